"""Policies that need no learning but have parameters: each scenario's best ones, found by search.

Every candidate meets the same episodes, which are neither held out nor trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from emutune.policies import CountTable, Hold, Lookahead, plan_lookahead
from emutune.scenario import Scenario
from emutune.study.evaluate import SEARCH_KEY, draw_episodes, run_episodes
from emutune.world import Episode, World, build_world

_EPISODES = 48
# In larger fleets the count of uploaders is searched as a share of those who wait.
_TABLE_UES = 16
_SHARES = (0.0, 0.2, 0.35, 0.5, 0.65, 0.8, 1.0)

Point = tuple[float, ...]


def search_hold(scenario: Scenario) -> Hold:
    """The best coin and retention of ``Hold``."""

    def score(world: World, drawn: Episode, share: Array, retention: Array) -> Array:
        return run_episodes(world, Hold(share, retention), drawn)[0].mean()

    shares = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    best = _descend(_scorer(scenario, score), (0.5, _levels(scenario)[-1]), (shares, _levels(scenario)))
    return Hold(*(jnp.float32(value) for value in best))


def search_lookahead(scenario: Scenario) -> Lookahead:
    """The best prices of ``Lookahead``."""

    def plan(world: World, upload_price: Array, download_price: Array) -> Lookahead:
        return plan_lookahead(scenario, world, upload_price, download_price)

    def score(world: World, drawn: Episode, *prices: Array) -> Array:
        return run_episodes(world, plan(world, *prices), drawn)[0].mean()

    grid = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2)
    best = _descend(_scorer(scenario, score), (0.5, 0.5), (grid[2:], grid))
    return jax.jit(plan)(build_world(scenario), *(jnp.float32(price) for price in best))


def search_count_table(scenario: Scenario) -> CountTable:
    """The best counts and retention limits of ``CountTable``."""
    ues = scenario.fleet.ues
    most = max(model.most for model in scenario.models)
    levels = _levels(scenario)

    def table(uploads: Array, low: Array, high: Array) -> CountTable:
        return CountTable(most, uploads, jnp.stack([jnp.minimum(low, high), high]))

    def score(world: World, drawn: Episode, uploads: Array, low: Array, high: Array) -> Array:
        return run_episodes(world, table(uploads, low, high), drawn)[0].mean()

    compiled = _scorer(scenario, score)
    candidates = []
    for share in _SHARES:
        counts = np.round(share * np.arange(ues + 1))
        low, high = _descend(partial(compiled, _uploads(counts)), (levels[0], levels[-1]), (levels, levels))
        candidates.append((counts, low, high))
    if ues <= _TABLE_UES:
        # Several beginnings: the counts of one table hold each other in place.
        candidates = [_refine_table(compiled, *candidate, levels) for candidate in candidates]
    counts, low, high = max(candidates, key=lambda one: compiled(_uploads(one[0]), *one[1:]))
    return table(_uploads(counts), jnp.float32(low), jnp.float32(high))


def _refine_table(
    compiled: Callable[..., float], uploads: np.ndarray, low: float, high: float, levels: Point
) -> tuple[np.ndarray, float, float]:
    """Counts moved by one at a time, and limits, for as long as that helps."""
    best = compiled(_uploads(uploads), low, high)
    improved = True
    while improved:
        improved = False
        for waiting in range(1, len(uploads)):
            for count in (uploads[waiting] - 1, uploads[waiting] + 1):
                trial = uploads.copy()
                trial[waiting] = count
                if 0 <= count <= waiting and (value := compiled(_uploads(trial), low, high)) > best:
                    best, uploads, improved = value, trial, True
        moved = _descend(partial(compiled, _uploads(uploads)), (low, high), (levels, levels))
        if moved != (low, high):
            (low, high), improved = moved, True
            best = compiled(_uploads(uploads), low, high)
    return uploads, low, high


def _uploads(counts: Float[np.ndarray, "counts"]) -> Array:
    return jnp.asarray(np.round(counts), jnp.int32)


def _levels(scenario: Scenario) -> Point:
    """Every retention that an emulator of some family may have."""
    return tuple(
        sorted({layers / one.layers for one in scenario.models for layers in range(one.fewest, one.most + 1)})
    )


def _scorer(scenario: Scenario, score: Callable[..., Array]) -> Callable[..., float]:
    """The mean return of candidates, compiled once for all of them."""
    world = build_world(scenario)
    episodes = max(4, min(_EPISODES, 600 // scenario.fleet.ues))
    drawn = draw_episodes(world, SEARCH_KEY, episodes)
    compiled = jax.jit(score)

    def measure(*candidate: object) -> float:
        parts = [jnp.float32(part) if isinstance(part, float) else part for part in candidate]
        return float(compiled(world, drawn, *parts))

    return measure


def _descend(score: Callable[..., float], start: Point, grids: Iterable[Point]) -> Point:
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
