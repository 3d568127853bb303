"""What people read of a ledger: counters, and what was predicted beside what was measured."""

from __future__ import annotations

import json
from collections import Counter

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
# Not the messages, which are most of a row.
_COMPARED = (
    "step, device, lease, task, base, kind, state, at_server, retention, emulator_name, gain, complexity, rate_bps,"
    " predicted_bytes, transferred_bytes AS measured_bytes, predicted_delay_s, transferred_s AS measured_delay_s,"
    " predicted_perplexity, after AS measured_perplexity, before AS perplexity_before, adapter_sha256, accepted,"
    f" {REASON}"
)


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
