"""Links that are shaped: drawn from the law of a scenario's gains."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from emutune.errors import FleetError
from emutune.scenario import Range, Scenario


class PlainLaw(NamedTuple):
    """Gains that are a power of the distance times the mean of so many Rayleigh blocks."""

    distance_m: Range
    exponent: float
    blocks: int


def plain_law(scenario: Scenario) -> PlainLaw:
    """The law of a scenario's gains.

    Raises:
        FleetError: the scenario has another one.
    """
    distance, radio = scenario.fleet.distance_m, scenario.radio
    if (
        not scenario.plain_radio
        or distance is None
        or radio.path_loss_exponent is None
        or radio.fading_blocks is None
    ):
        raise FleetError(
            f"scenario {scenario.name!r}: its links follow a trace, a path loss model, mobility, drifting fading or "
            "the ergodic rate, but a fleet's follow radio.path_loss_exponent and radio.fading_blocks alone; use a "
            "policy for such a scenario"
        )
    return PlainLaw(distance, radio.path_loss_exponent, radio.fading_blocks)


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
        law = plain_law(self.scenario)
        metres = self._generator(2).uniform(law.distance_m.min, law.distance_m.max)
        fading = self._generator(3, step + 1).gamma(law.blocks, 1 / law.blocks)
        return float(metres**-law.exponent * fading)

    def _generator(self, *purpose: int) -> np.random.Generator:
        name = int.from_bytes(hashlib.sha256(self.device.encode()).digest()[:8], "big")
        return np.random.default_rng((self.seed, name, *purpose))


def middle_gain(scenario: Scenario) -> float:
    """The gain of a link of which nothing is known: that of the middle of the distances, without fading."""
    law = plain_law(scenario)
    return float(((law.distance_m.min + law.distance_m.max) / 2) ** -law.exponent)
