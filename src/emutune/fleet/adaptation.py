"""How adapters get better from step to step: what the curve says of one training, and what others before it left."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import median
from typing import NamedTuple


class Judged(NamedTuple):
    """An adapter that was judged.

    Attributes:
        device, base: whose, and of which foundation model.
        curve: perplexity that the curve says of its training.
        before, after: perplexity without and with it.
        accepted: whether it is in service since.
    """

    device: str
    base: str | None
    curve: float
    before: float
    after: float
    accepted: bool


def factors(judged: Iterable[Judged]) -> dict[tuple[str, str | None], float]:
    """By what the curve's perplexity is to be multiplied for the next training of each device and model.

    The curve is that of one training from nothing. Later ones go on from the adapter in service, so they begin where
    the last one ended, in parts of the curve's, and gain as much as is usual for the second and later ones; where every
    task is tuned from nothing, that is nothing, and a device is where its last task was.

    Args:
        judged: in the order in which they were leased.
    """
    now: dict[tuple[str, str | None], float] = {}
    gains: list[float] = []
    for one in judged:
        reached, whose = one.after / one.curve, (one.device, one.base)
        if whose in now:
            gains.append(reached / now[whose])
        # What was refused leaves the one in service.
        now[whose] = reached if one.accepted else now.get(whose, one.before / one.curve)
    usual = median(gains) if gains else 1.0
    return {whose: reached * usual for whose, reached in now.items()}
