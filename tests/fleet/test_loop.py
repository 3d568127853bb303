from __future__ import annotations

import asyncio
import signal
import subprocess
import sys

import pytest

from emutune.fleet.loop import run

# Ctrl-C ends a device as it ends what asyncio.run runs; a server takes the signal itself and raises from a task.
DEVICE = """
async def main():
    print("ready", flush=True)
    try:
        await asyncio.sleep(60)
    finally:
        print("put away", flush=True)
"""
SERVER = """
async def main():
    told = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGINT, told.set)
    print("ready", flush=True)
    try:
        await told.wait()
        raise KeyboardInterrupt
    finally:
        await asyncio.sleep(0)
        print("put away", flush=True)
"""
SCRIPT = """
import asyncio, signal, sys
from emutune.fleet.loop import run
{main}
try:
    run(main())
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


@pytest.mark.parametrize("main", [DEVICE, SERVER])
def test_an_interrupt_comes_out_after_everything_was_put_away(main: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(main=main)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    said, complaints = process.communicate(timeout=20)
    assert said.splitlines() == ["put away", "interrupted"]
    assert complaints == ""
    assert process.returncode == 0


def test_the_loop_is_uvloops_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    async def module() -> str:
        return type(asyncio.get_running_loop()).__module__

    pytest.importorskip("uvloop")
    assert run(module()).startswith("uvloop")
    monkeypatch.setitem(sys.modules, "uvloop", None)
    assert run(module()).startswith("asyncio")
