"""What a UE can do at all: every wish is brought to the nearest thing that is possible.

The simulator, every policy and the bounds ask here, so that they mean the same.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from emutune.world.devices import Device
from emutune.world.parameters import World, bits_of, layers_of, levels_of


def possible_levels(
    world: World, family: Int[Array, "*batch ues"] | None, device: Device
) -> tuple[Int[Array, "..."], Int[Array, "..."]]:
    """Fewest and most layers of an emulator that a UE can hold for its task's family.

    The most is less than the fewest where not even the smallest emulator fits.
    """
    low, high = levels_of(world, family)
    if device.memory_bits is None:
        return low, high
    layer_bits = bits_of(world, family) / layers_of(world, family)
    # An emulator that fills the memory fits: the guard absorbs the rounding of both sizes.
    fitting = jnp.floor(device.memory_bits / layer_bits * (1 + 1e-6))
    return low, jnp.minimum(high, jnp.minimum(fitting, 1e9).astype(jnp.int32))


def possible_case(
    world: World,
    family: Int[Array, "*batch ues"] | None,
    device: Device,
    active: Bool[Array, "*batch ues"] | None,
    at_server: Bool[Array, "*batch ues"],
) -> Bool[Array, "*batch ues"]:
    """Which UEs train at the server after all.

    Data that may not leave are trained on where they are; where no emulator fits, the server trains; a UE
    without a task does neither.
    """
    if device.private is not None:
        at_server = at_server & ~device.private
    if device.memory_bits is not None:
        low, high = possible_levels(world, family, device)
        at_server = at_server | (high < low)
    return at_server if active is None else at_server & active


def trains_locally(
    active: Bool[Array, "*batch ues"] | None, at_server: Bool[Array, "*batch ues"]
) -> Bool[Array, "*batch ues"]:
    """Which UEs train on their own, of possible cases."""
    return ~at_server if active is None else active & ~at_server


def chooses_case(
    world: World,
    family: Int[Array, "*batch ues"] | None,
    device: Device,
    active: Bool[Array, "*batch ues"] | None,
) -> Bool[Array, "*batch ues"] | None:
    """Where either case is possible; None if everywhere."""
    if device.private is None and device.memory_bits is None and active is None:
        return None
    shape = next(part for part in (*device, active) if part is not None).shape
    yes, no = (possible_case(world, family, device, active, jnp.full(shape, wish)) for wish in (True, False))
    return yes & ~no


def mean_over_tasks(
    active: Bool[Array, "*batch ues"] | None, values: Float[Array, "*batch ues"]
) -> Float[Array, "*batch"]:
    """Mean over the UEs that have a task; 0 if none has."""
    if active is None:
        return jnp.mean(values, axis=-1)
    return jnp.sum(jnp.where(active, values, 0.0), axis=-1) / task_count(values.shape[-1], active)


def task_count(ues: int, active: Bool[Array, "*batch ues"] | None) -> int | Int[Array, "*batch"]:
    """How many UEs have a task, but at least 1, since it is what sums over tasks are divided by."""
    return ues if active is None else jnp.maximum(jnp.sum(active, axis=-1), 1)
