"""Links of a given rate over a network that is faster: whoever sends waits for the link it is said to have."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable

from emutune.errors import FleetError

_SMALLEST_PIECE, _LARGEST_PIECE = 1 << 10, 1 << 20
_PIECE_S = 0.05
_MADE_UP_S = 1.0


class TokenBucket:
    """Paces bytes to a rate, which is kept exactly over a long transfer.

    Bytes are let through when the link would have carried the last of them. Time in which nobody sends,
    between two requests or in a thread that came late, is made up for, but no more than one second of
    the rate, or ``burst_bytes`` where that is more. Several senders share one bucket in the order in which
    they ask.

    Args:
        rate_bps: bits/s.
        burst_bytes: the least that may follow at once after a pause.
        clock: seconds that never run backwards.
        sleep: waits for so many seconds.

    Raises:
        FleetError: the rate is not positive and finite.
    """

    def __init__(
        self,
        rate_bps: float,
        burst_bytes: int = 65536,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ) -> None:
        if not (rate_bps > 0 and math.isfinite(rate_bps)):
            raise FleetError(f"rate_bps: must be positive and finite, got {rate_bps}")
        self._bytes_per_s = rate_bps / 8
        self._made_up_s = max(_MADE_UP_S, burst_bytes / self._bytes_per_s)
        self._clock = clock
        self._sleep = sleep
        self._free_at = clock()

    @property
    def piece_bytes(self) -> int:
        """A size of pieces that arrive evenly: what the link carries in 50 ms, between 1 KiB and 1 MiB."""
        return int(min(max(self._bytes_per_s * _PIECE_S, _SMALLEST_PIECE), _LARGEST_PIECE))

    def start(self) -> None:
        """Forget what accumulated: the link is free from now on."""
        self._free_at = self._clock()

    async def take(self, amount: int) -> None:
        """Wait until the link has carried so many bytes more.

        Whoever is cancelled while waiting gives back what it took.
        """
        seconds = amount / self._bytes_per_s
        self._free_at = max(self._free_at, self._clock() - self._made_up_s) + seconds
        due = self._free_at
        try:
            while (wait := due - self._clock()) > 0:
                await self._sleep(wait)
        except asyncio.CancelledError:
            self._free_at -= seconds
            raise
