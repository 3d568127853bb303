"""What a UE holds: emulators of several families, of which the least recently used make room.

A UE that caches one emulator is one that caches several without spare room: whatever it takes up next, the rest goes.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from emutune.step.models import Models
from emutune.step.rules import Rules
from emutune.step.situation import Situation


def usable_layers(situation: Situation) -> Int[Array, "*batch ues"]:
    """Layers of the emulator that each UE holds for its task's family; 0 if it holds none of that family."""
    held = situation.held
    if held.shape[-1] == 1:
        return held[..., 0]
    return jnp.take_along_axis(held, situation.family[..., None], axis=-1)[..., 0]


def other_layers(situation: Situation) -> Int[Array, "*batch ues families"]:
    """What each UE holds of other families than its task's."""
    every = jnp.arange(situation.held.shape[-1])
    return jnp.where(every == situation.family[..., None], 0, situation.held)


def empty_cache(rules: Rules, ues: int) -> tuple[Int[Array, "{ues} families"], Int[Array, "{ues} families"]]:
    """``held`` and ``age`` of UEs that hold nothing (D10)."""
    order = jnp.broadcast_to(jnp.arange(rules.models.families, dtype=jnp.int32), (ues, rules.models.families))
    return jnp.zeros_like(order), order


def put_in_cache(
    rules: Rules,
    held: Int[Array, "*#batch families"],
    age: Int[Array, "*#batch families"],
    family: Int[Array, "*#batch"],
    layers: Int[Array, "*#batch"],
) -> tuple[Int[Array, "*batch families"], Int[Array, "*batch families"]]:
    """``held`` and ``age`` once an emulator is taken up; where its layers are 0 nothing changes."""
    taken = (layers > 0)[..., None]
    every = jnp.arange(held.shape[-1])
    own = every == family[..., None]
    if not rules.several:
        return jnp.where(taken, jnp.where(own, layers[..., None], 0), held), age
    older = jnp.sum(jnp.where(own, age, 0), axis=-1, keepdims=True)
    now = jnp.where(own, 0, age + (age < older))
    wanted = jnp.where(own, layers[..., None], held)
    kept = jnp.where(_fits(rules.models, rules.cache_bits, wanted, now), wanted, 0)
    return jnp.where(taken, kept, held), jnp.where(taken, now, age)


def cache_share(rules: Rules, held: Int[Array, "*batch families"]) -> Float[Array, "*batch"]:
    """How much of a cache of several is in use, from 0 to 1."""
    return jnp.sum(_held_bits(rules.models, held), axis=-1) / rules.cache_bits


def _held_bits(models: Models, held: Int[Array, "*batch families"]) -> Float[Array, "*batch families"]:
    return models.bits[jnp.arange(models.families), held]


def _fits(
    models: Models, cache_bits: Float[Array, ""], held: Int[Array, "*batch families"], age: Int[Array, "..."]
) -> Bool[Array, "*batch families"]:
    """Whether each emulator fits with all that were used later."""
    later = age[..., None, :] <= age[..., :, None]
    together = jnp.sum(jnp.where(later, _held_bits(models, held)[..., None, :], 0.0), axis=-1)
    # What fills the cache fits: the guard absorbs the rounding of sizes and sums.
    return together <= cache_bits * (1 + 1e-6)
