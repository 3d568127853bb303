"""Throughput traces: the one normalised file that scenarios read, and what is made of it.

A normalised trace is a CSV file with the header ``time_s,downlink_mbps,uplink_mbps``, whose times count up from
0 in equal intervals; a row's rates are the means over the interval that begins there. ``emutune trace import``
writes such files from others.
"""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from emutune.errors import TraceError
from emutune.files import replacing

HEADER = ("time_s", "downlink_mbps", "uplink_mbps")
# More intervals than this are no trace but a mistake in a time or an interval.
MOST_INTERVALS = 10_000_000
# What a mahimahi file's every line lets through.
PACKET_BITS = 12_000
_LONGEST_LINE = 10_000
_REPAIR = "repair it with emutune trace import csv {path} --out FILE"


class Rates(NamedTuple):
    """A trace: the mean rates of equal intervals, one after another.

    Attributes:
        interval_s: of each rate.
        downlink_mbps: what a UE alone was sent.
        uplink_mbps: what it sent, as many.
    """

    interval_s: float
    downlink_mbps: tuple[float, ...]
    uplink_mbps: tuple[float, ...]


class Row(NamedTuple):
    """A measurement: rates that hold from a time until the next row's."""

    line: int
    time_s: float
    downlink_mbps: float
    uplink_mbps: float


def read_trace(path: str | Path) -> Rates:
    """Read a normalised trace.

    Raises:
        TraceError: the file cannot be read, has another header, or a row is not what it should be: no numbers,
            a time that repeats, goes back or leaves a gap, a rate that is negative or not finite.
    """
    rows = list(read_rows(path))
    if len(rows) < 2:
        raise TraceError(f"{path}: too short: {len(rows)} rows; a trace needs two or more")
    spacing = statistics.median(later.time_s - row.time_s for row, later in pairwise(rows))
    for row, later in pairwise(rows):
        step = later.time_s - row.time_s
        if step <= 0:
            what = "repeats" if step == 0 else "goes back"
            raise TraceError(
                f"{path}: line {later.line}: the time {what} ({later.time_s:g} s after {row.time_s:g} s); "
                + _REPAIR.format(path=path)
            )
        if abs(step - spacing) > 1e-3 * spacing:
            raise TraceError(
                f"{path}: line {later.line}: a gap of {step:g} s where rows are {spacing:g} s apart; "
                + _REPAIR.format(path=path)
            )
    # Of all rows together, since each time is rounded.
    spacing = (rows[-1].time_s - rows[0].time_s) / (len(rows) - 1)
    return Rates(spacing, tuple(row.downlink_mbps for row in rows), tuple(row.uplink_mbps for row in rows))


def read_rows(path: str | Path) -> Iterator[Row]:
    """The rows of a CSV file with the header of a trace, in whatever order their times are.

    Raises:
        TraceError: the file cannot be read, has another header, or a row holds no numbers.
    """
    rows = read_table(path)
    _, names = next(rows, (1, []))
    header = tuple(name.strip() for name in names)
    if header != HEADER:
        raise TraceError(
            f"{path}: its first line must be {','.join(HEADER)}, got {','.join(header)[:80]!r}; rename the columns, "
            "and give seconds and Mbit/s"
        )
    for line, parts in rows:
        if not parts:
            continue
        try:
            time_s, downlink, uplink = (float(part) for part in parts)
        except ValueError as error:
            raise TraceError(
                f"{path}: line {line}: must be three numbers, got {','.join(parts)[:80]!r}"
            ) from error
        row = Row(line, time_s, downlink, uplink)
        if not all(map(math.isfinite, row)) or min(downlink, uplink) < 0:
            raise TraceError(
                f"{path}: line {row.line}: times and rates must be finite and rates not negative, "
                f"got {','.join(parts)[:80]!r}"
            )
        yield row


def read_table(path: str | Path) -> Iterator[tuple[int, list[str]]]:
    """The rows of a CSV file, that of its names first, each with the number of the line where it begins.

    A quoted cell may run over lines, but not over what looks like rows: its quote was forgotten then.

    Raises:
        TraceError: the file cannot be read, or a quote is opened and not closed.
    """
    lines = open_text(path)
    # A quote that nothing closes runs into the line that is added.
    reader, columns = csv.reader([*lines, ""]), 0
    while (begin := reader.line_num + 1) <= len(lines):
        try:
            parts = next(reader)
            unclosed = reader.line_num > len(lines)
        except csv.Error:
            # The lines are short, so it is what a quote has swallowed that is too much for the library.
            unclosed = True
        swallowed = lines[begin : reader.line_num]
        if unclosed or any(line.count(",") >= columns - 1 for line in swallowed):
            raise TraceError(
                f"{path}: line {begin}: a quote is opened and not closed; close it or take it out"
            )
        columns = columns or len(parts)
        yield begin, parts


def open_text(path: str | Path) -> list[str]:
    """The lines of a text file.

    Raises:
        TraceError: it cannot be read.
    """
    try:
        # Not splitlines, for which many a character in a note ends a line.
        lines = Path(path).read_text("utf-8-sig").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise TraceError(f"{path}: line {line}: not UTF-8 text; save it as such") from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no such path"
        raise TraceError(f"{path}: cannot be read: {reason}") from error
    for number, text in enumerate(lines, 1):
        if len(text) > _LONGEST_LINE:
            raise TraceError(
                f"{path}: line {number}: has more than {_LONGEST_LINE} characters; that is no trace"
            )
    return lines


def write_trace(path: str | Path, rates: Rates) -> None:
    """Write a normalised trace, whole or not at all.

    Raises:
        TraceError: the file cannot be written.
    """
    rows = [",".join(HEADER)]
    for index, (down, up) in enumerate(zip(rates.downlink_mbps, rates.uplink_mbps, strict=True)):
        rows.append(f"{index * rates.interval_s:.10g},{down:.6g},{up:.6g}")
    write_text(path, rows)


def write_text(path: str | Path, lines: Iterable[str]) -> None:
    """Write lines, all or nothing.

    Raises:
        TraceError: the file cannot be written.
    """
    try:
        with replacing(Path(path)) as aside, aside.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(line + "\n" for line in lines)
    except OSError as error:
        raise TraceError(f"{path}: cannot be written: {error.strerror}") from error


def mean_rates(rates: Rates, interval_s: float) -> Rates:
    """The same trace in other intervals; what is left at its end is dropped.

    Raises:
        TraceError: the intervals are shorter than its own, it is shorter than two of them, or nothing at all
            passes in one of them.
    """
    if interval_s < rates.interval_s * (1 - 1e-9):
        raise TraceError(
            f"intervals of {interval_s:g} s are shorter than its rows of {rates.interval_s:g} s; take longer ones"
        )
    seconds = len(rates.downlink_mbps) * rates.interval_s
    count = whole_intervals(seconds, interval_s)
    if count < 2:
        raise TraceError(
            f"too short: {seconds:g} s are less than two intervals of {interval_s:g} s; take a longer trace or "
            "shorter intervals"
        )
    starts = [index * rates.interval_s for index in range(len(rates.downlink_mbps) + 1)]
    columns = [
        means(starts, column, interval_s, count) for column in (rates.downlink_mbps, rates.uplink_mbps)
    ]
    for name, column in zip(("downlink", "uplink"), columns, strict=True):
        silent = [index for index, rate in enumerate(column) if rate <= 0]
        if silent:
            raise TraceError(
                f"zero rate: nothing passes on the {name} in {len(silent)} of {count} intervals of {interval_s:g} s "
                f"(the first at {silent[0] * interval_s:g} s), so no transfer would end there; take longer "
                "intervals, or import the trace with --drop-zeros"
            )
    return Rates(interval_s, *columns)


def whole_intervals(seconds: float, interval_s: float) -> int:
    """How many intervals a trace fills; times that were written as decimals are not exact."""
    return math.floor(seconds / interval_s + 1e-6)


def means(
    starts: Sequence[float], values: Sequence[float], interval_s: float, count: int
) -> tuple[float, ...]:
    """Means over equal intervals from 0 of what is constant between neighbouring starts.

    Args:
        starts: rising, the first 0; one more than there are values, the last one the end.
        values: from each start to the next.
        interval_s: of each mean.
        count: of means; no more than end before the last start.
    """
    found, index = [], 0
    for window in range(count):
        begin, end = window * interval_s, (window + 1) * interval_s
        total = 0.0
        while index < len(values):
            total += values[index] * max(0.0, min(starts[index + 1], end) - max(starts[index], begin))
            if starts[index + 1] > end:
                break
            index += 1
        found.append(total / interval_s)
    return tuple(found)


def opportunities_ms(rates_mbps: Sequence[float], interval_s: float) -> Iterator[int]:
    """A mahimahi file's lines: the milliseconds at which a packet of 1500 bytes may pass.

    A packet passes as soon as the rates add up to it, so no second is off by more than a packet. The last line is
    the end of the trace, since it is there that mahimahi begins anew.
    """
    packets, last_ms, total_bits = 0, 0, 0.0
    for index, rate in enumerate(rates_mbps):
        begin_ms, bits_per_ms = 1000 * interval_s * index, 1000 * rate
        due_bits = total_bits + bits_per_ms * 1000 * interval_s
        while (packets + 1) * PACKET_BITS <= due_bits * (1 + 1e-12):
            packets += 1
            waited_ms = (packets * PACKET_BITS - total_bits) / bits_per_ms
            last_ms = max(1, math.ceil(begin_ms + waited_ms - 1e-6))
            yield last_ms
        total_bits = due_bits
    end_ms = max(1, round(1000 * interval_s * len(rates_mbps)))
    if last_ms < end_ms:
        yield end_ms
