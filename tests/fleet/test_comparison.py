"""Prediction against measurement, and the command that prints it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from ledgers import add_devices, decision, digest, run_step

from emutune.cli import ledger as command
from emutune.errors import LedgerError, UsageError
from emutune.fleet.comparison import Comparison, compare_steps, error_percent, errors
from emutune.fleet.figures import FAILED
from emutune.fleet.ledger import Decision, Ledger
from emutune.fleet.protocol import Result


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Three steps: one as predicted on the whole, one with a transfer missing, one that stops everybody."""
    path = tmp_path / "ledger.sqlite"
    with Ledger(path) as ledger:
        add_devices(ledger, "ue1", "ue2")
        ledger.begin_step(0, [decision(0, "ue1", predicted_delay_s=4.0), upload(0, "ue2")])
        ledger.transferred("0-ue1", 5.0, 1100)
        ledger.adapter("0-ue1", digest("a"), 64)
        ledger.evaluation("0-ue1", 30.0, 22.0, True)
        ledger.result("0-ue1", Result(outcome="trained"))
        ledger.close_lease("0-ue1", "done")
        ledger.transferred("0-ue2", 2.0, 500)
        ledger.adapter("0-ue2", digest("b"), 64)
        ledger.evaluation("0-ue2", 30.0, 31.0, False)
        ledger.close_lease("0-ue2", "late")
        ledger.end_step(0, 5.0)
        ledger.begin_step(1, [decision(1, "ue1"), upload(1, "ue2")])
        ledger.transferred("1-ue1", 2.0, 1000)
        ledger.close_lease("1-ue2", "expired")
        ledger.begin_step(2, [decision(2, name, "", kind="stop", retention=None) for name in ("ue1", "ue2")])
    return path


def upload(step: int, device: str) -> Decision:
    """A lease to train at the server."""
    return decision(
        step,
        device,
        kind="upload",
        at_server=True,
        retention=None,
        predicted_bytes=500,
        predicted_delay_s=3.0,
        predicted_perplexity=None,
    )


def rows_of(path: Path) -> list[Comparison]:
    """The rows of a ledger."""
    with Ledger(path) as ledger:
        return ledger.comparison()


def test_a_step_takes_as_long_as_its_slowest_transfer(path: Path) -> None:
    first, second, _ = compare_steps(rows_of(path))
    assert (first.predicted_delay_s, first.measured_delay_s) == (4.0, 5.0)
    assert first.error_percent == pytest.approx(25.0)
    assert (second.predicted_delay_s, second.measured_delay_s, second.error_percent) == (3.0, None, None)


def test_a_lease_without_transfer_is_not_waited_for(path: Path) -> None:
    with Ledger(path) as ledger:
        cached = decision(3, "ue1", predicted_bytes=0, predicted_delay_s=0.0)
        ledger.begin_step(3, [cached, decision(3, "ue2")])
        ledger.transferred("3-ue2", 3.0, 1000)
    last = compare_steps(rows_of(path))[-1]
    assert (last.predicted_delay_s, last.measured_delay_s) == (2.0, 3.0)
    assert last.error_percent == pytest.approx(50.0)


def test_the_medians_are_over_what_was_predicted_and_measured(path: Path) -> None:
    apart = errors(rows_of(path))
    assert (apart.delay_percent, apart.steps) == (pytest.approx(25.0), 1)
    # Of 10, 0 and 0 percent; the expired lease never moved its bytes.
    assert (apart.bytes_percent, apart.transfers) == (pytest.approx(0.0), 3)
    assert (apart.perplexity_percent, apart.evaluations) == (pytest.approx(10.0), 1)


def test_nothing_is_said_about_nothing() -> None:
    apart = errors([])
    assert (apart.delay_percent, apart.steps, apart.bytes_percent, apart.transfers) == (None, 0, None, 0)


@given(st.floats(1e-3, 1e6), st.floats(0, 1e6))
def test_the_error_is_relative_to_the_prediction(predicted: float, measured: float) -> None:
    percent = error_percent(predicted, measured)
    assert percent is not None
    assert percent >= 0
    assert predicted * percent / 100 == pytest.approx(abs(predicted - measured), abs=1e-6)
    assert error_percent(0.0, measured) is None
    assert error_percent(predicted, None) is None


def test_a_fleet_that_does_as_predicted_has_no_error(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        add_devices(ledger, "ue1")
        for step in range(4):
            run_step(ledger, step, "ue1")
        apart = errors(ledger.comparison())
    assert (apart.delay_percent, apart.steps) == (pytest.approx(50.0), 4), "1 s of 2 s"
    assert (apart.bytes_percent, apart.perplexity_percent) == (pytest.approx(0.0), pytest.approx(5.0))


# The command


def run_command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    """Run ``emutune ledger`` as the command line does."""
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(command.ledger)
    monkeypatch.setattr(sys, "argv", ["emutune", *arguments])
    app(standalone_mode=False)


def test_the_command_prints_and_writes_the_same(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = tmp_path / "figures.json"
    run_command(monkeypatch, str(path), "--json", str(figures))
    printed = capsys.readouterr().out
    lines = [" ".join(line.split()) for line in printed.splitlines()]
    assert "0 ue1 device 0.500 0.001/0.001 5.00/4.00 22.00/20.00 accepted" in lines
    assert "0 ue2 server 0.001/0.001 2.00/3.00 31.00/- late, rejected" in lines
    assert "1 ue1 device 0.500 0.001/0.001 2.00/2.00 -/20.00 open" in lines
    assert "1 ue2 server -/0.001 -/3.00 -/- expired" in lines
    assert "2 ue1 stop open" in lines
    assert "adapters trained by devices: 1, by the server: 1" in lines
    assert "median error of the delay: 25.00 % over 1 steps" in printed
    written = json.loads(figures.read_text("utf-8"))
    with Ledger(path) as ledger:
        assert written["totals"] == ledger.totals()
        assert [row["lease"] for row in written["leases"]] == [row.lease for row in ledger.comparison()]
    first = written["leases"][0]
    assert (first["trained_by"], first["predicted_bytes"], first["measured_bytes"]) == ("device", 1000, 1100)
    assert (first["at_server"], first["retention"], first["accepted"]) == (False, 0.5, True)
    assert written["steps"][0]["error_percent"] == pytest.approx(25.0)
    assert written["errors"]["bytes_percent"] == pytest.approx(0.0)
    for name, count in written["totals"].items():
        assert f"{name}: {count:,}" in printed


def test_the_command_says_why_a_lease_failed(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with Ledger(path) as ledger:
        ledger.audit(FAILED, "ue2", "1-ue2", "judge: was not done in 600 s")
        ledger.result("1-ue1", Result(outcome="failed", reason="no room\n\x1b[2Jall is well"))
    run_command(monkeypatch, str(path))
    printed = capsys.readouterr().out
    assert "step 1, ue2: expired: judge: was not done in 600 s\n" in printed
    assert "step 1, ue1: open: no room  [2Jall is well\n" in printed


def test_the_command_changes_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = path.read_bytes()
    run_command(monkeypatch, str(path))
    assert path.read_bytes() == before


def test_the_command_names_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="absent: does not exist; give the ledger of a fleet"):
        run_command(monkeypatch, str(tmp_path / "absent"))
    assert not (tmp_path / "absent").exists()
    (tmp_path / "text").write_text("no ledger " * 100, "utf-8")
    with pytest.raises(LedgerError, match="file is not a database"):
        run_command(monkeypatch, str(tmp_path / "text"))
