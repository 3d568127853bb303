"""How many upload is read from a table; who uploads is ranked by how fast its upload is."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from emutune.policies.base import policy_pytree
from emutune.policies.search import Point, ascend, levels_of, mean_return, patiences_s, scorer
from emutune.scenario import Scenario
from emutune.step import Plan, Situation, at_server, plan_of_wish, possible_case, possible_levels
from emutune.step.models import look_up
from emutune.step.options import every_level, whole_training_s
from emutune.world import World, cached_retention

# In larger fleets the count of uploaders is searched as a share of those who wait.
_TABLE_UES = 16
_SHARES = (0.0, 0.2, 0.35, 0.5, 0.65, 0.8, 1.0)


@policy_pytree
@dataclass(frozen=True)
class CountTable:
    """UEs that hold a usable emulator use it. Of the others, those with the fastest uploads upload.

    The rest download the largest emulators that arrive before the uploads do. Where training takes time,
    UEs that would train too long even with the smallest retention always upload, those that would with what
    they hold count among the others, the fastest are those that an upload saves most seconds, and what
    arrives must also be trained with in time.

    Attributes:
        uploads: how many upload, by the number of UEs without a usable emulator.
        retention: smallest and largest retention that is downloaded.
        patience_s: how long training with a held emulator may take; without limit if not given, as where training
            takes no time.
    """

    uploads: Int[Array, "counts"]
    retention: Float[Array, "2"]
    patience_s: Float[Array, ""] | float = float("inf")

    def decide(self, world: World, situation: Situation, key: Key[Array, ""]) -> Plan:
        """See ``Policy.decide``."""
        if situation.complexity.ndim > 1:
            return jax.vmap(lambda one: self.decide(world, one, key))(situation)
        rules, (low, high) = world.rules, self.retention
        held, whole_s = cached_retention(world, situation), whole_training_s(rules, situation)
        may = possible_case(rules, situation, jnp.ones(held.shape, bool))
        usable = (held > 0) & (whole_s * held <= self.patience_s)
        hopeless = may & (whole_s * low > self.patience_s)
        waits = ~usable & ~hopeless & situation.active
        waiting = jnp.sum(waits)
        uploads = jnp.minimum(self.uploads[waiting], waiting)
        sharers = jnp.maximum(uploads + jnp.sum(hopeless), 1).astype(jnp.float32)
        away = at_server(rules, situation, sharers)
        together_s = away.upload_s + away.training_s
        rank = jnp.argsort(jnp.argsort(jnp.where(waits & may, together_s - low * whole_s, jnp.inf)))
        there = hopeless | (waits & may & (rank < uploads))
        slowest_s = jnp.max(jnp.where(there, together_s, 0.0))
        limit_s = jnp.where(uploads > 0, slowest_s, jnp.inf)
        local = every_level(rules, situation)
        takes_s = local.download_s * (waiting - uploads)
        if rules.trains_in_time:
            takes_s, limit_s = takes_s + local.training_s, jnp.maximum(slowest_s, self.patience_s)
        layers = jnp.arange(rules.models.most + 1)[:, None]
        fewest, most = possible_levels(rules, situation)
        retention = layers / look_up(rules.models.layers, situation.family)
        fits = (takes_s <= limit_s) & (layers >= fewest) & (layers <= most) & (retention <= high + 1e-6)
        wanted = jnp.maximum(jnp.where(fits, retention, 0.0).max(0), low)
        return plan_of_wish(rules, situation, there, jnp.where(usable, held, wanted))


def search_count_table(scenario: Scenario) -> CountTable:
    """The best counts, retention limits and patience of ``CountTable``."""
    ues = scenario.fleet.ues
    levels, patience = levels_of(scenario), patiences_s(scenario)
    grids = (levels, levels, *([patience] if patience else []))

    def table(uploads: Array, low: Array, high: Array, *patience_s: Array) -> CountTable:
        return CountTable(uploads, jnp.stack([jnp.minimum(low, high), high]), *patience_s)

    compiled = scorer(scenario, mean_return(lambda world, *candidate: table(*candidate)))
    begins: list[Point] = [(levels[0], levels[-1], limit) for limit in patience[len(patience) // 3 :: 3]]
    candidates = []
    for share, begin in itertools.product(_SHARES, begins or [(levels[0], levels[-1])]):
        counts = np.round(share * np.arange(ues + 1))
        candidates.append((counts, ascend(partial(compiled, _uploads(counts)), begin, grids)))
    if len(candidates) > len(_SHARES):
        # Refining takes longest: the more promising half of them, or less.
        candidates.sort(key=lambda one: compiled(_uploads(one[0]), *one[1]), reverse=True)
        del candidates[len(_SHARES) :]
    # Several beginnings: the counts of one table hold each other in place.
    if ues <= _TABLE_UES:
        candidates = [_refine_table(compiled, *candidate, grids) for candidate in candidates]
    counts, limits = max(candidates, key=lambda one: compiled(_uploads(one[0]), *one[1]))
    return table(_uploads(counts), *(jnp.float32(limit) for limit in limits))


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
        moved = ascend(partial(compiled, _uploads(uploads)), limits, grids)
        if moved != limits:
            limits, improved = moved, True
            best = compiled(_uploads(uploads), *limits)
    return uploads, limits


def _uploads(counts: Float[np.ndarray, "counts"]) -> Array:
    return jnp.asarray(np.round(counts), jnp.int32)
