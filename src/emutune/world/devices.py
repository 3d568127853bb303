"""What sets UEs apart beside their radio: speed, energy, memory, privacy, and whether they have a task.

Each is a feature of its own. Where one is off its numbers are None, and it is no part of any program.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from emutune.scenario import Computation, Scenario, Spread

# Each draw has a number of its own, folded into the episode's key: those that were there before stay.
_SPEED, _ENERGY, _MEMORY, _PRIVACY, _ACTIVITY = 101, 102, 103, 104, 105


class SpreadTable(NamedTuple):
    """An interval, and whether it is the logarithm that is uniform."""

    bounds: Float[Array, "2"]
    logarithmic: Bool[Array, ""]


class ComputationTable(NamedTuple):
    """How fast UEs and server train, and operations of a whole model for a bit of data, by family (D13)."""

    device_tflops: SpreadTable
    server_tflops: Float[Array, ""]
    tflop_per_bit: Float[Array, "families"]


class EnergyTable(NamedTuple):
    """Powers and prices of energy (D14); the last two are None where there is no budget."""

    receive_w: Float[Array, ""]
    compute_j_per_tflop: SpreadTable | None
    weight_per_j: Float[Array, ""]
    budget_j: Float[Array, ""] | None
    over_budget_weight_per_j: Float[Array, ""] | None


class DeviceTables(NamedTuple):
    """The features of a world that concern devices; None where one is off."""

    computation: ComputationTable | None = None
    energy: EnergyTable | None = None
    memory_bits: SpreadTable | None = None
    private_ues: Float[Array, ""] | None = None
    task_probability: Float[Array, ""] | None = None


class Device(NamedTuple):
    """What each UE is for a whole episode; None where the feature is off.

    Attributes:
        tflops: training speed, in 1e12 operations a second.
        compute_w: power that training takes.
        memory_bits: the largest emulator that it can hold.
        private: whether its data may not leave it.
    """

    tflops: Float[Array, "*batch ues"] | None = None
    compute_w: Float[Array, "*batch ues"] | None = None
    memory_bits: Float[Array, "*batch ues"] | None = None
    private: Bool[Array, "*batch ues"] | None = None


def build_devices(scenario: Scenario) -> DeviceTables:
    """The tables of a scenario."""
    privacy, activity, memory = scenario.privacy, scenario.activity, scenario.memory
    return DeviceTables(
        computation=_build_computation(scenario),
        energy=_build_energy(scenario),
        memory_bits=None if memory is None else _spread(memory.device_gb, 8e9),
        private_ues=None if privacy is None else _real(float(scenario.private_ues)),
        task_probability=None if activity is None else _real(activity.task_probability),
    )


def draw_devices(key: Key[Array, ""], tables: DeviceTables, ues: int) -> Device:
    """The UEs of one episode."""
    tflops = compute_w = None
    if tables.computation is not None:
        tflops = _draw(jax.random.fold_in(key, _SPEED), tables.computation.device_tflops, ues)
        if tables.energy is not None and tables.energy.compute_j_per_tflop is not None:
            each = _draw(jax.random.fold_in(key, _ENERGY), tables.energy.compute_j_per_tflop, ues)
            compute_w = each * tflops
    memory = tables.memory_bits
    return Device(
        tflops=tflops,
        compute_w=compute_w,
        memory_bits=None if memory is None else _draw(jax.random.fold_in(key, _MEMORY), memory, ues),
        private=None
        if tables.private_ues is None
        else _some(jax.random.fold_in(key, _PRIVACY), tables.private_ues, ues),
    )


def draw_activity(
    key: Key[Array, ""], tables: DeviceTables, tasks: int, ues: int
) -> Bool[Array, "{tasks} {ues}"] | None:
    """Which UEs have a task at each step; None if all always do."""
    if tables.task_probability is None:
        return None
    return jax.random.bernoulli(jax.random.fold_in(key, _ACTIVITY), tables.task_probability, (tasks, ues))


def for_every_step(device: Device, tasks: int) -> Device:
    """The same UEs with a leading time axis."""
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (tasks, *leaf.shape)), device)


def tflop_per_bit(scenario: Scenario, wanted: Computation) -> list[float]:
    """Operations, in 1e12, of training each family's whole model on a bit of data (D13)."""
    # 4 P operations a token: 2 forward, and 2 backward to the activations of weights that stay frozen.
    tflop_per_token = [4e-3 * (model.parameters_billion or 0.0) for model in scenario.models]
    per_bit = wanted.epochs / (8 * wanted.bytes_per_token)
    return [each * per_bit for each in tflop_per_token]


def _build_computation(scenario: Scenario) -> ComputationTable | None:
    wanted = scenario.computation
    if wanted is None:
        return None
    return ComputationTable(
        device_tflops=_spread(wanted.device_tflops),
        server_tflops=_real(wanted.server_tflops),
        tflop_per_bit=jnp.asarray(tflop_per_bit(scenario, wanted), jnp.float32),
    )


def _build_energy(scenario: Scenario) -> EnergyTable | None:
    wanted = scenario.energy
    if wanted is None:
        return None
    compute, over = wanted.compute_j_per_tflop, wanted.over_budget_weight_per_j
    return EnergyTable(
        receive_w=_real(wanted.receive_w),
        compute_j_per_tflop=None if compute is None else _spread(compute),
        weight_per_j=_real(wanted.weight_per_j),
        budget_j=None if wanted.budget_j is None else _real(wanted.budget_j),
        over_budget_weight_per_j=None if over is None else _real(over),
    )


def _spread(wanted: Spread, scale: float = 1.0) -> SpreadTable:
    bounds = jnp.asarray([wanted.min * scale, wanted.max * scale], jnp.float32)
    return SpreadTable(bounds, jnp.asarray(wanted.law == "log_uniform"))


def _draw(key: Key[Array, ""], table: SpreadTable, ues: int) -> Float[Array, "{ues}"]:
    return spread_quantile(table, jax.random.uniform(key, (ues,)))


def spread_quantile(table: SpreadTable, share: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """The value below which such a share of a distribution lies."""
    low, high = table.bounds
    return jnp.where(table.logarithmic, low * (high / low) ** share, low + (high - low) * share)


def _some(key: Key[Array, ""], count: Float[Array, ""], ues: int) -> Bool[Array, "{ues}"]:
    """So many UEs, whichever."""
    return jnp.argsort(jax.random.uniform(key, (ues,))) < count


def _real(value: float) -> Float[Array, ""]:
    return jnp.asarray(value, jnp.float32)
