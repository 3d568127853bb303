"""What people read of a ledger: counters, and what was predicted beside what was measured."""

from __future__ import annotations

import json
from collections import Counter
from statistics import median

from emutune.fleet.adaptation import Judged
from emutune.fleet.comparison import Comparison
from emutune.fleet.database import Database

# Where the names of models are noted.
MODELS = "models"
# What the audit calls a lease that failed by the server's work.
FAILED = "lease failed"
# Why a lease failed: the server's word, or else the device's. With the plus the index of the audit serves.
REASON = f"""coalesce(
    (SELECT detail FROM audit WHERE event = '{FAILED}' AND ifnull(audit.device, '') = +leases.device
        AND audit.lease = leases.lease),
    json_extract(result, '$.reason'), '') AS reason"""
# In seconds of the scenario: the transfer, and training where the world says that it takes time.
DELAY = "transferred_s + CASE WHEN predicted_training_s > 0 THEN training_s ELSE 0 END"
JOULES = "transfer_w * transferred_s + CASE WHEN training_w > 0 THEN training_w * training_s ELSE 0 END"
_PREDICTED_JOULES = (
    "transfer_w * (predicted_delay_s - predicted_training_s) + training_w * predicted_training_s"
)
# Not the messages, which are most of a row.
_COMPARED = (
    "step, device, lease, task, base, kind, state, at_server, retention, emulator_name, gain, complexity, rate_bps,"
    f" predicted_bytes, transferred_bytes AS measured_bytes, predicted_delay_s, {DELAY} AS measured_delay_s,"
    " predicted_training_s, training_s AS measured_training_s,"
    f" {_PREDICTED_JOULES} AS predicted_joules, {JOULES} AS measured_joules,"
    " predicted_perplexity, after AS measured_perplexity, before AS perplexity_before, adapter_sha256, accepted,"
    f" situation, {REASON}"
)


# Of so many adapters it is read how they get on.
_JUDGED_READ = 2048
# Of a device's last trainings so many tell its speed.
_TRAININGS_READ = 8


class Figures(Database):
    """The figures of an open ledger; see ``Ledger``."""

    def meta(self, key: str) -> str | None:
        """A fact that was noted, or None."""
        row = self._one("SELECT value FROM meta WHERE key = ?", key)
        return None if row is None else str(row["value"])

    def models(self) -> dict[str | None, str]:
        """What the fleet's foundation models are called, by their hashes; that of the first is None."""
        noted = self.meta(MODELS)
        return {} if noted is None else dict(json.loads(noted))

    def last_step(self) -> int:
        """The number of the last step that was begun; -1 before the first."""
        row = self._one("SELECT number FROM steps ORDER BY id DESC LIMIT 1")
        return -1 if row is None else int(row["number"])

    def totals(self) -> dict[str, int]:
        """Counters that are the same for two runs that did the same work, however they were interrupted.

        ``steps``; ``leases.KIND.STATE``; ``bytes.KIND``, moved for leases of a kind, and ``bytes.adapter``;
        ``adapters.accepted`` and ``adapters.rejected``. A counter of nothing is left out, but for the steps. What was
        pruned still counts.
        """
        totals = self.counts() + Counter(self.pruned())
        names = sorted({"steps", *totals})
        return {name: totals[name] for name in names if not name.startswith("trained")}

    def trained(self) -> dict[str, int]:
        """How many adapters each side has trained: ``device`` and ``server``; what was pruned still counts."""
        totals = self.counts() + Counter(self.pruned())
        return {side: totals[f"trained.{side}"] for side in ("device", "server")}

    def pruned(self) -> dict[str, int]:
        """What the steps that were pruned counted for."""
        return {row["name"]: row["count"] for row in self._all("SELECT name, count FROM pruned")}

    def counts(self, which: str = "", *values: object) -> Counter[str]:
        """The counters of ``totals`` and ``trained`` over the rows that are there, or those of some steps.

        Args:
            which: a condition on the column ``step``, where it is not all.
            values: of its parameters.
        """
        steps = self._all(f"SELECT count(*) AS n FROM (SELECT number AS step FROM steps) {which}", *values)
        totals = Counter(steps=int(steps[0]["n"]))
        # One pass, since the table is long and the dashboard asks again and again.
        for row in self._all(
            "SELECT kind, state, count(*) AS leases, total(transferred_bytes) AS moved, total(adapter_bytes) AS"
            " adapter, total(accepted) AS accepted, count(accepted) AS judged, count(adapter_sha256) AS trained,"
            f" total(at_server AND adapter_sha256 IS NOT NULL) AS by_server FROM leases {which} GROUP BY kind, state",
            *values,
        ):
            accepted, by_server = int(row["accepted"]), int(row["by_server"])
            totals[f"leases.{row['kind']}.{row['state']}"] = row["leases"]
            totals[f"bytes.{row['kind']}"] += int(row["moved"])
            totals["bytes.adapter"] += int(row["adapter"])
            totals["adapters.accepted"] += accepted
            totals["adapters.rejected"] += row["judged"] - accepted
            totals["trained.server"] += by_server
            totals["trained.device"] += row["trained"] - by_server
        return totals

    def spent_j(self, device: str, steps: range) -> float:
        """Energy that a device has spent in some steps, as far as it was measured, and else as predicted."""
        row = self._one(
            f"SELECT total(ifnull({JOULES}, {_PREDICTED_JOULES})) AS joules FROM leases"
            " WHERE device = ? AND step >= ? AND step < ?",
            *(device, steps.start, steps.stop),
        )
        return 0.0 if row is None else float(row["joules"])

    def judged(self) -> list[Judged]:
        """The last adapters that were judged, of all devices, in the order in which they were leased."""
        rows = self._all(
            "SELECT device, base, curve_perplexity AS curve, before, after, accepted FROM leases"
            " WHERE accepted IS NOT NULL AND curve_perplexity > 0 AND before > 0 AND after > 0"
            " ORDER BY id DESC LIMIT ?",
            _JUDGED_READ,
        )
        return [Judged(**dict(row) | {"accepted": bool(row["accepted"])}) for row in reversed(rows)]

    def adapters_of(self, device: str) -> list[str]:
        """SHA-256 of the adapters that serve a device, one for each model."""
        rows = self._all(
            "SELECT adapter_sha256 AS adapter, max(judged) FROM leases WHERE device = ? AND accepted = 1"
            " AND adapter_sha256 IS NOT NULL GROUP BY base ORDER BY base",
            device,
        )
        return [row["adapter"] for row in rows]

    def states_of(self, device: str) -> list[str]:
        """The state of each of a device's leases."""
        return [
            row["state"] for row in self._all("SELECT state FROM leases WHERE device = ? ORDER BY id", device)
        ]

    def speed(self, device: str) -> float | None:
        """A device's training speed in TFLOP/s: the median of its last trainings; None if none was measured."""
        rows = self._all(
            "SELECT json_extract(situation, '$.tflops') * predicted_training_s / training_s AS tflops FROM leases"
            " WHERE device = ? AND kind = 'train' AND predicted_training_s > 0 AND training_s > 0"
            " ORDER BY id DESC LIMIT ?",
            *(device, _TRAININGS_READ),
        )
        speeds = [row["tflops"] for row in rows if row["tflops"] is not None]
        return median(speeds) if speeds else None

    def last_steps(self, leases: int) -> range:
        """The last steps, as many as have so many leases together; at least one."""
        last, first = self.last_step(), self.last_step()
        for row in self._all(
            "SELECT step, count(*) AS n FROM leases GROUP BY step ORDER BY step DESC LIMIT ?", leases
        ):
            leases -= row["n"]
            if leases < 0:
                break
            first = row["step"]
        return range(max(first, 0), last + 1)

    def comparison(self, steps: int | range | None = None) -> list[Comparison]:
        """What was predicted of every lease, or of those of a step or of some, beside what was measured; in order."""
        chosen = range(steps, steps + 1) if isinstance(steps, int) else steps
        which, values = (
            ("", ()) if chosen is None else ("WHERE step >= ? AND step < ?", (chosen.start, chosen.stop))
        )
        return [
            Comparison(**dict(row) | {"at_server": bool(row["at_server"]), "accepted": flag(row["accepted"])})
            for row in self._all(f"SELECT {_COMPARED} FROM leases {which} ORDER BY id", *values)
        ]


def flag(value: int | None) -> bool | None:
    """A truth as SQLite keeps it."""
    return None if value is None else bool(value)
