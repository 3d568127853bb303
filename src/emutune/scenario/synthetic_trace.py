"""A made-up trace: rates that drift among levels of signal quality, with handovers between cells.

It stands for a drive through a city where no measured trace can be shipped: the shape is that of such traces
(levels that last minutes, fast variation about them, silence at handovers), its numbers are nobody's.
"""

from __future__ import annotations

import math
import random

from emutune.errors import UsageError
from emutune.scenario.trace import Rates, means

# Mean rates in Mbit/s of each level of quality, from the cell's edge to its middle, on a band of 20 MHz.
_DOWNLINK = (4.0, 14.0, 32.0, 58.0, 92.0)
_UPLINK = (0.8, 3.0, 8.0, 16.0, 26.0)
# Of one second.
_CHANGE = 1 / 90
_HANDOVER = (1 / 40, 1 / 120, 1 / 400, 0.0, 0.0)
_SILENCE_S = (1, 2, 3)
# Fast variation about a level, in nepers: its spread, and what a second keeps of it.
_SPREAD, _KEPT = 0.35, 0.8


def synthesize_trace(seconds: int = 3600, seed: int = 0, interval_s: int = 1) -> Rates:
    """A trace, the same for the same seed.

    A Markov chain steps between neighbouring levels every 90 s or so. Near a cell's edge it may come to a
    handover: for one to three seconds nothing passes, then the next cell takes over at a level of its own.

    Args:
        seconds: how long, at least two intervals.
        seed: of its draws.
        interval_s: of its rows.

    Raises:
        UsageError: it would be shorter than two intervals.
    """
    if interval_s < 1 or seconds < 2 * interval_s:
        raise UsageError(
            f"--seconds: must be at least two intervals of a second or more, got {seconds} s of {interval_s} s each"
        )
    draw = random.Random(seed)
    level, silent, down, up = draw.randrange(len(_DOWNLINK)), 0, draw.gauss(0, 1), draw.gauss(0, 1)
    columns: tuple[list[float], list[float]] = ([], [])
    for _ in range(seconds):
        down, up = (_KEPT * one + math.sqrt(1 - _KEPT**2) * draw.gauss(0, 1) for one in (down, up))
        chance = draw.random()
        if silent:
            silent -= 1
            level = draw.randrange(1, len(_DOWNLINK)) if not silent else level
        elif chance < _HANDOVER[level]:
            silent = draw.choice(_SILENCE_S)
        elif chance > 1 - _CHANGE:
            level = min(max(level + draw.choice((-1, 1)), 0), len(_DOWNLINK) - 1)
        for column, rates, score in zip(columns, (_DOWNLINK, _UPLINK), (down, up), strict=True):
            # The correction keeps the level's mean.
            column.append(0.0 if silent else rates[level] * math.exp(_SPREAD * score - _SPREAD**2 / 2))
    rows = [means(range(seconds + 1), column, interval_s, seconds // interval_s) for column in columns]
    return Rates(float(interval_s), *(tuple(float(f"{rate:.4g}") for rate in row) for row in rows))
