"""A device's work: report a task, wait for a lease, move what it names, train, return the result, again."""

from __future__ import annotations

import asyncio
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from emutune.errors import EmutuneError, FleetError
from emutune.fleet.device.abilities import ANYTHING, Abilities
from emutune.fleet.device.cache import Cache
from emutune.fleet.device.client import POLL_S, FleetClient, RefusedError
from emutune.fleet.device.errand import Errand
from emutune.fleet.device.key import device_key
from emutune.fleet.device.state import Arrival, Memory, Task, Work, check_texts, model_of, texts_of
from emutune.fleet.device.telling import Telling
from emutune.fleet.protocol import FleetInfo, Lease, Report, Result
from emutune.fleet.security import secret_sha256

_AFTER_FAILURE_S = 2.0
# Not about a lease, but about this device's place in the fleet.
_NO_PLACE = frozenset({401, 403})


async def run_device(
    client: FleetClient,
    data: Path,
    cache: Path,
    cache_bytes: int,
    tasks: int | None = None,
    telling: Telling | None = None,
    abilities: Abilities = ANYTHING,
) -> int:
    """Take part in a fleet until it is stopped, or so many tasks are done.

    Whatever interrupts it, the same call goes on where it was.

    Args:
        client: the connection, with the device's credentials.
        data: directory of texts; the tasks take the files that end with ``.txt``, by name, round robin. They are of
            the fleet's first model, and those in a folder of the model that is called so.
        cache: directory of everything that the device keeps.
        cache_bytes: the most that shards may take there.
        tasks: how many to do before the device leaves the fleet; None to go on until the server ends it.
        telling: who is told.
        abilities: what the device can, and may.

    Returns:
        The tasks done.

    Raises:
        FleetError: data, cache, credentials or server are not what they should be.
    """
    check_texts(data)
    async with Cache(cache, cache_bytes) as opened:
        device = Device(client, data, opened, telling or Telling(), abilities)
        await device.join()
        return await device.run(tasks)


class Device:
    """One device with an open cache."""

    def __init__(
        self, client: FleetClient, data: Path, cache: Cache, telling: Telling, abilities: Abilities
    ) -> None:
        self.client, self.data, self.cache, self.telling = client, data, cache, telling
        self.abilities = abilities
        credentials = client.credentials
        self.memory = Memory(cache.directory / "state.json", credentials.fleet, credentials.device)
        self.info: FleetInfo
        self._ratios: dict[tuple[str, str], float | None] = {}

    async def join(self) -> None:
        """Enrol, and get ready to train.

        Raises:
            FleetError: the fleet is another one or does not serve the model of a text, or the smallest emulator does
                not fit where it must.
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
        wanted = {(model := model_of(self.data, path, self.info)).base: model for path in texts_of(self.data)}
        self.abilities.check(wanted.values(), self.cache.limit)
        await self.cache.prepare(self.info, self.client)
        task = self.memory.state.task
        if task is not None and task.model is None:
            self.memory.change(task=task.model_copy(update={"model": self.info.base}))
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
        await self.memory.written(self.telling.remark, lambda: self.memory.change(done=0))
        return done

    async def _next_lease(self) -> Lease:
        """Report the task at hand and wait for what to do about it."""
        self.telling.stage("waiting for a lease", 0, 1, "")
        task = await self.memory.written(self.telling.remark, lambda: self.memory.task(self.data, self.info))
        while True:
            # Again after every wait: a server that lost its last moments then knows of the task.
            await self.client.report(await self._report(task))
            if (lease := await self.client.lease(POLL_S)) is not None:
                return lease

    async def _report(self, task: Task) -> Report:
        base, used = task.model or self.info.base, self.cache.emulators.used
        current, several = used.get(base), len(self.info.models) > 1
        return Report(
            task=task.task,
            data_bytes=task.bytes,
            data_sha256=task.sha256,
            perplexity_ratio=None if current is None else await self._ratio(task, current),
            emulator=None if current is None else current["name"],
            model=base if several else None,
            held=tuple((base, None if one is None else one["name"]) for base, one in used.items())
            if several
            else (),
            cache_bytes=self.cache.limit,
            memory_bytes=self.abilities.memory_bytes,
            private=self.abilities.private,
            transmit_w=self.abilities.transmit_w,
            compute_w=self.abilities.compute_w,
        )

    async def _ratio(self, task: Task, current: dict[str, Any]) -> float | None:
        key = (task.task, f"{current['base']} {current['name']}")
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
        work = await self.memory.written(self.telling.remark, lambda: self._work(lease))
        folder = self._folder(lease)
        try:
            errand = Errand(
                self.client, self.data, self.cache, self.memory, self.telling, lease, self.abilities.private
            )
            result = work.result or await self._remembered(await errand.result(folder))
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
        await self.memory.written(
            self.telling.remark, lambda: self.memory.change(work=None, task=task, done=state.done + 1)
        )
        shutil.rmtree(folder, ignore_errors=True)

    async def _remembered(self, result: Result) -> Result:
        """Keep a result until the server has it."""
        work = self.memory.state.work
        assert work is not None
        kept = work.model_copy(update={"result": result})
        await self.memory.written(self.telling.remark, lambda: self.memory.change(work=kept))
        return result

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

    def _folder(self, lease: Lease) -> Path:
        return self.cache.directory / "work" / lease.lease

    def _forget_other_leases(self, lease: Lease) -> None:
        folder = self.cache.directory / "work"
        if folder.is_dir():
            for other in folder.iterdir():
                if other.name != lease.lease:
                    shutil.rmtree(other, ignore_errors=True)

    def _tell(self, lease: Lease, result: Result) -> None:
        if result.outcome == "failed":
            self.telling.remark(f"step {lease.step}: failed: {result.reason}")
        elif result.after is not None:
            self.telling.remark(
                f"step {lease.step}: perplexity {result.before:.2f} before, {result.after:.2f} after"
            )
        else:
            self.telling.remark(f"step {lease.step}: the server's adapter has arrived")


def _described(lease: Lease, work: Work) -> str:
    if lease.kind == "upload":
        return f"send {work.bytes} bytes of data, the server trains"
    name = (lease.emulator or {}).get("name", "?")
    return f"train against {name}, {work.bytes} bytes to fetch"
