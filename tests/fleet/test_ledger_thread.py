"""What is asked of a ledger from an event loop: done together, on the disk before it is answered, failing alone."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ledgers import add_devices, digest, report

from emutune.errors import LedgerError
from emutune.fleet.ledger import Ledger
from emutune.fleet.server.ledger_thread import LedgerThread

DEVICES = [f"ue{number}" for number in range(40)]


@pytest.fixture
def asked(tmp_path: Path) -> Iterator[LedgerThread]:
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        add_devices(ledger, *DEVICES)
    with LedgerThread(tmp_path / "ledger.sqlite") as asked:
        yield asked


async def held(asked: LedgerThread, *waiting: asyncio.Task[object]) -> None:
    """Let so much wait that it is done in one transaction."""
    go = threading.Event()
    first = asyncio.create_task(asked(lambda ledger: go.wait()))
    await asyncio.sleep(0.05)
    go.set()
    await asyncio.gather(first, *waiting, return_exceptions=True)


def commits(statements: list[str]) -> int:
    return statements.count("COMMIT")


def test_what_waits_is_one_transaction_and_on_the_disk_when_it_is_answered(asked: LedgerThread) -> None:
    statements: list[str] = []

    async def run() -> None:
        await asked(lambda ledger: ledger._database.set_trace_callback(statements.append))
        tasks = [asyncio.create_task(asked(Ledger.report, device, report("t"))) for device in DEVICES]
        await held(asked, *tasks)
        assert all(task.result() for task in tasks)
        with Ledger(asked.path) as other:
            assert len(other.open_reports()) == len(DEVICES)
        # With the question that held them back, or in the transaction after it.
        assert commits(statements) <= 3
        assert statements.count("RELEASE change") == len(DEVICES)

    asyncio.run(run())


def test_who_asks_is_told_after_the_commit(asked: LedgerThread) -> None:
    told: list[object] = []
    before_commit: list[int] = []

    def slow(statement: str) -> None:
        if statement == "COMMIT":
            time.sleep(0.1)
            before_commit.append(len(told))

    async def run() -> None:
        await asked(lambda ledger: ledger._database.set_trace_callback(slow))
        before_commit.clear()
        tasks = [asyncio.create_task(asked(Ledger.report, device, report("t"))) for device in DEVICES]
        for task in tasks:
            task.add_done_callback(told.append)
        await held(asked, *tasks)

    asyncio.run(run())
    assert set(before_commit) == {0}
    assert len(told) == len(DEVICES)


def test_what_fails_fails_alone(asked: LedgerThread) -> None:
    async def run() -> list[object]:
        known = asyncio.create_task(asked(Ledger.report, "ue1", report("t")))
        unknown = asyncio.create_task(asked(Ledger.report, "nobody", report("t")))
        wrong = asyncio.create_task(asked(lambda ledger: 1 // 0))
        await held(asked, known, unknown, wrong)
        return await asyncio.gather(known, unknown, wrong, return_exceptions=True)

    known, unknown, wrong = asyncio.run(run())
    assert known is True
    assert isinstance(unknown, LedgerError)
    assert isinstance(wrong, ZeroDivisionError)


def test_a_transaction_that_the_disk_refuses_is_done_again_one_by_one(asked: LedgerThread) -> None:
    tries: list[str] = []

    def refused(ledger: Ledger) -> None:
        tries.append("refused")
        with ledger._transaction() as database:
            database.execute("UPDATE devices SET has_left = 1")
            raise sqlite3.OperationalError("database or disk is full")

    async def run() -> list[object]:
        before = asyncio.create_task(asked(Ledger.report, "ue1", report("t")))
        failing = asyncio.create_task(asked(refused))
        after = asyncio.create_task(asked(Ledger.report, "ue2", report("t")))
        await held(asked, before, failing, after)
        return await asyncio.gather(before, failing, after, return_exceptions=True)

    before, failing, after = asyncio.run(run())
    assert (before, after) == (True, True)
    assert isinstance(failing, LedgerError)
    assert len(tries) == 2
    with Ledger(asked.path) as other:
        assert [device for device, _ in other.open_reports()] == ["ue1", "ue2"]
        assert not any(row.left for row in other.devices())


def test_others_write_meanwhile(asked: LedgerThread) -> None:
    """A transaction that began with reading, while another process wrote, is done again."""

    def read_then_write(ledger: Ledger) -> bool:
        assert ledger.devices()
        if not interrupted.is_set():
            interrupted.set()
            with Ledger(ledger.path) as other:
                other.report("ue3", report("t"))
        return ledger.report("ue1", report("t"))

    interrupted = threading.Event()
    assert asyncio.run(asked(read_then_write)) is True


def test_a_ledger_that_is_closed_says_so(tmp_path: Path) -> None:
    asked = LedgerThread(tmp_path / "ledger.sqlite")
    asked.close()
    with pytest.raises(LedgerError, match="is closed"):
        asyncio.run(asked(Ledger.devices))
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        ledger.set_meta("key", digest("value"))
    (tmp_path / "damaged.sqlite").write_bytes(b"no ledger of anybody" * 100)
    with pytest.raises(LedgerError):
        LedgerThread(tmp_path / "damaged.sqlite")
