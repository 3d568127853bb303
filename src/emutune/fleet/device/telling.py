"""Who is told what a device does."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

_TELL_EVERY_S = 0.1


@dataclass
class Telling:
    """Who is told what a device does.

    Attributes:
        stage: of bytes and training steps: stage, done, of how many, and a remark.
        remark: a line worth keeping.
    """

    stage: Callable[[str, int, int, str], None] = lambda stage, done, total, remark: None
    remark: Callable[[str], None] = lambda text: None
    _told_at: float = field(default=0.0, init=False, repr=False)

    def progress(self, stage: str, done: int, total: int, remark: str = "") -> None:
        """Tell of a stage that moves fast, now and then."""
        now = time.monotonic()
        if done < total and now - self._told_at < _TELL_EVERY_S:
            return
        self._told_at = now
        self.stage(stage, done, total, remark)
