"""What the dashboard is told, version 1: JSON below ``/v1/dashboard``, with the key of the dashboard.

| method and path | answer |
|---|---|
| ``GET /v1/dashboard?since=REVISION`` | ``Overview`` |
| ``GET /v1/dashboard/steps/{step}`` | ``StepDetail``; 404 if it was not begun |

Both answer ``If-None-Match`` with 304 where nothing has changed. Times are those of the server's wall clock, in UTC.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from emutune.fleet.comparison import Errors
from emutune.fleet.rows import Kind, State

RunState = Literal["waiting", "running", "done", "stopped"]
Doing = Literal[
    "expected",
    "idle",
    "reported",
    "downloading",
    "training",
    "returning",
    "uploading",
    "server trains",
    "fetching",
    "judging",
    "left",
    "revoked",
]


class Shown(BaseModel):
    """What all parts have in common: nothing changed after it was read."""

    model_config = ConfigDict(frozen=True)


class Model(Shown):
    """A foundation model.

    Attributes:
        name: what the fleet's devices know it by.
        kind: of its architecture, as transformers names it.
        base: its hash.
    """

    name: str
    kind: str
    base: str
    layers: int


class Cached(Shown):
    """The emulator that a device holds, as it last reported or was last seen to fetch.

    Attributes:
        base: hash of the model it was made of.
        retention: of the layers between the adapter layers, or of the width; None if the catalogue lacks it.
        layers: how many the emulator has, adapter layers included.
    """

    emulator: str
    base: str
    retention: float | None
    layers: int | None


class Work(Shown):
    """The lease that a device works on, or worked on last.

    Attributes:
        state: of the lease; ``expired`` while the device is late.
        moved_bytes: of the emulator sent to the device, or of the data that arrived. What was sent of an
            emulator before the server was last started is not in it until the device has all.
        of_bytes: how many they are predicted to be.
    """

    lease: str
    step: int
    kind: Kind
    state: State
    retention: float | None
    moved_bytes: int
    of_bytes: int
    opened_at: str


class Device(Shown):
    """A device at a glance.

    Attributes:
        joined_at: when it enrolled with the credentials that count; None if it did not yet.
        heard_at: of its last request; of its last report or enrolment if the server was started after it.
        doing: what it does now, as far as the server can know.
    """

    name: str
    joined_at: str | None
    heard_at: str | None
    revoked: bool
    left: bool
    doing: Doing
    cached: Cached | None
    work: Work | None


class StepSummary(Shown):
    """A step at a glance; delays in seconds as ``emutune ledger`` compares them.

    Attributes:
        measured_delay_s: None unless every transfer that was to take time has been measured.
        known_delay_s: of the transfers that were measured by the end of the step; None before it.
        leases, at_server: devices that took part; those whose data the server trains on.
        predicted_perplexity, measured_perplexity: means over the leases that have both.
        perplexity_before: mean over the leases that were judged, without their adapters.
        emulator_bytes, data_bytes: measured payload, to and from devices.
        adapter_bytes: of the adapters that were trained.
        accepted, refused: adapters.
        open, failed, expired, late: leases in that state.
    """

    step: int
    begun_at: str
    ended_at: str | None
    leases: int
    at_server: int
    predicted_delay_s: float
    measured_delay_s: float | None
    known_delay_s: float | None
    error_percent: float | None
    predicted_perplexity: float | None
    measured_perplexity: float | None
    perplexity_before: float | None
    emulator_bytes: int
    data_bytes: int
    adapter_bytes: int
    accepted: int
    refused: int
    open: int
    failed: int
    expired: int
    late: int


class Noted(Shown):
    """A row of the audit: a refusal, or a deletion of data."""

    at: str
    event: str
    device: str | None
    lease: str | None
    detail: str


class Audit(Shown):
    """What was noted beside the leases.

    Attributes:
        strangers: refused requests without a key that is known.
        of_devices: refused requests of devices of the fleet.
        damaged: uploads that arrived otherwise than reported, and were sent again.
        deleted: uploads whose text was deleted after training.
        refusals, deletions: the last of them, newest first.
    """

    strangers: int
    of_devices: int
    damaged: int
    deleted: int
    refusals: list[Noted]
    deletions: list[Noted]


class Fault(Shown):
    """A lease that failed or was not done in time.

    Attributes:
        reason: the words of the server or of the device, if there are any.
    """

    step: int
    device: str
    lease: str
    state: State
    reason: str
    closed_at: str | None


class Overview(Shown):
    """A fleet at a glance.

    Attributes:
        state: ``waiting`` before the first step; ``stopped`` when the server is told to end before the last.
        server_started_at: when this server began to listen.
        policy: as it was named to ``emutune serve``.
        scenario: that rules decide in and links are shaped by.
        step: the last that was begun, counted from 0; None before the first.
        steps_ended, steps_total: how many are over, and of how many.
        revision: of this answer; the next question names it, to be told of no step that has stayed as it was.
        steps: of the last of them, from ``first_step`` on, those that changed since the revision that was named;
            all, if none or another server's was. ``steps_left_out`` came before.
        totals: counters, the same as ``emutune ledger`` prints.
        faults: leases that failed or came late, newest first, the last of them.
    """

    version: Literal[1] = 1
    name: str
    state: RunState
    server_started_at: str
    policy: str
    scenario: str
    models: list[Model]
    step: int | None
    steps_ended: int
    steps_total: int
    devices: list[Device]
    revision: int
    first_step: int | None
    steps: list[StepSummary]
    steps_left_out: int
    totals: dict[str, int]
    errors: Errors
    faults: list[Fault]
    audit: Audit


class LeaseDetail(Shown):
    """A decision, what was predicted of it, and what came of it; None where nothing was predicted or measured.

    Attributes:
        base: hash of the task's model; None for the fleet's first.
        trained_by: who made the adapter.
        accepted: whether the adapter entered service; it did not if the whole model got worse with it.
        reason: why the lease failed, in the words of the server or of the device.
    """

    step: int
    device: str
    lease: str
    task: str
    kind: Kind
    state: State
    at_server: bool
    base: str | None
    retention: float | None
    emulator_name: str | None
    predicted_bytes: int
    measured_bytes: int | None
    predicted_delay_s: float
    measured_delay_s: float | None
    predicted_perplexity: float | None
    measured_perplexity: float | None
    perplexity_before: float | None
    trained_by: Literal["server", "device"] | None
    accepted: bool | None
    reason: str


class StepDetail(Shown):
    """A step and its leases, in the order of the decisions."""

    version: Literal[1] = 1
    summary: StepSummary
    leases: list[LeaseDetail]
