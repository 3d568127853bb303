"""Traces as others record them, brought into the normalised form, with an account of what was dropped and why."""

from __future__ import annotations

import difflib
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import groupby, pairwise
from pathlib import Path
from typing import NamedTuple

from emutune.errors import TraceError, UsageError
from emutune.scenario.trace import (
    HEADER,
    MOST_INTERVALS,
    PACKET_BITS,
    Rates,
    Row,
    means,
    open_text,
    read_table,
    whole_intervals,
)

_RACA_TIME = "%Y.%m.%d_%H.%M.%S"
# A pause of more than so many usual spacings is a gap.
_GAP_SPACINGS = 5.0
_LONGER = "raise --interval-s, or look for a time in a wrong unit"


@dataclass
class Account:
    """What an import kept and dropped.

    Attributes:
        rows: that the file has.
        dropped: reasons with the lines they befell.
        gaps: lines after which time was missing, and the seconds that were cut out there.
        kept: rows that were kept.
        notes: what else is worth knowing.
    """

    rows: int = 0
    dropped: dict[str, list[int]] = field(default_factory=dict)
    gaps: list[tuple[int, float]] = field(default_factory=list)
    kept: int = 0
    notes: list[str] = field(default_factory=list)

    def drop(self, reason: str, line: int) -> None:
        """Count a row that is not used."""
        self.dropped.setdefault(reason, []).append(line)

    def lines(self) -> list[str]:
        """The account in words, a line each."""
        told = [f"kept {self.kept} of {self.rows} rows"]
        for reason, lines in self.dropped.items():
            told.append(f"dropped {len(lines)}: {reason} (line {_some(lines)})")
        if self.gaps:
            cut = sum(seconds for _, seconds in self.gaps)
            told.append(
                f"closed {len(self.gaps)} gaps, {cut:g} s in all (before line {_some([line for line, _ in self.gaps])})"
            )
        return told + self.notes


def import_trace(
    form: str,
    path: str | Path,
    *,
    uplink: str | Path | None = None,
    interval_s: float = 1.0,
    drop_zeros: bool = False,
    max_gap_s: float | None = None,
) -> tuple[Rates, Account]:
    """Read a trace in one of the known forms.

    Args:
        form: ``mahimahi`` (delivery opportunities of 1500 bytes, in ms), ``raca`` (CSV of the 5G dataset of Raca
            et al.) or ``csv`` (``time_s,downlink_mbps,uplink_mbps``).
        path: of the file; with ``mahimahi`` that of the downlink.
        uplink: the uplink's file, with ``mahimahi`` only; ``NAME.up`` where the downlink's is ``NAME.down``.
        interval_s: of the normalised trace.
        drop_zeros: drop rows without any downlink or uplink: a logger that had nothing to send, not an outage.
        max_gap_s: a longer pause between rows is closed; five times the usual spacing if left out.

    Raises:
        TraceError: the file cannot be read, is of another form, or too little of it is usable.
        UsageError: the form is unknown, or an argument does not fit it.
    """
    if form not in _FORMS:
        raise UsageError(f"trace import: no form {form!r}; choose from {', '.join(_FORMS)}")
    if interval_s <= 0 or not math.isfinite(interval_s):
        raise UsageError(f"--interval-s: must be positive, got {interval_s:g}")
    account = Account()
    if form == "mahimahi":
        rows = _read_mahimahi(path, uplink, interval_s, account)
    elif uplink is not None:
        raise UsageError("--uplink: only mahimahi keeps the uplink in a file of its own; leave it out")
    else:
        rows = list(_read_table(path, _TABLES[form], account))
    used = _in_order(_drop_zeros(rows, account) if drop_zeros else rows, account)
    if 0 < len(used) < len(rows):
        account.notes.append(f"what was dropped moved the mean of rows from {_means(rows)} to {_means(used)}")
    rows = _one_a_time(used, account)
    if len(rows) < 2:
        raise TraceError(f"{path}: too short: {'; '.join(account.lines())}; a trace needs two rows or more")
    rates = _regular(rows, interval_s, max_gap_s, account)
    if len(rates.downlink_mbps) < 2:
        raise TraceError(
            f"{path}: too short: less than two intervals of {interval_s:g} s ({'; '.join(account.lines())}); "
            "lower --interval-s or take a longer trace"
        )
    for name, column in (("downlink", rates.downlink_mbps), ("uplink", rates.uplink_mbps)):
        silent = sum(rate == 0 for rate in column)
        if silent:
            account.notes.append(
                f"kept {silent} intervals without any {name}, as outages; --drop-zeros drops such rows"
            )
    return rates, account


class _Table(NamedTuple):
    """A CSV form: its columns of time, downlink and uplink, how times are written, and its unit of rates."""

    columns: tuple[str, str, str]
    seconds: Callable[[str], float]
    mbps: float


def _read_table(path: str | Path, table: _Table, account: Account) -> Iterable[Row]:
    """What has numbers; a dash stands for what was not measured."""
    rows = read_table(path)
    _, header = next(rows, (1, []))
    places = _columns(path, header, table.columns)
    for line, parts in rows:
        if not parts:
            continue
        account.rows += 1
        if len(parts) <= max(places):
            account.drop("fewer columns than the first line", line)
            continue
        # Commas for decimal points would shift every number that follows.
        if any(part.strip() for part in parts[len(header) :]):
            account.drop("more columns than the first line", line)
            continue
        time, down, up = (parts[place].strip() for place in places)
        try:
            row = Row(line, table.seconds(time), table.mbps * float(down), table.mbps * float(up))
        except ValueError:
            account.drop("no time or rate", line)
            continue
        if not all(map(math.isfinite, row)) or min(row.downlink_mbps, row.uplink_mbps) < 0:
            account.drop("a rate that is negative or not finite", line)
            continue
        yield row


def _seconds(text: str) -> float:
    return datetime.strptime(text, _RACA_TIME).replace(tzinfo=UTC).timestamp()


def _columns(path: str | Path, header: Sequence[str], wanted: Sequence[str]) -> list[int]:
    """Where the wanted columns stand."""
    names = [name.strip() for name in header]
    for name in wanted:
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
            hint = f"; is {close[0]!r} meant? Rename it" if close else ""
            raise TraceError(
                f"{path}: has no column {name}; its first line is {','.join(names)[:80]!r}, but must name "
                f"{', '.join(wanted)}{hint}"
            )
    return [names.index(name) for name in wanted]


def _read_mahimahi(
    path: str | Path, uplink: str | Path | None, interval_s: float, account: Account
) -> list[Row]:
    """Both links, counted in the intervals that both files fill."""
    down_path = Path(path)
    up_path = down_path.with_suffix(".up") if uplink is None and down_path.suffix == ".down" else uplink
    if up_path is None:
        raise UsageError("--uplink: name the uplink's file; mahimahi keeps the two links apart")
    columns, ends_s = zip(*(_packets(one, interval_s, account) for one in (down_path, up_path)), strict=True)
    if longer_s := max(ends_s) - min(ends_s):
        account.notes.append(f"one link's file is {longer_s:g} s longer; dropped what it has more")
    count = _drop_part(min(ends_s), interval_s, account)
    return [
        Row(index + 1, index * interval_s, down, up)
        for index, (down, up) in enumerate(zip(*(column[:count] for column in columns), strict=True))
    ]


def _packets(path: str | Path, interval_s: float, account: Account) -> tuple[list[float], float]:
    """Rates in Mbit/s, and the end in s: the last opportunity, where mahimahi begins anew.

    An opportunity on the border of two intervals ends the first.
    """
    counts: list[int] = []
    last = 0
    for line, text in enumerate(open_text(path), 1):
        if not text.strip():
            continue
        account.rows += 1
        try:
            time_ms = int(text)
        except ValueError:
            account.drop(f"no whole milliseconds, in {path}", line)
            continue
        if time_ms < last:
            account.drop(f"time goes back, in {path}", line)
            continue
        last = time_ms
        account.kept += 1
        place = max(0, math.ceil(time_ms / (1000 * interval_s) - 1e-9) - 1)
        if place >= MOST_INTERVALS:
            raise TraceError(
                f"{path}: line {line}: {time_ms} ms are more than {MOST_INTERVALS} intervals; {_LONGER}"
            )
        counts += [0] * (place + 1 - len(counts))
        counts[place] += 1
    if not counts:
        raise TraceError(
            f"{path}: holds no delivery opportunity; a mahimahi file has a time in ms on every line"
        )
    return [count * PACKET_BITS / interval_s / 1e6 for count in counts], last / 1000


def _drop_zeros(rows: Sequence[Row], account: Account) -> list[Row]:
    kept = []
    for row in rows:
        if min(row.downlink_mbps, row.uplink_mbps) == 0:
            account.drop("a zero rate", row.line)
        else:
            kept.append(row)
    return kept


def _in_order(rows: Sequence[Row], account: Account) -> list[Row]:
    kept: list[Row] = []
    for row in rows:
        if kept and row.time_s < kept[-1].time_s:
            account.drop("time goes back", row.line)
        else:
            kept.append(row)
    account.kept = account.kept or len(kept)
    return kept


def _one_a_time(rows: Sequence[Row], account: Account) -> list[Row]:
    """The plain mean of rows with one time: nothing says how long each of them held."""
    merged = []
    for time_s, group in groupby(rows, lambda row: row.time_s):
        same = list(group)
        merged.append(Row(same[0].line, time_s, *_means(same)))
    if len(merged) < len(rows):
        account.notes.append(
            f"{len(rows)} rows have {len(merged)} times; the mean of those with one time stands for them"
        )
    return merged


def _regular(rows: Sequence[Row], interval_s: float, max_gap_s: float | None, account: Account) -> Rates:
    """Means over equal intervals; a row holds until the next, and gaps are closed."""
    steps = [later.time_s - row.time_s for row, later in pairwise(rows)]
    spacing = statistics.median(steps)
    longest = _GAP_SPACINGS * spacing if max_gap_s is None else max_gap_s
    starts = [0.0]
    for row, step in zip(rows[1:], steps, strict=True):
        if step > longest:
            account.gaps.append((row.line, step - spacing))
        starts.append(starts[-1] + (spacing if step > longest else step))
    starts.append(starts[-1] + spacing)
    if starts[-1] / interval_s > MOST_INTERVALS:
        raise TraceError(f"{starts[-1]:g} s are more than {MOST_INTERVALS} intervals; {_LONGER}")
    count = _drop_part(starts[-1], interval_s, account)
    columns = [[row.downlink_mbps for row in rows], [row.uplink_mbps for row in rows]]
    return Rates(interval_s, *(means(starts, column, interval_s, count) for column in columns))


def _drop_part(seconds: float, interval_s: float, account: Account) -> int:
    """How many intervals a trace fills; the part of one that is left has no mean of one, and is dropped."""
    count = whole_intervals(seconds, interval_s)
    left_s = seconds - count * interval_s
    if left_s > 1e-6 * interval_s:
        account.notes.append(f"dropped the last {left_s:.3g} s, less than an interval of {interval_s:g} s")
    return count


class _Mean(NamedTuple):
    downlink_mbps: float
    uplink_mbps: float

    def __str__(self) -> str:
        return f"{self.downlink_mbps:.4g} Mbit/s down and {self.uplink_mbps:.4g} up"


def _means(rows: Sequence[Row]) -> _Mean:
    """Divided before they are added, since sums of finite rates may not be finite."""
    return _Mean(
        sum(row.downlink_mbps / len(rows) for row in rows), sum(row.uplink_mbps / len(rows) for row in rows)
    )


def _some(lines: Sequence[int], most: int = 3) -> str:
    shown = ", ".join(map(str, lines[:most]))
    return shown if len(lines) <= most else f"{shown}, ..."


_TABLES = {
    "csv": _Table(HEADER, float, 1.0),
    "raca": _Table(("Timestamp", "DL_bitrate", "UL_bitrate"), _seconds, 1e-3),
}
_FORMS = (*_TABLES, "mahimahi")
