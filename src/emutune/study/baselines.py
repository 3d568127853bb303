"""The policies that need no training, by name."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from emutune.errors import UsageError
from emutune.learning.configuration import Settings, TrainingConfig
from emutune.learning.slices import fixed_shares, slice_of
from emutune.policies import AllServer, Fixed, Policy, Random
from emutune.scenario import Scenario
from emutune.study.evaluate import search_best_fixed
from emutune.study.search import (
    search_count_table,
    search_hold,
    search_horizon,
    search_lookahead,
    search_lookaheads,
)
from emutune.world import build_world

# A decision takes a fifth of a second: for few episodes, and only if it is named.
SLOW = ("horizon",)
SIMPLE = ("random", "all_server", "fixed", "best_fixed")
BASELINES = (*SIMPLE, "hold", "count_table", "lookahead", "horizon")
# A teacher of a slice need only be about as good as it can be.
_TEACHERS_EPISODES = 8
_SEARCHED: dict[str, Callable[[Scenario], Policy]] = {
    "best_fixed": search_best_fixed,
    "hold": search_hold,
    "count_table": search_count_table,
    "lookahead": search_lookahead,
    "horizon": search_horizon,
}


def teacher_of(config: Settings, scenario: Scenario) -> Policy | None:
    """The policy that a training begins by imitating, if it does.

    Networks of any size of fleet have one for each of ``fixed_shares``, stacked along a first axis of its arrays.
    """
    if config.teacher == "none":
        return None
    if not isinstance(config, TrainingConfig) or config.network != "sized":
        return baseline_policy(config.teacher, scenario)
    world = build_world(scenario)
    slices = [slice_of(world, share) for share in fixed_shares(config, world)]
    each = search_lookaheads(scenario, slices, _TEACHERS_EPISODES)
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)


def baseline_policy(name: str, scenario: Scenario, retention: float | None = None) -> Policy:
    """A policy that needs no training.

    Args:
        name: one of ``BASELINES``.
        scenario: the world it decides in.
        retention: of ``fixed``; the largest allowed if not given.

    Raises:
        UsageError: the name is unknown, or the retention outside the scenario's bounds.
    """
    if name == "random":
        return Random()
    if name == "all_server":
        return AllServer()
    if name in _SEARCHED:
        return _SEARCHED[name](scenario)
    if name != "fixed":
        raise UsageError(
            f"policy: no policy {name!r} that needs no training; choose from {', '.join(BASELINES)}"
        )
    bounds = scenario.retention
    wanted = bounds.max if retention is None else retention
    if not bounds.min <= wanted <= bounds.max:
        raise UsageError(f"retention: must be between {bounds.min:g} and {bounds.max:g}, got {wanted:g}")
    return Fixed(jnp.asarray(wanted, jnp.float32))
