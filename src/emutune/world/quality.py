"""Perplexity of a tuned task against retention and complexity (Eq. 9)."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from emutune.world.families import FamilyTables
from emutune.world.parameters import World


def curve_perplexity(
    world: World, retention: Float[Array, "*batch"], family: Int[Array, "*batch"] | None = None
) -> Float[Array, "*batch"]:
    """Perplexity f(E) of the reference task at a retention (sec. VI-A), or between measured knots."""
    if world.families is not None and family is not None:
        return _family_perplexity(world.families, retention, family)
    if world.curve_knots.shape[1]:
        measured: Array = jnp.interp(retention, *world.curve_knots)
        return measured
    quadratic, linear, constant = world.curve
    perplexity: Array = (quadratic * retention + linear) * retention + constant
    return perplexity


def complexity_factor(world: World, complexity: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """The factor g(c) by which complexity scales perplexity: rising, or as printed (D2)."""
    weight = world.complexity_weight
    return (complexity + weight) / jnp.where(world.complexity_as_printed, complexity, weight)


def task_perplexity(
    world: World,
    retention: Float[Array, "ues"],
    complexity: Float[Array, "ues"],
    at_server: Bool[Array, "ues"],
    family: Int[Array, "ues"] | None = None,
) -> Float[Array, "ues"]:
    """Perplexity of each UE's task: f(1) g(c) at the server, f(E) g(c) on the UE (Eq. 9, D12)."""
    effective = jnp.where(at_server, 1.0, retention)
    return curve_perplexity(world, effective, family) * complexity_factor(world, complexity)


def _family_perplexity(
    tables: FamilyTables, retention: Float[Array, "*batch"], family: Int[Array, "*batch"]
) -> Float[Array, "*batch"]:
    quadratic, linear, constant = jnp.moveaxis(tables.curve[family], -1, 0)
    fitted = (quadratic * retention + linear) * retention + constant
    if not tables.knots.shape[-1]:
        return fitted
    x, y = jnp.moveaxis(tables.knots[family], -2, 0)
    measured = jnp.vectorize(jnp.interp, signature="(),(k),(k)->()")(retention, x, y)
    return jnp.where(tables.measured[family], measured, fitted)
