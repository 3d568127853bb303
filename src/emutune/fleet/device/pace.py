"""Training as slow as on the device that a shaped fleet stands for."""

from __future__ import annotations

import threading
import time
from typing import Protocol


class HasProgress(Protocol):
    """How far training is: ``emutune.tuning.trainer.Progress``."""

    step: int
    seconds: float


class Pace:
    """Slows training down to so many seconds, spread evenly over its steps.

    Devices of a shaped fleet share the cores of one machine, which those that they stand for do not. So what training
    took is what was asked for, or the processor's time where that is more, and no time in which others computed.

    Args:
        seconds: that training lasts at least; None for as long as it takes, by the wall clock.
        steps: of the training.
        stopping: ends a wait.
    """

    def __init__(self, seconds: float | None, steps: int, stopping: threading.Event) -> None:
        self._seconds, self._steps, self._stopping = seconds, steps, stopping
        self._due: float | None = None
        self._taken = self._processor = 0.0

    def keep(self, progress: HasProgress) -> bool:
        """Wait after a step, and say in the progress how long training has taken; False if it is to stop.

        Called by the thread that trains, which after an interruption goes on from the time that was kept.
        """
        if self._seconds is None:
            return not self._stopping.is_set()
        each = self._seconds / self._steps
        if self._due is None:
            # When this attempt began, and what its first step took, is not told.
            self._due, self._taken = time.monotonic(), each * progress.step
        else:
            self._taken = max(each * progress.step, self._taken + time.thread_time() - self._processor)
        self._processor = time.thread_time()
        self._due += each
        progress.seconds = self._taken
        return not self._stopping.wait(max(0.0, self._due - time.monotonic()))
