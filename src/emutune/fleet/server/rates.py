"""Rate and latency of real links, from the transfers that were measured on them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
from jaxtyping import Float, Int

from emutune.fleet.rows import Kind, Transfer

# A transfer counts half as much as one that came so many later: of these, what would have predicted best so far. There
# a prediction counts half as much as one of six later.
_HALVED_AFTER, _TRIED_OVER = np.array([0.5, 3.0, 8.0]), 6.0
# Of two sizes that are nearer to each other, their seconds do not tell latency from rate.
_APART = 2.0
# What a latency of the middle transfer's seconds has to gain, in the logarithm of one transfer's: on links that change,
# two transfers may look like latency alone.
_LATENCY_PRICE = 0.5
# Of the predictions so far so many are within the interval. Of one more, half as heavy as the last, it is only
# known that it is off by no more than a factor of two.
_WITHIN, _UNKNOWN, _UNKNOWN_WEIGHT = 0.9, math.log(2.0), 0.5


@dataclass(frozen=True)
class LinkEstimate:
    """A link in one direction, used alone: bytes take ``latency_s`` and their bits over ``rate_bps``.

    Attributes:
        spread: logarithm of the factor by which nine of ten transfers are off at most.
    """

    rate_bps: float
    latency_s: float
    spread: float

    def __str__(self) -> str:
        slow, fast = (self.rate_bps / 1e6 * math.exp(sign * self.spread) for sign in (-1, 1))
        return f"{self.rate_bps / 1e6:.3g} Mbit/s ({slow:.3g} to {fast:.3g}), {self.latency_s:.3g} s"

    def seconds(self, moved: float) -> float:
        """Of so many bytes."""
        return self.latency_s + 8 * moved / self.rate_bps

    def within(self, moved: float) -> tuple[float, float]:
        """Seconds that nine of ten transfers of so many bytes are between."""
        factor = math.exp(self.spread)
        return self.seconds(moved) / factor, self.seconds(moved) * factor


def estimate_link(transfers: Sequence[Transfer]) -> LinkEstimate | None:
    """What transfers say of a link, the oldest first; None if there are none.

    Of all lines through two transfers, or through one and the origin, that one whose errors, as logarithms of ratios,
    have the least weighted sum: what is far off moves it no more than what is near, small transfers tell the latency
    and large ones the rate.
    """
    if not transfers:
        return None
    moved, seconds = np.array([(one.bytes, one.seconds) for one in transfers], float).T
    latency, per_byte, last = _lines(moved, seconds)
    off = np.abs(np.log((latency[:, None] + per_byte[:, None] * moved) / seconds))
    # Axes: how fast transfers lose weight, after how many transfers, and the line that is best then.
    now = np.arange(len(moved))[:, None]
    weights = np.where(now >= now.T, 0.5 ** ((now - now.T).clip(0) / _HALVED_AFTER[:, None, None]), 0.0)
    loss = weights @ off.T + _LATENCY_PRICE * latency / np.median(seconds)
    best = np.where(last <= now, loss, np.inf).argmin(axis=-1)
    ahead = off[best[:, :-1], now[1:, 0]]
    recent = 0.5 ** (now[:-1, 0][::-1] / _TRIED_OVER)
    chosen = np.argmin(ahead @ recent)
    spread = _quantile(np.append(ahead[chosen], _UNKNOWN), np.append(recent, _UNKNOWN_WEIGHT))
    line = best[chosen, -1]
    return LinkEstimate(float(8 / per_byte[line]), float(latency[line]), spread)


def estimate_links(
    transfers_of: Callable[[str, Kind], Sequence[Transfer]], devices: Sequence[str], kind: Kind
) -> list[LinkEstimate | None]:
    """Every device's link in a direction; where a device has moved nothing yet, the middle of the others'."""
    own = [estimate_link(transfers_of(device, kind)) for device in devices]
    known = [one for one in own if one is not None]
    if not known:
        return own
    usual = LinkEstimate(
        median(one.rate_bps for one in known),
        median(one.latency_s for one in known),
        max(_UNKNOWN, *(one.spread for one in known)),
    )
    return [one or usual for one in own]


def _lines(
    moved: Float[np.ndarray, "transfers"], seconds: Float[np.ndarray, "transfers"]
) -> tuple[Float[np.ndarray, "lines"], Float[np.ndarray, "lines"], Int[np.ndarray, "lines"]]:
    """Latency and seconds a byte of the lines that links may have, and the last transfer that each is through."""
    one, other = np.triu_indices(len(moved), 1)
    apart = np.maximum(moved[one], moved[other]) >= _APART * np.minimum(moved[one], moved[other])
    one, other = one[apart], other[apart]
    slope = (seconds[other] - seconds[one]) / (moved[other] - moved[one])
    latency = seconds[one] - slope * moved[one]
    possible = (slope > 0) & (latency > 0)
    return (
        np.append(np.zeros(len(moved)), latency[possible]),
        np.append(seconds / moved, slope[possible]),
        np.append(np.arange(len(moved)), other[possible]),
    )


def _quantile(values: Float[np.ndarray, "some"], weights: Float[np.ndarray, "some"]) -> float:
    order = np.argsort(values)
    share = np.cumsum(weights[order]) / weights.sum()
    return float(values[order][np.searchsorted(share, _WITHIN)])
