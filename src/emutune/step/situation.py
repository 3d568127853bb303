"""All that a UE is, holds and is asked in a step: one row a UE, every field always there."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Situation(NamedTuple):
    """A step as far as it is known, over any leading batch axes.

    Before a decision the gains are those during the task before, since those of the coming one are not known yet;
    a step is charged at the true ones. Where a feature is off its field is neutral: family 0, infinite speed and
    memory, no power for computing, nothing private, everybody active, distance and approach 0.

    Attributes:
        progress: step / tasks, from 0 to 1.
        family: of each task's foundation model. A UE without a task shows the one that its next tasks come from.
        complexity: c of each task.
        data_bits: D of each task.
        active: who has a task.
        transmit_power_w: of each UE.
        gain: power gain of each uplink.
        downlink_gain: of each downlink.
        distance_m: as the timing advance tells the base station.
        approach_m: by how much a UE came nearer since the task before.
        tflops: training speed, in 1e12 operations a second.
        compute_w: power that training takes.
        memory_bits: the largest emulator that a UE can hold.
        private: whose data may not leave them.
        held: layers of the emulator of each family that a UE holds; 0 for none.
        age: how many families were used since each was; those never used come last.
        spent_j: energy spent so far.
    """

    progress: Float[Array, "*batch"]
    family: Int[Array, "*batch ues"]
    complexity: Float[Array, "*batch ues"]
    data_bits: Float[Array, "*batch ues"]
    active: Bool[Array, "*batch ues"]
    transmit_power_w: Float[Array, "*batch ues"]
    gain: Float[Array, "*batch ues"]
    downlink_gain: Float[Array, "*batch ues"]
    distance_m: Float[Array, "*batch ues"]
    approach_m: Float[Array, "*batch ues"]
    tflops: Float[Array, "*batch ues"]
    compute_w: Float[Array, "*batch ues"]
    memory_bits: Float[Array, "*batch ues"]
    private: Bool[Array, "*batch ues"]
    held: Int[Array, "*batch ues families"]
    age: Int[Array, "*batch ues families"]
    spent_j: Float[Array, "*batch ues"]


_NEUTRAL: dict[str, float | int | bool] = {
    "family": 0,
    "active": True,
    "distance_m": 0.0,
    "approach_m": 0.0,
    "tflops": float("inf"),
    "compute_w": 0.0,
    "memory_bits": float("inf"),
    "private": False,
    "spent_j": 0.0,
}


def situation_of(**known: Array | None) -> Situation:
    """A situation of what is known; what is not, or is None, is neutral, as constants of the program.

    ``progress``, ``complexity``, ``data_bits``, ``transmit_power_w``, ``gain``, ``held`` and ``age`` must be known; the
    downlink's gain is that of the uplink if it is not given.
    """
    given = {name: value for name, value in known.items() if value is not None}
    shape = given["complexity"].shape
    neutral = {name: jnp.full(shape, value) for name, value in _NEUTRAL.items() if name not in given}
    return Situation(**{"downlink_gain": given["gain"], **neutral, **given})


class Plan(NamedTuple):
    """Who trains at the server (z), and with how many layers the others train; neither is a UE that does nothing."""

    at_server: Bool[Array, "*batch ues"]
    layers: Int[Array, "*batch ues"]
