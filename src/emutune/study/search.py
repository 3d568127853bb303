"""Policies that need no learning but have parameters: each scenario's best ones, found by search.

Every candidate meets the same episodes, which are neither held out nor trained on.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from emutune.errors import UsageError
from emutune.policies import CountTable, Hold, Horizon, LaterPrices, Lookahead, plan_horizon, plan_lookahead
from emutune.scenario import Scenario
from emutune.study.evaluate import SEARCH_KEY, draw_episodes, run_episodes
from emutune.world import Episode, World, build_world

_EPISODES, _FEWER_EPISODES = 48, 16
# In larger fleets the count of uploaders is searched as a share of those who wait.
_TABLE_UES = 16
_SHARES = (0.0, 0.2, 0.35, 0.5, 0.65, 0.8, 1.0)

# Of keeping an emulator through a step, as shares of what sending it costs.
_RENTS = (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5)

# Limits on the seconds of a UE's training that are tried, over the decades that its speed spreads over.
_PATIENCES = 12

Point = tuple[float, ...]


def search_hold(scenario: Scenario) -> Hold:
    """The best coin, retention and patience of ``Hold``."""

    def score(world: World, drawn: Episode, *point: Array) -> Array:
        return run_episodes(world, Hold(*point), drawn)[0].mean()

    shares = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    levels, patience = _levels(scenario), _patience_s(scenario)
    grids = (shares, levels, *([patience] if patience else []))
    scorer = _scorer(scenario, score)
    # From several limits: between letting the fast train and letting everybody there is a valley.
    begins: list[Point] = [(0.5, levels[-1], limit) for limit in patience[len(patience) // 2 :: 3]]
    begins = begins or [(0.5, levels[-1])]
    best = max((_descend(scorer, begin, grids) for begin in begins), key=lambda point: scorer(*point))
    return Hold(*(jnp.float32(value) for value in best))


def search_lookahead(scenario: Scenario) -> Lookahead:
    """The best prices of ``Lookahead``."""
    return _planner(scenario)(build_world(scenario), *_later_prices(scenario))


def search_horizon(scenario: Scenario) -> Horizon:
    """``Horizon`` with the best prices of ``Lookahead`` beyond it.

    Raises:
        UsageError: UEs cache several emulators.
    """
    if scenario.families and scenario.families.cache_gb is not None:
        raise UsageError(
            "horizon: its programme knows caches of one emulator only, and families.cache_gb lets a UE cache several; "
            "use lookahead, or leave families.cache_gb out"
        )
    return plan_horizon(scenario, build_world(scenario), _later_prices(scenario))


def search_lookaheads(scenario: Scenario, worlds: Sequence[World], episodes: int) -> list[Lookahead]:
    """The best prices in each of some worlds that differ from the scenario's in no shape, compiled once."""
    plan = _planner(scenario)
    found = _search_prices(scenario, worlds, episodes)
    return [plan(world, *prices) for world, prices in zip(worlds, found, strict=True)]


def _later_prices(scenario: Scenario) -> LaterPrices:
    # Joint choices take a while where devices differ, and returns change smoothly with prices.
    episodes = _FEWER_EPISODES if scenario.has_devices else _EPISODES
    return _search_prices(scenario, [build_world(scenario)], episodes)[0]


def _planner(scenario: Scenario) -> Callable[..., Lookahead]:
    return jax.jit(lambda world, *prices: plan_lookahead(scenario, world, LaterPrices(*prices)))


def _search_prices(scenario: Scenario, worlds: Iterable[World], episodes: int) -> list[LaterPrices]:
    begins, grids = _price_grids(scenario)

    def prices_of(point: Sequence[Any]) -> LaterPrices:
        return LaterPrices(**dict(zip(grids, point, strict=True)))

    def score(world: World, drawn: Episode, *point: Array) -> Array:
        return run_episodes(world, plan_lookahead(scenario, world, prices_of(point)), drawn)[0].mean()

    found = []
    for world in worlds:
        scorer = _scorer(scenario, score, episodes, world)
        ends = [_descend(scorer, begin, grids.values()) for begin in begins]
        best = max(ends, key=lambda point: scorer(*point)) if len(ends) > 1 else ends[0]
        found.append(prices_of([jnp.float32(price) for price in best]))
    return found


def _price_grids(scenario: Scenario) -> tuple[list[Point], dict[str, Point]]:
    """Where searches of prices begin, and the values of each of ``LaterPrices`` that they try."""
    grid = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2)
    coarse = (0.1, 0.25, 0.5, 0.75, 1.0, 1.5)
    start: Point = (0.5, 0.5)
    grids: dict[str, Point] = {"upload": grid[2:], "download": grid}
    backgrounds = _patience_s(scenario)
    if backgrounds:
        start = (*start, backgrounds[len(backgrounds) // 2])
        grids = {"upload": coarse, "download": coarse, "background_s": (0.0, *backgrounds[:-1])}
    if scenario.families is None or scenario.families.cache_gb is None:
        return [start], grids
    # Rents and the price of downloads make up for each other: from one beginning the search stays near it.
    return [(*start, rent) for rent in _RENTS[2:7:2]], {**grids, "rent": _RENTS}


def search_count_table(scenario: Scenario) -> CountTable:
    """The best counts, retention limits and patience of ``CountTable``."""
    ues = scenario.fleet.ues
    most = max(model.most for model in scenario.models)
    levels, patience = _levels(scenario), _patience_s(scenario)
    grids = (levels, levels, *([patience] if patience else []))

    def table(uploads: Array, low: Array, high: Array, *patience_s: Array) -> CountTable:
        return CountTable(most, uploads, jnp.stack([jnp.minimum(low, high), high]), *patience_s)

    def score(world: World, drawn: Episode, uploads: Array, *limits: Array) -> Array:
        return run_episodes(world, table(uploads, *limits), drawn)[0].mean()

    compiled = _scorer(scenario, score)
    begins: list[Point] = [(levels[0], levels[-1], limit) for limit in patience[len(patience) // 3 :: 3]]
    candidates = []
    for share, begin in itertools.product(_SHARES, begins or [(levels[0], levels[-1])]):
        counts = np.round(share * np.arange(ues + 1))
        candidates.append((counts, _descend(partial(compiled, _uploads(counts)), begin, grids)))
    if len(candidates) > len(_SHARES):
        # Refining takes longest: the more promising half of them, or less.
        candidates.sort(key=lambda one: compiled(_uploads(one[0]), *one[1]), reverse=True)
        del candidates[len(_SHARES) :]
    # Several beginnings: the counts of one table hold each other in place.
    if ues <= _TABLE_UES:
        candidates = [_refine_table(compiled, *candidate, grids) for candidate in candidates]
    counts, limits = max(candidates, key=lambda one: compiled(_uploads(one[0]), *one[1]))
    return table(_uploads(counts), *(jnp.float32(limit) for limit in limits))


def _patience_s(scenario: Scenario) -> Point:
    """How long training on a UE may be let take, from hardly any to any; nothing where it takes no time."""
    world = build_world(scenario)
    table = world.devices.computation
    if table is None:
        return ()
    tflop = np.asarray(table.tflop_per_bit)[:, None] * np.asarray(world.data_bits)
    slowest, fastest = np.asarray(table.device_tflops.bounds, np.float64)
    shortest, longest = _levels(scenario)[0] * tflop.min() / fastest, tflop.max() / slowest
    return tuple(np.geomspace(shortest, longest * 1.001, _PATIENCES).tolist())


def _refine_table(
    compiled: Callable[..., float], uploads: np.ndarray, limits: Point, grids: tuple[Point, ...]
) -> tuple[np.ndarray, Point]:
    """Counts moved by one at a time, and limits, for as long as that helps."""
    best = compiled(_uploads(uploads), *limits)
    improved = True
    while improved:
        improved = False
        for waiting in range(1, len(uploads)):
            for count in (uploads[waiting] - 1, uploads[waiting] + 1):
                trial = uploads.copy()
                trial[waiting] = count
                if 0 <= count <= waiting and (value := compiled(_uploads(trial), *limits)) > best:
                    best, uploads, improved = value, trial, True
        moved = _descend(partial(compiled, _uploads(uploads)), limits, grids)
        if moved != limits:
            limits, improved = moved, True
            best = compiled(_uploads(uploads), *limits)
    return uploads, limits


def _uploads(counts: Float[np.ndarray, "counts"]) -> Array:
    return jnp.asarray(np.round(counts), jnp.int32)


def _levels(scenario: Scenario) -> Point:
    """Every retention that an emulator of some family may have."""
    return tuple(
        sorted({layers / one.layers for one in scenario.models for layers in range(one.fewest, one.most + 1)})
    )


def _scorer(
    scenario: Scenario, score: Callable[..., Array], most: int = _EPISODES, world: World | None = None
) -> Callable[..., float]:
    """The mean return of candidates, compiled once for all of them and for every call with the same score."""
    world = build_world(scenario) if world is None else world
    episodes = max(4, min(most, 600 // scenario.fleet.ues))
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
