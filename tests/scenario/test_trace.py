"""Traces: what is read, what is refused with which remedy, and that nothing is lost on the way."""

from __future__ import annotations

import math
import random
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emutune.errors import EmutuneError, ScenarioError, TraceError, UsageError
from emutune.scenario import dump_scenario, load_scenario, parse_scenario
from emutune.scenario.synthetic_trace import synthesize_trace
from emutune.scenario.trace import Rates, mean_rates, means, opportunities_ms, read_trace, write_trace
from emutune.scenario.trace_formats import import_trace

HEADER = "time_s,downlink_mbps,uplink_mbps\n"
RACA_HEADER = (
    "Timestamp,Longitude,Latitude,Speed,Operatorname,CellID,NetworkMode,RSRP,DL_bitrate,UL_bitrate,State\n"
)


def written(path: Path, text: str) -> Path:
    path.write_text(text, "utf-8")
    return path


def raca_row(second: int, down: object, up: object) -> str:
    clock = f"2019.12.16_13.{second // 60:02d}.{second % 60:02d}"
    return f"{clock},-8.3,51.8,0,B,12,5G,-98,{down},{up},D\n"


rates = st.floats(0, 1e4, allow_subnormal=False)
columns = st.integers(2, 40).flatmap(
    lambda count: st.tuples(*[st.lists(rates, min_size=count, max_size=count)] * 2)
)


# --- the normalised file ------------------------------------------------------------------------------------


@given(columns, st.floats(0.01, 1e4))
def test_a_written_trace_is_read_back(tmp_path_factory, drawn, interval_s: float) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path_factory.mktemp("trace") / "t.csv"
    write_trace(path, Rates(interval_s, *map(tuple, drawn)))
    back = read_trace(path)
    assert back.interval_s == pytest.approx(interval_s, rel=1e-6)
    for mine, theirs in zip(back[1:], drawn, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "its first line must be time_s,downlink_mbps,uplink_mbps, got ''"),
        ("time,down,up\n0,1,2\n", "got 'time,down,up'; rename the columns"),
        (HEADER, "too short: 0 rows"),
        (HEADER + "0,1,2\n", "too short: 1 rows"),
        (HEADER + "0,1,2\n1,1\n", "line 3: must be three numbers, got '1,1'"),
        (HEADER + "0,1,2\n1,fast,2\n", "line 3: must be three numbers"),
        (HEADER + "0,1,2\n1,nan,2\n", "line 3: times and rates must be finite"),
        (HEADER + "0,1,2\n1,-1,2\n", "line 3: times and rates must be finite and rates not negative"),
        (
            HEADER + "0,1,2\n1,1,2\n2,1,2\n1.5,1,2\n",
            "line 5: the time goes back (1.5 s after 2 s); repair it",
        ),
        (HEADER + "0,1,2\n1,1,2\n1,1,2\n2,1,2\n", "line 4: the time repeats"),
        (HEADER + "0,1,2\n1,1,2\n2,1,2\n9,1,2\n", "line 5: a gap of 7 s where rows are 1 s apart; repair it"),
    ],
)
def test_what_is_no_normalised_trace_is_refused_by_line_and_remedy(
    tmp_path: Path, text: str, message: str
) -> None:
    with pytest.raises(TraceError) as caught:
        read_trace(written(tmp_path / "t.csv", text))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_or_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="cannot be read: No such file"):
        read_trace(tmp_path / "none.csv")
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TraceError, match="line 1: not UTF-8 text"):
        read_trace(tmp_path / "binary.csv")
    with pytest.raises(TraceError, match="line 2: has more than 10000 characters"):
        read_trace(written(tmp_path / "long.csv", HEADER + "1" * 10_001))
    with pytest.raises(TraceError, match="cannot be written"):
        write_trace(tmp_path / "no" / "t.csv", Rates(1.0, (1.0, 1.0), (1.0, 1.0)))


@given(st.binary(max_size=400))
def test_any_bytes_are_read_or_refused(tmp_path_factory, content: bytes) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path_factory.mktemp("trace") / "t.down"
    path.write_bytes(content)
    path.with_suffix(".up").write_bytes(content)
    for read in (
        read_trace,
        lambda one: import_trace("csv", one),
        lambda one: import_trace("raca", one),
        lambda one: import_trace("mahimahi", one),
    ):
        with suppress(EmutuneError):
            read(path)


words = st.one_of(
    st.sampled_from(["-", "", "nan", "inf", "1e308", "-3", "0", "x", "1" * 30]), st.floats().map(str)
)


@given(st.lists(st.lists(words, max_size=4).map(",".join), max_size=12), st.booleans())
def test_any_rows_are_imported_or_refused(tmp_path_factory, rows: list[str], drop: bool) -> None:  # type: ignore[no-untyped-def]
    path = written(tmp_path_factory.mktemp("trace") / "t.csv", HEADER + "\n".join(rows))
    try:
        found, account = import_trace("csv", path, drop_zeros=drop)
    except EmutuneError:
        return
    assert account.kept + sum(map(len, account.dropped.values())) == account.rows
    assert all(math.isfinite(rate) and rate >= 0 for column in found[1:] for rate in column)


# --- means over intervals -----------------------------------------------------------------------------------


@given(columns, st.integers(1, 7))
def test_means_keep_what_is_carried(drawn, group: int) -> None:  # type: ignore[no-untyped-def]
    values = drawn[0]
    count = len(values) // group
    found = means(range(len(values) + 1), values, float(group), count)
    expected = [sum(values[index * group : (index + 1) * group]) / group for index in range(count)]
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_means_over_intervals_that_cut_rows() -> None:
    # 10 s at 4 and 10 s at 1: the interval from 7.5 to 15 holds a third of the one and two of the other.
    assert means([0.0, 10.0, 20.0], [4.0, 1.0], 7.5, 2) == pytest.approx((4.0, (2.5 * 4 + 5 * 1) / 7.5))


@pytest.mark.parametrize("interval_s", [1 / 3, 0.1, 0.7])
def test_a_written_trace_fills_the_intervals_it_was_made_for(tmp_path: Path, interval_s: float) -> None:
    # Decimals round its times, and late ones more than early ones.
    write_trace(tmp_path / "t.csv", Rates(interval_s, (5.0,) * 20_000, (1.0,) * 20_000))
    found = mean_rates(read_trace(tmp_path / "t.csv"), 100 * interval_s)
    assert found.downlink_mbps == pytest.approx((5.0,) * 200)


@pytest.mark.parametrize(
    ("interval_s", "message"),
    [
        (40.0, "too short: 60 s are less than two intervals of 40 s"),
        (5.0, "intervals of 5 s are shorter than its rows of 10 s"),
        (10.0, "zero rate: nothing passes on the uplink in 1 of 6 intervals of 10 s (the first at 30 s)"),
    ],
)
def test_intervals_that_do_not_fit_are_refused(interval_s: float, message: str) -> None:
    trace = Rates(10.0, (5.0,) * 6, (1.0, 1.0, 1.0, 0.0, 1.0, 1.0))
    with pytest.raises(TraceError) as caught:
        mean_rates(trace, interval_s)
    assert message in str(caught.value)
    assert mean_rates(trace, 20.0).uplink_mbps == (1.0, 0.5, 1.0)


# --- what others record -------------------------------------------------------------------------------------


def test_csv_is_cleaned_and_accounted_for(tmp_path: Path) -> None:
    rows = ["5,10,1", "6,12,1", "6,20,3", "4,99,9", "7,-,1", "8,14,1", "9,0,1", "39,20,2", "40,22,2", "41,1"]
    found, account = import_trace("csv", written(tmp_path / "t.csv", HEADER + "\n".join(rows)))
    # The two rows at 6 s hold until 8 s, and after the gap the row at 39 s follows the one at 9 s at once.
    assert found == Rates(1.0, (10.0, 16.0, 16.0, 14.0, 0.0, 20.0, 22.0), (1.0, 2.0, 2.0, 1.0, 1.0, 2.0, 2.0))
    assert account.rows == 10
    assert account.kept == 7
    assert account.dropped == {
        "no time or rate": [6],
        "fewer columns than the first line": [11],
        "time goes back": [5],
    }
    assert account.gaps == [(9, 29.0)]
    told = "\n".join(account.lines())
    for part in (
        "kept 7 of 10 rows", "dropped 1: time goes back (line 5)",
        "what was dropped moved the mean of rows from 24.62 Mbit/s down and 2.5 up to 14 Mbit/s down and 1.571 up",
        "7 rows have 6 times; the mean of those with one time stands for them",
        "closed 1 gaps, 29 s in all (before line 9)",
        "kept 1 intervals without any downlink, as outages; --drop-zeros drops such rows",
    ):  # fmt: skip
        assert part in told


def test_zero_rates_are_dropped_on_demand(tmp_path: Path) -> None:
    path = written(tmp_path / "t.csv", HEADER + "0,4,1\n1,0,1\n2,6,1\n3,8,0\n4,10,1\n")
    found, account = import_trace("csv", path, drop_zeros=True)
    assert account.dropped == {"a zero rate": [3, 5]}
    # What is dropped leaves time in which the row before goes on.
    assert found.downlink_mbps == (4.0, 4.0, 6.0, 6.0, 10.0, 10.0)


def test_the_dataset_of_raca_is_read_by_its_columns(tmp_path: Path) -> None:
    rows = [
        raca_row(58, 30_000, 400),
        raca_row(59, "-", 0),
        raca_row(59, 25_000, 300),
        raca_row(60, 20_000, 50),
    ]
    found, account = import_trace("raca", written(tmp_path / "t.csv", "\ufeff" + RACA_HEADER + "".join(rows)))
    assert found == Rates(1.0, (30.0, 25.0, 20.0), (0.4, 0.3, 0.05))
    assert account.dropped == {"no time or rate": [3]}


def test_rows_of_one_second_count_by_their_mean(tmp_path: Path) -> None:
    # A second of four rows weighs no more than one of a single row.
    logged = [(0, 8_000), (1, 10_000), (1, 20_000), (1, 30_000), (1, 40_000), (2, 5_000), (2, 7_000)]
    text = RACA_HEADER + "".join(raca_row(second, rate, rate / 10) for second, rate in logged)
    found, account = import_trace("raca", written(tmp_path / "t.csv", text))
    assert found.downlink_mbps == pytest.approx((8.0, 25.0, 6.0))
    assert found.uplink_mbps == pytest.approx((0.8, 2.5, 0.6))
    assert (account.kept, account.dropped) == (7, {})
    assert account.notes == ["7 rows have 3 times; the mean of those with one time stands for them"]


@pytest.mark.parametrize(
    ("form", "text", "message"),
    [
        ("raca", RACA_HEADER.replace("DL_bitrate", "DL_bitrates"), "has no column DL_bitrate; "),
        ("raca", RACA_HEADER.replace("DL_bitrate", "DL_bitrates"), "is 'DL_bitrates' meant? Rename it"),
        ("csv", "time_s,uplink_mbps\n", "has no column downlink_mbps"),
        ("csv", HEADER + "0,1,1\n", "too short: kept 1 of 1 rows; a trace needs two"),
        (
            "csv",
            HEADER + "0,x,1\n1,y,1\n",
            "too short: kept 0 of 2 rows; dropped 2: no time or rate (line 2, 3)",
        ),
        (
            "csv",
            HEADER + "0,1,1\n0.1,1,1\n",
            "less than two intervals of 1 s (kept 2 of 2 rows; dropped the last 0.2 s",
        ),
        ("csv", HEADER + "0,1,1\n0.1,1,1\n0.2,1,1\n9,1,1\n", "closed 1 gaps, 8.7 s in all (before line 5)"),
        ("csv", HEADER + "0,1,1\n1e300,1,1\n", "more than 10000000 intervals; raise --interval-s"),
        ("mahimahi", "x\n", "holds no delivery opportunity"),
        ("mahimahi", "1\n100000000000000\n", "line 2: 100000000000000 ms are more than"),
    ],
)
def test_what_cannot_be_imported_is_refused_with_the_remedy(
    tmp_path: Path, form: str, text: str, message: str
) -> None:
    path = written(tmp_path / "t.csv", text)
    with pytest.raises(TraceError) as caught:
        import_trace(form, path, uplink=path if form == "mahimahi" else None)
    assert message in str(caught.value)


def test_arguments_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "t.csv", HEADER)
    for message, arguments in (
        ("no form 'pcap'; choose from csv, raca, mahimahi", {"form": "pcap"}),
        ("--uplink: only mahimahi", {"form": "csv", "uplink": path}),
        ("--uplink: name the uplink's file", {"form": "mahimahi"}),
        ("--interval-s: must be positive, got 0", {"form": "csv", "interval_s": 0.0}),
    ):
        with pytest.raises(UsageError, match=message):
            import_trace(path=path, **arguments)  # type: ignore[arg-type]


def test_mahimahi_by_hand(tmp_path: Path) -> None:
    # Three packets of 12 kbit in the first second, one of them on its border; an outage; part of a third second.
    down = written(tmp_path / "lte.down", "0\n500\n1000\nx\n900\n2400\n")
    written(tmp_path / "lte.up", "100\n1500\n2500\n3600\n")
    found, account = import_trace("mahimahi", down)
    assert found == Rates(1.0, (0.036, 0.0), (0.012, 0.012))
    told = "\n".join(account.lines())
    assert "kept 8 of 10 rows" in told
    assert "no whole milliseconds" in told
    assert "one link's file is 1.2 s longer" in told
    assert "dropped the last 0.4 s, less than an interval of 1 s" in told
    assert "kept 1 intervals without any downlink" in told


@pytest.mark.parametrize(("seconds", "interval_s"), [(2.5, 1.0), (10.4, 1.0), (10.4, 2.5), (3.0, 1.0)])
def test_a_part_of_an_interval_at_the_end_has_no_mean(
    tmp_path: Path, seconds: float, interval_s: float
) -> None:
    count = round(seconds / 0.1)
    made = Rates(0.1, (12.0,) * count, (6.0,) * count)
    for suffix, column in (("down", made.downlink_mbps), ("up", made.uplink_mbps)):
        written(tmp_path / f"t.{suffix}", "\n".join(map(str, opportunities_ms(column, 0.1))) + "\n")
    # As a clock that counts from 1970 writes them.
    times = [f"{1_600_000_000 + index / 10:.1f},12,6\n" for index in range(count)]
    written(tmp_path / "t.csv", HEADER + "".join(times))
    whole, left_s = int(seconds // interval_s), seconds % interval_s
    for form, name in (("mahimahi", "t.down"), ("csv", "t.csv")):
        found, account = import_trace(form, tmp_path / name, interval_s=interval_s)
        assert found.downlink_mbps == pytest.approx((12.0,) * whole, rel=1e-5)
        assert found.uplink_mbps == pytest.approx((6.0,) * whole, rel=1e-5)
        told = f"dropped the last {left_s:.3g} s, less than an interval of {interval_s:g} s"
        assert account.notes == ([told] if left_s > 1e-6 else [])


def test_a_part_of_an_interval_is_dropped_from_the_dataset_of_raca(tmp_path: Path) -> None:
    rows = "".join(raca_row(second, 12_000, 6_000) for second in range(5))
    found, account = import_trace("raca", written(tmp_path / "t.csv", RACA_HEADER + rows), interval_s=2.0)
    assert found == Rates(2.0, (12.0, 12.0), (6.0, 6.0))
    assert account.notes == ["dropped the last 1 s, less than an interval of 2 s"]


@given(columns, st.sampled_from([0.25, 1.0, 2.0]))
def test_mahimahi_files_carry_the_rates_back(drawn, interval_s: float) -> None:  # type: ignore[no-untyped-def]
    column = [min(rate, 8.0) for rate in drawn[0]]
    lines = list(opportunities_ms(column, interval_s))
    assert lines == sorted(lines)
    assert lines[-1] == round(1000 * interval_s * len(column))
    for index, rate in enumerate(column):
        begin, end = 1000 * interval_s * index, 1000 * interval_s * (index + 1)
        packets = sum(begin < line <= end for line in lines)
        # One may slip into the next interval, one come over from the last, and the last line ends the file.
        last = index == len(column) - 1
        assert packets == pytest.approx(rate * 1e6 * interval_s / 12_000, abs=2.01 + last)
    sent = sum(column) * 1e6 * interval_s / 12_000
    assert len(lines) == pytest.approx(sent, abs=2.01)


def test_the_round_trip_through_mahimahi_is_off_by_a_packet(tmp_path: Path) -> None:
    trace = synthesize_trace(40, seed=3)
    for suffix, column in (("down", trace.downlink_mbps), ("up", trace.uplink_mbps)):
        written(tmp_path / f"t.{suffix}", "\n".join(map(str, opportunities_ms(column, 1.0))) + "\n")
    back, account = import_trace("mahimahi", tmp_path / "t.down")
    assert not account.dropped
    for mine, theirs in zip(back[1:], trace[1:], strict=True):
        assert len(mine) == len(theirs)
        assert max(abs(one - other) for one, other in zip(mine, theirs, strict=True)) <= 2 * 0.012 + 1e-9


# --- in a scenario ------------------------------------------------------------------------------------------


def text_with(section: str) -> str:
    return dump_scenario(load_scenario("paper", ["fleet.tasks=3"])) + f"\n[trace]\n{section}\n"


def test_a_scenario_reads_the_trace_beside_it(tmp_path: Path) -> None:
    write_trace(tmp_path / "t.csv", Rates(5.0, tuple(range(1, 13)), tuple(range(1, 13))))
    path = written(
        tmp_path / "mine.toml",
        text_with('file = "t.csv"\ninterval_s = 10').replace(
            "uplink_bandwidth_hz = 100000.0", "uplink_bandwidth_hz = 1e6"
        ),
    )
    scenario = load_scenario(path)
    assert scenario.trace is not None
    assert scenario.trace.downlink_mbps == (1.5, 3.5, 5.5, 7.5, 9.5, 11.5)
    # What was read stands in the scenario itself: a checkpoint needs no other file.
    assert parse_scenario(dump_scenario(scenario), source="elsewhere") == scenario


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ('file = "none.csv"\ninterval_s = 1', "mine.toml: trace.file: none.csv: cannot be read"),
        ("file = 3\ninterval_s = 1", "trace.file: must be the path of a trace, got 3"),
        ('file = "t.csv"', "trace.interval_s: missing; add it"),
        ('file = "t.csv"\ninterval_s = -1', "trace.interval_s: must be positive, got -1"),
        ('file = "t.csv"\ninterval_s = "1"', "trace.interval_s: must be a number in s, got '1'"),
        (
            'file = "t.csv"\ninterval_s = 40',
            "trace.file: too short: 60 s are less than two intervals of 40 s",
        ),
        ('file = "t.csv"\ninterval_s = 30', "trace: too short: 2 intervals of 30 s, but 3 tasks need 4"),
        ('file = "t.csv"\ninterval_s = 10', "trace.file: zero rate: nothing passes on the uplink"),
        ('file = "t.csv"\ninterval_s = 15\nwindow = 3', "trace.window: unknown field"),
    ],
)
def test_a_scenario_s_trace_that_does_not_fit_is_refused(tmp_path: Path, section: str, message: str) -> None:
    write_trace(tmp_path / "t.csv", Rates(10.0, (1.0,) * 6, (1.0, 1.0, 0.0, 1.0, 1.0, 1.0)))
    with pytest.raises(ScenarioError) as caught:
        load_scenario(written(tmp_path / "mine.toml", text_with(section)))
    assert message in str(caught.value)


# --- made up ------------------------------------------------------------------------------------------------


def test_a_made_up_trace_is_the_same_for_the_same_seed() -> None:
    assert synthesize_trace(200, 1) == synthesize_trace(200, 1)
    assert synthesize_trace(200, 1) != synthesize_trace(200, 2)
    assert synthesize_trace(100, 1).downlink_mbps == synthesize_trace(200, 1).downlink_mbps[:100]
    with pytest.raises(UsageError, match="--seconds: must be at least two intervals"):
        synthesize_trace(1)


def test_a_made_up_trace_has_levels_that_last_and_silent_handovers() -> None:
    trace = synthesize_trace(20_000, 5)
    silent = [rate == 0 for rate in trace.downlink_mbps]
    assert silent == [rate == 0 for rate in trace.uplink_mbps]
    lengths, run = [], 0
    for now in [*silent, False]:
        if run and not now:
            lengths.append(run)
        run = run + 1 if now else 0
    assert len(lengths) > 20
    assert max(lengths) <= 3
    minutes = mean_rates(trace, 60).downlink_mbps
    spread = max(minutes) / min(minutes)
    assert spread > 5
    # The minute after is closer than any other minute is.
    shuffled = random.Random(0).sample(minutes, len(minutes))
    jumps, others = (
        sum(abs(math.log(later / one)) for one, later in pairwise(column)) for column in (minutes, shuffled)
    )
    assert jumps < 0.6 * others


def test_the_shipped_trace_is_the_made_up_one_of_its_seed() -> None:
    from importlib import resources

    path = resources.files("emutune.scenario") / "library" / "synthetic-trace.csv"
    assert len(path.read_bytes()) < 100_000
    shipped, made = read_trace(Path(str(path))), synthesize_trace(14_400, 0, 5)
    for mine, theirs in zip(shipped[1:], made[1:], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)
