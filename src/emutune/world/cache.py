"""What each UE carries from one step to the next: its emulators, and what it has spent."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from emutune.world.families import FamilyTables
from emutune.world.parameters import World


class Shelf(NamedTuple):
    """The emulators of a UE that caches several: one of each family at most.

    Attributes:
        layers: of the emulator of each family; 0 for none.
        age: how many families were used since this one was; those never used come last. Means nothing where
            nothing is held.
    """

    layers: Int[Array, "*batch ues families"]
    age: Int[Array, "*batch ues families"]


class Cache(NamedTuple):
    """What each UE carries from one step to the next.

    That is the emulator that it used last: its layers (0: none, D10), and its family if there are several. Where
    a UE caches several, ``shelf`` holds all of them, that one included; else it is None. Where there is a budget
    of energy it is also the energy that was spent.
    """

    layers: Int[Array, "*batch ues"]
    family: Int[Array, "*batch ues"] | None = None
    spent_j: Float[Array, "*batch ues"] | None = None
    shelf: Shelf | None = None


def empty_cache(world: World) -> Cache:
    """No UE holds an emulator (D10), and none has spent anything."""
    nothing = jnp.zeros(world.ues, jnp.int32)
    energy = world.devices.energy
    has_budget = energy is not None and energy.budget_j is not None
    return Cache(
        nothing,
        None if world.families is None else nothing,
        jnp.zeros(world.ues) if has_budget else None,
        _empty_shelf(world),
    )


def usable_layers(cache: Cache, family: Int[Array, "*batch ues"] | None) -> Int[Array, "*batch ues"]:
    """Layers of the emulator that each UE holds for its task's family; 0 if it holds none of that family."""
    if cache.family is None or family is None:
        return cache.layers
    if cache.shelf is not None:
        return jnp.take_along_axis(cache.shelf.layers, family[..., None], axis=-1)[..., 0]
    return jnp.where(cache.family == family, cache.layers, 0)


def updated_cache(
    world: World,
    cache: Cache,
    family: Int[Array, "*batch ues"] | None,
    layers: Int[Array, "*batch ues"],
    keeps: Bool[Array, "*batch ues"],
) -> Cache:
    """Training on a UE leaves its emulator in the cache; UEs that keep theirs train elsewhere or not at all."""
    after = jnp.where(keeps, cache.layers, layers)
    if cache.family is None or family is None:
        return Cache(after, None, cache.spent_j)
    shelf = cache.shelf
    if shelf is not None and world.families is not None:
        used = put_on_shelf(world.families, shelf, family, layers)
        shelf = Shelf(*(jnp.where(keeps[..., None], *parts) for parts in zip(shelf, used, strict=True)))
    return Cache(after, jnp.where(keeps, cache.family, family), cache.spent_j, shelf)


def put_on_shelf(
    tables: FamilyTables,
    shelf: Shelf,
    family: Int[Array, "*#batch ues"],
    layers: Int[Array, "*#batch ues"],
) -> Shelf:
    """A family's emulator takes the place of the one before and is the one used last.

    Those used least recently go, one after another, until the rest fit.
    """
    every = jnp.arange(shelf.layers.shape[-1])
    own = every == family[..., None]
    age = jnp.sum(jnp.where(own, shelf.age, 0), axis=-1, keepdims=True)
    age = jnp.where(own, 0, shelf.age + (shelf.age < age))
    held = jnp.where(own, layers[..., None], shelf.layers)
    return Shelf(jnp.where(_fits(tables, held, age), held, 0), age)


def _fits(
    tables: FamilyTables, layers: Int[Array, "*batch families"], age: Int[Array, "*batch families"]
) -> Bool[Array, "*batch families"]:
    """Whether each emulator fits with all that were used later."""
    assert tables.cache_bits is not None
    later = age[..., None, :] <= age[..., :, None]
    bits = layers * (tables.model_bits / tables.model_layers)
    together = jnp.sum(jnp.where(later, bits[..., None, :], 0.0), axis=-1)
    # What fills the cache fits: the guard absorbs the rounding of sizes and sums.
    return together <= tables.cache_bits * (1 + 1e-6)


def _empty_shelf(world: World) -> Shelf | None:
    if world.families is None or world.families.cache_bits is None:
        return None
    count = world.families.model_bits.shape[0]
    order = jnp.broadcast_to(jnp.arange(count, dtype=jnp.int32), (world.ues, count))
    return Shelf(jnp.zeros_like(order), order)
