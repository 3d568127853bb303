"""What decisions rest on and come to, for the server that asks and for the policy that answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from emutune.fleet.server.rates import LinkEstimate
from emutune.scenario import Scenario


@dataclass(frozen=True)
class Candidate:
    """What a decision rests on, of one device.

    Attributes:
        gain: power gain of the link in the directions in which nothing was measured.
        complexity: c of the task.
        data_bytes: of the task's text, in bytes of the scenario.
        held: k of the emulator of each foundation model on the device; 0 for none.
        transmit_power_w: of its uplink.
        family: number of the task's model.
        age: how many models the device used since each; those it never used come last. If empty, it used none.
        most_layers: of the largest emulator that the device can hold and train with; 0 if none fits.
        private: the data may not leave the device.
        uplink, downlink: as measured, in bytes of the scenario; None where links are shaped, or nothing was moved yet.
    """

    gain: float
    complexity: float
    data_bytes: float
    held: tuple[int, ...]
    transmit_power_w: float
    family: int = 0
    age: tuple[int, ...] = ()
    most_layers: int = 1_000_000
    private: bool = False
    uplink: LinkEstimate | None = None
    downlink: LinkEstimate | None = None


@dataclass(frozen=True)
class Choice:
    """What was decided for one device.

    Attributes:
        at_server: z.
        layers: k of the emulator that trains there.
        keep: numbers of the other models whose emulators then stay on the device.
    """

    at_server: bool
    layers: int
    keep: tuple[int, ...] = ()


@dataclass(frozen=True)
class Forecast:
    """What the system model says of a choice: rate of the link, delay (Eq. 1 to 8), perplexity (Eq. 9)."""

    rate_bps: float
    delay_s: float
    perplexity: float


class Deciding(Protocol):
    """A policy in its scenario, as the server asks it."""

    @property
    def scenario(self) -> Scenario:
        """The world that the policy knows."""
        ...

    async def decide(self, step: int, candidates: Sequence[Candidate]) -> list[Choice]:
        """One choice a device; the same for the same step and candidates."""
        ...

    async def forecast(
        self, candidates: Sequence[Candidate], choices: Sequence[Choice], bytes_to_move: Sequence[float]
    ) -> list[Forecast]:
        """What the system model predicts; see ``Decider.forecast``."""
        ...
