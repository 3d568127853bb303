from __future__ import annotations

import asyncio
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emutune.errors import FleetError
from emutune.fleet.shaping import TokenBucket


class Clock:
    """Time that passes only while somebody sleeps, late by a fixed amount."""

    def __init__(self, late_s: float = 0.0) -> None:
        self.now = 100.0
        self.late_s = late_s

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds + self.late_s


def bucket(clock: Clock, rate_bps: float = 8000.0, burst_bytes: int = 1) -> TokenBucket:
    return TokenBucket(rate_bps, burst_bytes, clock, clock.sleep)


@given(
    pieces=st.lists(st.integers(0, 10**6), min_size=1, max_size=30),
    rate_bps=st.floats(1e2, 1e10),
)
def test_bytes_take_as_long_as_the_link_needs(pieces: list[int], rate_bps: float) -> None:
    clock = Clock()
    link = bucket(clock, rate_bps)

    async def send() -> None:
        for piece in pieces:
            await link.take(piece)

    asyncio.run(send())
    assert clock.now - 100 == pytest.approx(sum(pieces) * 8 / rate_bps, rel=1e-6, abs=1e-6)


def test_what_is_late_is_made_up_for() -> None:
    clock = Clock(late_s=0.03)
    link = bucket(clock)

    async def send() -> None:
        for _ in range(100):
            await link.take(100)
            clock.now += 0.02  # between two requests

    asyncio.run(send())
    assert clock.now - 100 == pytest.approx(10, abs=0.06)


@pytest.mark.parametrize(("burst_bytes", "made_up"), [(1, 1000), (5000, 5000)])
def test_a_pause_is_made_up_for_no_longer_than_a_second(burst_bytes: int, made_up: int) -> None:
    clock = Clock()
    link = bucket(clock, burst_bytes=burst_bytes)
    clock.now += 3600

    async def send() -> float:
        before = clock.now
        await link.take(made_up)
        assert clock.now == before
        await link.take(500)
        return clock.now - before

    assert asyncio.run(send()) == pytest.approx(0.5)


def test_start_forgets_what_accumulated() -> None:
    clock = Clock()
    link = bucket(clock)
    clock.now += 50
    link.start()
    asyncio.run(link.take(1000))
    assert clock.now == pytest.approx(151)


def test_senders_share_a_link() -> None:
    async def run() -> list[float]:
        link = TokenBucket(8e5, 1)
        begin = time.monotonic()

        async def send() -> float:
            for _ in range(5):
                await link.take(2000)
            return time.monotonic() - begin

        return list(await asyncio.gather(send(), send()))

    first, second = asyncio.run(run())
    assert 0.17 < first <= second
    assert 0.19 < second < 1


def test_who_is_cancelled_gives_back() -> None:
    async def run() -> float:
        link = TokenBucket(8e5, 1)
        waiting = asyncio.create_task(link.take(10**9))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        begin = time.monotonic()
        await link.take(1000)
        return time.monotonic() - begin

    assert asyncio.run(run()) < 1


@pytest.mark.parametrize("rate_bps", [0.0, -1.0, float("nan"), float("inf")])
def test_rates_that_no_link_has(rate_bps: float) -> None:
    with pytest.raises(FleetError, match="rate_bps"):
        TokenBucket(rate_bps)


def test_pieces_are_small_on_slow_links() -> None:
    assert [TokenBucket(rate).piece_bytes for rate in (1e3, 8e6, 1e12)] == [1024, 50_000, 1 << 20]
