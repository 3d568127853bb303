"""Rates of uplink and downlink, shared (Eq. 2, 3, 6, 7) or each UE's own (D18)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Num

from emutune.scenario import Scenario
from emutune.step.ergodic import snr_of_efficiency, spectral_nats


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Links:
    """Bands and powers of both links.

    Attributes:
        ergodic: whether a rate is the mean over Rayleigh fading about the gain, instead of that at the gain.
        shared: whether those who send split a band, instead of having a link of their own each (D18).
    """

    ergodic: bool = field(metadata={"static": True})
    shared: bool = field(metadata={"static": True})
    uplink_bandwidth_hz: Float[Array, ""]
    downlink_bandwidth_hz: Float[Array, ""]
    downlink_power_w: Float[Array, ""]
    noise_w_per_hz: Float[Array, ""]


def build_links(scenario: Scenario, dtype: DTypeLike = jnp.float32) -> Links:
    """The links of a scenario."""
    radio = scenario.radio

    def real(value: float) -> Array:
        return jnp.asarray(value, dtype)

    return Links(
        ergodic=radio.rate == "ergodic",
        shared=radio.sharing == "equal",
        uplink_bandwidth_hz=real(radio.uplink_bandwidth_hz),
        downlink_bandwidth_hz=real(radio.downlink_bandwidth_hz),
        downlink_power_w=real(radio.downlink_power_w),
        noise_w_per_hz=real(10 ** ((radio.noise_dbm_per_hz - 30) / 10)),
    )


def parts(links: Links, users: Num[Array, "*batch"] | float) -> Num[Array, "*batch"] | float:
    """Into how many parts so many users of a link split it; one where each has its own."""
    return users if links.shared else jnp.ones_like(users)


def uplink_bps(
    links: Links,
    power_w: Float[Array, "*#batch"],
    gain: Float[Array, "*#batch"],
    sharers: Float[Array, "*#batch"] | float = 1.0,
) -> Float[Array, "*batch"]:
    """Rate of one of ``sharers`` uploads, each at its UE's power, that split the band equally if they share it (Eq. 2).

    Args:
        links: of the cell.
        power_w: of each UE, in W.
        gain: power gain of each UE's link.
        sharers: how many upload; below one counts as one.
    """
    share_hz = links.uplink_bandwidth_hz / jnp.maximum(parts(links, sharers), 1.0)
    return _rate_bps(links, share_hz, power_w * gain)


def downlink_bps(links: Links, gain: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """Rate of a download that has the downlink to itself (Eq. 6).

    Power and band are both split equally, so n that share it have an n-th of their own rate each (Eq. 7, D1).
    """
    return _rate_bps(links, links.downlink_bandwidth_hz, links.downlink_power_w * gain)


def uplink_gain(
    links: Links, power_w: Float[np.ndarray, "*batch"], rate_bps: Float[np.ndarray, "*batch"]
) -> Float[np.ndarray, "*batch"]:
    """The gain at which a lone upload has a rate: ``uplink_bps`` inverted, in double precision."""
    return _received_w(links, links.uplink_bandwidth_hz, rate_bps) / power_w


def downlink_gain(links: Links, rate_bps: Float[np.ndarray, "*batch"]) -> Float[np.ndarray, "*batch"]:
    """The gain at which a lone download has a rate: ``downlink_bps`` inverted, in double precision."""
    return _received_w(links, links.downlink_bandwidth_hz, rate_bps) / np.float64(links.downlink_power_w)


def _received_w(links: Links, hertz: Array, rate_bps: np.ndarray) -> np.ndarray:
    """``_rate_bps`` inverted, for the whole band."""
    noise_w = np.float64(links.noise_w_per_hz) * np.float64(hertz)
    return noise_w * snr_of_efficiency(rate_bps / np.float64(hertz), links.ergodic)


def _rate_bps(links: Links, share_hz: Array, received_w: Array) -> Array:
    snr = received_w / (links.noise_w_per_hz * share_hz)
    return share_hz * (spectral_nats(snr, links.ergodic) * (1 / math.log(2)))
