"""What decisions rest on and come to, for the server that asks and for the policy that answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field

from emutune.fleet.config import FleetConfig
from emutune.fleet.server.rates import LinkEstimate
from emutune.scenario import Scenario


class Opening(BaseModel):
    """Which policy decides, and where.

    Attributes:
        policy: a run's directory, or a rule's name.
        scenario: the world of rules; a learned policy brings its own.
        retention: of the rule ``fixed``; the largest allowed if not given.
        seed: of what is drawn, by policies and for devices.
        sharing: of links, where that is not as the scenario says.
        shaped: whether links, speeds and who has a task are drawn from the scenario's laws.
        episode: how many steps belong together; as many as the scenario has tasks if not given.
        content: SHA-256 of the policy's file as it was first read, "" for a rule; None before that.
    """

    # Forecasts may be infinite, which JSON has no word for.
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants")

    policy: str
    scenario: Scenario
    retention: float | None = None
    seed: int = 0
    sharing: Literal["equal", "none"] | None = None
    shaped: bool = False
    episode: int | None = Field(default=None, ge=1)
    content: str | None = None


def opening_of(
    config: FleetConfig, policy: str, scenario: Scenario, retention: float | None = None
) -> Opening:
    """A policy in a scenario, as a fleet's file says."""
    return Opening(
        policy=policy,
        scenario=scenario,
        retention=retention,
        seed=config.shaping.seed,
        sharing=config.sharing,
        shaped=config.shaping.enabled,
        episode=config.steps.episode,
    )


@dataclass(frozen=True)
class Candidate:
    """What a decision rests on, of one device; what is None is drawn, or the middle of what is possible.

    Attributes:
        device: its name, by which its links and speed are drawn.
        complexity: c of the task.
        data_bytes: of the task's text, in bytes of the scenario.
        family: number of the task's foundation model.
        held: k of the emulator of each model on the device; 0 for none. If empty, it has none.
        age: how many models the device used since each; those it never used come last. If empty, it used none.
        most_layers: of the largest emulator that the device can hold and train with; 0 if none fits.
        private: the data may not leave the device.
        spent_j: energy that it has spent in this episode.
        gain: power gain of the link in the directions in which nothing was measured.
        transmit_power_w: of its uplink.
        tflops: training speed, as measured.
        compute_w: power that training takes.
        uplink, downlink: as measured, in bytes of the scenario; None where links are shaped, or nothing was moved yet.
    """

    device: str
    complexity: float
    data_bytes: float
    family: int = 0
    held: tuple[int, ...] = ()
    age: tuple[int, ...] = ()
    most_layers: int = 1_000_000
    private: bool = False
    spent_j: float = 0.0
    gain: float | None = None
    transmit_power_w: float | None = None
    tflops: float | None = None
    compute_w: float | None = None
    uplink: LinkEstimate | None = None
    downlink: LinkEstimate | None = None


@dataclass(frozen=True)
class Choice:
    """What was decided for one device; nothing, if it has no task now.

    Attributes:
        at_server: z.
        layers: k of the emulator that trains there.
        keep: numbers of the other models whose emulators then stay on the device.
    """

    at_server: bool
    layers: int
    keep: tuple[int, ...] = ()

    @property
    def idle(self) -> bool:
        """Nothing is to be done."""
        return not self.at_server and not self.layers


@dataclass(frozen=True)
class Forecast:
    """What the system model says of a choice (Eq. 1 to 9, D13, D14).

    Attributes:
        rate_bps: of the link.
        transfer_s: of the bytes that move.
        training_s: of training, wherever; 0 in a world where that takes no time.
        transfer_w, training_w: power that the device takes meanwhile; 0 in a world where energy is not counted.
        perplexity: of the task.
        situation: what was known of the device, by the names of ``emutune.step.Situation``.
    """

    rate_bps: float
    transfer_s: float
    training_s: float
    transfer_w: float
    training_w: float
    perplexity: float
    situation: dict[str, Any] = field(default_factory=dict)

    @property
    def delay_s(self) -> float:
        """From the first byte to the end of training (Eq. 8)."""
        return self.transfer_s + self.training_s


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
        self,
        step: int,
        candidates: Sequence[Candidate],
        choices: Sequence[Choice],
        bytes_to_move: Sequence[float],
        during: bool = False,
    ) -> list[Forecast]:
        """What the system model predicts; see ``Decider.forecast``."""
        ...
