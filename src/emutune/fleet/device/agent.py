"""A device's work: report a task, wait for a lease, move what it names, train, return the result, again."""

from __future__ import annotations

import asyncio
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from emutune.errors import CatalogueError, EmutuneError, FleetError
from emutune.fleet.device.cache import Cache
from emutune.fleet.device.client import FleetClient, RefusedError
from emutune.fleet.device.files import hash_file
from emutune.fleet.device.key import device_key
from emutune.fleet.device.state import (
    Arrival,
    Memory,
    StateUnwritableError,
    Task,
    Work,
    check_texts,
    unchanged,
)
from emutune.fleet.disk import is_full
from emutune.fleet.protocol import FleetInfo, Lease, Report, Result, Transferred
from emutune.fleet.security import secret_sha256
from emutune.fleet.shaping import TokenBucket

_POLL_S = 20.0
_AFTER_FAILURE_S = 2.0
_DISK_FULL_S = 5.0
# A full disk is often one for a moment; the step does not wait longer for it.
_DISK_FULL_AT_MOST_S = 60.0
_DAMAGED_AT_MOST = 3
_ENDED_AT_LEAST = 3
# Not about a lease, but about this device's place in the fleet.
_NO_PLACE = frozenset({401, 403})
_LONGEST_REASON = 500
_TELL_EVERY_S = 0.1
Answer = TypeVar("Answer")


class _StoppedError(Exception):
    """Training ends here, because the device does."""


@dataclass(frozen=True)
class Telling:
    """Who is told what a device does.

    Attributes:
        stage: of bytes and training steps: stage, done, of how many, and a remark.
        remark: a line worth keeping.
    """

    stage: Callable[[str, int, int, str], None] = lambda stage, done, total, remark: None
    remark: Callable[[str], None] = lambda text: None


async def run_device(
    client: FleetClient,
    data: Path,
    cache: Path,
    cache_bytes: int,
    tasks: int | None = None,
    telling: Telling | None = None,
) -> int:
    """Take part in a fleet until it is stopped, or so many tasks are done.

    Whatever interrupts it, the same call goes on where it was.

    Args:
        client: the connection, with the device's credentials.
        data: directory of texts; the tasks take the files that end with ``.txt``, by name, round robin.
        cache: directory of everything that the device keeps.
        cache_bytes: the most that shards may take there.
        tasks: how many to do before the device leaves the fleet; None to go on until the server ends it.
        telling: who is told.

    Returns:
        The tasks done.

    Raises:
        FleetError: data, cache, credentials or server are not what they should be.
    """
    check_texts(data)
    async with Cache(cache, cache_bytes) as opened:
        device = Device(client, data, opened, telling or Telling())
        await device.join()
        return await device.run(tasks)


class Device:
    """One device with an open cache."""

    def __init__(self, client: FleetClient, data: Path, cache: Cache, telling: Telling) -> None:
        self.client, self.data, self.cache, self.telling = client, data, cache, telling
        credentials = client.credentials
        self.memory = Memory(cache.directory / "state.json", credentials.fleet, credentials.device)
        self.info: FleetInfo | None = None
        self._told_at = 0.0
        self._ratios: dict[tuple[str, str], float | None] = {}

    async def join(self) -> None:
        """Enrol, and get ready to train.

        Raises:
            FleetError: the fleet is another one, or its smallest emulator does not fit into the cache.
        """
        # On disk before the first task, so that the cache is this device's from now on.
        self.memory.change()
        if self.cache.dropped:
            self.telling.remark(
                f"{len(self.cache.dropped)} damaged shards were dropped; they are fetched again"
            )
        key = device_key(self.cache.directory / "device.key")
        await self.client.enrol(key, secret_sha256(key))
        self.info = await self.client.info()
        if self.info.name != self.client.credentials.fleet:
            raise FleetError(
                f"{self.client.url}: is the fleet {self.info.name!r}, the credentials are for "
                f"{self.client.credentials.fleet!r}; give that fleet's address, or credentials of this one"
            )
        await self.cache.prepare(self.info, self.client)
        self.telling.remark(f"joined {self.info.name} as {self.client.credentials.device}")

    async def run(self, tasks: int | None) -> int:
        """Do tasks until there were enough, or the server ends it; returns how many."""
        begun = self.memory.state.work
        if begun is not None and begun.result is not None:
            # The server may know the result, and would then never lease this task again.
            await self._carry_out(begun.lease)
        while tasks is None or self.memory.state.done < tasks:
            lease = await self._next_lease()
            if lease.kind == "stop":
                self.telling.remark("the server ends this device's work")
                break
            await self._carry_out(lease)
        else:
            await self.client.leave()
        done = self.memory.state.done
        await self._written(lambda: self.memory.change(done=0))
        return done

    async def _next_lease(self) -> Lease:
        """Report the task at hand and wait for what to do about it."""
        self.telling.stage("waiting for a lease", 0, 1, "")
        task = await self._written(lambda: self.memory.task(self.data))
        while True:
            # Again after every wait: a server that lost its last moments then knows of the task.
            await self.client.report(await self._report(task))
            if (lease := await self.client.lease(_POLL_S)) is not None:
                return lease

    async def _report(self, task: Task) -> Report:
        current = self.cache.current
        return Report(
            task=task.task,
            data_bytes=task.bytes,
            data_sha256=task.sha256,
            perplexity_ratio=None if current is None else await self._ratio(task, current),
            emulator=None if current is None else current["name"],
            cache_bytes=self.cache.limit,
        )

    async def _ratio(self, task: Task, current: dict[str, Any]) -> float | None:
        key = (task.task, current["name"])
        if key not in self._ratios:
            self._ratios = {key: await self._measured_ratio(task, current)}
        return self._ratios[key]

    async def _measured_ratio(self, task: Task, current: dict[str, Any]) -> float | None:
        self.telling.stage("measuring the task's text", 0, 1, "")
        try:
            from emutune.fleet.device import work

            return await asyncio.to_thread(
                work.perplexity_ratio, self.cache.directory, current, self.data / task.file
            )
        except (EmutuneError, ImportError) as error:
            # A report without it is a report.
            self.telling.remark(f"the task's text was not measured: {error}")
            return None

    async def _carry_out(self, lease: Lease) -> None:
        """Do what a lease says, and say what became of it."""
        work = await self._written(lambda: self._work(lease))
        folder = self._folder(lease)
        try:
            result = work.result or await self._remembered(await self._result(lease, work, folder))
            await self.client.result(lease.lease, result)
        except RefusedError as error:
            if error.status in _NO_PLACE:
                raise
            # The lease is no longer this device's, and its task neither.
            self.telling.remark(f"step {lease.step}: {error}")
            await asyncio.sleep(_AFTER_FAILURE_S)
        else:
            self._tell(lease, result)
            if result.outcome == "failed":
                await asyncio.sleep(_AFTER_FAILURE_S)
        state = self.memory.state
        mine = state.task is not None and state.task.task == lease.task
        task = None if mine else state.task
        await self._written(lambda: self.memory.change(work=None, task=task, done=state.done + 1))
        shutil.rmtree(folder, ignore_errors=True)

    async def _result(self, lease: Lease, work: Work, folder: Path) -> Result:
        """The result of a lease; a failure is one too.

        Raises:
            RefusedError: the server wants no more of this lease, or nothing of this device.
        """
        until, told = time.monotonic() + _DISK_FULL_AT_MOST_S, False
        while True:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                if lease.kind == "upload":
                    return await self._upload(lease, work, folder)
                return await self._train(lease, work, folder)
            except RefusedError as error:
                if error.status != 422:
                    raise
                return _failed(error)
            except Exception as error:
                # Whatever a model or a disk does, the step must not wait for this device.
                if not is_full(error) or time.monotonic() >= until:
                    return _failed(error)
                if not told:
                    self.telling.remark(f"step {lease.step}: {error}; going on as soon as there is room")
            told, work = True, self.memory.state.work or work
            await asyncio.sleep(_DISK_FULL_S)

    async def _remembered(self, result: Result) -> Result:
        """Keep a result until the server has it."""
        work = self.memory.state.work
        assert work is not None
        kept = work.model_copy(update={"result": result})
        await self._written(lambda: self.memory.change(work=kept))
        return result

    async def _upload(self, lease: Lease, work: Work, folder: Path) -> Result:
        """Send the task's text, and fetch the adapter that the server trains on it."""
        task = self._task_of(lease)
        path = await asyncio.to_thread(unchanged, self.data, task)
        if work.transferred is None:
            bucket = None if lease.rate_bps is None else TokenBucket(lease.rate_bps)
            await self.client.upload(
                lease.lease,
                path,
                task.bytes,
                bucket,
                lambda done: self._stage("sending data", done, task.bytes),
            )
            work = await self._written(lambda: self._moved(work))
        assert work.transferred is not None
        await self.client.transferred(lease.lease, work.transferred)
        self.telling.stage("waiting for the server's training", 0, 1, "")
        adapter = folder / "received.safetensors"
        sha256 = await self._servers_adapter(lease, adapter)
        self._keep(adapter)
        return Result(outcome="received", adapter=sha256)

    async def _servers_adapter(self, lease: Lease, path: Path) -> str:
        """Fetch the adapter that the server trains, once it has; its SHA-256."""
        ended = 0
        while ended < _ENDED_AT_LEAST:
            sha256 = await self.cache.fetch_adapter(self.client, lease.lease, path, _POLL_S)
            if sha256 is not None:
                return sha256
            # A lease that ended may be late, with an adapter still to come, or have failed.
            ended = 0 if await self.client.lease(0.0) == lease else ended + 1
        raise FleetError("the server ended the lease without an adapter")

    async def _train(self, lease: Lease, work: Work, folder: Path) -> Result:
        """Fetch what the emulator lacks, train, and send the adapter."""
        if lease.emulator is None:
            raise FleetError("lease.emulator: is missing, but the lease is to train")
        task = self._task_of(lease)
        path = await asyncio.to_thread(unchanged, self.data, task)
        await self._fetch(lease.emulator)
        if work.transferred is None:
            work = await self._written(lambda: self._moved(work))
        assert work.transferred is not None
        await self.client.transferred(lease.lease, work.transferred)
        start = await self._start(lease, folder)
        made = await self._trained(lease, path, folder, start)
        adapter = folder / "adapter.safetensors"
        await self.client.put_adapter(lease.lease, adapter)
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
            emulator, self.client, lambda done, total: self._stage("fetching the emulator", done, total)
        )

    async def _start(self, lease: Lease, folder: Path) -> Path | None:
        """The adapter that training starts from."""
        if lease.start is None:
            return None
        path = folder / "start.safetensors"
        for known in (path, self.cache.directory / "adapter.safetensors"):
            if known.is_file() and hash_file(known)[0] == lease.start:
                return known
        for _ in range(_DAMAGED_AT_MOST):
            if await self.cache.fetch_adapter(self.client, lease.lease, path, _POLL_S) == lease.start:
                return path
        raise FleetError(f"adapter {lease.start[:12]}: did not arrive whole; check the server's files")

    async def _trained(self, lease: Lease, text: Path, folder: Path, start: Path | None) -> Any:
        """Train in a thread, so that Ctrl-C is answered; after damage in the cache, once more."""
        from emutune.fleet.device import work

        assert lease.emulator is not None
        stopping = threading.Event()
        steps = lease.training.steps

        def report(progress: Any) -> None:
            if stopping.is_set():
                raise _StoppedError
            self._stage("training", progress.step, steps, f"loss {progress.losses[-1]:.3f}")

        def attempt() -> Any:
            return work.train_adapter(
                self.cache.directory, lease.emulator or {}, text, lease.training, folder, start, report
            )

        try:
            return await _in_thread(attempt, stopping)
        except CatalogueError:
            if not await self.cache.check():
                raise
        await self._fetch(lease.emulator)
        return await _in_thread(attempt, stopping)

    def _work(self, lease: Lease) -> Work:
        """What is remembered of a lease; of a new one, when it arrived and what has to move."""
        known = self.memory.state.work
        if known is not None and known.lease == lease:
            return known
        self._forget_other_leases(lease)
        task = self.memory.state.task
        moving = 0
        if lease.kind == "upload":
            moving = task.bytes if task is not None else 0
        elif lease.emulator is not None:
            with suppress(FleetError):
                missing = sum(self.cache.missing(lease.emulator).values())
                moving = missing - self.cache.arrived(lease.emulator)
        work = Work(lease=lease, arrival=Arrival.now(), bytes=max(0, moving))
        self.memory.change(work=work)
        self.telling.remark(f"step {lease.step}: {_described(lease, work)}")
        return work

    def _moved(self, work: Work) -> Work:
        """Measure, once and for all, how long a lease's bytes took."""
        message = Transferred(seconds=work.arrival.seconds(), bytes=work.bytes)
        moved = work.model_copy(update={"transferred": message})
        self.memory.change(work=moved)
        return moved

    async def _written(self, change: Callable[[], Answer]) -> Answer:
        """Make a change of what is remembered, as soon as the disk has room for it."""
        while True:
            try:
                return change()
            except StateUnwritableError as error:
                self.telling.remark(str(error))
                await asyncio.sleep(_DISK_FULL_S)

    def _task_of(self, lease: Lease) -> Task:
        task = self.memory.state.task
        if task is None or task.task != lease.task:
            raise FleetError(f"task {lease.task}: is none of this device's; was its cache deleted?")
        return task

    def _folder(self, lease: Lease) -> Path:
        return self.cache.directory / "work" / lease.lease

    def _forget_other_leases(self, lease: Lease) -> None:
        folder = self.cache.directory / "work"
        if folder.is_dir():
            for other in folder.iterdir():
                if other.name != lease.lease:
                    shutil.rmtree(other, ignore_errors=True)

    def _keep(self, adapter: Path) -> None:
        """Keep the newest adapter where it outlives its lease."""
        kept = self.cache.directory / "adapter.safetensors"
        aside = kept.with_name(kept.name + ".partial")
        shutil.copyfile(adapter, aside)
        aside.replace(kept)

    def _stage(self, stage: str, done: int, total: int, remark: str = "") -> None:
        now = time.monotonic()
        if done < total and now - self._told_at < _TELL_EVERY_S:
            return
        self._told_at = now
        self.telling.stage(stage, done, total, remark)

    def _tell(self, lease: Lease, result: Result) -> None:
        if result.outcome == "failed":
            self.telling.remark(f"step {lease.step}: failed: {result.reason}")
        elif result.after is not None:
            self.telling.remark(
                f"step {lease.step}: perplexity {result.before:.2f} before, {result.after:.2f} after"
            )
        else:
            self.telling.remark(f"step {lease.step}: the server's adapter has arrived")


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


def _described(lease: Lease, work: Work) -> str:
    if lease.kind == "upload":
        return f"send {work.bytes} bytes of data, the server trains"
    name = (lease.emulator or {}).get("name", "?")
    return f"train against {name}, {work.bytes} bytes to fetch"
