"""Channel gains from measured rates: what a UE that has the band to itself was measured to get."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from emutune.scenario import Scenario
from emutune.step.ergodic import snr_of_efficiency


class TraceTables(NamedTuple):
    """A trace, one value for each interval between tasks.

    Attributes:
        uplink_snr: signal-to-noise ratio over the whole uplink at which a UE alone has the measured rate.
        downlink_gain: gain at which a UE alone has the measured rate, with the whole band and power.
    """

    uplink_snr: Float[Array, "windows"]
    downlink_gain: Float[Array, "windows"]


def build_trace(scenario: Scenario) -> TraceTables | None:
    """The tables of a scenario; None if its channel is not a measured one."""
    trace, radio = scenario.trace, scenario.radio
    if trace is None:
        return None
    ergodic = radio.rate == "ergodic"
    noise_w = 10 ** ((radio.noise_dbm_per_hz - 30) / 10) * radio.downlink_bandwidth_hz
    uplink, downlink = (
        snr_of_efficiency(1e6 * np.asarray(rates, np.float64) / bandwidth, ergodic)
        for rates, bandwidth in (
            (trace.uplink_mbps, radio.uplink_bandwidth_hz),
            (trace.downlink_mbps, radio.downlink_bandwidth_hz),
        )
    )
    return TraceTables(
        uplink_snr=jnp.asarray(uplink, jnp.float32),
        downlink_gain=jnp.asarray(downlink * noise_w / radio.downlink_power_w, jnp.float32),
    )


def draw_windows(
    key: Key[Array, ""], tables: TraceTables, rows: int, ues: int
) -> tuple[Float[Array, "{rows} {ues}"], Float[Array, "{rows} {ues}"]]:
    """Each UE's part of the trace, from a place drawn for the episode on: uplink ratios, downlink gains."""
    begins = tables.uplink_snr.shape[0] - rows + 1
    places = jax.random.randint(key, (ues,), 0, begins) + jnp.arange(rows)[:, None]
    return tables.uplink_snr[places], tables.downlink_gain[places]
