"""Messages between server and devices; version 1, JSON over HTTPS, all of them below ``/v1``.

Devices pull. A device reports that it has a task, waits for a lease, moves the bytes that the lease names, trains if
the lease says so, and returns the result. Whatever a device sends may arrive twice: reports are told apart by
their task, everything else by its lease, and what was counted is not counted again.

| method and path | body | answer |
|---|---|---|
| ``POST /v1/enrolment`` | ``Enrolment`` | 204; 403 for a token that is unknown or was used with another key |
| ``GET /v1/fleet`` | | ``FleetInfo`` |
| ``POST /v1/reports`` | ``Report`` | 204; 429 while too many tasks wait for a decision; 422 if nobody can train it |
| ``GET /v1/lease?wait=SECONDS`` | | ``Lease``, or 204 if there is none yet |
| ``GET /v1/shards/{sha256}`` | | a shard of the catalogue; answers ``Range: bytes=N-`` |
| ``GET /v1/tokenizer/{name}?model=BASE`` | | a file of a model's tokenizer, the first's if none is named |
| ``GET /v1/leases/{lease}/adapter`` | | the adapter that training starts from, or with ``upload`` the one trained |
| ``GET /v1/leases/{lease}/data`` | | ``Received``: how far an upload is |
| ``PATCH /v1/leases/{lease}/data?offset=N`` | the bytes from N on | ``Received``; 409 if N is not how far it is |
| ``POST /v1/leases/{lease}/transferred`` | ``Transferred`` | 204 |
| ``PUT /v1/leases/{lease}/adapter`` | the adapter's file | 204; 422 if it is none, or belongs elsewhere |
| ``POST /v1/leases/{lease}/result`` | ``Result`` | 204 |
| ``POST /v1/leave`` | | 204 |

All but enrolment carry ``Authorization: Bearer KEY``, where KEY is the hexadecimal key that the device drew.

A fleet serves one foundation model or several. What is said only where there are several is left out where there is
one, so that devices which know of no others take part in such a fleet.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

VERSION = 1

Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
ModelName = Annotated[str, Field(pattern="^[0-9A-Za-z][0-9A-Za-z._-]{0,63}$")]
EmulatorName = Annotated[str, Field(max_length=200)]
DeviceName = Annotated[str, Field(pattern="^[a-z0-9][a-z0-9-]{0,31}$")]
Identifier = Annotated[str, Field(pattern="^[0-9A-Za-z-]{1,64}$")]
Seconds = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]
Bytes = Annotated[int, Field(ge=0, le=1 << 50)]
Watts = Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]
Perplexity = Annotated[float, Field(gt=0, le=1e30, allow_inf_nan=False)]


def _absent(value: object) -> bool:
    return not value


class Message(BaseModel):
    """What all messages have in common: nothing unknown, nothing changed after it was read."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Enrolment(Message):
    """A device takes its place with the one-time token from its credentials file.

    Attributes:
        key_sha256: of the key that the device drew and keeps; the server never sees the key before it is used.
    """

    device: DeviceName
    token: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    key_sha256: Sha256


class ModelInfo(Message):
    """A foundation model, as devices have to know it.

    Attributes:
        model: its name, which the folders of its texts have; None where the fleet serves one.
        base: its hash.
        config: its transformers configuration.
        tokenizer: names of the tokenizer's files, with their SHA-256.
        smallest_bytes: of the smallest emulator.
    """

    model: ModelName | None = Field(default=None, exclude_if=_absent)
    base: Sha256
    config: dict[str, object]
    layers: int
    bottom: int
    top: int
    tokenizer: dict[str, Sha256]
    smallest_bytes: Bytes

    @property
    def called(self) -> str:
        """What people know it by."""
        return self.model or self.base[:12]


class FleetInfo(ModelInfo):
    """What a device has to know before its first task: the fleet, its first model, and the other ones.

    Attributes:
        name: of the fleet.
        others: the models beside the first.
    """

    version: Literal[1] = 1
    name: str
    others: tuple[ModelInfo, ...] = Field(default=(), max_length=63, exclude_if=_absent)

    @property
    def models(self) -> tuple[ModelInfo, ...]:
        """All models that the fleet serves."""
        return (self, *self.others)


class Report(Message):
    """A device has a task.

    Attributes:
        task: identifies the task on this device; a report of the same task counts once.
        data_bytes, data_sha256: of the task's text, UTF-8.
        perplexity_ratio: perplexity of the cached emulator on the task's text, over that on the
            catalogue's calibration text; None if the device holds no emulator.
        gain: power gain of the link, until a transfer was measured; None where it is not known, or links are shaped,
            whose gains the server draws.
        emulator: name of the cached emulator, whole and verified.
        model: hash of the task's model, which ratio and emulator are of; None for the fleet's first.
        held: of all models that the device has trained against, the last first, the hash, and the name of the emulator
            that is there, or None if it made room; left out where the fleet serves one.
        cache_bytes: the most that the device's cache may hold.
        memory_bytes: of the largest emulator that the device can train with; None if only its cache is a limit.
        private: the data may not leave the device.
        transmit_w, compute_w: power that sending and training take; None where the device does not know.
    """

    task: Identifier
    data_bytes: Annotated[int, Field(ge=1, le=1 << 40)]
    data_sha256: Sha256
    perplexity_ratio: Perplexity | None = None
    gain: Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)] | None = None
    emulator: EmulatorName | None = None
    model: Sha256 | None = Field(default=None, exclude_if=_absent)
    held: tuple[tuple[Sha256, EmulatorName | None], ...] = Field(
        default=(), max_length=64, exclude_if=_absent
    )
    cache_bytes: Annotated[int, Field(ge=1, le=1 << 50)]
    memory_bytes: Annotated[int, Field(ge=0, le=1 << 50)] | None = None
    private: bool = False
    transmit_w: Watts | None = Field(default=None, exclude_if=_absent)
    compute_w: Watts | None = Field(default=None, exclude_if=_absent)


class Training(Message):
    """How the adapter is trained, on the device and at the server alike."""

    adapter: Literal["layers", "lora", "bottleneck"] = "lora"
    width: int = Field(default=8, ge=1, le=1024)
    steps: int = Field(default=20, ge=1, le=1_000_000)
    batch: int = Field(default=4, ge=1, le=4096)
    learning_rate: float = Field(default=1e-3, gt=0, le=1)
    block: int = Field(default=128, ge=8, le=1 << 20)
    seed: int = Field(default=0, ge=0)


class Lease(Message):
    """What one device is to do in one step; valid until its deadline, the same however often it is fetched.

    Attributes:
        lease: idempotency key of everything that the device sends about it.
        kind: ``train`` fetches an emulator and trains on the device (z = 0), ``upload`` sends the data and
            fetches the adapter that the server trained (z = 1), ``stop`` ends the device's work.
        task: which of the device's tasks.
        emulator: manifest of the emulator to hold, as JSON of ``emutune.tuning.manifest.Emulator``; ``train`` only.
        keep: bases of the models whose emulators stay on the device beside that one; all others make room.
        start: SHA-256 of the adapter in service, from which training starts; None for the first.
        rate_bps: what the link of this device can carry in this step, in bits/s of wall time; None if not shaped.
        training_s: how long training on the device lasts at least; None if as long as it takes.
        deadline_s: seconds from when it was fetched until its result comes late.
    """

    version: Literal[1] = 1
    lease: Identifier
    step: int = Field(ge=0)
    kind: Literal["train", "upload", "stop"]
    task: str = ""
    emulator: dict[str, object] | None = None
    keep: tuple[Sha256, ...] = Field(default=(), max_length=64, exclude_if=_absent)
    start: Sha256 | None = None
    training: Training = Training()
    rate_bps: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    training_s: Seconds | None = None
    deadline_s: Seconds = 0.0


class Received(Message):
    """How much of an upload the server has."""

    bytes: Bytes
    complete: bool


class Transferred(Message):
    """The bytes of a lease have arrived: an emulator's missing shards, or the data.

    Attributes:
        seconds: wall time from the lease's arrival.
        bytes: payload that this device moved for the lease, over all its attempts, each byte once.
    """

    seconds: Seconds
    bytes: Bytes


class Result(Message):
    """A lease is done.

    Attributes:
        outcome: ``trained`` with an adapter, ``received`` the server's adapter, or ``failed`` with a reason.
        adapter: SHA-256 of the adapter that was put.
        before, after: perplexity of the emulator on the device's own held-back text.
        training_s: wall time of training.
    """

    outcome: Literal["trained", "received", "failed"]
    reason: Annotated[str, Field(max_length=500)] = ""
    adapter: Sha256 | None = None
    before: Perplexity | None = None
    after: Perplexity | None = None
    training_s: Seconds | None = None
