"""The loop of a fleet: gather reports, decide, see the leases through, judge what was trained."""

from __future__ import annotations

import asyncio
import logging
import os
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

from emutune.errors import FleetError
from emutune.fleet.config import FleetConfig
from emutune.fleet.figures import FAILED
from emutune.fleet.ledger import Ledger
from emutune.fleet.protocol import FleetInfo, Lease, Report, Result, Transferred
from emutune.fleet.rows import Kind, LeaseRow, Transfer
from emutune.fleet.server.adapters import Adapters
from emutune.fleet.server.at_server import AtServer
from emutune.fleet.server.choices import Deciding
from emutune.fleet.server.jobs import Jobs, Work, noted
from emutune.fleet.server.judging import Judging
from emutune.fleet.server.leasing import Leasing
from emutune.fleet.server.pool import Pool
from emutune.tuning.adapter_manifest import Asked
from emutune.tuning.inventory import Inventory
from emutune.tuning.manifest import Emulator

log = logging.getLogger("emutune.fleet")

_LONGEST_WAIT_S = 30.0
_CLOSED = ("done", "failed")


class Orchestrator:
    """A fleet's server behind its routes; see ``Hub`` for what they ask of it.

    The ledger is the only memory: a server that was killed goes on where the ledger ends.

    Args:
        config: the fleet's file.
        ledger: what happened so far.
        catalogue: the emulators.
        decider: the policy.
        trainers: does the training of uploaded tasks.
        judge: evaluates adapters.
        report: told of every step that ends.

    Raises:
        EmutuneError: the catalogue is of another model than the scenario's, or lacks what the fleet's file asks for.
    """

    def __init__(
        self,
        config: FleetConfig,
        ledger: Ledger,
        catalogue: Inventory,
        decider: Deciding,
        trainers: Pool,
        judge: Pool,
        report: Callable[[int], None] = lambda step: None,
    ) -> None:
        self._config, self._ledger, self._catalogue = config, ledger, catalogue
        self._trainers, self._judge, self._report = trainers, judge, report
        self._scenario = decider.scenario
        self._adapters = Adapters(config.server.directory / "adapters", catalogue.info)
        self._judging = Judging(
            config, ledger, catalogue.directory, self._scenario, self._judge, self._adapters.path
        )
        self._leasing = Leasing(
            config, catalogue, decider, self._judging.complexity, self._transfers, ledger.in_service
        )
        largest = self._leasing.emulators[-1].name
        self._at_server = AtServer(
            config, ledger, catalogue.directory, largest, self._trainers, self._adapters.path
        )
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
        for row in self._ledger.unfinished_leases():
            await noted(partial(self._take_up, row))
        last = self._ledger.last_step()
        if last >= 0 and not self._ledger.step_ended(last):
            await self._see_through(last)
        for step in range(self._ledger.last_step() + 1, self._config.steps.count):
            reports = await self._gather()
            await self._measured([device for device, report in reports if report.perplexity_ratio is None])
            decided = await self._leasing.lease_step(step, reports)
            await noted(partial(self._ledger.begin_step, step, decided))
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
            reports = self._ledger.open_reports()
            busy = self._ledger.at_work()
            reports = [(device, report) for device, report in reports if device not in busy]
            if reports:
                first = loop.time() if first is None else first
                left = first + self._config.steps.gather_s - loop.time()
                if len(reports) >= self._expected(busy) or left <= 0:
                    return sorted(reports, key=lambda row: row[0])
                await self._wait(self._news, left)
            else:
                await self._news.wait()

    def _expected(self, busy: set[str]) -> int:
        """How many reports are worth waiting for: not those of devices that were lost in the last step."""
        last = self._ledger.last_step()
        lost = self._ledger.devices_of(last, "expired")
        taking_part = (
            {
                row.name
                for row in self._ledger.devices()
                # Before the first step, whoever has credentials may be about to join.
                if (row.key_sha256 or last < 0) and not row.left and not row.revoked
            }
            - lost
            - busy
        )
        return min(self._config.steps.devices or len(taking_part), len(taking_part)) or 1

    async def _see_through(self, step: int) -> None:
        """Wait until the devices have done what they were leased, or the deadline has passed."""
        loop = asyncio.get_running_loop()
        end = loop.time() + self._config.steps.deadline_s
        while True:
            self._news.clear()
            # News come with every request, and reading all leases of a large step takes long.
            late = self._ledger.at_work(step)
            if not late or loop.time() >= end:
                break
            await self._wait(self._news, end - loop.time())
        for row in self._ledger.step_leases(step):
            if row.device in late:
                log.warning("step %d: %s is late", step, row.device)
                await noted(partial(self._ledger.close_lease, row.lease, "expired"))
        judged = [_job_of(row.lease) for row in self._ledger.step_leases(step) if row.state == "open"]
        await self._jobs.allow(judged, self._config.steps.gather_s)
        delays = [
            row.transferred_s for row in self._ledger.step_leases(step) if row.transferred_s is not None
        ]
        await noted(partial(self._ledger.end_step, step, max(delays, default=0.0)))
        self._report(step)

    async def _let_go(self) -> None:
        """Tell the devices that are there to stop, and give them a moment to hear it."""
        self._stopping = True
        for device in [row.name for row in self._ledger.devices()]:
            self._wake(device)
        loop = asyncio.get_running_loop()
        end = loop.time() + min(self._config.steps.gather_s, 10.0)
        while loop.time() < end:
            self._news.clear()
            here = {row.name for row in self._ledger.devices() if row.key_sha256 and not row.left}
            if here <= self._told:
                break
            await self._wait(self._news, end - loop.time())
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
        self._leasing.check(report)
        self._ledger.report(device, report)
        self._news.set()

    async def next_lease(self, device: str, wait_s: float) -> Lease | None:
        """See ``Hub.next_lease``."""
        loop = asyncio.get_running_loop()
        end = loop.time() + min(wait_s, _LONGEST_WAIT_S)
        while True:
            self._wakers[device].clear()
            lease = self._unfinished_lease(device) or self._stop_lease(device)
            if lease is not None or loop.time() >= end:
                return lease
            await self._wait(self._wakers[device], end - loop.time())

    def _unfinished_lease(self, device: str) -> Lease | None:
        """The device's open lease, unless all that is left to do is the server's."""
        lease = self._ledger.open_lease(device)
        row = None if lease is None else self._ledger.lease(device, lease.lease)
        return None if row is None or row.result is not None else lease

    def _stop_lease(self, device: str, lease: str | None = None) -> Lease | None:
        """What ends a device's work once all steps are done; no part of the ledger."""
        name = f"stop-{device}"
        if not self._stopping or lease not in (None, name):
            return None
        self._told.add(device)
        self._news.set()
        return Lease(lease=name, step=self._config.steps.count, kind="stop")

    def lease_of(self, device: str, lease: str) -> Lease | None:
        """See ``Hub.lease_of``."""
        row = self._ledger.lease(device, lease)
        return self._stop_lease(device, lease) if row is None else row.message

    def data_size(self, device: str, lease: str) -> tuple[int, str]:
        """See ``Hub.data_size``."""
        row = self._row(device, lease)
        report = self._ledger.report_of(device, row.task)
        return report.data_bytes, report.data_sha256

    async def data_received(self, device: str, lease: str, path: Path) -> None:
        """See ``Hub.data_received``."""
        row = self._row(device, lease)
        if row.kind != "upload" or row.adapter_sha256 is not None:
            return
        kept = self._at_server.data(lease)
        if path != kept:
            kept.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, kept)
        self._ledger.data_complete(lease)
        self._start(row, partial(self._train, row))

    async def transferred(self, device: str, lease: str, message: Transferred) -> None:
        """See ``Hub.transferred``."""
        row = self._row(device, lease)
        simulated = message.seconds * (self._config.shaping.time_scale if self._config.shaping.enabled else 1)
        self._ledger.transferred(row.lease, simulated, message.bytes)
        self._finish(device, lease)

    def start_adapter(self, device: str, lease: str) -> Path | None:
        """See ``Hub.start_adapter``."""
        row = self._row(device, lease)
        sha256 = row.adapter_sha256 if row.kind == "upload" else row.message.start
        return None if sha256 is None else self._adapters.path(sha256)

    def adapter_asked(self, device: str, lease: str) -> Asked:
        """See ``Hub.adapter_asked``."""
        message = self._row(device, lease).message
        emulator = Emulator.model_validate(message.emulator)
        return self._catalogue.asked(emulator, message.training.adapter, message.training.width)

    async def adapter_received(self, device: str, lease: str, path: Path) -> None:
        """See ``Hub.adapter_received``."""
        row = self._row(device, lease)
        await self._keep_adapter(lease, path)
        self._start(row, partial(self._evaluate, row))

    async def result(self, device: str, lease: str, message: Result) -> None:
        """See ``Hub.result``."""
        if self._ledger.lease(device, lease) is not None:
            self._ledger.result(lease, message)
            self._finish(device, lease)

    async def left(self, device: str) -> None:
        """See ``Hub.left``."""
        self._ledger.leave(device)
        self._news.set()

    # Work on a lease

    def _take_up(self, row: LeaseRow) -> None:
        """Go on with what a killed server had begun."""
        if row.kind == "upload" and row.adapter_sha256 is not None:
            self._at_server.forget(row)
        if row.adapter_sha256 is not None and row.accepted is None:
            self._start(row, partial(self._evaluate, row))
        elif row.data_complete and row.adapter_sha256 is None:
            self._start(row, partial(self._train, row))
        self._finish(row.device, row.lease)

    def _start(self, row: LeaseRow, work: Work) -> None:
        def failed(reason: str) -> None:
            self._ledger.audit(FAILED, row.device, row.lease, reason)
            self._ledger.close_lease(row.lease, "failed")
            self._news.set()

        self._jobs.start(_job_of(row.lease), work, failed)

    async def _train(self, row: LeaseRow) -> None:
        """Train an uploaded task; its data stay until that is done, whatever comes between."""
        if self._row(row.device, row.lease).adapter_sha256 is None:
            await self._keep_adapter(row.lease, await self._at_server.train(row))
        self._at_server.forget(row)
        self._wake(row.device)
        await self._evaluate(row)

    async def _keep_adapter(self, lease: str, path: Path) -> None:
        """Keep what was trained for a lease, and record it.

        Raises:
            AdapterError: it belongs to another model, or to other layers.
        """
        sha256 = await asyncio.to_thread(self._adapters.keep, path)
        self._ledger.adapter(lease, sha256, self._adapters.path(sha256).stat().st_size)

    async def _evaluate(self, row: LeaseRow) -> None:
        """Have a lease's adapter judged."""
        await self._judging.judge(row)
        self._finish(row.device, row.lease)

    def _finish(self, device: str, lease: str) -> None:
        """Close a lease once everything about it is known."""
        row = self._row(device, lease)
        if row.result is None or row.state in _CLOSED:
            pass
        elif row.result.outcome == "failed" and not _trained_late(row):
            self._ledger.close_lease(lease, "failed")
        elif row.accepted is not None and row.transferred_s is not None:
            self._ledger.close_lease(lease, "done" if row.state == "open" else "late")
        self._news.set()

    def _row(self, device: str, lease: str) -> LeaseRow:
        row = self._ledger.lease(device, lease)
        if row is None:
            raise FleetError(f"lease {lease}: is not one of {device}")
        return row

    # What decisions need

    async def _measured(self, devices: list[str]) -> None:
        """Give the text that is held back for devices which hold no emulator yet, as all do that are new, a while."""
        for device in filter(self._judging.unmeasured, devices):
            self._jobs.start(
                _measure_of(device),
                partial(self._judging.measure, device),
                partial(self._judging.give_up, device),
            )
        await self._jobs.allow(map(_measure_of, devices), self._config.steps.gather_s)

    def _transfers(self, device: str, kind: Kind) -> list[Transfer]:
        return self._ledger.transfers(device, kind, shared=self._scenario.radio.sharing == "equal")


def _trained_late(row: LeaseRow) -> bool:
    """Whether the server trains for a device that no longer waits, so that its failure is not the last word."""
    return row.state == "expired" and row.kind == "upload" and row.data_complete


def _job_of(lease: str) -> str:
    return f"lease {lease}"


def _measure_of(device: str) -> str:
    return f"complexity of {device}"
