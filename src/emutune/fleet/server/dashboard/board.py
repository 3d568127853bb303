"""What the dashboard shows, read from the ledger in a thread of its own, only while somebody looks."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from emutune.fleet.server.dashboard.messages import (
    Cached,
    Device,
    Doing,
    Model,
    Overview,
    RunState,
    Shown,
    Work,
)
from emutune.fleet.server.dashboard.reading import DeviceNow, LastLease, Reading
from emutune.fleet.server.dashboard.watch import Watch

_STEPS_SHOWN = 1000
_FRESH_S = 0.5
# Reading must not take more than a tenth of a processor, however large the ledger has become.
_REST = 10
_LOOKED_S = 5.0
# A page that is seen asks every second.
_LAST_LOOK_S = 1.5
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Fleet:
    """What does not change while a server runs.

    Attributes:
        models: the first first.
        emulators: retention and number of layers by the hash of the emulator's model, and its name.
    """

    name: str
    policy: str
    scenario: str
    models: Sequence[Model]
    steps_total: int
    emulators: Mapping[tuple[str, str], tuple[float, int]]


@dataclass(frozen=True)
class Page:
    """An answer, ready to be sent.

    Attributes:
        tag: tells it from every other answer; an ``ETag``.
    """

    tag: str
    body: bytes
    zipped: bytes


@dataclass(frozen=True)
class _Read:
    """All that is shown, and in which revision each step was read last."""

    overview: Overview
    revisions: Mapping[int, int]

    def page(self, since: int) -> Page:
        overview = self.overview
        if since > overview.revision:
            return _page(overview)
        news = [step for step in overview.steps if self.revisions[step.step] > since]
        return _page(overview.model_copy(update={"steps": news}))


class Board:
    """The dashboard of one fleet; for the thread of the event loop.

    Args:
        fleet: what it is about.
        ledger: the file; opened at the first look.
        uploads: where data arrive, as ``LEASE.part``.
        watch: what the ledger does not say.
        key_sha256: of the key that opens it.
    """

    def __init__(self, fleet: Fleet, ledger: Path, uploads: Path, watch: Watch, key_sha256: str) -> None:
        self.fleet, self.watch, self.key_sha256 = fleet, watch, key_sha256
        self._ledger, self._uploads = ledger, uploads
        self._started_at = _text(watch.now())
        # SQLite's objects stay in the thread that made them, and reading keeps no request waiting.
        self._thread = ThreadPoolExecutor(1, "dashboard")
        self._reading: Reading | None = None
        self._read: _Read | None = None
        self._pages: dict[int, Page] = {}
        self._read_again = 0.0
        self._one_reader = asyncio.Lock()
        self._stopped = False
        self._looked = -_LOOKED_S

    async def overview(self, since: int = 0) -> Page:
        """The fleet at a glance, at most half a second old, or ten times as old as reading it takes.

        Args:
            since: revision of the answer that is known; steps that are as they were then are left out.

        Raises:
            LedgerError: the ledger cannot be read.
        """
        async with self._one_reader:
            if self._read is None or time.monotonic() >= self._read_again:
                begin = time.monotonic()
                self._read = await self._in_thread(self._read_overview)
                self._pages.clear()
                took = time.monotonic() - begin
                self._read_again = time.monotonic() + max(_FRESH_S, _REST * took)
            if since not in self._pages:
                loop = asyncio.get_running_loop()
                self._pages[since] = await loop.run_in_executor(self._thread, self._read.page, since)
            page = self._pages[since]
        self._looked = time.monotonic()
        return page

    async def step(self, number: int) -> Page | None:
        """A step and its leases; None if it was not begun.

        Raises:
            LedgerError: the ledger cannot be read.
        """

        def read(reading: Reading) -> Page | None:
            detail = reading.step_detail(number)
            return None if detail is None else _page(detail)

        return await self._in_thread(read)

    async def say_farewell(self) -> None:
        """Stay until every page that is seen has heard that the server ends; not if there is none."""
        self._stopped, self._read_again = True, 0.0
        if time.monotonic() - self._looked < _LOOKED_S:
            await asyncio.sleep(_LAST_LOOK_S)

    def close(self) -> None:
        """Close the ledger; nobody can look any more."""
        if self._reading is not None:
            self._thread.submit(self._reading.close)
        self._thread.shutdown()

    async def _in_thread(self, read: Callable[[Reading], Answer]) -> Answer:
        def opened() -> Answer:
            if self._reading is None:
                self._reading = Reading(self._ledger)
            with self._reading.moment():
                return read(self._reading)

        return await asyncio.get_running_loop().run_in_executor(self._thread, opened)

    def _read_overview(self, reading: Reading) -> _Read:
        fleet, steps, ended = self.fleet, reading.steps(), reading.steps_ended()
        leases, last = reading.last_leases(), reading.last_step()
        shown = steps[-_STEPS_SHOWN:]
        return _Read(
            Overview(
                name=fleet.name,
                state=self._state(last, ended),
                server_started_at=self._started_at,
                policy=fleet.policy,
                scenario=fleet.scenario,
                models=list(fleet.models),
                step=None if last < 0 else last,
                steps_ended=ended,
                steps_total=fleet.steps_total,
                devices=[self._device(device, leases.get(device.name)) for device in reading.devices_now()],
                revision=reading.revision,
                first_step=shown[0].step if shown else None,
                steps=shown,
                steps_left_out=len(steps) - len(shown),
                totals=reading.totals(),
                errors=reading.errors(),
                faults=reading.faults(),
                audit=reading.audit_so_far(),
            ),
            reading.revisions(),
        )

    def _state(self, last: int, ended: int) -> RunState:
        if ended >= self.fleet.steps_total:
            return "done"
        if self._stopped:
            return "stopped"
        return "waiting" if last < 0 else "running"

    def _device(self, device: DeviceNow, lease: LastLease | None) -> Device:
        heard = self.watch.heard.get(device.name)
        known = [moment for moment in (device.enrolled_at, device.reported_at) if moment is not None]
        return Device(
            name=device.name,
            joined_at=device.enrolled_at,
            heard_at=max(known, default=None) if heard is None else _text(heard),
            revoked=device.revoked,
            left=device.left,
            doing=doing(device, lease),
            cached=self._cached(device, lease),
            work=None if lease is None else self._work(lease),
        )

    def _cached(self, device: DeviceNow, lease: LastLease | None) -> Cached | None:
        name, base = device.emulator, device.base
        if lease is not None and lease.kind == "train" and lease.transferred_bytes is not None:
            name, base = lease.emulator_name, lease.base
        if name is None:
            return None
        base = base or self.fleet.models[0].base
        retention, layers = self.fleet.emulators.get((base, name), (None, None))
        return Cached(emulator=name, base=base, retention=retention, layers=layers)

    def _work(self, lease: LastLease) -> Work:
        return Work(
            lease=lease.lease,
            step=lease.step,
            kind=lease.kind,
            state=lease.state,
            retention=lease.retention,
            moved_bytes=self._moved(lease),
            of_bytes=lease.predicted_bytes,
            opened_at=lease.opened_at,
        )

    def _moved(self, lease: LastLease) -> int:
        if lease.transferred_bytes is not None:
            return lease.transferred_bytes
        if lease.kind == "train":
            return self.watch.sent_for(lease.device, lease.lease)
        if lease.data_complete:
            return lease.predicted_bytes
        try:
            return (self._uploads / f"{lease.lease}.part").stat().st_size
        except OSError:
            return 0


def doing(device: DeviceNow, lease: LastLease | None) -> Doing:
    """What a device does now, as far as the server can know; ``lease`` is its last."""
    if device.revoked:
        return "revoked"
    if not device.enrolled:
        return "expected"
    if device.left:
        return "left"
    if device.undecided:
        return "reported"
    if lease is None or lease.state not in ("open", "expired"):
        return "idle"
    if lease.told:
        return "judging" if lease.state == "open" else "idle"
    if lease.kind == "train":
        if lease.transferred_bytes is None:
            return "downloading"
        return "returning" if lease.adapter else "training"
    if not lease.data_complete:
        return "uploading"
    return "fetching" if lease.adapter else "server trains"


def _page(content: Shown) -> Page:
    body = content.model_dump_json().encode()
    return Page(hashlib.sha256(body).hexdigest()[:32], body, gzip.compress(body, 1, mtime=0))


def _text(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="seconds")
