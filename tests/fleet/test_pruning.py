"""A ledger made shorter: what a server goes on with stays, whatever comes between."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from ledgers import add_devices, decision, digest, report, run_step
from typer.testing import CliRunner

from emutune.cli import ledger as command
from emutune.cli.ledger import group
from emutune.fleet import pruning
from emutune.fleet.config import LOCK
from emutune.fleet.ledger import Closed, Decision, Ledger
from emutune.fleet.pruning import Prunable, give_space_back

DEVICES = ("ue1", "ue2", "gone", "late", "trainer", "mover", "idle")
# Each is needed for another reason; see ``long_ledger``.
NEEDED = (1, 2, 3, 4, 5, 39)
STEPS = 60
BEGIN = datetime(2026, 1, 1, tzinfo=UTC)


def long_ledger(path: Path, steps: int = STEPS) -> None:
    """Steps of two devices an hour each, and early ones of devices that are not there any more."""
    moment = BEGIN

    def now() -> datetime:
        return moment

    with Ledger(path, now) as ledger:
        ledger._database.execute("PRAGMA synchronous = OFF")
        add_devices(ledger, *DEVICES)
        run_step(ledger, 0, "ue1", "ue2")
        run_step(ledger, 1, "ue1", "ue2", "gone")  # whose adapter is in service
        other_step(ledger, 2, "expired", decision(2, "late", kind="upload", at_server=True))
        ledger.data_complete("2-late")  # so the server has to train
        other_step(ledger, 3, "failed", decision(3, "trainer"))  # may still fetch the emulator
        other_step(ledger, 4, "failed", decision(4, "mover", kind="upload", at_server=True))
        ledger.transferred("4-mover", 1.0, 10)  # says what the link is worth
        others = ("gone", "late", "trainer", "mover")
        other_step(
            ledger, 5, "failed", *(decision(5, name, kind="upload", at_server=True) for name in others)
        )
        ledger.report("idle", report("undecided"))
        for step in range(6, steps):
            moment = BEGIN + timedelta(hours=step)
            run_step(ledger, step, "ue1", "ue2", accepted=step < 40)
            ledger.audit("data deleted", "ue1", f"{step}-ue1", "after training")
        ledger.report("ue1", report(f"ue1-{steps}"))


def other_step(ledger: Ledger, step: int, state: Closed, *decided: Decision) -> None:
    for row in decided:
        ledger.report(row.device, report(row.task))
    ledger.begin_step(step, decided)
    for row in decided:
        ledger.close_lease(row.lease, state)
    ledger.end_step(step, 1.0)


def goes_on_with(path: Path) -> dict[str, object]:
    """All that a server asks a ledger for, beside what is written from now on."""
    with Ledger(path) as ledger:
        return {
            "last": (ledger.last_step(), ledger.step_ended(ledger.last_step())),
            "lost": ledger.devices_of(ledger.last_step(), "expired"),
            "reports": ledger.open_reports(),
            "open": ledger.open_leases(),
            "unfinished": ledger.unfinished_leases(),
            "devices": ledger.devices(),
            "keys": [ledger.device_of_key(digest(f"key {device}")) for device in DEVICES],
            "service": [ledger.in_service(device) for device in DEVICES],
            "training": [ledger.last_training(device) for device in DEVICES],
            "transfers": [
                ledger.transfers(device, kind, shared)[-1:]
                for device in DEVICES
                for kind in ("train", "upload")
                for shared in (True, False)
            ],
            "late": ledger.report_of("late", "late-2"),
            "totals": (ledger.totals(), ledger.trained()),
        }


def test_a_server_goes_on_with_the_same(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    long_ledger(path)
    before = goes_on_with(path)
    with Prunable(path) as ledger:
        old = ledger.old(keep=10)
        expected = ledger.would_go(old)
        assert ledger.prune(old) == expected
        assert ledger.kept(old) == len(NEEDED)
        assert (expected.steps, ledger.prune(old)) == (STEPS - 10 - len(NEEDED), pruning.Pruned())
    assert goes_on_with(path) == before
    with Ledger(path) as ledger:
        assert {row.step for row in ledger.comparison()} == {*NEEDED, *range(STEPS - 10, STEPS)}
        assert not ledger.report("ue2", report(f"ue2-{STEPS - 1}")), "what was decided on stays decided"
        run_step(ledger, STEPS, "ue1", "ue2")
        assert ledger.in_service("ue1") == digest(f"{STEPS}-ue1"), "what is accepted now comes after what was"
        noted = [row.event for row in ledger.audit_rows()]
        assert noted.count("pruned") == 1
        assert noted.count("data deleted") == 10


def test_what_was_over_at_a_moment_goes(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    long_ledger(path)
    with Prunable(path) as ledger:
        ledger.prune(ledger.old(before=BEGIN + timedelta(hours=30)))
    with Ledger(path) as ledger:
        assert {row.step for row in ledger.comparison()} == {*NEEDED, *range(30, STEPS)}


def test_pieces_are_small_and_come_to_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ledger.sqlite"
    long_ledger(path)
    before = goes_on_with(path)
    for name in ("_LEASES_AT_ONCE", "_ROWS_AT_ONCE", "_PAGES_AT_ONCE"):
        monkeypatch.setattr(pruning, name, 3)
    with Prunable(path) as ledger:
        old = ledger.old(keep=10)
        assert ledger.would_go(old) == ledger.prune(old)
    assert give_space_back(path)
    assert goes_on_with(path) == before


def test_a_kill_at_any_statement_loses_nothing_that_is_needed(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    long_ledger(path, 9)
    expected = goes_on_with(path)
    program = Path(__file__).with_name("write_ledger.py")
    died = subprocess.run(
        [sys.executable, str(program), "prune", str(path)], capture_output=True, text=True, check=True
    )
    copies = int(died.stdout)
    assert copies > 10
    for number in range(1, copies + 1):
        assert goes_on_with(tmp_path / str(number)) == expected, number


def test_the_file_shrinks_while_it_is_written_to(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    long_ledger(path)
    with Ledger(path) as server:
        for step in range(STEPS, STEPS + 200):
            run_step(server, step, "ue1", "ue2")
        server.begin_step(STEPS + 200, [decision(STEPS + 200, "ue1")])
        size = path.stat().st_size
        with Prunable(path) as ledger:
            ledger.prune(ledger.old(keep=10))
        assert give_space_back(path)
        assert path.stat().st_size < size / 2
        server.transferred(f"{STEPS + 200}-ue1", 1.0, 10)
        assert server.close_lease(f"{STEPS + 200}-ue1", "done")


def test_an_older_file_shrinks_once_no_server_uses_it(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    long_ledger(path)
    with sqlite3.connect(path, isolation_level=None) as database:
        database.execute("PRAGMA auto_vacuum = NONE")
        database.execute("VACUUM")
    database.close()
    with Prunable(path) as ledger:
        ledger.prune(ledger.old(keep=1))
    size = path.stat().st_size
    from filelock import FileLock

    with FileLock(tmp_path / LOCK):
        assert not give_space_back(path)
    assert give_space_back(path)
    assert path.stat().st_size < size


# The commands


def test_prune_says_what_goes_and_a_dry_run_changes_nothing(tmp_path: Path) -> None:
    path, figures = tmp_path / "ledger.sqlite", tmp_path / "figures.json"
    long_ledger(path)
    runner = CliRunner()
    before = path.read_bytes()
    told = runner.invoke(group, ["prune", str(path), "--keep", "10", "--dry-run"])
    assert told.output.startswith(f"would go: {STEPS - 10 - len(NEEDED)} steps with")
    assert path.read_bytes() == before
    done = runner.invoke(group, ["prune", str(path), "--keep", "10", "--json", str(figures)])
    assert done.output.startswith(told.output.splitlines()[0].replace("would go", "gone"))
    assert f"{len(NEEDED)} older steps stay" in done.output
    written = json.loads(figures.read_text("utf-8"))
    assert written["steps"] == STEPS - 10 - len(NEEDED)
    assert written["bytes"] == path.stat().st_size < written["bytes_before"]
    for arguments in ([], ["--keep", "1", "--before", "2026-01-01"]):
        assert "--keep, --before: give one" in str(
            runner.invoke(group, ["prune", str(path), *arguments]).exception
        )


@pytest.mark.parametrize(
    ("given", "steps"),
    [
        (["--steps", "2:4"], [2, 3]),
        (["--steps", "-2:"], [58, 59]),
        (["--steps", ":"], list(range(60))),
        (["--steps", "59:99"], [59]),
        (["--steps", "9:2"], []),
        ([], list(range(60))),
    ],
)
def test_only_the_steps_that_are_asked_for_are_read(
    tmp_path: Path, given: list[str], steps: list[int]
) -> None:
    path, figures = tmp_path / "ledger.sqlite", tmp_path / "figures.json"
    long_ledger(path)
    printed = CliRunner().invoke(group, [str(path), *given, "--json", str(figures)])
    written = json.loads(figures.read_text("utf-8"))
    assert sorted({lease["step"] for lease in written["leases"]}) == steps
    assert [step["step"] for step in written["steps"]] == steps
    assert written["steps_left_out"] == 60 - len(steps)
    assert written["totals"]["steps"] == 60
    assert (f"{60 - len(steps)} of 60 steps are not printed" in printed.output) == (len(steps) < 60)


def test_a_long_ledger_is_not_printed_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ledger.sqlite"
    long_ledger(path)
    monkeypatch.setattr(command, "_LEASES_SHOWN", 21)
    shown = CliRunner().invoke(group, ["show", str(path)]).output
    assert "49 ue2" not in shown
    assert "50 ue1" in shown
    assert "50 of 60 steps are not printed" in shown
    for wrong in ("5", "1:2:3", "a:b"):
        assert "--steps: must be A:B" in str(
            CliRunner().invoke(group, [str(path), "--steps", wrong]).exception
        )
    with Ledger(path) as ledger:
        assert ledger.last_steps(1) == range(59, 60), "at least one"
