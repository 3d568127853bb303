"""Who takes part in a fleet, with which credentials, and which tasks they report."""

from __future__ import annotations

from emutune.errors import LedgerError
from emutune.fleet.database import Database
from emutune.fleet.protocol import Report
from emutune.fleet.rows import DeviceRow


class Members(Database):
    """The devices of an open ledger; see ``Ledger``."""

    def add_device(self, name: str, token_sha256: str) -> bool:
        """Issue credentials to a device; True if they are new.

        New credentials end the validity of the device's earlier ones, and of their revocation.

        Raises:
            LedgerError: the token belongs to another device.
        """
        with self._transaction() as database:
            known = self._one("SELECT device FROM credentials WHERE token_sha256 = ?", token_sha256)
            if known is not None and known["device"] != name:
                raise LedgerError(f"device {name}: its token belongs to another device; draw a new one")
            if known is not None:
                return False
            time = self._time()
            database.execute("INSERT OR IGNORE INTO devices (name, added_at) VALUES (?, ?)", (name, time))
            database.execute(
                "INSERT INTO credentials (device, token_sha256, issued_at) VALUES (?, ?, ?)",
                (name, token_sha256, time),
            )
        return True

    def enrol(self, name: str, token_sha256: str, key_sha256: str) -> bool:
        """Bind a key to a device's token, once; True if the key is now, or was already, the device's.

        False if the token is not the one last issued to the device, was revoked or was used with another key,
        or if the key is another device's.
        """
        with self._transaction() as database:
            last = self._one("SELECT * FROM credentials WHERE device = ? ORDER BY id DESC LIMIT 1", name)
            if last is None or last["revoked"] or last["token_sha256"] != token_sha256:
                return False
            if last["key_sha256"] is None:
                if self._one("SELECT 1 FROM credentials WHERE key_sha256 = ?", key_sha256) is not None:
                    return False
                database.execute(
                    "UPDATE credentials SET key_sha256 = ?, enrolled_at = ? WHERE id = ?",
                    (key_sha256, self._time(), last["id"]),
                )
            elif last["key_sha256"] != key_sha256:
                return False
            database.execute("UPDATE devices SET has_left = 0 WHERE name = ?", (name,))
        return True

    def device_of_key(self, key_sha256: str) -> str | None:
        """The device whose key this is; None if it is nobody's, or not valid any more."""
        row = self._one(
            "SELECT device FROM credentials AS mine WHERE key_sha256 = ? AND revoked = 0"
            " AND id = (SELECT max(id) FROM credentials WHERE device = mine.device)",
            key_sha256,
        )
        return None if row is None else str(row["device"])

    def valid_keys(self) -> set[str]:
        """SHA-256 of every key that ``device_of_key`` knows a device of."""
        rows = self._all(
            "SELECT key_sha256 FROM credentials WHERE key_sha256 IS NOT NULL AND revoked = 0"
            " AND id IN (SELECT max(id) FROM credentials GROUP BY device)"
        )
        return {row["key_sha256"] for row in rows}

    def revoke(self, name: str) -> None:
        """End the validity of a device's token and key."""
        with self._transaction() as database:
            self._known("device", "SELECT 1 FROM devices WHERE name = ?", name)
            database.execute("UPDATE credentials SET revoked = 1 WHERE device = ?", (name,))

    def leave(self, device: str) -> None:
        """A device takes no part until it enrols again, or reports a new task."""
        with self._transaction() as database:
            self._known("device", "SELECT 1 FROM devices WHERE name = ?", device)
            database.execute("UPDATE devices SET has_left = 1 WHERE name = ?", (device,))

    def devices(self) -> list[DeviceRow]:
        """All devices, in the order in which they were added."""
        rows = self._all(
            "SELECT devices.*, token_sha256, key_sha256, revoked FROM devices JOIN credentials"
            " ON credentials.id = (SELECT max(id) FROM credentials WHERE device = devices.name)"
            " ORDER BY devices.id"
        )
        return [
            DeviceRow(
                name=row["name"],
                token_sha256=row["token_sha256"],
                key_sha256=row["key_sha256"],
                revoked=bool(row["revoked"]),
                left=bool(row["has_left"]),
                added_at=row["added_at"],
            )
            for row in rows
        ]

    def report(self, device: str, report: Report) -> bool:
        """A device has a task; True the first time, and the first time counts."""
        with self._transaction() as database:
            self._known("device", "SELECT 1 FROM devices WHERE name = ?", device)
            cursor = database.execute(
                "INSERT INTO reports (device, task, message, received_at) VALUES (?, ?, ?, ?)"
                " ON CONFLICT (device, task) DO NOTHING",
                (device, report.task, report.model_dump_json(), self._time()),
            )
            if cursor.rowcount:
                database.execute("UPDATE devices SET has_left = 0 WHERE name = ?", (device,))
            return cursor.rowcount > 0

    def may_report(self, device: str, task: str, most: int) -> bool:
        """Whether a task is known, or something was decided about one of the device's last ``most``."""
        if self._one("SELECT 1 FROM reports WHERE device = ? AND task = ?", device, task) is not None:
            return True
        row = self._one(
            "SELECT count(*) AS open FROM"
            " (SELECT task FROM reports WHERE device = ?1 ORDER BY id DESC LIMIT ?2) AS last"
            " WHERE NOT EXISTS (SELECT 1 FROM leases WHERE kind <> 'stop' AND device = ?1 AND task = last.task)",
            device,
            most,
        )
        return row is not None and row["open"] < most

    def open_reports(self) -> list[tuple[str, Report]]:
        """Each device's last report, if nothing was decided about its task and the device takes part.

        In the order of the reports.
        """
        rows = self._all(
            # Crossed, since the planner would rather read all reports there ever were.
            "SELECT reports.device, message FROM devices CROSS JOIN reports"
            " ON reports.id = (SELECT max(id) FROM reports WHERE device = devices.name) WHERE has_left = 0"
            " AND 0 = (SELECT revoked FROM credentials WHERE device = reports.device ORDER BY id DESC LIMIT 1)"
            " AND NOT EXISTS (SELECT 1 FROM leases WHERE kind <> 'stop'"
            " AND leases.device = reports.device AND leases.task = reports.task)"
            " ORDER BY reports.id"
        )
        return [(row["device"], self._read(Report, row["message"])) for row in rows]

    def last_reports(self) -> dict[str, Report]:
        """What each device reported last."""
        rows = self._all(
            "SELECT device, message FROM reports WHERE id IN (SELECT max(id) FROM reports GROUP BY device)"
        )
        return {row["device"]: self._read(Report, row["message"]) for row in rows}

    def report_of(self, device: str, task: str) -> Report:
        """What a device reported about a task.

        Raises:
            LedgerError: it did not.
        """
        row = self._one("SELECT message FROM reports WHERE device = ? AND task = ?", device, task)
        if row is None:
            raise LedgerError(f"device {device}: reported no task {task}")
        return self._read(Report, row["message"])
