"""The ledger's tables, as the steps that lead from each version of them to the next.

A version that was once released is never edited: what changes is a new entry at the end of ``MIGRATIONS``. Every
entry runs in the transaction that also raises ``PRAGMA user_version``, so a ledger is at one version or the next.
"""

from __future__ import annotations

import sqlite3

APPLICATION_ID = 0x656D7574  # "emut": tells a ledger from any other SQLite file
BUSY_S = 10.0

_TABLES = (
    """
    CREATE TABLE schema_version (
        version INTEGER PRIMARY KEY,
        reached_at TEXT NOT NULL
    )
    """,
    """
    CREATE TABLE meta (
        key TEXT PRIMARY KEY,
        value TEXT NOT NULL
    )
    """,
    """
    CREATE TABLE devices (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        name TEXT NOT NULL UNIQUE,
        has_left INTEGER NOT NULL DEFAULT 0,
        added_at TEXT NOT NULL
    )
    """,
    # One row for each token ever issued, so that an old one never becomes valid again; a device's last one counts.
    """
    CREATE TABLE credentials (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        device TEXT NOT NULL REFERENCES devices (name),
        token_sha256 TEXT NOT NULL UNIQUE,
        key_sha256 TEXT UNIQUE,
        revoked INTEGER NOT NULL DEFAULT 0,
        issued_at TEXT NOT NULL,
        enrolled_at TEXT
    )
    """,
    """
    CREATE TABLE reports (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        device TEXT NOT NULL REFERENCES devices (name),
        task TEXT NOT NULL,
        message TEXT NOT NULL,
        received_at TEXT NOT NULL,
        UNIQUE (device, task)
    )
    """,
    """
    CREATE TABLE steps (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        number INTEGER NOT NULL UNIQUE,
        delay_s REAL,
        begun_at TEXT NOT NULL,
        ended_at TEXT
    )
    """,
    """
    CREATE TABLE leases (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        lease TEXT NOT NULL UNIQUE,
        step INTEGER NOT NULL REFERENCES steps (number),
        device TEXT NOT NULL REFERENCES devices (name),
        task TEXT NOT NULL,
        kind TEXT NOT NULL CHECK (kind IN ('train', 'upload', 'stop')),
        retention REAL,
        at_server INTEGER NOT NULL,
        emulator_name TEXT,
        message TEXT NOT NULL,
        predicted_bytes INTEGER NOT NULL,
        predicted_delay_s REAL NOT NULL,
        predicted_perplexity REAL,
        gain REAL,
        complexity REAL,
        rate_bps REAL,
        state TEXT NOT NULL DEFAULT 'open' CHECK (state IN ('open', 'expired', 'failed', 'late', 'done')),
        data_complete INTEGER NOT NULL DEFAULT 0,
        transferred_s REAL,
        transferred_bytes INTEGER,
        adapter_sha256 TEXT,
        before REAL,
        after REAL,
        accepted INTEGER,
        outcome TEXT,
        result TEXT,
        opened_at TEXT NOT NULL,
        closed_at TEXT
    )
    """,
    # A task is decided on once: that a second lease of it is refused here keeps it from being counted twice.
    "CREATE UNIQUE INDEX leases_by_task ON leases (device, task) WHERE kind <> 'stop'",
    "CREATE INDEX leases_by_step ON leases (step)",
    """
    CREATE TABLE audit (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        event TEXT NOT NULL,
        device TEXT,
        lease TEXT,
        detail TEXT NOT NULL,
        at TEXT NOT NULL
    )
    """,
    """
    CREATE UNIQUE INDEX audit_by_lease ON audit (event, ifnull(device, ''), lease, detail)
    WHERE lease IS NOT NULL
    """,
)
_ADAPTERS = (
    "ALTER TABLE leases ADD COLUMN adapter_bytes INTEGER",
    # Counts a device's accepted adapters; in version 1 the last leased was the one in service.
    "ALTER TABLE leases ADD COLUMN judged INTEGER",
    "UPDATE leases SET judged = id WHERE accepted IS NOT NULL",
    # Both questions are asked again and again, at every poll and at every step, of a table that only grows.
    "CREATE INDEX leases_open ON leases (device, id) WHERE state = 'open'",
    "CREATE INDEX leases_accepted ON leases (device, judged) WHERE accepted = 1",
)
_LONG = (
    # What is asked of each device's last rows must not grow with those before them.
    "CREATE INDEX leases_by_device ON leases (device, id)",
    "CREATE INDEX reports_by_device ON reports (device, id)",
    "CREATE INDEX leases_expired ON leases (id) WHERE state = 'expired'",
    "CREATE INDEX leases_by_adapter ON leases (adapter_sha256) WHERE adapter_sha256 IS NOT NULL",
    # What the rows that were pruned counted for.
    """
    CREATE TABLE pruned (
        name TEXT PRIMARY KEY,
        count INTEGER NOT NULL
    )
    """,
)
_FAMILIES = (
    # Hash of the foundation model; none for the fleet's first, which all leases were of before there were others.
    "ALTER TABLE leases ADD COLUMN base TEXT",
    # A device has an adapter of each model in service.
    "DROP INDEX leases_accepted",
    "CREATE INDEX leases_accepted ON leases (device, base, judged) WHERE accepted = 1",
)
_CHARGES = (
    # Training and energy beside the transfer, and what was known when it was decided.
    "ALTER TABLE leases ADD COLUMN predicted_training_s REAL NOT NULL DEFAULT 0",
    "ALTER TABLE leases ADD COLUMN transfer_w REAL NOT NULL DEFAULT 0",
    "ALTER TABLE leases ADD COLUMN training_w REAL NOT NULL DEFAULT 0",
    "ALTER TABLE leases ADD COLUMN situation TEXT NOT NULL DEFAULT '{}'",
    "ALTER TABLE leases ADD COLUMN training_s REAL",
    # Of the curve alone, before it was corrected by how adapters got on.
    "ALTER TABLE leases ADD COLUMN curve_perplexity REAL",
)
MIGRATIONS: tuple[tuple[str, ...], ...] = (_TABLES, _ADAPTERS, _LONG, _FAMILIES, _CHARGES)
VERSION = len(MIGRATIONS)


def connect(path: str) -> sqlite3.Connection:
    """A connection whose commits have reached the disk, to a database that is checked but not yet migrated."""
    database = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None)
    try:
        database.row_factory = sqlite3.Row
        if not database.execute("PRAGMA page_count").fetchone()[0]:
            # Of a new file alone: what is pruned gives its space back piece by piece, while the server runs.
            database.execute("PRAGMA auto_vacuum = INCREMENTAL")
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = FULL")
        database.execute("PRAGMA foreign_keys = ON")
    except BaseException:
        database.close()
        raise
    return database


def version_of(database: sqlite3.Connection) -> int:
    """The version of a database's tables; 0 for an empty database, -1 for one that is no ledger."""
    application = database.execute("PRAGMA application_id").fetchone()[0]
    version: int = database.execute("PRAGMA user_version").fetchone()[0]
    tables = database.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    if application == APPLICATION_ID and version > 0:
        return version
    return 0 if (application, version, tables) == (0, 0, 0) else -1


def migrate(database: sqlite3.Connection, at: str) -> None:
    """Bring the tables to this version, all of the way or not at all.

    Must run inside a transaction that holds the write lock: two processes may open a ledger at once.

    Args:
        database: a ledger, or empty.
        at: the time to note, as text.
    """
    for version in range(version_of(database) + 1, VERSION + 1):
        for statement in MIGRATIONS[version - 1]:
            database.execute(statement)
        database.execute("INSERT INTO schema_version VALUES (?, ?)", (version, at))
        database.execute(f"PRAGMA user_version = {version}")
    database.execute(f"PRAGMA application_id = {APPLICATION_ID}")
