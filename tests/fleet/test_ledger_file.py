"""The ledger as a file: killed writers, full disks, damage, other versions."""

from __future__ import annotations

import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ledgers import add_devices, decision, digest, report, run_step

from emutune.errors import LedgerError
from emutune.fleet import migrations
from emutune.fleet.ledger import Ledger

HERE = Path(__file__).parent
DEVICES = ("ue1", "ue2", "ue3")
PAGE = 4096


def writer(what: str, path: Path) -> subprocess.Popen[str]:
    """A real process that writes to a ledger."""
    return subprocess.Popen(
        [sys.executable, str(HERE / "write_ledger.py"), what, str(path)], stdout=subprocess.PIPE, text=True
    )


def acknowledged(process: subprocess.Popen[str]) -> list[list[str]]:
    """The words of all lines that a process wrote to its end."""
    written, _ = process.communicate(timeout=60)
    # A kill may leave half a line, which is then not an acknowledgement.
    return [line.split() for line in written.splitlines(keepends=True) if line.endswith("\n")]


def filled(path: Path, steps: int = 12) -> dict[str, int]:
    """A closed ledger of some steps; its totals."""
    with Ledger(path) as ledger:
        add_devices(ledger, *DEVICES)
        for step in range(steps):
            run_step(ledger, step, *DEVICES)
        return ledger.totals()


# Killed writers


def test_a_kill_at_any_moment_loses_nothing_acknowledged(tmp_path: Path) -> None:
    path, chance, said = tmp_path / "ledger.sqlite", random.Random(), []
    for _ in range(6):
        process = writer("write", path)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(chance.uniform(0.0, 0.25))
        process.send_signal(signal.SIGKILL)
        said += acknowledged(process)
        assert process.returncode == -signal.SIGKILL
        with Ledger(path) as ledger:
            check_writer(ledger, said)
    assert len(said) > 6, "the writers got somewhere"


def check_writer(ledger: Ledger, said: list[list[str]]) -> None:
    """All that was acknowledged is there, and every step is whole."""
    rows = {row.lease: row for step in range(ledger.last_step() + 1) for row in ledger.step_leases(step)}
    assert len(rows) == (ledger.last_step() + 1) * len(DEVICES)
    service = {}
    for what, *words in said:
        if what == "begun":
            assert int(words[0]) <= ledger.last_step()
        elif what == "transferred":
            assert rows[words[0]].transferred_bytes == 1000
        else:
            service[words[0]] = words[1]
    for device, adapter in service.items():
        mine = [row for row in rows.values() if row.device == device]
        assert adapter in {row.adapter_sha256 for row in mine if row.accepted}
        newest = max((row for row in mine if row.accepted), key=lambda row: row.step)
        assert ledger.in_service(device) == newest.adapter_sha256


def test_a_kill_before_any_statement_leaves_no_half_step(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    filled(path, 1)
    process = writer("die", path)
    last = int(acknowledged(process)[-1][0])
    assert last > 12, "so many statements there were at least"
    seen = []
    for number in range(1, last + 1):
        with Ledger(tmp_path / str(number)) as ledger:
            leases = [row.lease for row in ledger.step_leases(1)]
            assert leases == ([f"1-{device}" for device in DEVICES] if ledger.last_step() == 1 else [])
            totals = ledger.totals()
            service = ledger.in_service("ue1")
            assert service == digest("1-ue1" if totals["adapters.accepted"] == 4 else "0-ue1")
            seen.append((len(leases), totals["bytes.adapter"], totals["adapters.accepted"]))
            # And it goes on from there to the same end.
            run_step(ledger, 1, *DEVICES)
            assert ledger.totals()["adapters.accepted"] == 6
    assert seen == sorted(seen)
    assert sorted(set(seen)) == [(0, 192, 3), (3, 192, 3), (3, 256, 3), (3, 256, 4)]


@pytest.mark.parametrize("old", [True, False])
def test_a_kill_while_tables_are_made_or_changed_leaves_one_version(tmp_path: Path, old: bool) -> None:
    path = tmp_path / "ledger.sqlite"
    if old:
        write_version_1(path)
    last = int(acknowledged(writer("open", path))[-1][0])
    assert last > 5
    for number in range(1, last + 1):
        left = sqlite3.connect(tmp_path / str(number))
        assert left.execute("PRAGMA user_version").fetchone()[0] in (int(old), migrations.VERSION)
        left.close()
        with Ledger(tmp_path / str(number)) as ledger:
            assert ledger.last_step() == (1 if old else -1)
            ledger.set_meta("base", "new")


def test_a_full_disk_is_named_and_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    filled(path, 1)
    process = writer("fill", path)
    said = acknowledged(process)
    assert process.returncode == 0
    steps = [int(words[1]) for words in said if words[0] == "step"]
    failed = [" ".join(words[1:]) for words in said if words[0] == "error"]
    assert len(failed) == 1
    assert str(path) in failed[0]
    assert "nothing that was recorded is lost" in failed[0]
    assert said[-1][0] == "step", "with room again, the same ledger goes on"
    with Ledger(path) as ledger:
        assert steps == list(range(1, ledger.last_step() + 1))
        assert ledger.totals()["leases.train.done"] == 3 * (len(steps) + 1)


def test_two_processes_write_side_by_side(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    with Ledger(path) as one, Ledger(path) as two:
        add_devices(one, "ue1")
        one.begin_step(0, [decision(0, "ue1")])
        assert two.transferred("0-ue1", 1.0, 5)
        assert not one.transferred("0-ue1", 1.0, 5)
        assert two.last_step() == 0


# Versions


def write_version_1(path: Path) -> None:
    """A ledger as version 1 left it."""
    database = sqlite3.connect(path)
    database.executescript((HERE / "ledger_v1.sql").read_text("utf-8"))
    database.close()


def test_an_older_ledger_is_brought_to_this_version(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    write_version_1(path)
    for _ in range(2):
        with Ledger(path) as ledger:
            assert ledger.meta("base") == digest("base")
            assert ledger.in_service("ue1") == digest("0-ue1")
            assert [(row.name, row.left) for row in ledger.devices()] == [("ue1", False), ("ue2", True)]
            assert ledger.device_of_key(digest("key ue2")) == "ue2"
            assert ledger.open_reports() == [("ue1", report("c"))]
            assert [row.lease for row in ledger.open_leases()] == ["1-ue1"]
            row = ledger.lease("ue1", "0-ue1")
            assert row is not None
            assert (row.state, row.transferred_s, row.adapter_bytes) == ("done", 2.5, None)
            assert row.base is None, "all that was before there were several models is of the first"
            assert (ledger.step_ended(0), ledger.step_ended(1), ledger.last_step()) == (True, False, 1)
            assert [row.lease for row in ledger.audit_rows()] == ["0-ue2"]
            ledger.adapter("1-ue1", digest("1-ue1"), 64)
            assert ledger.totals() == {
                "steps": 2,
                "leases.train.done": 1,
                "leases.train.open": 1,
                "leases.upload.expired": 1,
                "bytes.train": 1000,
                "bytes.adapter": 64,
                "adapters.accepted": 1,
            }
    with Ledger(path) as ledger:
        ledger.evaluation("1-ue1", 21.0, 20.0, True)
        assert ledger.in_service("ue1") == digest("1-ue1"), "what is accepted now comes after what was"


def test_an_older_ledger_gets_the_tables_of_a_new_one(tmp_path: Path) -> None:
    write_version_1(tmp_path / "old")
    shapes = []
    for name in ("old", "new"):
        with Ledger(tmp_path / name):
            pass
        database = sqlite3.connect(tmp_path / name)
        tables = [row[0] for row in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        columns = {table: database.execute(f"PRAGMA table_info({table})").fetchall() for table in tables}
        indices = set(database.execute("SELECT name FROM sqlite_master WHERE type = 'index'"))
        versions = [row[0] for row in database.execute("SELECT version FROM schema_version")]
        shapes.append((columns, indices, versions, database.execute("PRAGMA user_version").fetchone()))
        database.close()
    assert shapes[0] == shapes[1]
    assert shapes[0][2] == list(range(1, migrations.VERSION + 1))


def test_the_tables_of_version_1_stay_what_they_were(tmp_path: Path) -> None:
    write_version_1(tmp_path / "old")
    old, now = sqlite3.connect(tmp_path / "old"), sqlite3.connect(":memory:")
    for statement in migrations.MIGRATIONS[0]:
        now.execute(statement)
    query = "SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL ORDER BY name"
    both = [
        [(name, "".join(sql.split())) for name, sql in database.execute(query)] for database in (old, now)
    ]
    old.close()
    now.close()
    assert both[0] == both[1]


def test_a_newer_ledger_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    filled(path, 1)
    alter(path, f"PRAGMA user_version = {migrations.VERSION + 1}")
    before = path.read_bytes()
    with pytest.raises(LedgerError, match=r"written by a newer emutune \(version \d+ .* install that one"):
        Ledger(path)
    assert path.read_bytes() == before


def alter(path: Path, statement: str) -> None:
    """Change a database behind the ledger's back."""
    database = sqlite3.connect(path, isolation_level=None)
    database.execute(statement)
    database.close()


# Damage


def test_every_page_that_is_overwritten_is_noticed(tmp_path: Path) -> None:
    path, damaged = tmp_path / "ledger.sqlite", tmp_path / "damaged.sqlite"
    filled(path)
    whole = path.read_bytes()
    assert len(whole) // PAGE > 20
    for start in range(0, len(whole), PAGE):
        damaged.write_bytes(whole[:start] + b"\xa5" * PAGE + whole[start + PAGE :])
        with pytest.raises(LedgerError, match=r"damaged\.sqlite.*restore a copy of it, or move it"):
            Ledger(damaged)


@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.99])
def test_a_ledger_cut_short_is_refused(tmp_path: Path, share: float) -> None:
    path = tmp_path / "ledger.sqlite"
    filled(path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(LedgerError, match="restore a copy of it, or move it"):
        Ledger(path)


def test_what_is_no_ledger_is_refused_and_left_alone(tmp_path: Path) -> None:
    text, other = tmp_path / "text", tmp_path / "other"
    text.write_text("This is no database. " * 100, "utf-8")
    with pytest.raises(LedgerError, match="text: file is not a database; restore a copy"):
        Ledger(text)
    assert text.read_text("utf-8").startswith("This is no database.")
    alter(other, "CREATE TABLE contacts (name TEXT)")
    with pytest.raises(LedgerError, match="other: is no ledger of emutune; give another path"):
        Ledger(other)
    with pytest.raises(LedgerError, match="unable to open database file; give a path in a directory"):
        Ledger(tmp_path / "missing" / "ledger.sqlite")


@pytest.mark.parametrize(
    ("statement", "call"),
    [
        (f"DELETE FROM schema_version WHERE version = {migrations.VERSION}", lambda ledger: ledger.totals()),
        ("UPDATE leases SET message = '{}', state = 'open'", lambda ledger: ledger.open_lease("ue1")),
        ("UPDATE leases SET result = '{}'", lambda ledger: ledger.lease("ue1", "0-ue1")),
    ],
)
def test_content_that_cannot_be_read_is_named(tmp_path: Path, statement: str, call: object) -> None:
    path = tmp_path / "ledger.sqlite"
    filled(path, 1)
    alter(path, statement)
    assert callable(call)
    with pytest.raises(LedgerError, match=r"ledger\.sqlite: is damaged: .*restore a copy of it"):
        call_on(path, call)


def call_on(path: Path, call: object) -> None:
    """Open a ledger and read from it."""
    with Ledger(path) as ledger:
        assert callable(call)
        call(ledger)


def test_a_copy_of_a_ledger_at_rest_is_a_backup(tmp_path: Path) -> None:
    totals = filled(tmp_path / "ledger.sqlite")
    shutil.copy(tmp_path / "ledger.sqlite", tmp_path / "copy.sqlite")
    with Ledger(tmp_path / "copy.sqlite") as ledger:
        assert ledger.totals() == totals
