"""The fleet of one process under faults for which a process of its own would add nothing.

What carries requests repeats, delays and damages them; clocks jump; disks, real ones of a few megabytes, are full for
a while.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx2
from faulty_fleet import DEVICES, STEPS, Outcome, outcome
from small_disks import fill, small_disk
from whole_fleet import Carrier, WholeFleet

from emutune.fleet import disk
from emutune.fleet.device import state
from emutune.tuning.catalogue import Catalogue

LONGEST_S = 90.0
NAMES = tuple(f"ue{number}" for number in range(1, DEVICES + 1))
_CHANGING = ("POST", "PUT", "PATCH")
Fault = Callable[["MemoryFleet"], Awaitable[None]]


class MemoryFleet(WholeFleet):
    """Server and devices in one process, doing the work that ``ProcessFleet`` does."""

    def __init__(self, folder: Path, catalogue: Catalogue, policy: str, *others: Catalogue) -> None:
        super().__init__(folder, catalogue, *others, count=STEPS, policy=policy)
        steps = self.config.steps.model_copy(update={"gather_s": 60.0, "deadline_s": 120.0})
        self.config = self.config.model_copy(update={"steps": steps})
        self.at_work: dict[str, asyncio.Task[int]] = {}
        for name in NAMES:
            self.add_device(name)

    @property
    def directory(self) -> Path:
        return self.config.server.directory

    def start(self, name: str) -> None:
        self.at_work[name] = asyncio.create_task(self.device(name))

    async def restart(self, name: str) -> None:
        """End a device wherever it is, and start it again."""
        task = self.at_work[name]
        task.cancel()
        await asyncio.wait([task])
        self.start(name)

    def run(self, fault: Fault | None = None) -> Outcome:
        """Run to the end, with a fault under way."""
        asyncio.run(asyncio.wait_for(self._run(fault), LONGEST_S))
        return outcome(self.directory)

    async def _run(self, fault: Fault | None) -> None:
        async with self.server() as work:
            for name in NAMES:
                self.start(name)
            under_way = None if fault is None else asyncio.ensure_future(fault(self))
            while not all(task.done() for task in self.at_work.values()):
                await asyncio.wait(self.at_work.values(), timeout=0.2)
                if work.done():
                    work.result()
                for task in self.at_work.values():
                    if task.done() and not task.cancelled():
                        task.result()
            await work
            if under_way is not None:
                under_way.cancel()
                with suppress(asyncio.CancelledError):
                    await under_way
            if isinstance(self.carrier, FaultyCarrier):
                await self.carrier.settle()


# Messages


@dataclass
class FaultyCarrier(Carrier):
    """Carries requests badly.

    Attributes:
        random: of everything.
        repeated: share of the requests that change something of which a copy comes, most of them much later.
        unanswered: share of those whose answer does not arrive, so that the device sends them again.
        delayed: share of all requests that wait, and are overtaken by others.
        damaged: share of the shards and of the data sent that arrive with a bit flipped or cut short; each twice at
            most, since what arrives damaged again and again is so at its source, and its lease is to fail.
    """

    random: random.Random = field(default_factory=random.Random)
    repeated: float = 0.0
    unanswered: float = 0.0
    delayed: float = 0.0
    damaged: float = 0.0
    did: int = 0
    _copies: set[asyncio.Task[None]] = field(default_factory=set)
    _damage_done: Counter[tuple[str, str]] = field(default_factory=Counter)

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        content = await request.aread()
        path = request.url.path
        if self._draw(self.delayed):
            await asyncio.sleep(self.random.uniform(0, 0.2))
        if request.method in _CHANGING and self._draw(self.repeated):
            self._copy(request, content)
        if path.endswith("/data") and content and self._damages(request):
            content = _damage(content, self.random)
        response = await super().handle_async_request(_again(request, content))
        if request.method in _CHANGING and self._draw(self.unanswered):
            await response.aclose()
            raise httpx2.ReadError("connection reset")
        if path.startswith("/v1/shards/") and response.status_code < 300 and self._damages(request):
            body = _damage(await response.aread(), self.random)
            return httpx2.Response(response.status_code, headers=response.headers, stream=_Bytes(body))
        return response

    async def settle(self) -> None:
        """Until the last copy has arrived."""
        await asyncio.gather(*self._copies, return_exceptions=True)

    def _draw(self, share: float) -> bool:
        hit = self.random.random() < share
        self.did += hit
        return hit

    def _damages(self, request: httpx2.Request) -> bool:
        key = (request.url.path, request.headers["authorization"])
        if self._damage_done[key] >= 2 or not self._draw(self.damaged):
            return False
        self._damage_done[key] += 1
        return True

    def _copy(self, request: httpx2.Request, content: bytes) -> None:
        seconds = self.random.choice((0.0, self.random.uniform(0, 0.3), self.random.uniform(0, 3)))

        async def carry() -> None:
            await asyncio.sleep(seconds)
            with suppress(httpx2.TransportError, asyncio.CancelledError):
                response = await Carrier.handle_async_request(self, _again(request, content))
                await response.aclose()

        task = asyncio.ensure_future(carry())
        self._copies.add(task)
        task.add_done_callback(self._copies.discard)


class _Bytes(httpx2.AsyncByteStream):
    def __init__(self, content: bytes) -> None:
        self._content = content

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield self._content


def _again(request: httpx2.Request, content: bytes) -> httpx2.Request:
    """The same request with a body that can be sent once more."""
    headers = [(key, value) for key, value in request.headers.items() if key.lower() != "content-length"]
    return httpx2.Request(
        request.method, request.url, headers=headers, content=content, extensions=request.extensions
    )


def _damage(content: bytes, draw: random.Random) -> bytes:
    altered = bytearray(content)
    if altered and draw.random() < 0.7:
        altered[draw.randrange(len(altered))] ^= 1 << draw.randrange(8)
    else:
        del altered[draw.randrange(len(altered) + 1) :]
    return bytes(altered)


# Clocks


class JumpingClock:
    """The wall clock of a machine that is set, by seconds or by years; and its monotonic clock, after a new start."""

    def __init__(self, draw: random.Random) -> None:
        self._random, self._offset_s, self._started_at, self._boot = draw, 0.0, 0.0, "first"
        self.jumps = 0

    def jump(self) -> None:
        """Set the wall clock."""
        self._offset_s = self._random.choice((-1, 1)) * 10 ** self._random.uniform(0, 9.2)
        self.jumps += 1

    def start_anew(self) -> None:
        """Start the machine anew."""
        self._boot, self._started_at = f"boot-{self._random.random()}", time.monotonic()

    def boot(self) -> str:
        return self._boot

    def time(self) -> float:
        return max(0.0, time.time() + self._offset_s)

    def monotonic(self) -> float:
        return time.monotonic() - self._started_at

    def now(self) -> datetime:
        """The same for the ledger, within what a date can be."""
        try:
            return datetime.now(UTC) + timedelta(seconds=self._offset_s)
        except OverflowError:
            return datetime.min.replace(tzinfo=UTC)


@contextmanager
def device_clock(clock: JumpingClock) -> Iterator[None]:
    """Let devices look at a clock."""
    kept = state.time, state._boot
    state.time, state._boot = clock, clock.boot  # type: ignore[assignment]
    try:
        yield
    finally:
        state.time, state._boot = kept  # type: ignore[assignment]


# What goes wrong


class MemoryInjector:
    """Faults at moments that a seed decides, each a whole run.

    Args:
        seed: of all that is drawn.
        span_s: how long a run takes.
    """

    def __init__(self, seed: int, span_s: float) -> None:
        self.random, self.span_s = random.Random(seed), span_s
        self.did: list[str] = []

    def duplicate(self, fleet: MemoryFleet) -> Outcome:
        """Requests that arrive twice, most of them later than what came after them, and answers that get lost."""
        return self._carried(fleet, FaultyCarrier(random=self.random, repeated=0.6, unanswered=0.15))

    def reorder(self, fleet: MemoryFleet) -> Outcome:
        """Requests that overtake each other, with copies that are late."""
        return self._carried(fleet, FaultyCarrier(random=self.random, repeated=0.3, delayed=0.5))

    def damage(self, fleet: MemoryFleet) -> Outcome:
        """Shards and data that arrive altered or cut short."""
        return self._carried(fleet, FaultyCarrier(random=self.random, damaged=0.3))

    def jump_clock(self, fleet: MemoryFleet) -> Outcome:
        """Wall clocks that are set again and again, and a device whose machine is started anew."""
        ledgers, devices = JumpingClock(self.random), JumpingClock(self.random)
        fleet.now = ledgers.now

        async def jumps(fleet: MemoryFleet) -> None:
            anew = self.random.uniform(0, self.span_s)
            begun = time.monotonic()
            while True:
                await asyncio.sleep(self.random.uniform(0, self.span_s / 5))
                ledgers.jump()
                devices.jump()
                if time.monotonic() - begun > anew:
                    anew = float("inf")
                    name = self.random.choice(NAMES)
                    if not fleet.at_work[name].done():
                        devices.start_anew()
                        await fleet.restart(name)
                        self.did.append(f"{name} started anew")

        with device_clock(devices):
            found = fleet.run(jumps)
        self.did.append(f"{ledgers.jumps} jumps")
        return found

    def fill_device(self, fleet: MemoryFleet) -> Outcome:
        """The disk of a device is full for a while, once or twice."""
        return self._on_small_disk(fleet, fleet.folder / self.random.choice(NAMES) / "cache")

    def fill_server(self, fleet: MemoryFleet) -> Outcome:
        """The server's disk is full for a while, once or twice."""
        return self._on_small_disk(fleet, fleet.directory)

    def _carried(self, fleet: MemoryFleet, carrier: FaultyCarrier) -> Outcome:
        fleet.carrier = carrier
        found = fleet.run()
        self.did.append(f"{carrier.did} requests")
        return found

    def _on_small_disk(self, fleet: MemoryFleet, folder: Path) -> Outcome:
        async def filled(fleet: MemoryFleet) -> None:
            # A device that joins with a full disk ends and says so, as any command does.
            while not all(has_task(fleet, name) for name in NAMES):
                await asyncio.sleep(0.01)
            for _ in range(self.random.choice((1, 2))):
                await asyncio.sleep(self.random.uniform(0, self.span_s / 2))
                left = int(10 ** self.random.uniform(3.6, 5.6))
                await asyncio.to_thread(fill, folder, left)
                self.did.append(f"{left} bytes left")
                await asyncio.sleep(self.random.uniform(0.2, 1.5))
                (folder / "ballast").unlink()

        with small_disk(folder), hasty():
            return fleet.run(filled)


def has_task(fleet: MemoryFleet, name: str) -> bool:
    """Whether a device has joined, and made its first task."""
    path = fleet.folder / name / "cache" / "state.json"
    return path.exists() and '"sha256"' in path.read_text()


@contextmanager
def hasty() -> Iterator[None]:
    """Look often whether a disk has room again."""
    kept, disk.LOOK_AGAIN_S = disk.LOOK_AGAIN_S, 0.1
    try:
        yield
    finally:
        disk.LOOK_AGAIN_S = kept


def faults(random_seed: int, span_s: float) -> dict[str, Callable[[MemoryFleet], Any]]:
    """All of them, by name."""
    injector = MemoryInjector(random_seed, span_s)
    names = ("duplicate", "reorder", "damage", "jump_clock", "fill_device", "fill_server")
    return {name: getattr(injector, name) for name in names}
