"""How parameters of policies that need no learning are found: each scenario's best ones, on a grid.

Every candidate meets the same episodes, which are neither held out nor trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from emutune.policies.base import Policy
from emutune.policies.measure import draw_episodes, run_episodes
from emutune.scenario import Scenario
from emutune.world import Episode, World, build_world

# Episodes share no key with training (seeds 0, 1, ...) nor with those held out.
SEARCH_STREAM = 0x5EA2C400
EPISODES = 48
# Limits on the seconds of a UE's training that are tried, over the decades that its speed spreads over.
_PATIENCES = 12

Point = tuple[float, ...]


def levels_of(scenario: Scenario) -> Point:
    """Every retention that an emulator of some family may have."""
    return tuple(
        sorted({layers / one.layers for one in scenario.models for layers in range(one.fewest, one.most + 1)})
    )


def patiences_s(scenario: Scenario) -> Point:
    """How long training on a UE may be let take, from hardly any to any; nothing where it takes no time."""
    world = build_world(scenario)
    if not world.rules.trains_in_time:
        return ()
    tflop = np.asarray(world.rules.models.whole_tflop_per_bit)[:, None] * np.asarray(world.data_bits)
    slowest, fastest = np.asarray(world.devices.tflops.bounds, np.float64)
    shortest, longest = levels_of(scenario)[0] * tflop.min() / fastest, tflop.max() / slowest
    return tuple(np.geomspace(shortest, longest * 1.001, _PATIENCES).tolist())


def mean_return(make: Callable[..., Policy]) -> Callable[..., Array]:
    """What ``make(world, *candidate)`` returns on average, as a function of world, episodes and candidate."""

    def score(world: World, drawn: Episode, *candidate: Array) -> Array:
        return run_episodes(world, make(world, *candidate), drawn).episode_return.mean()

    return score


def scorer(
    scenario: Scenario, score: Callable[..., Array], most: int = EPISODES, world: World | None = None
) -> Callable[..., float]:
    """The mean return of candidates, compiled once for all of them and for every call with the same score."""
    world = build_world(scenario) if world is None else world
    episodes = max(4, min(most, 600 // scenario.fleet.ues))
    drawn = draw_episodes(world, SEARCH_STREAM, episodes)
    compiled = jax.jit(score)

    def measure(*candidate: object) -> float:
        parts = [jnp.float32(part) if isinstance(part, float) else part for part in candidate]
        return float(compiled(world, drawn, *parts))

    return measure


def ascend(score: Callable[..., float], start: Point, grids: Iterable[Point]) -> Point:
    """One coordinate after another to its best value on its grid, until none moves (at most three rounds)."""
    point, grids = tuple(float(value) for value in start), tuple(grids)
    known: dict[Point, float] = {}

    def value(candidate: Point) -> float:
        if candidate not in known:
            known[candidate] = score(*candidate)
        return known[candidate]

    for _ in range(3):
        before = point
        for axis, grid in enumerate(grids):
            options = [(*point[:axis], float(value), *point[axis + 1 :]) for value in grid]
            point = max([point, *options], key=value)
        if point == before:
            break
    return point
