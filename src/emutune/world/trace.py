"""Channel gains from measured rates: what a UE that has the band to itself was measured to get."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from emutune.scenario import Scenario, Trace
from emutune.step.ergodic import snr_of_efficiency
from emutune.world.channel import Channel
from emutune.world.draws import Draw, bounds_of, key_of
from emutune.world.mobility import Standing


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MeasuredRadio:
    """Gains from a trace, one value for each interval between tasks; see ``ModelledRadio`` for what a radio does.

    Attributes:
        uplink_w: received power at which a UE alone has the measured rate.
        downlink_gain: gain at which a UE alone has the measured rate, with the whole band and power.
        transmit_power_w: the least and the most that UEs send with.
    """

    uplink_w: Float[Array, "windows"]
    downlink_gain: Float[Array, "windows"]
    transmit_power_w: Float[Array, "2"]
    reciprocal: ClassVar[bool] = False

    @property
    def place(self) -> Standing:
        """A trace says nothing of distances."""
        return Standing(jnp.zeros(2))

    @property
    def gain_bounds(self) -> Float[Array, "2"]:
        """The weakest and the strongest gain of the uplink."""
        return _extremes(self.uplink_w) / self.transmit_power_w[::-1]

    @property
    def downlink_gain_bounds(self) -> Float[Array, "2"]:
        """The same of the downlink."""
        return _extremes(self.downlink_gain)

    @property
    def middle_gain(self) -> Float[Array, ""]:
        """The mean of the downlink's gain, in decibels."""
        return jnp.exp(jnp.log(self.downlink_gain).mean())

    def downlink_gain_at(self, gain: Float[Array, ""]) -> Float[Array, ""]:
        """The downlink's gain that goes with one of the uplink: as far between its bounds, in decibels."""
        ends, others = jnp.log(self.gain_bounds), jnp.log(self.downlink_gain_bounds)
        return jnp.exp(jnp.interp(jnp.log(gain), ends, others))

    def ends(self) -> dict[str, tuple[Array, Array]]:
        """A trace has no nearest and no farthest place."""
        return {}

    def draw(self, key: Key[Array, ""], transmit_power_w: Float[Array, "ues"], rows: int) -> Channel:
        """Each UE's part of the trace, from a place drawn for the episode on."""
        begins = self.uplink_w.shape[0] - rows + 1
        drawn = jax.random.randint(key_of(key, Draw.WINDOWS), transmit_power_w.shape, 0, begins)
        places = drawn + jnp.arange(rows)[:, None]
        return Channel(self.uplink_w[places] / transmit_power_w, {}, self.downlink_gain[places])


def build_trace(scenario: Scenario, trace: Trace) -> MeasuredRadio:
    """The radio of a scenario whose links are measured ones."""
    radio, real = scenario.radio, partial(jnp.asarray, dtype=jnp.float32)
    noise_w_per_hz = 10 ** ((radio.noise_dbm_per_hz - 30) / 10)
    uplink, downlink = (
        snr_of_efficiency(1e6 * np.asarray(rates, np.float64) / bandwidth, radio.rate == "ergodic")
        for rates, bandwidth in (
            (trace.uplink_mbps, radio.uplink_bandwidth_hz),
            (trace.downlink_mbps, radio.downlink_bandwidth_hz),
        )
    )
    down_w = noise_w_per_hz * radio.downlink_bandwidth_hz
    return MeasuredRadio(
        # In single precision, as links have the noise.
        uplink_w=real(uplink) * (real(noise_w_per_hz) * real(radio.uplink_bandwidth_hz)),
        downlink_gain=real(downlink * down_w / radio.downlink_power_w),
        transmit_power_w=bounds_of(scenario.fleet.transmit_power_w),
    )


def _extremes(values: Float[Array, "windows"]) -> Float[Array, "2"]:
    return jnp.stack([values.min(), values.max()])
