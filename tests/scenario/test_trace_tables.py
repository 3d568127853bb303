"""Rows of traces as files hold them: quotes, line ends, characters. No rate changes in silence."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_trace import HEADER, raca_row, written

from emutune.errors import TraceError
from emutune.scenario.trace import Rates, read_trace
from emutune.scenario.trace_formats import import_trace

FORMS = {
    "csv": ("time_s,downlink_mbps,uplink_mbps,note\n", lambda second: f"{second},5,1"),
    "raca": (
        "Timestamp,DL_bitrate,UL_bitrate,note\n",
        lambda second: raca_row(second, 0, 0).split(",")[0] + ",5000,1000",
    ),
}
FIVE = Rates(1.0, (5.0,) * 30, (1.0,) * 30)


def noted(form: str, notes: dict[int, str], line_end: str = "\n") -> str:
    """Thirty rows of 5 and 1 Mbit/s, with notes in the last column; row 0 is line 2."""
    header, row = FORMS[form]
    text = header + "".join(f"{row(second)},{notes.get(second, 'a')}\n" for second in range(30))
    return text.replace("\n", line_end)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("notes", "line"),
    [
        ({20: '"5 inch'}, 22),
        ({29: '"5 inch'}, 31),
        # Two that together look like a quoted cell of several lines.
        ({10: '"5 inch', 13: '6 inch"'}, 12),
        ({10: '"5 inch', 11: '""'}, 12),
        ({5: '"two\nlines, said"', 20: '"5 inch'}, 23),
    ],
)
def test_an_open_quote_is_refused_by_its_line(
    tmp_path: Path, form: str, notes: dict[int, str], line: int
) -> None:
    with pytest.raises(TraceError) as caught:
        import_trace(form, written(tmp_path / "t.csv", noted(form, notes)))
    assert str(caught.value) == (
        f"{tmp_path / 't.csv'}: line {line}: a quote is opened and not closed; close it or take it out"
    )


@pytest.mark.parametrize(
    "begin", ['"time_s,', 'time_s,downlink_mbps,uplink_mbps\n0,1,2\n"1,1,2\n', '0,"1\n2,1']
)
def test_an_open_quote_before_what_is_wanted_is_refused(tmp_path: Path, begin: str) -> None:
    path = written(tmp_path / "t.csv", begin + "2,1,2\n" * 3)
    for read in (read_trace, lambda one: import_trace("csv", one)):
        with pytest.raises(TraceError, match=rf"line {3 if begin[0] == 't' else 1}: "):
            read(path)


def test_a_quote_that_swallows_more_than_the_library_takes_is_refused(tmp_path: Path) -> None:
    rows = [f"{second},5,1,{'a' * 28}" for second in range(6000)]
    rows[20] = '20,5,1,"x'
    path = written(tmp_path / "t.csv", "time_s,downlink_mbps,uplink_mbps,note\n" + "\n".join(rows))
    with pytest.raises(TraceError, match="line 22: a quote is opened"):
        import_trace("csv", path)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize(
    "note",
    ['"two\nlines"', '"say ""so"", then"', '5" wide', '"5" wide', "", "\x00", "\x0b\x1c\x85\u2028", ","],
)
def test_notes_change_no_rate(tmp_path: Path, form: str, line_end: str, note: str) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(noted(form, {7: note, 29: note}, line_end).encode("utf-8-sig"))
    found, account = import_trace(form, path)
    assert found == FIVE
    assert (account.kept, account.rows) == (30, 30)


def test_other_encodings_are_refused_by_their_line(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(noted("csv", {7: "Zürich"}).encode("latin-1"))
    with pytest.raises(TraceError, match=r"line 9: not UTF-8 text; save it as such"):
        import_trace("csv", path)
    path.write_bytes(noted("csv", {}).encode("utf-16"))
    with pytest.raises(TraceError, match=r"line 1: not UTF-8 text"):
        read_trace(path)


def test_commas_for_decimal_points_are_not_read_as_other_numbers(tmp_path: Path) -> None:
    path = written(tmp_path / "t.csv", HEADER + "0,5,5,1,2\n1,5,1\n2,5,1,\n3,5,1\n")
    found, account = import_trace("csv", path)
    assert account.dropped == {"more columns than the first line": [2]}
    assert found == Rates(1.0, (5.0,) * 3, (1.0,) * 3)
