"""How adapters get better from step to step: what the curve says of one training, and what others before it left."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import median
from typing import NamedTuple


class Judged(NamedTuple):
    """An adapter that was judged.

    Attributes:
        device: whose.
        curve: perplexity that the curve says of its training.
        before, after: perplexity without and with it.
        accepted: whether it is in service since.
    """

    device: str
    curve: float
    before: float
    after: float
    accepted: bool


def factors(judged: Iterable[Judged]) -> dict[str, float]:
    """By what the curve's perplexity is to be multiplied for each device's next training.

    The curve is that of one training from nothing. Later ones go on from the adapter in service, so they begin where
    the last one ended, in parts of the curve's, and gain as much as is usual for the second and later ones; where every
    task is tuned from nothing, that is nothing, and a device is where its last task was.

    Args:
        judged: in the order in which they were leased.
    """
    now: dict[str, float] = {}
    gains: list[float] = []
    for one in judged:
        reached = one.after / one.curve
        if one.device in now:
            gains.append(reached / now[one.device])
        # What was refused leaves the one in service.
        now[one.device] = reached if one.accepted else now.get(one.device, one.before / one.curve)
    usual = median(gains) if gains else 1.0
    return {device: reached * usual for device, reached in now.items()}
