"""Training in a shaped fleet lasts as long as it is to, over all attempts, and no time in which others computed."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

import pytest

from emutune.fleet.device.pace import Pace


@dataclass
class Far:
    """How far training is."""

    step: int = 0
    seconds: float = 0.0


def train(pace: Pace, far: Far, steps: int, compute_s: float = 0.0, others_s: float = 0.0) -> bool:
    """So many steps, each of which computes for a while and waits for others."""
    for _ in range(steps):
        until = time.thread_time() + compute_s
        while time.thread_time() < until:
            pass
        time.sleep(others_s)
        far.step += 1
        far.seconds += compute_s + others_s
        if not pace.keep(far):
            return False
    return True


def test_training_is_spread_over_its_time() -> None:
    far, began = Far(), time.monotonic()
    assert train(Pace(0.4, 8, threading.Event()), far, 4)
    assert far.seconds == pytest.approx(0.2)
    assert time.monotonic() - began == pytest.approx(0.2, abs=0.15)


def test_what_was_kept_counts_after_an_interruption() -> None:
    kept = Far(step=6, seconds=0.3)
    began = time.monotonic()
    assert train(Pace(0.4, 8, threading.Event()), kept, 2)
    assert kept.seconds == pytest.approx(0.4)
    assert time.monotonic() - began < 0.35


def test_who_is_too_slow_is_said_to_be() -> None:
    far = Far()
    train(Pace(0.04, 4, threading.Event()), far, 4, compute_s=0.05)
    # What the first step took, before the pace was first kept, is not known.
    assert far.seconds >= 0.15


def test_others_turns_are_not_this_devices_time() -> None:
    far = Far()
    train(Pace(0.04, 4, threading.Event()), far, 4, others_s=0.05)
    assert far.seconds == pytest.approx(0.04, abs=0.02)


def test_a_real_devices_time_is_the_wall_clocks() -> None:
    far = Far()
    assert train(Pace(None, 4, threading.Event()), far, 4, others_s=0.01)
    assert far.seconds == pytest.approx(0.04)


def test_a_wait_ends_when_the_device_does() -> None:
    stopping = threading.Event()
    threading.Timer(0.05, stopping.set).start()
    began = time.monotonic()
    assert not train(Pace(60.0, 2, stopping), Far(), 2)
    assert time.monotonic() - began < 20
