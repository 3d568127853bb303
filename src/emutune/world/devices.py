"""What sets UEs apart beside their radio: speed, power, memory, privacy, and whether they have a task.

Each is a feature of its own; what is off is not drawn.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from emutune.scenario import Scenario, Spread

# Each draw has a number of its own, folded into the episode's key: those that were there before stay.
_SPEED, _ENERGY, _MEMORY, _PRIVACY, _ACTIVITY = 101, 102, 103, 104, 105


class SpreadTable(NamedTuple):
    """An interval, and whether it is the logarithm that is uniform."""

    bounds: Float[Array, "2"]
    logarithmic: Bool[Array, ""]


class DeviceLaws(NamedTuple):
    """From which UEs are drawn; None where a feature is off."""

    tflops: SpreadTable | None = None
    j_per_tflop: SpreadTable | None = None
    memory_bits: SpreadTable | None = None
    private_ues: Float[Array, ""] | None = None
    task_probability: Float[Array, ""] | None = None


class Devices(NamedTuple):
    """What each UE is for a whole episode, as far as the world says; see ``Situation``."""

    tflops: Float[Array, "*batch ues"] | None = None
    compute_w: Float[Array, "*batch ues"] | None = None
    memory_bits: Float[Array, "*batch ues"] | None = None
    private: Bool[Array, "*batch ues"] | None = None


def build_devices(scenario: Scenario) -> DeviceLaws:
    """The laws of a scenario."""
    computation, energy, memory = scenario.computation, scenario.energy, scenario.memory
    privacy, activity = scenario.privacy, scenario.activity
    return DeviceLaws(
        tflops=_spread(computation.device_tflops if computation else None),
        j_per_tflop=_spread(energy.compute_j_per_tflop if energy else None),
        memory_bits=_spread(memory.device_gb if memory else None, 8e9),
        private_ues=_real(float(scenario.private_ues)) if privacy else None,
        task_probability=_real(activity.task_probability) if activity else None,
    )


def draw_devices(key: Key[Array, ""], laws: DeviceLaws, ues: int) -> Devices:
    """The UEs of one episode."""

    def drawn(number: int, law: SpreadTable | None) -> Array | None:
        return law and spread_quantile(law, jax.random.uniform(jax.random.fold_in(key, number), (ues,)))

    tflops, j_per_tflop = drawn(_SPEED, laws.tflops), drawn(_ENERGY, laws.j_per_tflop)
    private_ues = laws.private_ues
    return Devices(
        tflops=tflops,
        compute_w=None if tflops is None or j_per_tflop is None else j_per_tflop * tflops,
        memory_bits=drawn(_MEMORY, laws.memory_bits),
        private=None if private_ues is None else _some(jax.random.fold_in(key, _PRIVACY), private_ues, ues),
    )


def draw_activity(
    key: Key[Array, ""], laws: DeviceLaws, tasks: int, ues: int
) -> Bool[Array, "{tasks} {ues}"] | None:
    """Which UEs have a task at each step; None if all always do."""
    if laws.task_probability is None:
        return None
    return jax.random.bernoulli(jax.random.fold_in(key, _ACTIVITY), laws.task_probability, (tasks, ues))


def _spread(wanted: Spread | None, scale: float = 1.0) -> SpreadTable | None:
    if wanted is None:
        return None
    bounds = jnp.asarray([wanted.min * scale, wanted.max * scale], jnp.float32)
    return SpreadTable(bounds, jnp.asarray(wanted.law == "log_uniform"))


def spread_quantile(table: SpreadTable, share: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """The value below which such a share of a distribution lies."""
    low, high = table.bounds
    return jnp.where(table.logarithmic, low * (high / low) ** share, low + (high - low) * share)


def _some(key: Key[Array, ""], count: Float[Array, ""], ues: int) -> Bool[Array, "{ues}"]:
    """So many UEs, whichever."""
    return jnp.argsort(jax.random.uniform(key, (ues,))) < count


def _real(value: float) -> Float[Array, ""]:
    return jnp.asarray(value, jnp.float32)
