"""Bounds on the return of every policy, for a batch of the simulator's episodes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Float

from emutune.bounds.costs import episode_costs
from emutune.bounds.prices import price_bound
from emutune.bounds.programme import Method, cost_bound
from emutune.errors import UsageError
from emutune.scenario import Scenario
from emutune.world import Episode

# Tasks times UEs times emulators: 64 UEs of the world of three families already take more than a minute.
_LARGEST_LINEAR = 100_000


def certified_bounds(
    scenario: Scenario,
    episodes: Episode,
    *,
    method: Method | None = None,
    time_limit_s: float = 60.0,
    progress: Callable[[int], None] | None = None,
) -> Float[np.ndarray, "episodes"]:
    """Upper bounds on the return of any policy, one per episode (negative numbers).

    Args:
        scenario: the world the episodes were drawn in.
        episodes: a batch of episodes, leading axis the episodes.
        method: ``"linear"``; tighter and slower, ``"integer"``; within some hundredths of a percent of linear
            and far faster in large fleets, ``"prices"``. Linear if not given, and prices where the linear
            programme would take minutes.
        time_limit_s: limit of each integer programme, in seconds.
        progress: called with 1 after each episode.

    Raises:
        UsageError: the method does not exist.
        BoundError: the solver failed.
    """
    if method not in ("linear", "integer", "prices", None):
        raise UsageError(f"method: must be 'linear', 'integer' or 'prices', got {method!r}")
    bounds = []
    for costs in episode_costs(scenario, episodes):
        chosen = method or ("linear" if costs.local_cost.size <= _LARGEST_LINEAR else "prices")
        bounds.append(
            -(price_bound(costs) if chosen == "prices" else cost_bound(costs, chosen, time_limit_s))
        )
        if progress is not None:
            progress(1)
    return np.array(bounds)
