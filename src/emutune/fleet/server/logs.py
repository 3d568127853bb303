"""The server's log: what an operator should see by default, and no more than so many lines of it a minute."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

LINES_PER_MINUTE = 60


class Sparing(logging.Filter):
    """Lets through so many lines a minute of each place in the code that logs.

    Whoever knocks without pause, or sends damaged data again and again, does not fill the disk.

    Args:
        clock: seconds that never run backwards.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        # Of each place: when its minute began, and how many lines it had since.
        self._places: dict[tuple[str, int], tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a line is written; the last of a minute says that more are left out, the next how many were."""
        place = (record.pathname, record.lineno)
        began, lines = self._places.get(place, (-60.0, 0))
        now, left_out = self._clock(), 0
        if now - began >= 60:
            began, lines, left_out = now, 0, max(0, lines - LINES_PER_MINUTE)
        self._places[place] = (began, lines + 1)
        if left_out:
            record.msg = f"({left_out} like this were left out) {record.msg}"
        if lines + 1 == LINES_PER_MINUTE:
            record.msg = f"{record.msg} (more like this are left out for a minute)"
        return lines < LINES_PER_MINUTE


def log_to_stderr(*, verbose: bool) -> None:
    """Write warnings and errors to standard error, or every event.

    Args:
        verbose: every event.
    """
    handler = logging.StreamHandler()
    handler.addFilter(Sparing())
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING,
        format="%(asctime)s %(message)s",
        handlers=[handler],
    )
