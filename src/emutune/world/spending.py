"""Seconds of training and joules of everything: what a step takes beside sending (D13, D14)."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from emutune.world.devices import ComputationTable, Device, EnergyTable
from emutune.world.parameters import World


def training_tflop(
    table: ComputationTable, data_bits: Float[Array, "*batch ues"], family: Int[Array, "*batch ues"] | None
) -> Float[Array, "*batch ues"]:
    """Operations of training each task with its family's whole model: 4 P a token and epoch."""
    per_bit = table.tflop_per_bit[0] if family is None else table.tflop_per_bit[family]
    return per_bit * data_bits


def training_s(
    world: World,
    data_bits: Float[Array, "ues"],
    family: Int[Array, "ues"] | None,
    device: Device,
    retention: Float[Array, "ues"],
    at_server: Bool[Array, "ues"],
    local: Bool[Array, "ues"],
) -> Float[Array, "ues"] | None:
    """Seconds of each task's training; None where computation is off.

    On the UE it takes E of the whole model's operations at the UE's speed; n tasks at the server take the
    whole model's operations at an n-th of its speed each.
    """
    table = world.devices.computation
    if table is None or device.tflops is None:
        return None
    tflop = training_tflop(table, data_bits, family)
    sharers = jnp.sum(at_server, dtype=jnp.float32)
    there = tflop * sharers / table.server_tflops
    here = retention * tflop / device.tflops
    return jnp.where(at_server, there, jnp.where(local, here, 0.0))


def energy_j(
    table: EnergyTable,
    device: Device,
    transmit_power_w: Float[Array, "ues"],
    upload_s: Float[Array, "ues"],
    download_s: Float[Array, "ues"],
    local_training_s: Float[Array, "ues"] | None,
) -> Float[Array, "ues"]:
    """Joules of each UE: sending, receiving and computing, each its power times its seconds."""
    spent = transmit_power_w * upload_s + table.receive_w * download_s
    if local_training_s is None or device.compute_w is None:
        return spent
    return spent + device.compute_w * local_training_s


def energy_cost(
    table: EnergyTable, spent_j: Float[Array, "ues"] | None, more_j: Float[Array, "*batch ues"]
) -> Float[Array, "*batch ues"]:
    """What joules cost one UE, a positive number in units of reward times UEs.

    Args:
        table: prices.
        spent_j: before; None where there is no budget.
        more_j: what is spent now.
    """
    cost = -table.weight_per_j * more_j
    if spent_j is None or table.budget_j is None or table.over_budget_weight_per_j is None:
        return cost
    # What a step adds to the excess, so that an episode is charged its excess once.
    left = jnp.maximum(table.budget_j - spent_j, 0.0)
    return cost - table.over_budget_weight_per_j * jnp.maximum(more_j - left, 0.0)
