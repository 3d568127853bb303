"""A ledger made shorter: old steps and what was noted in their time go, what a server goes on with stays.

Steps go whole or not at all, so that whatever is still shown of one is true. Each transaction leaves a ledger that a
server can be started on, or goes on with if it runs; a kill between two leaves the rest for the next time.
"""

from __future__ import annotations

import sqlite3
import time
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path

from emutune.errors import LedgerError
from emutune.fleet.config import LOCK
from emutune.fleet.database import Database
from emutune.fleet.figures import Figures

# Of the old steps: all but those that somebody goes on with. Those are the last step, steps
# with a lease that is not over, and of every device the last lease of all, the last to train, the last of each
# kind whose bytes moved, and the one of each model whose adapter is in service. A report goes with the lease of its
# task, and not before.
_OLD = """
    SELECT number FROM steps WHERE ended_at IS NOT NULL AND {old} AND number NOT IN (
        SELECT max(number) FROM steps
        UNION SELECT step FROM leases INDEXED BY leases_open WHERE state = 'open'
        UNION SELECT step FROM leases WHERE state = 'expired' AND (data_complete = 1 OR adapter_sha256 IS NOT NULL)
        UNION SELECT step FROM leases WHERE id IN (
            SELECT (SELECT max(id) FROM leases WHERE device = name) FROM devices
            UNION SELECT (SELECT max(id) FROM leases WHERE device = name AND kind = 'train') FROM devices
            UNION SELECT max(id) FROM leases WHERE transferred_bytes > 0 GROUP BY device, kind
            UNION SELECT id FROM (SELECT id, max(judged) FROM leases WHERE accepted = 1 GROUP BY device, base)
        )
    )
"""
# Reports of tasks that were decided on go with their leases.
_LEFT_REPORTS = """
    received_at < ? AND id <> (SELECT max(id) FROM reports AS mine WHERE mine.device = reports.device)
    AND NOT EXISTS (SELECT 1 FROM leases WHERE kind <> 'stop'
        AND leases.device = reports.device AND leases.task = reports.task)
"""
# A server that waits for the lock gives up after some seconds, and has as much time for itself as this takes.
_LEASES_AT_ONCE = 2000
_ROWS_AT_ONCE = 10_000
_PAGES_AT_ONCE = 2000


@dataclass(frozen=True)
class Old:
    """Which steps are old, as a condition and its parameter, and the moment before which the rest is."""

    steps: str
    value: str | int
    moment: str


@dataclass(frozen=True)
class Pruned:
    """What went, or would go: rows."""

    steps: int = 0
    leases: int = 0
    reports: int = 0
    audit: int = 0

    def __add__(self, other: Pruned) -> Pruned:
        """Both together."""
        return Pruned(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))


class Prunable(Figures):
    """A ledger that can be made shorter, also while a server writes to it; see ``Ledger``."""

    def old(self, keep: int | None = None, before: datetime | None = None) -> Old:
        """What is old: all before the last so many steps, or what was over at some moment."""
        if before is not None:
            moment = before.astimezone(UTC).isoformat(timespec="milliseconds")
            return Old("ended_at < ?", moment, moment)
        rows = self._all("SELECT id, begun_at FROM steps ORDER BY id DESC LIMIT 1 OFFSET ?", (keep or 1) - 1)
        return Old("id < ?", rows[0]["id"], rows[0]["begun_at"]) if rows else Old("id < ?", 0, "")

    def would_go(self, old: Old) -> Pruned:
        """What ``prune`` would take away."""
        steps = _OLD.format(old=old.steps)
        row = self._all(
            f"WITH old AS ({steps}) SELECT (SELECT count(*) FROM old),"
            " (SELECT count(*) FROM leases WHERE step IN old),"
            " (SELECT count(*) FROM leases JOIN reports USING (device, task) WHERE step IN old AND kind <> 'stop')"
            f" + (SELECT count(*) FROM reports WHERE {_LEFT_REPORTS}), (SELECT count(*) FROM audit WHERE at < ?)",
            *(old.value, old.moment, old.moment),
        )[0]
        return Pruned(*row)

    def prune(self, old: Old) -> Pruned:
        """Take away old steps, with their leases and reports, and the audit of their time.

        What they counted for in ``totals`` is kept, the credentials too.

        Raises:
            LedgerError: see ``Ledger``.
        """
        gone = Pruned()
        while True:
            began = time.monotonic()
            some = self._prune_some(old)
            if some == Pruned():
                break
            gone += some
            time.sleep(time.monotonic() - began)
        if gone != Pruned():
            self._note(
                f"{gone.steps} steps, {gone.leases} leases, {gone.reports} reports, {gone.audit} rows of this"
            )
        return gone

    def kept(self, old: Old) -> int:
        """How many old steps are there, of which somebody goes on with each once all others were pruned."""
        return int(self._all(f"SELECT count(*) AS n FROM steps WHERE {old.steps}", old.value)[0]["n"])

    def _note(self, detail: str) -> None:
        with self._transaction() as database:
            database.execute(
                "INSERT INTO audit (event, detail, at) VALUES ('pruned', ?, ?)", (detail, self._time())
            )

    def _prune_some(self, old: Old) -> Pruned:
        """As much as one transaction may take away; nothing if there is nothing left to take."""
        with self._transaction() as database:
            steps = self._some_steps(old)
            if steps:
                return self._take_away(database, steps)
            audit = database.execute(
                "DELETE FROM audit WHERE id IN (SELECT id FROM audit WHERE at < ? LIMIT ?)",
                (old.moment, _ROWS_AT_ONCE),
            ).rowcount
            reports = database.execute(
                f"DELETE FROM reports WHERE id IN (SELECT id FROM reports WHERE {_LEFT_REPORTS} LIMIT ?)",
                (old.moment, _ROWS_AT_ONCE),
            ).rowcount
            return Pruned(reports=reports, audit=audit)

    def _some_steps(self, old: Old) -> list[int]:
        """The first of the steps that may go, at least one if there is any."""
        steps: list[int] = []
        leases = 0
        for row in self._all(
            "SELECT number, (SELECT count(*) FROM leases WHERE step = number) AS leases"
            f" FROM ({_OLD.format(old=old.steps)} ORDER BY number LIMIT ?)",
            *(old.value, _LEASES_AT_ONCE),
        ):
            leases += row["leases"]
            if steps and leases > _LEASES_AT_ONCE:
                break
            steps.append(row["number"])
        return steps

    def _take_away(self, database: sqlite3.Connection, steps: list[int]) -> Pruned:
        # As many parameters as there are steps, which SQLite allows.
        places = ", ".join("?" * len(steps))
        which = f"WHERE step IN ({places})"
        counted = self.counts(which, *steps)
        database.executemany(
            "INSERT INTO pruned VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET count = count + excluded.count",
            list((+counted).items()),
        )
        reports = database.execute(
            f"DELETE FROM reports WHERE id IN (SELECT reports.id FROM leases JOIN reports USING (device, task) {which}"
            " AND kind <> 'stop')",
            steps,
        ).rowcount
        leases = database.execute(f"DELETE FROM leases {which}", steps).rowcount
        database.execute(f"DELETE FROM steps WHERE number IN ({places})", steps)
        return Pruned(steps=len(steps), leases=leases, reports=reports)


def give_space_back(path: Path) -> bool:
    """Make a ledger's file as small as its content; whether that was possible now.

    A ledger of an earlier version is written anew, for which no server may use it.

    Raises:
        LedgerError: the file cannot be written.
    """
    from filelock import FileLock, Timeout

    with _Shrinkable(path) as opened:
        if opened.shrink():
            return True
        try:
            with FileLock(path.with_name(LOCK)).acquire(blocking=False):
                opened.write_anew()
        except Timeout:
            return False
    return True


class _Shrinkable(Database):
    def shrink(self) -> bool:
        """Give back the free pages, some at a time; False if the file was not made for that."""
        if self._pragma("auto_vacuum") != 2:
            return not self._pragma("freelist_count")
        while left := self._pragma("freelist_count"):
            began = time.monotonic()
            self._all(f"PRAGMA incremental_vacuum({_PAGES_AT_ONCE})")
            if self._pragma("freelist_count") >= left:
                raise LedgerError(f"{self.path}: its free pages cannot be given back; try again later")
            time.sleep(time.monotonic() - began)
        self._all("PRAGMA wal_checkpoint(TRUNCATE)")
        return True

    def write_anew(self) -> None:
        """Write the file anew, so that it shrinks piece by piece from now on."""
        self._all("PRAGMA auto_vacuum = INCREMENTAL")
        self._all("VACUUM")
        self._all("PRAGMA wal_checkpoint(TRUNCATE)")

    def _pragma(self, name: str) -> int:
        return int(self._all(f"PRAGMA {name}")[0][0])
