"""How far steps and leases are, and what that brings with it; each a question to the ledger, and one transaction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from emutune.errors import FleetError
from emutune.fleet.adaptation import factors
from emutune.fleet.config import FleetConfig
from emutune.fleet.figures import FAILED
from emutune.fleet.ledger import Ledger
from emutune.fleet.protocol import Report, Result, Transferred
from emutune.fleet.rows import Kind, LeaseRow, Transfer
from emutune.fleet.server.families import Family
from emutune.fleet.server.judging import complexity_of
from emutune.fleet.server.leasing import KINDS, Known
from emutune.scenario import Scenario

_CLOSED = ("done", "failed")


class Gathered(NamedTuple):
    """Reports of devices that have nothing else to do, by their names, and how many are worth waiting for."""

    reports: list[tuple[str, Report]]
    expected: int


def gathered(ledger: Ledger, wanted: int | None) -> Gathered:
    """What a step can begin with; of devices that were lost in the last step no report is waited for.

    Args:
        ledger: which is asked.
        wanted: the most reports to wait for; those of all that take part if None.
    """
    busy, last = ledger.at_work(), ledger.last_step()
    taking_part = {
        row.name
        for row in ledger.devices()
        # Before the first step, whoever has credentials may be about to join.
        if (row.key_sha256 or last < 0) and not row.left and not row.revoked
    }
    count = len(taking_part - ledger.devices_of(last, "expired") - busy)
    reports = [(device, report) for device, report in ledger.open_reports() if device not in busy]
    return Gathered(sorted(reports, key=lambda row: row[0]), min(wanted or count, count) or 1)


def known_of(
    ledger: Ledger,
    config: FleetConfig,
    scenario: Scenario,
    step: int,
    tasks: Sequence[tuple[str, Family]],
) -> dict[str, Known]:
    """What is known of devices before a step, and of the foundation model of each one's task, beside their reports."""
    shared, weight = scenario.radio.sharing == "equal", scenario.quality.complexity_weight
    steps = config.steps.episode or scenario.fleet.tasks
    episode = range(step - step % steps, step)

    def transfers(device: str) -> dict[Kind, list[Transfer]]:
        if config.shaping.enabled:
            return {}
        return {kind: ledger.transfers(device, kind, shared=shared) for kind in KINDS}

    progress = factors(ledger.judged())
    return {
        device: Known(
            progress=progress.get((device, family.key), 1.0),
            complexity=complexity_of(ledger, weight, device, family),
            spent_j=ledger.spent_j(device, episode),
            tflops=None if config.shaping.enabled else ledger.speed(device),
            transfers=transfers(device),
            adapter=ledger.in_service(device, family.key),
        )
        for device, family in tasks
    }


def expire(ledger: Ledger, step: int) -> list[str]:
    """Close what devices have not done of a step; returns their names."""
    late = sorted(ledger.at_work(step))
    for row in ledger.step_leases(step) if late else ():
        if row.device in late:
            ledger.close_lease(row.lease, "expired")
    return late


def open_of(ledger: Ledger, step: int) -> list[str]:
    """The leases of a step that nothing has closed."""
    return [row.lease for row in ledger.open_leases() if row.step == step]


def end(ledger: Ledger, step: int) -> None:
    """A step is over; it took as long as the slowest device, as far as that is known."""
    delays = [row.delay_s for row in ledger.step_leases(step) if row.delay_s is not None]
    ledger.end_step(step, max(delays, default=0.0))


def devices_here(ledger: Ledger) -> set[str]:
    """The devices that have joined and not left."""
    return {row.name for row in ledger.devices() if row.key_sha256 and not row.left}


def row_of(ledger: Ledger, device: str, lease: str) -> LeaseRow:
    """A lease of a device.

    Raises:
        FleetError: it has no such lease.
    """
    row = ledger.lease(device, lease)
    if row is None:
        raise FleetError(f"lease {lease}: is not one of {device}")
    return row


def data_size(ledger: Ledger, device: str, lease: str) -> tuple[int, str]:
    """See ``Hub.data_size``."""
    report = ledger.report_of(device, row_of(ledger, device, lease).task)
    return report.data_bytes, report.data_sha256


def transferred(ledger: Ledger, device: str, lease: str, message: Transferred) -> None:
    """The bytes of a lease have moved, in so many seconds of the scenario."""
    row_of(ledger, device, lease)
    ledger.transferred(lease, message.seconds, message.bytes)
    finish(ledger, device, lease)


def ended(ledger: Ledger, device: str, lease: str, message: Result, time_scale: float = 1.0) -> None:
    """A device is done with a lease; the scenario's clock runs so many times as fast as the device's."""
    if ledger.lease(device, lease) is not None:
        if message.training_s is not None:
            ledger.trained_for(lease, message.training_s * time_scale)
        ledger.result(lease, message)
        finish(ledger, device, lease)


def failed(ledger: Ledger, row: LeaseRow, reason: str) -> None:
    """The server's work for a lease has failed."""
    ledger.audit(FAILED, row.device, row.lease, reason)
    ledger.close_lease(row.lease, "failed")


def finish(ledger: Ledger, device: str, lease: str) -> None:
    """Close a lease once everything about it is known."""
    row = row_of(ledger, device, lease)
    if row.result is None or row.state in _CLOSED:
        return
    if row.result.outcome == "failed" and not _trained_late(row):
        ledger.close_lease(lease, "failed")
    elif row.accepted is not None and row.transferred_s is not None:
        ledger.close_lease(lease, "done" if row.state == "open" else "late")


def _trained_late(row: LeaseRow) -> bool:
    """Whether the server trains for a device that no longer waits, so that its failure is not the last word."""
    return row.state == "expired" and row.kind == "upload" and row.data_complete
