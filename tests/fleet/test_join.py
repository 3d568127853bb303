"""The command as a process: what it says about bad input, and how it ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from emutune.fleet.security import Credentials, new_secret, self_made_certificate, write_credentials

RUN = (sys.executable, "-u", "-c", "from emutune.cli.main import run; run()", "join")


@pytest.fixture
def ready(tmp_path: Path) -> list[str]:
    """Options of a device that has everything but a server."""
    authority = self_made_certificate(tmp_path / "ca", ["localhost"]).authority
    made = Credentials(fleet="f", device="ue1", url="https://localhost:1", token=new_secret(), ca=authority)
    write_credentials(tmp_path / "ue1.json", made)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.txt").write_text("some text")
    places = {"--credentials": "ue1.json", "--data": "data", "--cache": "cache"}
    return [part for option, name in places.items() for part in (option, str(tmp_path / name))]


def ended(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*RUN, *arguments], capture_output=True, text=True, timeout=60, check=False)


def test_bad_input_is_named(ready: list[str], tmp_path: Path) -> None:
    done = ended("http://localhost:1", *ready)
    assert done.returncode == 2
    assert "must begin with https://" in done.stderr
    (tmp_path / "ue1.json").write_text("{")
    done = ended("https://localhost:1", *ready)
    assert done.returncode == 2
    assert "damaged" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_an_unreachable_server_is_named_and_waited_for(ready: list[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"https://localhost:{taken.getsockname()[1]}"
        device = subprocess.Popen(
            [*RUN, url, *ready], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ
        )
        assert device.stdout is not None
        assert "trying again until it answers" in device.stdout.readline()
        assert device.poll() is None
        device.send_signal(signal.SIGINT)
        _, errors = device.communicate(timeout=30)
    assert device.returncode == 130
    assert "the same command goes on" in errors
    assert "Traceback" not in errors
