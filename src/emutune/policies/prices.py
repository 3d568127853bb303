"""What each choice of each UE costs in the step at hand, as planners see it before it is taken.

The gain during a task is not known before it; the previous one stands in for it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from emutune.world import Observation, World, possible_levels
from emutune.world.ergodic import spectral_nats
from emutune.world.link import shared_rate_bps
from emutune.world.observation import downlink_gain
from emutune.world.parameters import bits_of, layers_of
from emutune.world.possible import task_count
from emutune.world.quality import complexity_factor, curve_perplexity
from emutune.world.spending import training_tflop


class Prices(NamedTuple):
    """One state's choices: UEs n, and levels k of 0 to ``most`` layers. Costs are in units of reward.

    Attributes:
        server: cost of a task's perplexity at the server.
        local: the same on the UE, with an emulator of k layers.
        allowed: whether an emulator of k layers exists for the task's family.
        held: layers of the usable emulator, 0 for none.
        download_s: seconds that sending k layers takes, alone on the downlink; 0 where nothing is missing.
        per_s: cost of a second of the step's delay.
        training_s: seconds of training with k layers on the UE; None where computation is off.
        server_s: seconds that each task at the server adds to training there, for every one that is there.
    """

    server: Float[Array, "ues"]
    local: Float[Array, "ues levels"]
    allowed: Bool[Array, "ues levels"]
    held: Int[Array, "ues"]
    download_s: Float[Array, "ues levels"]
    per_s: Float[Array, ""]
    training_s: Float[Array, "ues levels"] | None = None
    server_s: Float[Array, "ues"] | None = None


def step_prices(world: World, observation: Observation, most: int) -> Prices:
    """The choices of one state (no batch axes)."""
    family = observation.family
    ues = observation.complexity.shape[0]
    layers = jnp.arange(most + 1)
    all_layers = jnp.broadcast_to(layers_of(world, family), (ues,))[:, None]
    low, high = (
        jnp.broadcast_to(bound, (ues,))[:, None]
        for bound in possible_levels(world, family, observation.device)
    )
    scale = (
        -world.perplexity_weight
        / task_count(ues, observation.active)
        * complexity_factor(world, observation.complexity)
    )
    each = None if family is None else jnp.broadcast_to(family[:, None], (ues, most + 1))
    held = jnp.round(observation.cached_retention * all_layers[:, 0]).astype(jnp.int32)
    missing = layers - (held[:, None] if world.delta_download else 0)
    bits = jnp.maximum(missing, 0) / all_layers * jnp.broadcast_to(bits_of(world, family), (ues,))[:, None]
    whole = whole_training_s(world, observation)
    return Prices(
        server=scale * curve_perplexity(world, jnp.ones(ues), family),
        local=scale[:, None] * curve_perplexity(world, layers / all_layers, each),
        allowed=(layers >= low) & (layers <= high),
        held=held,
        download_s=bits / lone_downlink_bps(world, downlink_gain(observation))[:, None],
        per_s=-world.delay_weight_per_s,
        training_s=None if whole is None else layers / all_layers * whole[0][:, None],
        server_s=None if whole is None else whole[1],
    )


def whole_training_s(
    world: World, observation: Observation
) -> tuple[Float[Array, "*batch ues"], Float[Array, "*batch ues"]] | None:
    """Seconds of training each task with the whole model on the UE, and alone at the server."""
    table, tflops = world.devices.computation, observation.device.tflops
    if table is None or tflops is None:
        return None
    tflop = training_tflop(table, observation.data_bits, observation.family)
    return tflop / tflops, tflop / table.server_tflops


def lone_downlink_bps(world: World, gain: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """Rate of a UE that has the downlink to itself; n that share it have an n-th each (Eq. 6)."""
    return shared_rate_bps(
        world.downlink_bandwidth_hz,
        world.downlink_power_w,
        gain,
        world.noise_w_per_hz,
        jnp.asarray(1.0),
        world.ergodic_rate,
    )


def upload_s(
    world: World, observation: Observation, sharers: Float[Array, "counts"]
) -> Float[Array, "counts ues"]:
    """Seconds of each UE's upload when so many share the uplink (Eq. 1 to 3)."""
    share_hz = world.uplink_bandwidth_hz / jnp.maximum(sharers, 1.0)[:, None]
    snr = observation.transmit_power_w * observation.previous_gain / (world.noise_w_per_hz * share_hz)
    return observation.data_bits / (share_hz * spectral_nats(snr, world.ergodic_rate) * (1 / math.log(2)))
