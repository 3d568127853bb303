"""The ledger of a fleet: what was decided, what was predicted, what was measured; one SQLite file in WAL mode.

Every method is one transaction that is on the disk when it returns, so what was acknowledged outlives a kill. What is
recorded about a lease only ever grows: a repeated or late mark finds its place taken and changes nothing, and
marks may arrive in any order. Rows are ordered by their ids; the wall clock is noted for people and decides nothing.
"""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

from pydantic import ValidationError

from emutune.errors import LedgerError
from emutune.fleet.comparison import Comparison
from emutune.fleet.database import first_problem
from emutune.fleet.figures import MODELS, Figures, flag
from emutune.fleet.members import Members
from emutune.fleet.protocol import Lease, Result
from emutune.fleet.rows import AuditRow, Closed, Decision, DeviceRow, Kind, LeaseRow, State, Transfer

__all__ = ["AuditRow", "Closed", "Comparison", "Decision", "DeviceRow", "Kind", "LeaseRow", "Ledger", "State"]

# What comes later in these takes the place of what stands before it, never the other way round. That makes the
# outcome of several marks a maximum, which is the same in whatever order they arrive.
_STATES = ("open", "expired", "failed", "late", "done")
_OUTCOMES = ("failed", "received", "trained")
_NOT_SHOWN = {"outcome", "judged"}
# How far back a device's transfers are looked for, and how many are enough.
_LEASES_READ, _TRANSFERS_READ = 256, 24


class Ledger(Members, Figures):
    """An open ledger; usable from the thread that opened it.

    Args:
        path: the file; made if it is not there, brought to this version if an older one wrote it.
        now: the wall clock; noted for people, never used for ordering.

    Raises:
        LedgerError: the file is damaged, no ledger, or was written by a newer emutune. Every method raises it where
            the file cannot be written, or a device, lease or step is unknown; nothing is then changed.
    """

    # Facts about the fleet

    def set_meta(self, key: str, value: str) -> None:
        """Note a fact about the whole fleet, such as the base model's hash, in the place of what was noted."""
        with self._transaction() as database:
            database.execute(
                "INSERT INTO meta VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value",
                (key, value),
            )

    def set_models(self, names: Mapping[str | None, str]) -> None:
        """Note what the foundation models of the fleet are called, by their hashes; that of the first is None."""
        self.set_meta(MODELS, json.dumps([[base, name] for base, name in names.items()]))

    # Steps and leases

    def begin_step(self, step: int, decided: Sequence[Decision]) -> bool:
        """Record a step and its leases, all or none; False if they are recorded already.

        Raises:
            LedgerError: the step is recorded with other leases, a lease or the lease of a task is recorded
                already, or a decision and its ``lease_json`` differ.
        """
        for decision in decided:
            self._agree(step, decision)
        with self._transaction() as database:
            if self._one("SELECT 1 FROM steps WHERE number = ?", step) is not None:
                known = {row["lease"] for row in self._all("SELECT lease FROM leases WHERE step = ?", step)}
                if known != {decision.lease for decision in decided}:
                    raise LedgerError(f"step {step}: is recorded with other leases; go on after last_step()")
                return False
            time = self._time()
            database.execute("INSERT INTO steps (number, begun_at) VALUES (?, ?)", (step, time))
            for decision in decided:
                self._known("device", "SELECT 1 FROM devices WHERE name = ?", decision.device)
                values = decision.model_dump() | {"step": step, "opened_at": time}
                values["message"] = values.pop("lease_json")
                names = ", ".join(values)
                places = ", ".join(f":{name}" for name in values)
                database.execute(f"INSERT INTO leases ({names}) VALUES ({places})", values)
        return True

    def end_step(self, step: int, delay_s: float) -> bool:
        """A step is over; True the first time.

        Args:
            step: which.
            delay_s: how long it took, Eq. 8, in seconds, as far as it was known; ``comparison`` goes by the leases.
        """
        with self._transaction() as database:
            self._known("step", "SELECT 1 FROM steps WHERE number = ?", step)
            cursor = database.execute(
                "UPDATE steps SET delay_s = ?, ended_at = ? WHERE number = ? AND ended_at IS NULL",
                (_finite(delay_s), self._time(), step),
            )
            return cursor.rowcount > 0

    def step_ended(self, step: int) -> bool:
        """Whether ``end_step`` was recorded."""
        return self._one("SELECT 1 FROM steps WHERE number = ? AND ended_at IS NOT NULL", step) is not None

    def step_leases(self, step: int) -> list[LeaseRow]:
        """The leases of a step, in the order of the decisions."""
        return [
            self._lease_row(row) for row in self._all("SELECT * FROM leases WHERE step = ? ORDER BY id", step)
        ]

    def devices_of(self, step: int, state: State) -> set[str]:
        """The devices whose leases of a step are in a state."""
        return {
            row["device"]
            for row in self._all("SELECT device FROM leases WHERE step = ? AND state = ?", step, state)
        }

    def open_lease(self, device: str) -> Lease | None:
        """The device's open lease, the last if there are several."""
        row = self._one(
            "SELECT message FROM leases WHERE device = ? AND state = 'open' ORDER BY id DESC LIMIT 1", device
        )
        return None if row is None else self._read(Lease, row["message"])

    def unanswered_lease(self, device: str) -> Lease | None:
        """The device's last open lease, unless its result is there, and all that is left to do is the server's."""
        row = self._one(
            "SELECT message, result FROM leases WHERE device = ? AND state = 'open' ORDER BY id DESC LIMIT 1",
            device,
        )
        return None if row is None or row["result"] is not None else self._read(Lease, row["message"])

    def last_training(self, device: str) -> Lease | None:
        """The device's last lease to train, open or not."""
        row = self._one(
            "SELECT message FROM leases WHERE device = ? AND kind = 'train' ORDER BY id DESC LIMIT 1", device
        )
        return None if row is None else self._read(Lease, row["message"])

    def at_work(self, step: int | None = None) -> set[str]:
        """The devices that have something left to do for a lease, or for one of a step; judging is the server's."""
        # Named, since the planner would rather read the whole table.
        among, values = ("INDEXED BY leases_open", ()) if step is None else ("", (step,))
        which = "" if step is None else "step = ? AND"
        return {
            row["device"]
            for row in self._all(
                f"SELECT device FROM leases {among} WHERE {which} state = 'open'"
                " AND (outcome IS NULL OR transferred_bytes IS NULL OR adapter_sha256 IS NULL)",
                *values,
            )
        }

    def open_leases(self) -> list[LeaseRow]:
        """All leases that nothing has closed."""
        # Named, since the planner would rather read the whole table in the order of its ids.
        rows = self._all("SELECT * FROM leases INDEXED BY leases_open WHERE state = 'open' ORDER BY id")
        return [self._lease_row(row) for row in rows]

    def unfinished_leases(self) -> list[LeaseRow]:
        """All leases that nothing has closed, and the expired ones of which something has arrived."""
        late = self._all(
            "SELECT * FROM leases WHERE state = 'expired' AND (data_complete = 1 OR adapter_sha256 IS NOT NULL)"
            " ORDER BY id"
        )
        return [*map(self._lease_row, late), *self.open_leases()]

    def lease(self, device: str, lease: str) -> LeaseRow | None:
        """A lease, open or not, if it is this device's."""
        row = self._one("SELECT * FROM leases WHERE lease = ? AND device = ?", lease, device)
        return None if row is None else self._lease_row(row)

    def find_lease(self, lease: str) -> LeaseRow | None:
        """A lease, whosever it is."""
        row = self._one("SELECT * FROM leases WHERE lease = ?", lease)
        return None if row is None else self._lease_row(row)

    def transfers(self, device: str, kind: Kind, shared: bool = False) -> list[Transfer]:
        """What the device moved for its last leases of a kind, the oldest first.

        Args:
            device: whose.
            kind: of the leases: uploads, or trainings, for which emulators are sent.
            shared: count bytes for each device of the step that was to move some too, as one link carried them all.
        """
        among = (
            "(SELECT max(count(*), 1) FROM leases AS other"
            " WHERE other.step = mine.step AND other.kind = mine.kind AND other.predicted_bytes > 0)"
        )
        # Of a device that does the other kind alone, not all that it ever did is read.
        rows = self._all(
            f"SELECT transferred_bytes AS bytes, transferred_s AS seconds, {among if shared else 1} AS sharers"
            " FROM (SELECT * FROM leases WHERE device = ? ORDER BY id DESC LIMIT ?) AS mine"
            " WHERE kind = ? AND transferred_bytes > 0 AND transferred_s > 0 ORDER BY id DESC LIMIT ?",
            *(device, _LEASES_READ, kind, _TRANSFERS_READ),
        )
        return [Transfer(row["bytes"] * row["sharers"], row["seconds"]) for row in reversed(rows)]

    # Progress of a lease

    def data_complete(self, lease: str) -> bool:
        """The data of an upload are whole and verified; True the first time."""
        return self._mark(lease, "data_complete = 1", "data_complete = 0")

    def transferred(self, lease: str, seconds: float, bytes: int) -> bool:
        """The bytes that a lease names have moved; True the first time, and the first time counts."""
        return self._mark(
            lease, "transferred_s = ?, transferred_bytes = ?", "transferred_bytes IS NULL", seconds, bytes
        )

    def trained_for(self, lease: str, seconds: float) -> bool:
        """Training took so many seconds of the scenario; True the first time, and the first time counts."""
        return self._mark(lease, "training_s = ?", "training_s IS NULL", seconds)

    def adapter(self, lease: str, sha256: str, bytes: int) -> bool:
        """An adapter was trained under a lease; True the first time.

        The first one counts: after False, the lease's row says which adapter that was.
        """
        return self._mark(
            lease, "adapter_sha256 = ?, adapter_bytes = ?", "adapter_sha256 IS NULL", sha256, bytes
        )

    def evaluation(self, lease: str, before: float, after: float, accepted: bool) -> bool:
        """The whole model was evaluated with the lease's adapter; True the first time, and the first time counts.

        An accepted adapter is thereby the one of its model in service, in the place of the one that it was compared
        with, even if it comes late and that one is of a newer lease.

        Args:
            lease: whose adapter.
            before: perplexity without it; one that is not finite is noted as none.
            after: perplexity with it, likewise.
            accepted: whether the adapter is to be used.
        """
        return self._mark(
            lease,
            "before = ?, after = ?, accepted = ?, judged = 1 + ifnull((SELECT max(judged) FROM leases AS other"
            " WHERE other.device = leases.device AND other.base IS leases.base AND other.accepted = 1), 0)",
            "accepted IS NULL",
            _finite(before),
            _finite(after),
            accepted,
        )

    def result(self, lease: str, result: Result) -> bool:
        """A device says how a lease went; True if that is news.

        The first result counts, but that success comes after a failure is kept in its place.
        """
        below = _OUTCOMES[: _OUTCOMES.index(result.outcome)]
        return self._mark(
            lease,
            "outcome = ?, result = ?",
            f"(outcome IS NULL OR outcome IN ({_places(below)}))",
            result.outcome,
            result.model_dump_json(),
            below=below,
        )

    def close_lease(self, lease: str, state: Closed) -> bool:
        """Close a lease; True if that is news.

        Of several states the one counts that says most: expired, failed, late, done. So a result after the
        deadline makes an expired lease a late one, and an expiry after the result changes nothing.
        """
        below = _STATES[: _STATES.index(state)]
        return self._mark(
            lease,
            "state = ?, closed_at = ?",
            f"state IN ({_places(below)})",
            state,
            self._time(),
            below=below,
        )

    def in_service(self, device: str, base: str | None = None) -> str | None:
        """SHA-256 of the adapter of a model that serves a device: the last that was accepted.

        Args:
            device: which.
            base: hash of the foundation model; None for the fleet's first.
        """
        row = self._one(
            "SELECT adapter_sha256 FROM leases WHERE device = ? AND base IS ? AND accepted = 1"
            " AND adapter_sha256 IS NOT NULL ORDER BY judged DESC LIMIT 1",
            *(device, base),
        )
        return None if row is None else str(row["adapter_sha256"])

    def running_adapters(self) -> set[str]:
        """What leases that may still go on start from or have made.

        Those are the open ones, those that the server has work to do for, and of every device the last, if it is late.
        """
        rows = self._all(
            "SELECT json_extract(message, '$.start') AS start, adapter_sha256 FROM leases WHERE state = 'open' UNION"
            " SELECT json_extract(message, '$.start'), adapter_sha256 FROM leases WHERE state = 'expired' AND ("
            "id = (SELECT max(id) FROM leases AS mine WHERE mine.device = leases.device)"
            " OR accepted IS NULL AND (data_complete = 1 OR adapter_sha256 IS NOT NULL))"
        )
        return {
            sha256 for row in rows for sha256 in (row["start"], row["adapter_sha256"]) if sha256 is not None
        }

    def adapter_needed(self, sha256: str, since: datetime) -> bool:
        """Whether an adapter is in service somewhere, or was still in service or judged since some moment."""
        # Of one that was accepted, the lease counts whose adapter took its place; there is none if it is in service.
        row = self._one(
            "SELECT 1 FROM leases LEFT JOIN leases AS next ON next.device = leases.device AND next.base IS leases.base"
            " AND next.accepted = 1 AND next.judged = (SELECT min(judged) FROM leases AS later"
            " WHERE later.device = leases.device AND later.base IS leases.base AND later.accepted = 1"
            " AND later.judged > leases.judged) WHERE leases.adapter_sha256 = ?"
            " AND CASE leases.accepted WHEN 1 THEN next.id IS NULL OR next.closed_at IS NULL OR next.closed_at >= ?"
            " ELSE leases.closed_at IS NULL OR leases.closed_at >= ? END",
            *(sha256, *[since.astimezone(UTC).isoformat(timespec="milliseconds")] * 2),
        )
        return row is not None

    # What people and tests read

    def audit(self, event: str, device: str | None, lease: str | None, detail: str) -> None:
        """Note a security event, a deletion of data or a failure of the server's work; one about a lease once."""
        with self._transaction() as database:
            database.execute(
                "INSERT OR IGNORE INTO audit (event, device, lease, detail, at) VALUES (?, ?, ?, ?, ?)",
                (event, device, lease, detail, self._time()),
            )

    def audit_rows(self) -> list[AuditRow]:
        """What was noted, in the order in which it was."""
        return [AuditRow(**row) for row in self._all("SELECT * FROM audit ORDER BY id")]

    # The database

    def _mark(
        self, lease: str, assignments: str, condition: str, *values: object, below: Sequence[str] = ()
    ) -> bool:
        """Change a lease's row if a condition holds; the values are those of the assignments."""
        with self._transaction() as database:
            self._known("lease", "SELECT 1 FROM leases WHERE lease = ?", lease)
            cursor = database.execute(
                f"UPDATE leases SET {assignments} WHERE lease = ? AND {condition}", (*values, lease, *below)
            )
            return cursor.rowcount > 0

    def _agree(self, step: int, decision: Decision) -> None:
        """Refuse a decision that the device would be told otherwise."""
        try:
            message = Lease.model_validate_json(decision.lease_json)
        except ValidationError as error:
            raise LedgerError(
                f"lease {decision.lease}: lease_json is no Lease: {first_problem(error)}"
            ) from error
        told = (message.step, message.lease, message.kind, message.task)
        if told != (step, decision.lease, decision.kind, decision.task):
            raise LedgerError(
                f"lease {decision.lease}: step, lease, kind and task are {told} in lease_json; make them those"
                f" decided, {(step, decision.lease, decision.kind, decision.task)}"
            )

    def _lease_row(self, row: sqlite3.Row) -> LeaseRow:
        """A lease with its messages read."""
        values = {name: row[name] for name in row.keys() if name not in _NOT_SHOWN}  # noqa: SIM118
        result = row["result"]
        return LeaseRow(
            **values
            | {
                "message": self._read(Lease, row["message"]),
                "result": None if result is None else self._read(Result, result),
                "at_server": bool(row["at_server"]),
                "data_complete": bool(row["data_complete"]),
                "accepted": flag(row["accepted"]),
            }
        )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _places(values: Sequence[str]) -> str:
    return ", ".join("?" * len(values))
