"""What one lease asks of a device: bytes to move, and an adapter to train or to wait for."""

from __future__ import annotations

import asyncio
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emutune.errors import CatalogueError, EmutuneError, FleetError
from emutune.fleet import disk
from emutune.fleet.device.cache import Cache
from emutune.fleet.device.client import POLL_S, FleetClient, RefusedError
from emutune.fleet.device.emulators import model_folder
from emutune.fleet.device.files import hash_file
from emutune.fleet.device.pace import Pace
from emutune.fleet.device.state import Answer, Memory, Task, Work, unchanged
from emutune.fleet.device.telling import Telling
from emutune.fleet.protocol import Lease, Result, Transferred
from emutune.fleet.shaping import TokenBucket

# A full disk is often one for a moment; the step does not wait longer for it.
_DISK_FULL_AT_MOST_S = 60.0
_DAMAGED_AT_MOST = 3
_ENDED_AT_LEAST = 3
_LONGEST_REASON = 500


class _StoppedError(Exception):
    """Training ends here, because the device does."""


@dataclass(frozen=True)
class Errand:
    """A lease at work; the memory says how far it is.

    Attributes:
        client: the connection to the server.
        data: directory of texts.
        cache: where shards and the newest adapter are.
        memory: holds the lease and its task.
        telling: who is told.
        lease: the lease.
        private: the data stay here, whatever the lease says.
    """

    client: FleetClient
    data: Path
    cache: Cache
    memory: Memory
    telling: Telling
    lease: Lease
    private: bool = False

    async def result(self, folder: Path) -> Result:
        """The result of the lease; a failure is one too.

        Args:
            folder: of what is fetched and made for it; made if it does not exist.

        Raises:
            RefusedError: the server wants no more of this lease, or nothing of this device.
        """
        until, told = time.monotonic() + _DISK_FULL_AT_MOST_S, False
        while True:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                if self.lease.kind == "upload":
                    return await self._upload(folder)
                return await self._train(folder)
            except RefusedError as error:
                if error.status != 422:
                    raise
                return _failed(error)
            except Exception as error:
                # Whatever a model or a disk does, the step must not wait for this device.
                if not disk.is_full(error) or time.monotonic() >= until:
                    return _failed(error)
                if not told:
                    self.telling.remark(f"step {self.lease.step}: {error}; going on as soon as there is room")
            told = True
            await asyncio.sleep(disk.LOOK_AGAIN_S)

    async def _upload(self, folder: Path) -> Result:
        """Send the task's text, and fetch the adapter that the server trains on it.

        Raises:
            FleetError: the device is private; nothing was sent.
        """
        if self.private:
            raise FleetError("the lease asks for data that are private: they stay on the device")
        task = self._task()
        path = await asyncio.to_thread(unchanged, self.data, task)
        if self._work.transferred is None:
            rate_bps = self.lease.rate_bps
            await self.client.upload(
                self.lease.lease,
                path,
                task.bytes,
                None if rate_bps is None else TokenBucket(rate_bps),
                lambda done: self.telling.progress("sending data", done, task.bytes),
            )
        await self._say_moved()
        self.telling.stage("waiting for the server's training", 0, 1, "")
        adapter = folder / "received.safetensors"
        sha256 = await self._servers_adapter(adapter)
        self._keep(adapter)
        return Result(outcome="received", adapter=sha256)

    async def _servers_adapter(self, path: Path) -> str:
        """Fetch the adapter that the server trains, once it has; its SHA-256."""
        ended = 0
        while ended < _ENDED_AT_LEAST:
            sha256 = await self.cache.fetch_adapter(self.client, self.lease.lease, path, POLL_S)
            if sha256 is not None:
                return sha256
            # A lease that ended may be late, with an adapter still to come, or have failed.
            ended = 0 if await self.client.lease(0.0) == self.lease else ended + 1
        raise FleetError("the server ended the lease without an adapter")

    async def _train(self, folder: Path) -> Result:
        """Fetch what the emulator lacks, train, and send the adapter."""
        if self.lease.emulator is None:
            raise FleetError("lease.emulator: is missing, but the lease is to train")
        path = await asyncio.to_thread(unchanged, self.data, self._task())
        await self._fetch(self.lease.emulator)
        await self._say_moved()
        start = await self._start(folder)
        made = await self._trained(self.lease.emulator, path, folder, start)
        adapter = folder / "adapter.safetensors"
        await self.client.put_adapter(self.lease.lease, adapter)
        self._keep(adapter)
        return Result(
            outcome="trained",
            adapter=made.sha256,
            before=made.before,
            after=made.after,
            training_s=made.training_s,
        )

    async def _fetch(self, emulator: dict[str, Any]) -> None:
        await self.cache.fetch(
            emulator,
            self.client,
            lambda done, total: self.telling.progress("fetching the emulator", done, total),
            self.lease.keep,
        )

    async def _start(self, folder: Path) -> Path | None:
        """The adapter that training starts from."""
        start = self.lease.start
        if start is None:
            return None
        path = folder / "start.safetensors"
        for known in (path, self._newest):
            if known.is_file() and hash_file(known)[0] == start:
                return known
        for _ in range(_DAMAGED_AT_MOST):
            if await self.cache.fetch_adapter(self.client, self.lease.lease, path, POLL_S) == start:
                return path
        raise FleetError(f"adapter {start[:12]}: did not arrive whole; check the server's files")

    async def _trained(self, emulator: dict[str, Any], text: Path, folder: Path, start: Path | None) -> Any:
        """Train in a thread, so that Ctrl-C is answered; after damage in the cache, once more."""
        from emutune.fleet.device import work

        stopping, training = threading.Event(), self.lease.training
        pace = Pace(self.lease.training_s, training.steps, stopping)

        def report(progress: Any) -> None:
            if not pace.keep(progress):
                raise _StoppedError
            remark = f"loss {progress.losses[-1]:.3f}"
            self.telling.progress("training", progress.step, training.steps, remark)

        def attempt() -> Any:
            return work.train_adapter(self.cache.directory, emulator, text, training, folder, start, report)

        try:
            return await _in_thread(attempt, stopping)
        except CatalogueError:
            if not await self.cache.check():
                raise
        await self._fetch(emulator)
        return await _in_thread(attempt, stopping)

    async def _say_moved(self) -> None:
        """Say how long the lease's bytes took, measured once and for all."""
        work = await self.memory.written(self.telling.remark, self._moved)
        assert work.transferred is not None
        await self.client.transferred(self.lease.lease, work.transferred)

    def _moved(self) -> Work:
        work = self._work
        if work.transferred is None:
            message = Transferred(seconds=work.arrival.seconds(), bytes=work.bytes)
            work = work.model_copy(update={"transferred": message})
            self.memory.change(work=work)
        return work

    @property
    def _work(self) -> Work:
        work = self.memory.state.work
        assert work is not None
        return work

    def _task(self) -> Task:
        task = self.memory.state.task
        if task is None or task.task != self.lease.task:
            raise FleetError(f"task {self.lease.task}: is none of this device's; was its cache deleted?")
        return task

    @property
    def _newest(self) -> Path:
        """Where the newest adapter of the task's model outlives its lease."""
        base = self._task().model
        assert base is not None
        return model_folder(self.cache.directory, base) / "adapter.safetensors"

    def _keep(self, adapter: Path) -> None:
        kept = self._newest
        kept.parent.mkdir(parents=True, exist_ok=True)
        aside = kept.with_name(kept.name + ".partial")
        shutil.copyfile(adapter, aside)
        aside.replace(kept)


async def _in_thread(function: Callable[[], Answer], stopping: threading.Event) -> Answer:
    """Run a function in a thread; if this task is cancelled, tell it to stop and wait until it has."""
    running = asyncio.ensure_future(asyncio.to_thread(function))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        stopping.set()
        with suppress(BaseException):
            await running
        raise


def _failed(error: Exception) -> Result:
    text = str(error) if isinstance(error, EmutuneError) else f"{type(error).__name__}: {error}"
    return Result(outcome="failed", reason=text[:_LONGEST_REASON])
