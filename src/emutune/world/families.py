"""Several foundation models: what differs between families, and which family each task is of."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from emutune.scenario import Curve, Scenario


class FamilyTables(NamedTuple):
    """The numbers of each family, and how likely a UE's next task is of the same one.

    ``knots`` holds the measured curves, padded beyond retention 1 to one length. ``cache_bits`` is what a UE
    can keep of emulators; None where it keeps one.
    """

    persistence: Float[Array, ""]
    model_bits: Float[Array, "families"]
    model_layers: Int[Array, "families"]
    level_bounds: Int[Array, "families 2"]
    curve: Float[Array, "families 3"]
    measured: Bool[Array, "families"]
    knots: Float[Array, "families 2 knots"]
    cache_bits: Float[Array, ""] | None = None


def build_families(scenario: Scenario) -> FamilyTables | None:
    """The tables of a scenario; None if it has one family."""
    if scenario.families is None:
        return None
    models, cache_gb = scenario.models, scenario.families.cache_gb
    curves = [model.curve for model in models]
    length = max(len(curve.knots) for curve in curves)
    return FamilyTables(
        persistence=jnp.asarray(scenario.families.persistence, jnp.float32),
        model_bits=jnp.asarray([8e9 * model.size_gb for model in models], jnp.float32),
        model_layers=jnp.asarray([model.layers for model in models], jnp.int32),
        level_bounds=jnp.asarray([(model.fewest, model.most) for model in models], jnp.int32),
        curve=jnp.asarray([(one.quadratic, one.linear, one.constant) for one in curves], jnp.float32),
        measured=jnp.asarray([bool(curve.knots) for curve in curves]),
        knots=jnp.asarray(np.stack([_padded(curve, length) for curve in curves]), jnp.float32),
        cache_bits=None if cache_gb is None else jnp.asarray(8e9 * cache_gb, jnp.float32),
    )


def draw_families(
    key: Key[Array, ""], tables: FamilyTables, tasks: int, ues: int
) -> Int[Array, "{tasks} {ues}"]:
    """The family of every task: a Markov chain for each UE, uniform at first."""
    anew_key, family_key = jax.random.split(key)
    drawn = jax.random.randint(family_key, (tasks, ues), 0, tables.model_bits.shape[0])
    anew = ~jax.random.bernoulli(anew_key, tables.persistence, (tasks, ues))
    rows = jnp.arange(tasks)[:, None]
    # The row of the latest fresh draw; the first row always is one.
    latest = jax.lax.cummax(jnp.where(anew, rows, 0), axis=0)
    return jnp.take_along_axis(drawn, latest, axis=0)


def _padded(curve: Curve, length: int) -> Float[np.ndarray, "2 knots"]:
    """Knots as two rows; beyond the last one the curve stays level."""
    missing = length - len(curve.knots)
    level = curve.knots[-1][1] if curve.knots else 0.0
    return np.array([*curve.knots, *((2.0 + index, level) for index in range(missing))]).reshape(-1, 2).T
