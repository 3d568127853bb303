"""Real training processes that are interrupted, killed, starved of disk, or run on other devices."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from checkpoints import assert_same_bits

SMALL = ["--set", "fleet.ues=2", "--set", "fleet.tasks=5", "--steps", "60000"]


def command(out, *more):
    # A shell's background jobs ignore Ctrl-C, and so would all their children: undo that.
    program = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "from emutune.cli.main import run; run()"
    )
    return [sys.executable, "-c", program, "train", "paper", *SMALL, "--out", str(out), *more]


def checkpoint(out: Path, seed: int = 0) -> Path:
    return out / f"seed-{seed:03d}" / "checkpoint.safetensors"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole")
    subprocess.run(command(out), check=True, capture_output=True)
    return out


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_run_resumes_to_the_same_bits(tmp_path, whole, how):
    with subprocess.Popen(command(tmp_path), stderr=subprocess.PIPE, text=True) as process:
        while not checkpoint(tmp_path).exists():
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(how)
        _, said = process.communicate()
    if how is signal.SIGINT:
        assert process.returncode == 130
        assert f"what was learned is in {tmp_path}; the same command resumes it" in said
        assert "Traceback" not in said
    subprocess.run(command(tmp_path), check=True, capture_output=True)
    assert_same_bits(checkpoint(tmp_path), checkpoint(whole))


def test_a_seed_has_the_same_bits_alone_and_beside_another(tmp_path, whole):
    subprocess.run(command(tmp_path, "--seeds", "2"), check=True, capture_output=True)
    assert_same_bits(checkpoint(tmp_path), checkpoint(whole))
    assert (
        load_file(checkpoint(tmp_path, 1))["0000"].tobytes()
        != load_file(checkpoint(tmp_path, 0))["0000"].tobytes()
    )


@pytest.mark.slow
def test_a_full_disk_keeps_the_earlier_checkpoint(tmp_path, whole):
    earlier = checkpoint(tmp_path)
    earlier.parent.mkdir()
    program = command(tmp_path)
    with subprocess.Popen(program, stderr=subprocess.DEVNULL) as process:
        while not earlier.exists():
            time.sleep(0.005)
        process.kill()
    before = earlier.read_bytes()

    # No file may grow beyond half a checkpoint; -B, so that no half-written bytecode is left behind.
    limited = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({len(before) // 2},) * 2);"
    )
    ended = subprocess.run(
        [program[0], "-B", "-c", limited + program[2], *program[3:]],
        env={"PATH": "", "XDG_CACHE_HOME": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 2
    assert "cannot be written" in ended.stderr.splitlines()[-1]
    assert earlier.read_bytes() == before
    assert list(earlier.parent.glob("*.partial")) == []
    subprocess.run(program, check=True, capture_output=True)
    assert_same_bits(earlier, checkpoint(whole))
