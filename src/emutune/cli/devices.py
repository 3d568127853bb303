"""The command ``devices``: who takes part in a fleet, what each can and may, and what it holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from emutune.cli.libraries import expect_libraries
from emutune.cli.options import JsonFile
from emutune.cli.serve import FleetArgument
from emutune.cli.terminal import print_table, write_json
from emutune.errors import UsageError

if TYPE_CHECKING:
    from emutune.fleet.ledger import Ledger
    from emutune.fleet.protocol import Report
    from emutune.fleet.rows import DeviceRow

_HEADINGS = ("device", "is", "MB", "data", "holds", "TFLOP/s", "leases", "adapters")


@dataclass(frozen=True)
class Known:
    """What a ledger knows of a device; None where the device did not say, or nothing was measured.

    Attributes:
        state: ``expected`` until it enrols, then ``here``, ``left`` or ``revoked``.
        memory_bytes: of the largest emulator that it can hold and train with.
        private: its data do not leave it.
        holds: names of the emulators that it reported last, the one used last first.
        tflops: training speed.
        leases: that came to their end, by state.
        transmit_w, compute_w: power that sending and training take.
        adapters: SHA-256 of those in service, one for each model.
    """

    name: str
    state: str
    memory_bytes: int | None
    private: bool | None
    holds: list[str]
    transmit_w: float | None
    compute_w: float | None
    tflops: float | None
    leases: dict[str, int]
    adapters: list[str]


def devices(fleet: FleetArgument, json_file: JsonFile = None) -> None:
    """Say who takes part in a fleet, what each device can and may, what it holds, and how fast it trains."""
    expect_libraries("fleet", "devices")
    from emutune.fleet.config import LEDGER, load_fleet
    from emutune.fleet.ledger import Ledger

    database = load_fleet(fleet).server.directory / LEDGER
    if not database.is_file():
        raise UsageError(f"{database}: does not exist; add a device with emutune enroll {fleet} NAME")
    with Ledger(database) as ledger:
        reports = ledger.last_reports()
        known = [_known(ledger, row, reports) for row in ledger.devices()]
    print_table(_HEADINGS, [_cells(device) for device in known])
    write_json(json_file, {"devices": [asdict(device) for device in known]})


def _known(ledger: Ledger, row: DeviceRow, reports: Mapping[str, Report]) -> Known:
    report = reports.get(row.name)
    sizes = () if report is None else (report.cache_bytes, report.memory_bytes)
    return Known(
        name=row.name,
        state="revoked" if row.revoked else "left" if row.left else "here" if row.key_sha256 else "expected",
        memory_bytes=min((size for size in sizes if size is not None), default=None),
        private=None if report is None else report.private,
        holds=[] if report is None else _held(report),
        transmit_w=None if report is None else report.transmit_w,
        compute_w=None if report is None else report.compute_w,
        tflops=ledger.speed(row.name),
        leases=dict(Counter(ledger.states_of(row.name))),
        adapters=ledger.adapters_of(row.name),
    )


def _held(report: Report) -> list[str]:
    names = (name for _, name in report.held) if report.held else (report.emulator,)
    return [name for name in names if name is not None]


def _cells(device: Known) -> tuple[str, ...]:
    memory = "" if device.memory_bytes is None else f"{device.memory_bytes / 1e6:.3g}"
    data = "" if device.private is None else "private" if device.private else "may come"
    speed = "" if device.tflops is None else f"{device.tflops:.3g}"
    leases = ", ".join(f"{count} {state}" for state, count in sorted(device.leases.items()))
    # Of a name the retention is what tells emulators apart.
    holds = ", ".join(f"E {name.rpartition('-')[2]}" for name in device.holds)
    return device.name, device.state, memory, data, holds, speed, leases, str(len(device.adapters))
