"""Prediction against measurement: of every lease, of every step, and how far they are apart."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from itertools import groupby
from statistics import median
from typing import Literal


@dataclass(frozen=True)
class Comparison:
    """A lease, predicted and measured; None where nothing was predicted or measured.

    Attributes:
        base: hash of the task's foundation model; None for the fleet's first.
        at_server: z = 1.
        predicted_bytes, measured_bytes: payload that the device moved.
        predicted_delay_s, measured_delay_s: of that transfer and, where training takes time, of training, in seconds.
        predicted_training_s, measured_training_s: of training alone.
        predicted_joules, measured_joules: that the device spends; 0 where energy is not counted.
        predicted_perplexity, measured_perplexity: of the whole model with the adapter plugged in.
        perplexity_before: of the whole model without it.
        adapter_sha256: of the adapter that was trained.
        situation: what was known of the device when it was decided, as JSON; see ``Decision``.
        reason: why the lease failed, in the words of the server or of the device.
    """

    step: int
    device: str
    lease: str
    task: str
    base: str | None
    kind: Literal["train", "upload", "stop"]
    state: str
    at_server: bool
    retention: float | None
    emulator_name: str | None
    gain: float | None
    complexity: float | None
    rate_bps: float | None
    predicted_bytes: int
    measured_bytes: int | None
    predicted_delay_s: float
    measured_delay_s: float | None
    predicted_training_s: float
    measured_training_s: float | None
    predicted_joules: float
    measured_joules: float | None
    predicted_perplexity: float | None
    measured_perplexity: float | None
    perplexity_before: float | None
    adapter_sha256: str | None
    accepted: bool | None
    situation: str = "{}"
    reason: str = ""

    @property
    def trained_by(self) -> Literal["server", "device"] | None:
        """Who made the adapter; None while there is none."""
        if self.adapter_sha256 is None:
            return None
        return "server" if self.at_server else "device"


@dataclass(frozen=True)
class StepComparison:
    """The delay of a step, which is that of its slowest device (Eq. 8), in seconds.

    Attributes:
        measured_delay_s: None unless all that was to take time has been measured: of the others alone
            it would be compared with a prediction about all.
        error_percent: how far the measured delay is from the predicted one; None where either is missing.
    """

    step: int
    predicted_delay_s: float
    measured_delay_s: float | None
    error_percent: float | None


@dataclass(frozen=True)
class Errors:
    """Medians of the absolute differences between measured and predicted, in percent of the predicted.

    Attributes:
        delay_percent, steps: over the steps whose delay was predicted and measured; how many those are.
        energy_percent, devices: over the leases that were to take energy and did.
        bytes_percent, transfers: over the leases that were to move bytes and did.
        perplexity_percent, evaluations: over the leases whose adapter was evaluated.
    """

    delay_percent: float | None
    steps: int
    energy_percent: float | None
    devices: int
    bytes_percent: float | None
    transfers: int
    perplexity_percent: float | None
    evaluations: int


@dataclass(frozen=True)
class Deviations:
    """Absolute differences between measured and predicted, in percent of the predicted; only those that are there.

    Attributes:
        delays: one a step.
        energies, sizes, perplexities: at most one a lease.
    """

    delays: tuple[float, ...]
    energies: tuple[float, ...]
    sizes: tuple[float, ...]
    perplexities: tuple[float, ...]


def compare_steps(rows: Iterable[Comparison]) -> list[StepComparison]:
    """The steps of leases that are in the order of their steps."""
    return [_compare_step(step, list(leases)) for step, leases in groupby(rows, lambda row: row.step)]


def errors(rows: Sequence[Comparison]) -> Errors:
    """How far the measurements of a fleet are from what was predicted."""
    return medians([deviations(rows)])


def deviations(rows: Sequence[Comparison]) -> Deviations:
    """How far each measurement of some whole steps is from what was predicted."""
    return Deviations(
        _there(step.error_percent for step in compare_steps(rows)),
        _there(error_percent(row.predicted_joules, row.measured_joules) for row in rows),
        _there(error_percent(row.predicted_bytes, row.measured_bytes) for row in rows),
        _there(error_percent(row.predicted_perplexity, row.measured_perplexity) for row in rows),
    )


def medians(parts: Sequence[Deviations]) -> Errors:
    """The medians over several parts of a fleet's steps together."""
    delays, energies, sizes, perplexities = (
        [value for part in parts for value in getattr(part, field.name)] for field in fields(Deviations)
    )
    return Errors(*_median(delays), *_median(energies), *_median(sizes), *_median(perplexities))


def error_percent(predicted: float | None, measured: float | None) -> float | None:
    """The absolute difference in percent of what was predicted; None if that is nothing."""
    if not predicted or measured is None:
        return None
    return abs(measured - predicted) / predicted * 100


def _compare_step(step: int, leases: Sequence[Comparison]) -> StepComparison:
    predicted = max((lease.predicted_delay_s for lease in leases), default=0.0)
    measured = [lease.measured_delay_s for lease in leases if lease.measured_delay_s is not None]
    complete = all(lease.measured_delay_s is not None for lease in leases if lease.predicted_delay_s > 0)
    delay = max(measured) if measured and complete else None
    return StepComparison(step, predicted, delay, error_percent(predicted, delay))


def _there(values: Iterable[float | None]) -> tuple[float, ...]:
    return tuple(value for value in values if value is not None)


def _median(values: Sequence[float]) -> tuple[float | None, int]:
    """The median, and of how many it is."""
    return (median(values) if values else None), len(values)
