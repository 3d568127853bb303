"""Links: drawn where they are shaped, inverted from measured transfers where they are real."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np

from emutune.scenario import Scenario


@dataclass(frozen=True)
class DrawnLink:
    """The simulated link of one device: power gain of every step, and transmit power in W (D8).

    Its draws depend on the seed, the device's name and the step alone, whoever else takes part.
    """

    scenario: Scenario
    seed: int
    device: str

    @property
    def transmit_power_w(self) -> float:
        """Of the uplink."""
        power = self.scenario.fleet.transmit_power_w
        return float(self._generator(1).uniform(power.min, power.max))

    def gain(self, step: int) -> float:
        """During a step; of step -1, what is known before the first."""
        distance, radio = self.scenario.fleet.distance_m, self.scenario.radio
        metres = self._generator(2).uniform(distance.min, distance.max)
        fading = self._generator(3, step + 1).gamma(radio.fading_blocks, 1 / radio.fading_blocks)
        return float(metres**-radio.path_loss_exponent * fading)

    def _generator(self, *purpose: int) -> np.random.Generator:
        name = int.from_bytes(hashlib.sha256(self.device.encode()).digest()[:8], "big")
        return np.random.default_rng((self.seed, name, *purpose))


def middle_gain(scenario: Scenario) -> float:
    """The gain of a link of which nothing is known: that of the middle of the distances, without fading."""
    distance = scenario.fleet.distance_m
    return float(((distance.min + distance.max) / 2) ** -scenario.radio.path_loss_exponent)


def gain_of_rate(scenario: Scenario, rate_bps: float, power_w: float, sharers: int, *, uplink: bool) -> float:
    """The gain at which a link among ``sharers`` would have a measured rate: Eq. 2 or 6, inverted.

    Args:
        scenario: whose bandwidths and noise hold.
        rate_bps: measured.
        power_w: put into this link.
        sharers: links that shared the band.
        uplink: which of the two bands.
    """
    radio = scenario.radio
    share_hz = (radio.uplink_bandwidth_hz if uplink else radio.downlink_bandwidth_hz) / sharers
    noise_w = 10 ** ((radio.noise_dbm_per_hz - 30) / 10) * share_hz
    # A rate that the scenario's band cannot carry at all would overflow.
    snr = math.expm1(min(rate_bps / share_hz, 200.0) * math.log(2))
    return min(max(snr * noise_w / power_w, 1e-30), 1e6)
