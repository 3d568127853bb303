"""The SQLite file below the ledger: opened, checked, migrated; whole transactions; errors that name a remedy."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self, TypeVar

from pydantic import BaseModel, ValidationError

from emutune.errors import LedgerError
from emutune.fleet.migrations import VERSION, connect, migrate, version_of

ASIDE = "restore a copy of it, or move it, its -wal and its -shm file aside and start a new one"
_Message = TypeVar("_Message", bound=BaseModel)
_REMEDIES = {
    "SQLITE_FULL": "free space on its disk; nothing that was recorded is lost",
    "SQLITE_IOERR": "see to its disk; nothing that was recorded is lost",
    "SQLITE_BUSY": "stop the other process that writes to it",
    "SQLITE_LOCKED": "stop the other process that writes to it",
    "SQLITE_READONLY": "make the file and its directory writable",
    "SQLITE_PERM": "make the file and its directory writable",
    "SQLITE_CANTOPEN": "give a path in a directory that exists and is writable",
    "SQLITE_CONSTRAINT": "each lease, and the lease of each task, is recorded once",
}


def utc_now() -> datetime:
    """The wall clock."""
    return datetime.now(UTC)


class Database:
    """An open file; usable from the thread that opened it. What it raises is described at ``Ledger``."""

    def __init__(self, path: str | os.PathLike[str], now: Callable[[], datetime] = utc_now) -> None:
        self.path = Path(path)
        self._now = now
        with self._explained():
            self._database = connect(str(self.path))
            try:
                self._check()
                # Only who has to change something asks for the lock, which a server at work would not leave long.
                if version_of(self._database) < VERSION:
                    with self._transaction():
                        migrate(self._database, self._time())
            except BaseException:
                self._database.close()
                raise

    def close(self) -> None:
        """Close the file; it cannot be used any more."""
        self._database.close()

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    def _one(self, query: str, *values: object) -> sqlite3.Row | None:
        rows = self._all(query, *values)
        return rows[0] if rows else None

    def _all(self, query: str, *values: Any) -> list[sqlite3.Row]:
        with self._explained():
            return self._database.execute(query, values).fetchall()

    def _time(self) -> str:
        return self._now().isoformat(timespec="milliseconds")

    def _check(self) -> None:
        """Refuse a file that is damaged, no ledger, or newer than this emutune."""
        version = version_of(self._database)
        if version < 0:
            raise LedgerError(f"{self.path}: is no ledger of emutune; give another path")
        if version > VERSION:
            raise LedgerError(
                f"{self.path}: was written by a newer emutune (version {version} of the ledger, known up to"
                f" {VERSION}); install that one"
            )
        found = self._all("PRAGMA integrity_check(1)")[0][0]
        if found == "ok" and version:
            known = self._one("SELECT max(version) AS version FROM schema_version")
            if known is None or known["version"] != version:
                found = "its versions differ"
        if found != "ok":
            raise LedgerError(f"{self.path}: is damaged: {' '.join(found.split())}; {ASIDE}")

    def _read(self, kind: type[_Message], text: str) -> _Message:
        """A message that was recorded."""
        try:
            return kind.model_validate_json(text)
        except ValidationError as error:
            raise LedgerError(
                f"{self.path}: is damaged: {kind.__name__}: {first_problem(error)}; {ASIDE}"
            ) from error

    def _known(self, what: str, query: str, key: str | int) -> None:
        """Refuse what the ledger does not hold."""
        if self._one(query, key) is None:
            raise LedgerError(f"{what} {key}: is not in {self.path}; record it first")

    @contextmanager
    def together(self) -> Iterator[None]:
        """All changes of the block, on the disk when it ends, or none if it raises; each is whole or undone."""
        with self._explained(), self._between("BEGIN", "COMMIT", "ROLLBACK"):
            yield

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """All that the block does, or nothing if it raises; on the disk when it ends, or what it is ``together`` in."""
        within = ("SAVEPOINT change", "RELEASE change", "ROLLBACK TO change")
        alone = ("BEGIN IMMEDIATE", "COMMIT", "ROLLBACK")
        with self._explained(), self._between(*(within if self._database.in_transaction else alone)):
            yield self._database

    @contextmanager
    def _between(self, begin: str, end: str, undo: str) -> Iterator[None]:
        self._database.execute(begin)
        try:
            yield
            self._database.execute(end)
        except BaseException:
            # After some errors SQLite has rolled back by itself.
            with suppress(sqlite3.Error):
                self._database.execute(undo)
            raise

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Name the file and the remedy in what SQLite raises; wrong use of this class is left as it is."""
        try:
            yield
        except sqlite3.ProgrammingError:
            raise
        except sqlite3.DatabaseError as error:
            name = getattr(error, "sqlite_errorname", "")
            remedy = next((text for code, text in _REMEDIES.items() if name.startswith(code)), ASIDE)
            raise LedgerError(f"{self.path}: {error}; {remedy}") from error


def first_problem(error: ValidationError) -> str:
    """What is wrong with a message, in one line."""
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
