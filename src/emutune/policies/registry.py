"""The policies that need no training, by name: one line each, and those of one's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from emutune.errors import UsageError
from emutune.plugins import entry_names, is_named, load_entry, load_named
from emutune.policies.base import Policy
from emutune.policies.count_table import search_count_table
from emutune.policies.fixed import AllServer, fixed_at, search_best_fixed
from emutune.policies.hold import search_hold
from emutune.policies.horizon import search_horizon
from emutune.policies.lookahead import search_lookahead
from emutune.policies.own import policy_of
from emutune.policies.random import Random
from emutune.scenario import Scenario


class Rule(NamedTuple):
    """How a policy is found for a scenario.

    Attributes:
        name: by which it is asked for.
        find: the policy of a scenario, with the best parameters if it has any.
        plans: whether it plans for later tasks of other kinds, which not every scenario is a matter for.
        slow: whether a decision takes long, so that it serves few episodes, and only if it is named.
    """

    name: str
    find: Callable[[Scenario], Policy]
    plans: bool = True
    slow: bool = False


RULES = (
    Rule("random", lambda scenario: Random(), plans=False),
    Rule("all_server", lambda scenario: AllServer(), plans=False),
    Rule("fixed", fixed_at, plans=False),
    Rule("best_fixed", search_best_fixed, plans=False),
    Rule("hold", search_hold),
    Rule("count_table", search_count_table),
    Rule("lookahead", search_lookahead),
    Rule("horizon", search_horizon, slow=True),
)
_BY_NAME = {rule.name: rule for rule in RULES}
_REGISTERED: dict[str, Any] = {}


def register_policy(name: str, policy: Any) -> None:
    """Make a policy selectable by name in this process, or put another in the place of an earlier one.

    Args:
        name: by which it is asked for; not that of a rule.
        policy: a class, an object or a function; see ``policy_of``.

    Raises:
        UsageError: the name is a rule's, or holds what separates names.
    """
    if name in _BY_NAME or not name or set(name) & set(",:/"):
        raise UsageError(
            f"policy {name!r}: cannot be registered so; choose a name that no rule has, without comma, colon, slash"
        )
    _REGISTERED[name] = policy


def policy_names() -> list[str]:
    """Names of all policies that need no training: rules, those registered, and those of installed packages."""
    return list(dict.fromkeys([*_BY_NAME, *_REGISTERED, *entry_names("emutune.policies")]))


def find_policy(name: str) -> Any | None:
    """A policy of one's own, as it was registered, as a package offers it, or from ``file.py:name``; None for no such.

    Raises:
        UsageError: what the name stands for cannot be imported.
    """
    if name in _REGISTERED:
        return _REGISTERED[name]
    if is_named(name):
        return load_named(name)
    return load_entry("emutune.policies", name) if name in entry_names("emutune.policies") else None


def baseline_policy(name: str, scenario: Scenario, retention: float | None = None) -> Policy:
    """A policy that needs no training.

    Args:
        name: of a rule, of a policy of one's own, or where one is: ``module:name``, ``file.py:name``.
        scenario: the world it decides in.
        retention: of ``fixed``; the largest allowed if not given.

    Raises:
        UsageError: the name is unknown, what it stands for is no policy, or the retention is outside the scenario's
            bounds.
    """
    if name == "fixed":
        return fixed_at(scenario, retention)
    if name in _BY_NAME:
        return _BY_NAME[name].find(scenario)
    own = find_policy(name)
    if own is None:
        raise UsageError(
            f"policy: no policy {name!r} that needs no training; choose from {', '.join(policy_names())}, "
            "or name your own as file.py:Class"
        )
    return policy_of(own, name, scenario)
