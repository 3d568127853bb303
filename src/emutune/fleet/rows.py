"""What goes into the ledger and comes out of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

from pydantic import Field

from emutune.fleet.protocol import (
    Bytes,
    DeviceName,
    Identifier,
    Lease,
    Message,
    Perplexity,
    Result,
    Seconds,
    Sha256,
)

Kind = Literal["train", "upload", "stop"]
Closed = Literal["done", "late", "failed", "expired"]
State = Literal["open", "done", "late", "failed", "expired"]
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Watts = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Decision(Message):
    """What a policy decided for one device in one step, and what it is predicted to cost.

    Attributes:
        base: hash of the task's foundation model; None for the fleet's first.
        lease_json: the ``Lease`` that the device is to fetch, as JSON; its lease, step, kind and task are those here.
        at_server: z = 1, the server trains; False for a lease that stops the device.
        predicted_delay_s: from the first byte to the end of training (Eq. 8).
        predicted_training_s: of that, training; 0 in a world where training takes no time.
        curve_perplexity: what the curve says of a training from nothing.
        transfer_w, training_w: power that the device takes meanwhile; 0 in a world where energy is not counted.
        situation: what was known of the device, as JSON by the names of ``emutune.step.Situation``.
        predicted_perplexity: of the plugged-in adapter on the task's text; None where nothing is trained.
        gain: power gain of the link that the prediction is about; None where that is of measured transfers.
    """

    device: DeviceName
    task: str
    base: Sha256 | None = None
    lease: Identifier
    kind: Kind
    retention: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    at_server: bool
    emulator_name: str | None = None
    lease_json: str
    predicted_bytes: Bytes = 0
    predicted_delay_s: Seconds = 0.0
    predicted_training_s: Seconds = 0.0
    predicted_perplexity: Perplexity | None = None
    curve_perplexity: Perplexity | None = None
    transfer_w: _Watts = 0.0
    training_w: _Watts = 0.0
    situation: str = "{}"
    gain: _Positive | None = None
    complexity: Annotated[float, Field(allow_inf_nan=False)] | None = None
    rate_bps: _Positive | None = None


class Transfer(NamedTuple):
    """Bytes that a device moved for a lease, and in how many seconds."""

    bytes: float
    seconds: float


@dataclass(frozen=True)
class DeviceRow:
    """A device, as the ledger knows it; its last credentials are the ones that count.

    Attributes:
        key_sha256: None until the device enrolled.
        left: it takes no part until it reports or enrols again.
    """

    name: str
    token_sha256: str
    key_sha256: str | None
    revoked: bool
    left: bool
    added_at: str


@dataclass(frozen=True)
class LeaseRow:
    """A lease, what was decided, and how far it is; None where something did not happen yet.

    Attributes:
        id: leases count up in the order in which they were begun, whatever the clock says.
        base: hash of the task's foundation model; None for the fleet's first.
        message: what the device fetches.
        before, after: perplexity of the whole model, the adapter not plugged in and plugged in; ``after`` is also
            None where it was not finite.
        training_s: of training, wherever it was, in seconds of the scenario.
        accepted: whether the evaluation put the adapter into service; None before it.
    """

    id: int
    lease: str
    step: int
    device: str
    task: str
    base: str | None
    kind: Kind
    retention: float | None
    at_server: bool
    emulator_name: str | None
    message: Lease
    predicted_bytes: int
    predicted_delay_s: float
    predicted_training_s: float
    predicted_perplexity: float | None
    curve_perplexity: float | None
    transfer_w: float
    training_w: float
    situation: str
    gain: float | None
    complexity: float | None
    rate_bps: float | None
    state: State
    data_complete: bool
    transferred_s: float | None
    transferred_bytes: int | None
    training_s: float | None
    adapter_sha256: str | None
    adapter_bytes: int | None
    before: float | None
    after: float | None
    accepted: bool | None
    result: Result | None
    opened_at: str
    closed_at: str | None

    @property
    def delay_s(self) -> float | None:
        """From the first byte to the end of training; None while it is not known as a whole."""
        training = self.training_s if self.predicted_training_s else 0.0
        return None if self.transferred_s is None or training is None else self.transferred_s + training


@dataclass(frozen=True)
class AuditRow:
    """A security event, a deletion of data, or a failure of the server's work."""

    id: int
    event: str
    device: str | None
    lease: str | None
    detail: str
    at: str
