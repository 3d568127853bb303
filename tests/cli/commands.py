"""The command in processes of its own, several commands in each: imports take longer than most commands."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

PROGRAM = """
import contextlib, io, json, sys, traceback
from emutune.cli import main  # its commands import what a prelude changed
ended = []
for command in json.loads(sys.argv[1]):
    sys.argv = ["emutune", *command]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main.run()
        except SystemExit as status:
            code = status.code
        except BaseException:
            code = traceback.format_exc()
    ended.append((code, out.getvalue(), err.getvalue()))
print(json.dumps(ended))
"""


class Ended(NamedTuple):
    """How a command ended."""

    status: int | str
    out: str
    err: str


def emutune(cwd: Path, *commands: tuple[str, ...], prelude: str = "") -> list[Ended]:
    """Run commands one after the other in one process, which begins with a prelude."""
    done = subprocess.run(
        [sys.executable, "-c", prelude + PROGRAM, json.dumps(commands)],
        capture_output=True,
        text=True,
        cwd=cwd,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [Ended(*ended) for ended in json.loads(done.stdout.splitlines()[-1])]


def assert_refused(ended: Ended, message: str) -> None:
    """One line that says what is wrong, and status 2."""
    assert ended.status == 2, ended
    assert message in ended.err
    assert ended.err.count("\n") == 1
