"""What the dashboard asks of the ledger: a few queries over all devices, leases and refusals at once.

The questions are asked again and again of tables that only grow. So what was read of a step is kept until one of
its leases has got further, and of the audit only the rows since the last time are read.
"""

from __future__ import annotations

import sqlite3
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from emutune.fleet.comparison import Comparison, Deviations, Errors, compare_steps, deviations, medians
from emutune.fleet.figures import FAILED, REASON
from emutune.fleet.ledger import Ledger
from emutune.fleet.rows import Kind, State
from emutune.fleet.server.dashboard.messages import (
    Audit,
    Fault,
    LeaseDetail,
    Noted,
    StepDetail,
    StepSummary,
)

_SHOWN_ROWS = 50
_DELETED = "data deleted"
_DEVICES = """
    SELECT name, has_left, revoked, key_sha256 IS NOT NULL AS enrolled, enrolled_at FROM devices
    JOIN (SELECT device, max(id) AS last FROM credentials GROUP BY device) AS mine ON mine.device = devices.name
    JOIN credentials ON credentials.id = mine.last
    ORDER BY devices.id
"""
_REPORTS = """
    SELECT reports.device, json_extract(reports.message, '$.emulator') AS emulator,
        json_extract(reports.message, '$.model') AS base, received_at, NOT EXISTS (
        SELECT 1 FROM leases WHERE kind <> 'stop' AND leases.device = reports.device AND leases.task = reports.task
    ) AS undecided
    FROM devices CROSS JOIN reports ON reports.id = (SELECT max(id) FROM reports WHERE device = devices.name)
"""
_LAST_LEASES = """
    SELECT device, lease, step, kind, state, retention, base, emulator_name, predicted_bytes, transferred_bytes,
        data_complete, adapter_sha256 IS NOT NULL AS adapter, outcome IS NOT NULL AS told, opened_at
    FROM devices CROSS JOIN leases ON leases.id = (
        SELECT max(id) FROM leases WHERE device = devices.name AND kind <> 'stop'
    )
"""
# Marks of a lease only ever grow, so whatever changes a comparison changes one of the counts.
_PROGRESS = """
    SELECT step, count(*) AS leases, total(at_server) AS at_server, count(transferred_bytes) AS moved,
        total(transferred_bytes) FILTER (WHERE kind = 'train') AS emulator_bytes,
        total(transferred_bytes) FILTER (WHERE kind = 'upload') AS data_bytes,
        total(adapter_bytes) AS adapter_bytes, count(adapter_sha256) AS adapters, count(outcome) AS told,
        count(*) FILTER (WHERE accepted = 1) AS accepted, count(*) FILTER (WHERE accepted = 0) AS refused,
        count(*) FILTER (WHERE state = 'open') AS open, count(*) FILTER (WHERE state = 'failed') AS failed,
        count(*) FILTER (WHERE state = 'expired') AS expired, count(*) FILTER (WHERE state = 'late') AS late
    FROM leases {which} GROUP BY step ORDER BY step
"""
_FAULTS = f"""
    SELECT step, device, lease, state, closed_at, {REASON}
    FROM leases WHERE state IN ('failed', 'expired', 'late') ORDER BY id DESC LIMIT ?
"""


@dataclass(frozen=True)
class DeviceNow:
    """What the ledger says of a device itself.

    Attributes:
        emulator: that it had when it last reported.
        base: hash of the model that this is of; None for the fleet's first.
        undecided: it reported a task that no lease is about yet.
    """

    name: str
    left: bool
    revoked: bool
    enrolled: bool
    enrolled_at: str | None
    reported_at: str | None
    emulator: str | None
    base: str | None
    undecided: bool


@dataclass(frozen=True)
class LastLease:
    """The last lease of a device, and how far it is.

    Attributes:
        base: hash of the task's model; None for the fleet's first.
        adapter: one was trained.
        told: the device said how it went.
    """

    device: str
    lease: str
    step: int
    kind: Kind
    state: State
    retention: float | None
    base: str | None
    emulator_name: str | None
    predicted_bytes: int
    transferred_bytes: int | None
    data_complete: bool
    adapter: bool
    told: bool
    opened_at: str


@dataclass(frozen=True)
class _Step:
    """What was read of a step, in which revision, and the counts that were true then."""

    revision: int
    counts: tuple[object, ...]
    summary: StepSummary
    apart: Deviations


class Reading(Ledger):
    """A ledger that is only read, by the thread that opened it.

    Attributes:
        revision: grows whenever a step has got further, and from one server to the next.

    Raises:
        LedgerError: see ``Ledger``.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._database.execute("PRAGMA query_only = ON")
        # Steps are read twice a second at most, so no later server begins below this one.
        self.revision = time.time_ns() // 1_000_000
        self._steps: dict[int, _Step] = {}
        self._audited = 0
        self._events: dict[tuple[str, bool], int] = {}
        self._refusals: deque[Noted] = deque(maxlen=_SHOWN_ROWS)
        self._deletions: deque[Noted] = deque(maxlen=_SHOWN_ROWS)

    @contextmanager
    def moment(self) -> Iterator[None]:
        """All that is read in the block was true at the same time."""
        with self._explained():
            self._database.execute("BEGIN")
        try:
            yield
        finally:
            if self._database.in_transaction:
                self._database.execute("ROLLBACK")

    def devices_now(self) -> list[DeviceNow]:
        """All devices, in the order in which they were added."""
        reports = {row["device"]: row for row in self._all(_REPORTS)}
        return [_device_now(row, reports.get(row["name"])) for row in self._all(_DEVICES)]

    def last_leases(self) -> dict[str, LastLease]:
        """The last lease of every device that had one."""
        flags = ("data_complete", "adapter", "told")
        return {
            row["device"]: LastLease(**{**dict(row), **{name: bool(row[name]) for name in flags}})
            for row in self._all(_LAST_LEASES)
        }

    def steps(self) -> list[StepSummary]:
        """All steps, in their order."""
        begun = {
            row["number"]: row for row in self._all("SELECT number, begun_at, ended_at, delay_s FROM steps")
        }
        self.revision += 1
        rows = self._all(_PROGRESS.format(which=""))
        for pruned in self._steps.keys() - {row["step"] for row in rows}:
            del self._steps[pruned]
        for row in rows:
            known, step = self._steps.get(row["step"]), begun[row["step"]]
            counts = (*row, step["ended_at"])
            if known is None or known.counts != counts:
                self._steps[row["step"]] = self._read_step(row, step, counts)
        return [self._steps[number].summary for number in sorted(self._steps)]

    def revisions(self) -> dict[int, int]:
        """In which revision each step was read last."""
        return {number: step.revision for number, step in self._steps.items()}

    def steps_ended(self) -> int:
        """How many steps are over."""
        return int(self._all("SELECT count(ended_at) AS n FROM steps")[0]["n"]) + self.pruned().get(
            "steps", 0
        )

    def errors(self) -> Errors:
        """How far prediction and measurement are apart, over the steps that were read last."""
        return medians([step.apart for step in self._steps.values()])

    def step_detail(self, number: int) -> StepDetail | None:
        """A step with its leases; None if it was not begun."""
        step = self._one("SELECT number, begun_at, ended_at, delay_s FROM steps WHERE number = ?", number)
        row = self._one(_PROGRESS.format(which=f"WHERE step = {number:d}"))
        if step is None or row is None:
            return None
        return StepDetail(
            summary=self._read_step(row, step, ()).summary,
            leases=[_lease_detail(lease) for lease in self.comparison(number)],
        )

    def faults(self) -> list[Fault]:
        """The last leases that failed or were not done in time, newest first."""
        return [Fault(**dict(row)) for row in self._all(_FAULTS, _SHOWN_ROWS)]

    def audit_so_far(self) -> Audit:
        """What was refused and deleted."""
        last = self._audited
        for row in self._all(
            "SELECT event, device IS NULL AS unknown, count(*) AS n, max(id) AS last FROM audit WHERE id > ?"
            " GROUP BY event, device IS NULL",
            last,
        ):
            kind = (row["event"], bool(row["unknown"]))
            self._events[kind] = self._events.get(kind, 0) + row["n"]
            self._audited = max(self._audited, row["last"])
        if self._audited > last:
            self._note(self._deletions, "event = ?", last)
            # A lease that failed is shown among the faults.
            self._note(self._refusals, f"event NOT IN (?, 'pruned', '{FAILED}')", last)
        of = self._events.get
        return Audit(
            strangers=of(("refused", True), 0),
            of_devices=of(("refused", False), 0),
            damaged=of(("damaged upload", True), 0) + of(("damaged upload", False), 0),
            deleted=of((_DELETED, True), 0) + of((_DELETED, False), 0),
            refusals=list(self._refusals),
            deletions=list(self._deletions),
        )

    def _note(self, shown: deque[Noted], which: str, after: int) -> None:
        rows = self._all(
            f"SELECT at, event, device, lease, detail FROM audit WHERE id > ? AND {which} ORDER BY id DESC LIMIT ?",
            after,
            _DELETED,
            _SHOWN_ROWS,
        )
        shown.extendleft(Noted(**dict(row)) for row in reversed(rows))

    def _read_step(self, row: sqlite3.Row, step: sqlite3.Row, counts: tuple[object, ...]) -> _Step:
        leases = self.comparison(row["step"])
        (compared,) = compare_steps(leases)
        predicted, measured = _mean_perplexities(leases)
        names = (
            "leases",
            "at_server",
            "emulator_bytes",
            "data_bytes",
            "adapter_bytes",
            "accepted",
            "refused",
        )
        summary = StepSummary(
            step=row["step"],
            begun_at=step["begun_at"],
            ended_at=step["ended_at"],
            predicted_delay_s=compared.predicted_delay_s,
            measured_delay_s=compared.measured_delay_s,
            known_delay_s=step["delay_s"],
            error_percent=compared.error_percent,
            predicted_perplexity=predicted,
            measured_perplexity=measured,
            perplexity_before=_mean([lease.perplexity_before for lease in leases]),
            **{name: int(row[name]) for name in (*names, "open", "failed", "expired", "late")},
        )
        return _Step(self.revision, counts, summary, deviations(leases))


def _device_now(row: sqlite3.Row, report: sqlite3.Row | None) -> DeviceNow:
    return DeviceNow(
        name=row["name"],
        left=bool(row["has_left"]),
        revoked=bool(row["revoked"]),
        enrolled=bool(row["enrolled"]),
        enrolled_at=row["enrolled_at"],
        reported_at=None if report is None else report["received_at"],
        emulator=None if report is None else report["emulator"],
        base=None if report is None else report["base"],
        undecided=report is not None and bool(report["undecided"]),
    )


def _lease_detail(lease: Comparison) -> LeaseDetail:
    return LeaseDetail(**{name: getattr(lease, name) for name in LeaseDetail.model_fields})


def _mean_perplexities(leases: Sequence[Comparison]) -> tuple[float | None, float | None]:
    """Predicted and measured, over the leases that have both."""
    both = [
        (lease.predicted_perplexity, lease.measured_perplexity)
        for lease in leases
        if lease.predicted_perplexity is not None and lease.measured_perplexity is not None
    ]
    return _mean([predicted for predicted, _ in both]), _mean([measured for _, measured in both])


def _mean(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return fmean(there) if there else None
