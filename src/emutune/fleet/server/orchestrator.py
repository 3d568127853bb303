"""The loop of a fleet: gather reports, decide, see the leases through, judge what was trained."""

from __future__ import annotations

import asyncio
import logging
import os
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from itertools import compress
from pathlib import Path

from emutune.fleet.config import FleetConfig
from emutune.fleet.ledger import Ledger
from emutune.fleet.protocol import FleetInfo, Lease, Report, Result, Transferred
from emutune.fleet.rows import LeaseRow
from emutune.fleet.server import progress
from emutune.fleet.server.adapters import Adapters
from emutune.fleet.server.at_server import AtServer
from emutune.fleet.server.choices import Deciding
from emutune.fleet.server.families import Families, Family
from emutune.fleet.server.jobs import Jobs, Work, noted
from emutune.fleet.server.judging import Judging, Task
from emutune.fleet.server.leasing import Leasing
from emutune.fleet.server.ledger_thread import AskLedger
from emutune.fleet.server.pool import Pool
from emutune.tuning.adapter_manifest import Asked
from emutune.tuning.manifest import Emulator

log = logging.getLogger("emutune.fleet")

_LONGEST_WAIT_S = 30.0
# Looking at a large fleet takes long, and news come with every request.
_REST = 2


class Orchestrator:
    """A fleet's server behind its routes; see ``Hub`` for what they ask of it.

    The ledger is the only memory: a server that was killed goes on where the ledger ends.

    Args:
        config: the fleet's file.
        ledger: what happened so far.
        families: the foundation models that are served.
        decider: the policy.
        trainers: does the training of uploaded tasks.
        judge: evaluates adapters.
        report: told of every step that ends.

    Raises:
        EmutuneError: a catalogue lacks what the fleet's file asks for.
    """

    def __init__(
        self,
        config: FleetConfig,
        ledger: AskLedger,
        families: Families,
        decider: Deciding,
        trainers: Pool,
        judge: Pool,
        report: Callable[[int], None] = lambda step: None,
    ) -> None:
        self._config, self._ledger, self._families = config, ledger, families
        self._trainers, self._judge, self._report = trainers, judge, report
        self._scenario = decider.scenario
        self._adapters = Adapters(config.server.directory / "adapters")
        self._judging = Judging(config, ledger, families, self._judge, self._adapters.path)
        self._leasing = Leasing(config, families, decider)
        self._at_server = AtServer(config, ledger, families, self._trainers, self._adapters.path)
        for catalogue in (family.catalogue for family in families):
            # Said now, not when the first adapter comes.
            catalogue.asked(catalogue.base(), config.training.adapter, config.training.width)
        self._wakers: dict[str, asyncio.Event] = defaultdict(asyncio.Event)
        self._news = asyncio.Event()
        self._jobs = Jobs()
        self._stopping = False
        self._told: set[str] = set()
        self._info = self._leasing.describe()
        self._adapters.directory.mkdir(parents=True, exist_ok=True)

    @property
    def jobs(self) -> list[asyncio.Task[None]]:
        """Training and judging under way."""
        return self._jobs.running

    def at_work(self) -> set[str]:
        """The leases that are trained or judged now."""
        return self._jobs.named(_job_of(""))

    # The loop

    async def run(self) -> None:
        """Run all steps that the ledger lacks, then tell the devices to stop."""
        for row in await self._ledger(Ledger.unfinished_leases):
            await noted(partial(self._take_up, row))
        last = await self._ledger(Ledger.last_step)
        if last >= 0 and not await self._ledger(Ledger.step_ended, last):
            await self._see_through(last)
        for step in range(last + 1, self._config.steps.count):
            reports = await self._gather()
            tasks = [(device, self._families.of(report.model)) for device, report in reports]
            untold = [report.perplexity_ratio is None for _, report in reports]
            await self._measured(list(compress(tasks, untold)))
            known = await self._ledger(progress.known_of, self._config, self._scenario, step, tasks)
            decided = await self._leasing.lease_step(step, reports, known)
            await noted(partial(self._ledger, Ledger.begin_step, step, decided))
            for decision in decided:
                self._wake(decision.device)
            await self._see_through(step)
        await self._let_go()

    async def _gather(self) -> list[tuple[str, Report]]:
        """Reports of all devices that take part, or of those that came in time."""
        loop = asyncio.get_running_loop()
        first: float | None = None
        while True:
            self._news.clear()
            began = loop.time()
            reports, expected = await self._ledger(progress.gathered, self._config.steps.devices)
            if reports:
                first = began if first is None else first
                end = first + self._config.steps.gather_s
                if len(reports) >= expected or loop.time() >= end:
                    return reports
                await self._wait_for_news(began, end)
            else:
                await self._news.wait()

    async def _see_through(self, step: int) -> None:
        """Wait until the devices have done what they were leased, or the deadline has passed."""
        loop = asyncio.get_running_loop()
        end = loop.time() + self._config.steps.deadline_s
        while True:
            self._news.clear()
            began = loop.time()
            if not await self._ledger(Ledger.at_work, step) or loop.time() >= end:
                break
            await self._wait_for_news(began, end)
        await noted(partial(self._expire, step))
        judged = [_job_of(lease) for lease in await self._ledger(progress.open_of, step)]
        await self._jobs.allow(judged, self._config.steps.gather_s)
        await noted(partial(self._ledger, progress.end, step))
        self._report(step)

    async def _expire(self, step: int) -> None:
        for device in await self._ledger(progress.expire, step):
            log.warning("step %d: %s is late", step, device)

    async def _wait_for_news(self, began: float, end: float) -> None:
        """Until something has happened, and some multiple of the time that looking at it takes is over."""
        loop = asyncio.get_running_loop()
        await asyncio.sleep(min(_REST * (loop.time() - began), end - loop.time()))
        await self._wait(self._news, end - loop.time())

    async def _let_go(self) -> None:
        """Tell the devices that are there to stop, and give them a moment to hear it."""
        self._stopping = True
        for device in list(self._wakers):
            self._wake(device)
        loop = asyncio.get_running_loop()
        end = loop.time() + min(self._config.steps.gather_s, 10.0)
        while loop.time() < end:
            self._news.clear()
            began = loop.time()
            if await self._ledger(progress.devices_here) <= self._told:
                break
            await self._wait_for_news(began, end)
        await asyncio.gather(*self.jobs, return_exceptions=True)

    @staticmethod
    async def _wait(event: asyncio.Event, seconds: float) -> None:
        with suppress(TimeoutError):
            # Unlike wait_for before Python 3.12, this never swallows that the task is cancelled.
            async with asyncio.timeout(seconds):
                await event.wait()

    def _wake(self, device: str) -> None:
        self._wakers[device].set()

    # What the routes ask (see ``Hub``)

    def info(self) -> FleetInfo:
        """See ``Hub.info``."""
        return self._info

    async def reported(self, device: str, report: Report) -> None:
        """See ``Hub.reported``."""
        self._families.check(report)
        await self._ledger(Ledger.report, device, report)
        self._news.set()

    async def next_lease(self, device: str, wait_s: float) -> Lease | None:
        """See ``Hub.next_lease``."""
        loop = asyncio.get_running_loop()
        end = loop.time() + min(wait_s, _LONGEST_WAIT_S)
        while True:
            self._wakers[device].clear()
            lease = await self._ledger(Ledger.unanswered_lease, device) or self._stop_lease(device)
            if lease is not None or loop.time() >= end:
                return lease
            await self._wait(self._wakers[device], end - loop.time())

    def _stop_lease(self, device: str, lease: str | None = None) -> Lease | None:
        """What ends a device's work once all steps are done; no part of the ledger."""
        name = f"stop-{device}"
        if not self._stopping or lease not in (None, name):
            return None
        self._told.add(device)
        self._news.set()
        return Lease(lease=name, step=self._config.steps.count, kind="stop")

    async def lease_of(self, device: str, lease: str) -> Lease | None:
        """See ``Hub.lease_of``."""
        row = await self._ledger(Ledger.lease, device, lease)
        return self._stop_lease(device, lease) if row is None else row.message

    async def data_size(self, device: str, lease: str) -> tuple[int, str]:
        """See ``Hub.data_size``."""
        return await self._ledger(progress.data_size, device, lease)

    async def data_received(self, device: str, lease: str, path: Path) -> None:
        """See ``Hub.data_received``."""
        row = await self._row(device, lease)
        if row.kind != "upload" or row.adapter_sha256 is not None:
            return
        kept = self._at_server.data(lease)
        if path != kept:
            kept.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, kept)
        await self._ledger(Ledger.data_complete, lease)
        self._start(row, partial(self._train, row))

    async def transferred(self, device: str, lease: str, message: Transferred) -> None:
        """See ``Hub.transferred``."""
        simulated = message.model_copy(update={"seconds": message.seconds * self._config.time_scale})
        await self._ledger(progress.transferred, device, lease, simulated)
        self._news.set()

    async def start_adapter(self, device: str, lease: str) -> Path | None:
        """See ``Hub.start_adapter``."""
        row = await self._row(device, lease)
        sha256 = row.adapter_sha256 if row.kind == "upload" else row.message.start
        return None if sha256 is None else self._adapters.path(sha256)

    async def adapter_asked(self, device: str, lease: str) -> Asked:
        """See ``Hub.adapter_asked``."""
        message = (await self._row(device, lease)).message
        emulator = Emulator.model_validate(message.emulator)
        catalogue = self._families.of(emulator.base).catalogue
        return catalogue.asked(emulator, message.training.adapter, message.training.width)

    async def adapter_received(self, device: str, lease: str, path: Path) -> None:
        """See ``Hub.adapter_received``."""
        row = await self._row(device, lease)
        await self._keep_adapter(row, path)
        self._start(row, partial(self._evaluate, row))

    async def result(self, device: str, lease: str, message: Result) -> None:
        """See ``Hub.result``."""
        await self._ledger(progress.ended, device, lease, message, self._config.time_scale)
        self._news.set()

    async def left(self, device: str) -> None:
        """See ``Hub.left``."""
        await self._ledger(Ledger.leave, device)
        self._news.set()

    # Work on a lease

    async def _take_up(self, row: LeaseRow) -> None:
        """Go on with what a killed server had begun."""
        if row.kind == "upload" and row.adapter_sha256 is not None:
            await self._at_server.forget(row)
        if row.adapter_sha256 is not None and row.accepted is None:
            self._start(row, partial(self._evaluate, row))
        elif row.data_complete and row.adapter_sha256 is None:
            self._start(row, partial(self._train, row))
        await self._finish(row.device, row.lease)

    def _start(self, row: LeaseRow, work: Work) -> None:
        async def failed(reason: str) -> None:
            await self._ledger(progress.failed, row, reason)
            self._news.set()

        self._jobs.start(_job_of(row.lease), work, failed)

    async def _train(self, row: LeaseRow) -> None:
        """Train an uploaded task; its data stay until that is done, whatever comes between."""
        if (await self._row(row.device, row.lease)).adapter_sha256 is None:
            began = asyncio.get_running_loop().time()
            trained = await self._at_server.train(row)
            await self._paced(row, began, trained.processor_s)
            await self._keep_adapter(row, trained.path)
        await self._at_server.forget(row)
        self._wake(row.device)
        await self._evaluate(row)

    async def _paced(self, row: LeaseRow, began: float, processor_s: float) -> None:
        """Note how long training took, which in a shaped fleet is as long as at the server that the scenario has."""
        loop, scale = asyncio.get_running_loop(), self._config.time_scale
        taken_s = loop.time() - began
        if self._config.shaping.enabled:
            # As on devices: other jobs of this machine are none of the server's that it stands for.
            pace_s = row.predicted_training_s / scale
            await asyncio.sleep(pace_s - taken_s)
            taken_s = max(pace_s, processor_s)
        await self._ledger(Ledger.trained_for, row.lease, taken_s * scale)

    async def _keep_adapter(self, row: LeaseRow, path: Path) -> None:
        """Keep what was trained for a lease, and record it.

        Raises:
            AdapterError: it belongs to another model, or to other layers.
        """
        info = self._families.of(row.base).catalogue.info
        sha256 = await asyncio.to_thread(self._adapters.keep, path, info)
        size = self._adapters.path(sha256).stat().st_size
        await self._ledger(Ledger.adapter, row.lease, sha256, size)

    async def _evaluate(self, row: LeaseRow) -> None:
        """Have a lease's adapter judged."""
        await self._judging.judge(row)
        await self._finish(row.device, row.lease)

    async def _finish(self, device: str, lease: str) -> None:
        await self._ledger(progress.finish, device, lease)
        self._news.set()

    async def _row(self, device: str, lease: str) -> LeaseRow:
        return await self._ledger(progress.row_of, device, lease)

    # What decisions need

    async def _measured(self, tasks: list[Task]) -> None:
        """Give the text that is held back for devices which hold no emulator yet, as all do that are new, a while."""
        for task in await self._judging.unmeasured(tasks):
            self._jobs.start(
                _measure_of(*task),
                partial(self._judging.measure, task),
                partial(self._judging.give_up, task),
            )
        await self._jobs.allow((_measure_of(*task) for task in tasks), self._config.steps.gather_s)


def _job_of(lease: str) -> str:
    return f"lease {lease}"


def _measure_of(device: str, family: Family) -> str:
    return f"complexity of {device}" + (f" in {family.name}" if family.key else "")
