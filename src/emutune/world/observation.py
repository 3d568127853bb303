"""What the agents see before they decide (sec. IV-A)."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from emutune.world.cache import Cache, usable_layers
from emutune.world.devices import ComputationTable, Device, SpreadTable, spread_quantile
from emutune.world.dynamics import State, Task, current_task
from emutune.world.families import FamilyTables
from emutune.world.parameters import World, layers_of
from emutune.world.possible import possible_levels
from emutune.world.quality import curve_perplexity
from emutune.world.radio import TIMING_ADVANCE_M, downlink_gain_bounds, gain_bounds
from emutune.world.spending import training_tflop


class Observation(NamedTuple):
    """The state s1 in physical units, and how far the episode is; any leading batch axes.

    The gain is that of the previous task: the gain during the coming one is not known yet. The cached
    retention is that of the emulator for the task's family, 0 if the UE holds none of that family. The
    transmit power is known to whoever plans the uplink but no part of s1, so networks do not take it.

    Attributes:
        family: family of each task; this and the next two are None in a world of one family.
        held_family: family of the emulator that each UE used last; means nothing where it holds none.
        held_retention: retention of that emulator, 0 for none.
        device: speed, power, memory and privacy of each UE, as far as the world has them.
        active: who has a task; None where everybody always has one. A UE without one still shows the family
            that its next tasks come from.
        spent_j: energy spent so far; None where there is no budget.
        previous_downlink_gain: None where both links have one gain.
        distance_m: of each UE, as its timing advance tells the base station; None where UEs do not move.
        approach_m: by how much it came nearer since the task before.
        held_retentions: retention of the emulator held of each family, 0 for none; this and the next are None
            where a UE holds no more than one.
        held_ages: how many families were used since each was (``Shelf``).
    """

    previous_gain: Float[Array, "*batch ues"]
    complexity: Float[Array, "*batch ues"]
    data_bits: Float[Array, "*batch ues"]
    cached_retention: Float[Array, "*batch ues"]
    progress: Float[Array, "*batch"]
    transmit_power_w: Float[Array, "*batch ues"]
    family: Int[Array, "*batch ues"] | None = None
    held_family: Int[Array, "*batch ues"] | None = None
    held_retention: Float[Array, "*batch ues"] | None = None
    device: Device = Device()
    active: Bool[Array, "*batch ues"] | None = None
    spent_j: Float[Array, "*batch ues"] | None = None
    previous_downlink_gain: Float[Array, "*batch ues"] | None = None
    distance_m: Float[Array, "*batch ues"] | None = None
    approach_m: Float[Array, "*batch ues"] | None = None
    held_retentions: Float[Array, "*batch ues families"] | None = None
    held_ages: Int[Array, "*batch ues families"] | None = None


def downlink_gain(observation: Observation) -> Float[Array, "*batch ues"]:
    """The gain of the downlink during the previous task."""
    if observation.previous_downlink_gain is None:
        return observation.previous_gain
    return observation.previous_downlink_gain


def other_retention(observation: Observation) -> Float[Array, "*batch ues"]:
    """The retention held of another family than the task's, the largest where there are several; 0 for none."""
    if observation.held_retentions is not None and observation.family is not None:
        own = jnp.arange(observation.held_retentions.shape[-1]) == observation.family[..., None]
        return jnp.max(jnp.where(own, 0.0, observation.held_retentions), axis=-1)
    if observation.held_retention is None:
        return jnp.zeros_like(observation.cached_retention)
    return jnp.where(observation.held_family == observation.family, 0.0, observation.held_retention)


def observe(world: World, state: State) -> Observation:
    """The observation of a state."""
    return observe_task(world, state.cache, current_task(state), state.step)


def observe_task(world: World, cache: Cache, task: Task, step: Int[Array, ""]) -> Observation:
    """The observation of caches and a waiting task; ``progress`` is step / tasks, from 0 to 1."""
    family, shelf = task.family, cache.shelf
    each = None if shelf is None else jnp.arange(shelf.layers.shape[-1])
    return Observation(
        previous_gain=task.previous_gain,
        complexity=task.complexity,
        data_bits=task.data_bits,
        cached_retention=usable_layers(cache, family) / layers_of(world, family),
        progress=step / world.tasks,
        transmit_power_w=task.transmit_power_w,
        family=family,
        held_family=cache.family,
        held_retention=None if cache.family is None else cache.layers / layers_of(world, cache.family),
        device=task.device,
        active=task.active,
        spent_j=cache.spent_j,
        previous_downlink_gain=task.previous_downlink_gain,
        distance_m=task.distance_m,
        approach_m=task.approach_m,
        held_retentions=None if shelf is None else shelf.layers / layers_of(world, each),
        held_ages=None if shelf is None else shelf.age,
    )


def ue_features(world: World, observation: Observation) -> Float[Array, "*batch ues features"]:
    """Features of each UE, about -1 to 1.

    In the order of s1 gain, complexity, data, cached retention. Then follows what the world has of: the
    retention of an emulator of another family, the largest where several are held; what share of the cache is
    full, where it holds several; the share of the energy budget that is left (below 0: what is
    spent beyond it, to -1); size of the task's family and its perplexity at the server, each as a share of
    the largest; the gain of the downlink, where that is another; the UE's distance and by how much it came
    nearer; its training speed, and how long this task would take it with the whole model; energy of an
    operation; the largest emulator that it can hold; whether it may upload; whether it has a task (without
    one its complexity and data read 0).
    """
    return join_features(task_features(world, observation), cache_features(world, observation))


def feature_bounds(world: World) -> list[tuple[float, float]]:
    """Lowest and highest value of each feature, up to rounding; fading leaves gains without any."""
    devices, energy = world.devices, world.devices.energy
    several = world.families is not None
    unlimited, signed, share = (-float("inf"), float("inf")), (-1.0, 1.0), (0.0, 1.0)
    return [
        *[unlimited, signed, signed, share],
        *[share] * several,
        *[share] * (world.families is not None and world.families.cache_bits is not None),
        *[signed] * (energy is not None and energy.budget_j is not None),
        *[share] * (2 * several),
        *[unlimited] * (world.trace is not None),
        *[signed] * (2 * (world.mobility is not None)),
        *[signed] * (2 * (devices.computation is not None)),
        *[signed] * (energy is not None and energy.compute_j_per_tflop is not None),
        *[share] * (devices.memory_bits is not None),
        *[signed] * (devices.private_ues is not None),
        *[signed] * (devices.task_probability is not None),
    ]


def feature_count(world: World) -> int:
    """Features of each UE."""
    return len(feature_bounds(world))


def task_features(world: World, observation: Observation) -> Float[Array, "*batch ues features"]:
    """The features that no action changes: gain, complexity, data, those of family, radio and device.

    Gains vary over decades, so they enter as logarithms, scaled by the path loss at the fleet's nearest
    and farthest distance and by fading up to three standard normal scores either way.
    """
    columns = [
        _centred(jnp.log(observation.previous_gain), jnp.log(gain_bounds(world))),
        _centred(observation.complexity, world.complexity),
        _centred(observation.data_bits, world.data_bits),
    ]
    if world.families is not None and observation.family is not None:
        columns += _family_columns(world, world.families, observation.family)
    columns += _radio_columns(world, observation)
    columns += _device_columns(world, observation)
    if observation.active is None:
        return jnp.stack(columns, axis=-1)
    # What is no task has no complexity and no data.
    columns[1:3] = [jnp.where(observation.active, column, 0.0) for column in columns[1:3]]
    return jnp.stack([*columns, jnp.where(observation.active, 1.0, -1.0)], axis=-1)


def cache_features(world: World, observation: Observation) -> Float[Array, "*batch ues features"]:
    """The features that actions change: the retention held for the task, what else is held, energy left."""
    columns = [cache_feature(world, observation.cached_retention)]
    if observation.held_retention is not None:
        columns.append(cache_feature(world, other_retention(observation)))
    if observation.held_retentions is not None:
        columns.append(_full_share(world, observation.held_retentions))
    energy = world.devices.energy
    if observation.spent_j is not None and energy is not None and energy.budget_j is not None:
        columns.append(jnp.maximum(1 - observation.spent_j / energy.budget_j, -1.0))
    return jnp.stack(columns, axis=-1)


def join_features(
    task: Float[Array, "*batch ues task"], cache: Float[Array, "*batch ues cache"]
) -> Float[Array, "*batch ues features"]:
    """Both kinds of features in the order of ``ue_features``."""
    return jnp.concatenate([task[..., :3], cache, task[..., 3:]], axis=-1)


def cache_feature(world: World, cached_retention: Float[Array, "*batch ues"]) -> Float[Array, "*batch ues"]:
    """A cached retention, from 0 to 1."""
    return cached_retention / world.retention_bounds[1]


def _full_share(
    world: World, held_retentions: Float[Array, "*batch ues families"]
) -> Float[Array, "*batch ues"]:
    """How much of the cache is in use."""
    assert world.families is not None
    assert world.families.cache_bits is not None
    return jnp.sum(held_retentions * world.families.model_bits, axis=-1) / world.families.cache_bits


def progress_feature(observation: Observation) -> Float[Array, "*batch"]:
    """Progress through the episode, from -1 to 1."""
    return 2 * observation.progress - 1


def _family_columns(world: World, tables: FamilyTables, family: Int[Array, "*batch ues"]) -> list[Array]:
    each = jnp.arange(tables.model_bits.shape[0])
    whole = curve_perplexity(world, jnp.ones(each.shape), each)
    return [(tables.model_bits / tables.model_bits.max())[family], (whole / whole.max())[family]]


def _radio_columns(world: World, observation: Observation) -> list[Array]:
    columns = []
    if observation.previous_downlink_gain is not None:
        bounds = jnp.log(downlink_gain_bounds(world))
        columns.append(_centred(jnp.log(observation.previous_downlink_gain), bounds))
    if observation.distance_m is not None and observation.approach_m is not None:
        assert world.mobility is not None
        assert world.distance_m is not None
        farthest_m = world.mobility.speed_mps[1] * world.mobility.interval_s + TIMING_ADVANCE_M
        columns.append(_centred(observation.distance_m, world.distance_m))
        columns.append(observation.approach_m / farthest_m)
    return columns


def _device_columns(world: World, observation: Observation) -> list[Array]:
    devices, device = world.devices, observation.device
    columns: list[Array] = []
    if devices.computation is not None and device.tflops is not None:
        columns += _speed_columns(world, devices.computation, observation)
        energy = devices.energy
        if energy is not None and energy.compute_j_per_tflop is not None and device.compute_w is not None:
            columns.append(_placed(device.compute_w / device.tflops, energy.compute_j_per_tflop))
    if device.memory_bits is not None:
        low, high = possible_levels(world, observation.family, device)
        largest = jnp.where(high < low, 0, high) / layers_of(world, observation.family)
        columns.append(cache_feature(world, largest))
    if device.private is not None:
        columns.append(jnp.where(device.private, -1.0, 1.0))
    return columns


def _speed_columns(world: World, table: ComputationTable, observation: Observation) -> list[Array]:
    """Speed, and the seconds of this task with the whole model; both as logarithms over their ranges."""
    tflops = observation.device.tflops
    assert tflops is not None
    seconds = training_tflop(table, observation.data_bits, observation.family) / tflops
    few, many = table.tflop_per_bit.min(), table.tflop_per_bit.max()
    slowest, fastest = table.device_tflops.bounds
    quickest = jnp.log(few * world.data_bits[0] / fastest)
    longest = jnp.log(many * world.data_bits[1] / slowest)
    return [
        _centred(jnp.log(tflops), jnp.log(table.device_tflops.bounds)),
        _centred(jnp.log(seconds), jnp.stack([quickest, longest])),
    ]


def _placed(values: Float[Array, "*batch"], table: SpreadTable) -> Float[Array, "*batch"]:
    return _centred(values, spread_quantile(table, jnp.asarray([0.0, 1.0])))


def _centred(values: Float[Array, "*batch"], bounds: Float[Array, "2"]) -> Float[Array, "*batch"]:
    """Map the bounds to -1 and 1; an interval of one point maps to 0."""
    half_width = (bounds[1] - bounds[0]) / 2
    return (values - (bounds[0] + half_width)) / jnp.maximum(half_width, 1e-6 * jnp.abs(bounds[1]) + 1e-12)
