"""What the server's log says by default, and that nobody fills the disk with it."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from emutune.fleet.server.logs import LINES_PER_MINUTE, Sparing

# The command up to where the server would start, with one that logs what a server logs in its place.
SERVE = """
import asyncio, contextlib, logging, sys
from emutune.errors import FleetError
from emutune.fleet.server import deciding, run
from emutune.tuning import inventory

@contextlib.asynccontextmanager
async def none(*arguments):
    yield None

async def served(*arguments, **more):
    logging.getLogger("emutune.fleet.server.refusals").warning("refused %s", "somebody")
    logging.getLogger("emutune.fleet").warning("step %d: %s is late", 3, "ue1")
    logging.getLogger("emutune.fleet.server.routes").info("ue1 enrolled")
    raise FleetError("enough")

deciding.deciding, run.run_server, inventory.open_inventory = none, served, lambda path: None
from emutune.cli.main import run as command
command()
"""


@pytest.mark.parametrize("verbose", [False, True])
def test_refusals_and_late_devices_are_logged_by_default(tmp_path: Path, verbose: bool) -> None:
    options = ["--catalogue", "none", "--policy", "hold", *(["--verbose"] if verbose else [])]
    ended = subprocess.run(
        [sys.executable, "-c", SERVE, "serve", "demo", *options], capture_output=True, text=True, cwd=tmp_path
    )
    assert "emutune: enough" in ended.stderr
    assert "refused somebody" in ended.stderr
    assert "step 3: ue1 is late" in ended.stderr
    assert ("ue1 enrolled" in ended.stderr) == verbose


def test_a_place_that_logs_without_pause_is_cut_short_and_no_other() -> None:
    now = [0.0]
    sparing, lines = Sparing(lambda: now[0]), []

    def say(place: int, text: str) -> None:
        record = logging.LogRecord(
            "emutune", logging.WARNING, "refusals.py", place, f"{text} %s", ("x",), None
        )
        if sparing.filter(record):
            lines.append(record.getMessage())

    for _ in range(1000):
        say(1, "refused")
    say(2, "late")
    assert len(lines) == LINES_PER_MINUTE + 1
    assert lines[0] == "refused x"
    assert lines[-2:] == ["refused x (more like this are left out for a minute)", "late x"]
    now[0] = 61.0
    say(1, "refused")
    say(1, "refused")
    assert lines[-2:] == [f"({1000 - LINES_PER_MINUTE} like this were left out) refused x", "refused x"]
