"""Rates and delays of the shared uplink and downlink (Eq. 1 to 3 and 5 to 7)."""

from __future__ import annotations

import math

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from emutune.world.ergodic import spectral_nats
from emutune.world.parameters import World


def shared_rate_bps(
    bandwidth_hz: Float[Array, ""],
    power_w: Float[Array, "*#batch"],
    gain: Float[Array, "*#batch"],
    noise_w_per_hz: Float[Array, ""],
    sharers: Float[Array, ""],
    ergodic: bool = False,
) -> Float[Array, "*batch"]:
    """Rate of one of ``sharers`` links that split a bandwidth equally (Eq. 2, 6).

    Args:
        bandwidth_hz: the whole bandwidth, in Hz.
        power_w: the power put into each link's own share, in W.
        gain: power gain of each link.
        noise_w_per_hz: noise power density, in W/Hz.
        sharers: how many links share; below one counts as one.
        ergodic: the mean rate over Rayleigh fading about the gain, instead of the rate at the gain.
    """
    share_hz = bandwidth_hz / jnp.maximum(sharers, 1.0)
    snr = power_w * gain / (noise_w_per_hz * share_hz)
    return share_hz * (spectral_nats(snr, ergodic) * (1 / math.log(2)))


def upload_delay_s(
    world: World,
    data_bits: Float[Array, "ues"],
    transmit_power_w: Float[Array, "ues"],
    gain: Float[Array, "ues"],
    uploads: Bool[Array, "ues"],
) -> Float[Array, "ues"]:
    """Seconds each uploading UE needs for its data, 0 for the others (Eq. 1 to 3)."""
    rate = shared_rate_bps(
        world.uplink_bandwidth_hz,
        transmit_power_w,
        gain,
        world.noise_w_per_hz,
        _count(uploads),
        world.ergodic_rate,
    )
    return jnp.where(uploads, data_bits / rate, 0.0)


def download_delay_s(
    world: World,
    bits: Float[Array, "ues"],
    gain: Float[Array, "ues"],
    downloads: Bool[Array, "ues"],
) -> Float[Array, "ues"]:
    """Seconds each downloading UE needs for the bits sent to it, 0 for the others (Eq. 5 to 7, D1)."""
    sharers = _count(downloads)
    power_w = world.downlink_power_w / jnp.maximum(sharers, 1.0)
    rate = shared_rate_bps(
        world.downlink_bandwidth_hz, power_w, gain, world.noise_w_per_hz, sharers, world.ergodic_rate
    )
    return jnp.where(downloads, bits / rate, 0.0)


def _count(members: Bool[Array, "ues"]) -> Float[Array, ""]:
    return jnp.sum(members, dtype=jnp.float32)
