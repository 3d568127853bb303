"""The policies that need no training, by name: one line each."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from emutune.errors import UsageError
from emutune.policies.base import Policy
from emutune.policies.count_table import search_count_table
from emutune.policies.fixed import AllServer, fixed_at, search_best_fixed
from emutune.policies.hold import search_hold
from emutune.policies.horizon import search_horizon
from emutune.policies.lookahead import search_lookahead
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


def baseline_policy(name: str, scenario: Scenario, retention: float | None = None) -> Policy:
    """A policy that needs no training.

    Args:
        name: of one of ``RULES``.
        scenario: the world it decides in.
        retention: of ``fixed``; the largest allowed if not given.

    Raises:
        UsageError: the name is unknown, or the retention outside the scenario's bounds.
    """
    if name not in _BY_NAME:
        raise UsageError(
            f"policy: no policy {name!r} that needs no training; choose from {', '.join(_BY_NAME)}"
        )
    if name == "fixed":
        return fixed_at(scenario, retention)
    return _BY_NAME[name].find(scenario)
