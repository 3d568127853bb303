"""The loop of a fleet: gather reports, decide, see the leases through, judge what was trained."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from emutune.errors import AdapterError, EmutuneError, FleetError, LedgerError
from emutune.fleet.config import FleetConfig
from emutune.fleet.disk import is_full
from emutune.fleet.ledger import Ledger
from emutune.fleet.protocol import FleetInfo, Lease, Report, Result, Transferred
from emutune.fleet.rows import LeaseRow
from emutune.fleet.server.choices import Deciding
from emutune.fleet.server.leasing import Leasing
from emutune.fleet.server.links import DrawnLink, gain_of_rate
from emutune.fleet.server.pool import Pool
from emutune.fleet.server.worker import JudgeJob, TrainJob
from emutune.tuning.adapter_manifest import check_belongs, read_manifest
from emutune.tuning.inventory import BASE, Inventory

log = logging.getLogger("emutune.fleet")

_LONGEST_WAIT_S = 30.0
_CLOSED = ("done", "failed")
_DISK_FULL_S = 5.0


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
        self._leasing = Leasing(
            config, catalogue, decider, self._held_back_complexity, self._last_gain, ledger.in_service
        )
        self._wakers: dict[str, asyncio.Event] = defaultdict(asyncio.Event)
        self._news = asyncio.Event()
        self._one_judgement = asyncio.Lock()
        self._jobs: dict[str, asyncio.Task[None]] = {}
        self._stopping = False
        self._told: set[str] = set()
        self._info = self._describe()
        self._adapters = config.server.directory / "adapters"
        self._adapters.mkdir(parents=True, exist_ok=True)

    @property
    def jobs(self) -> list[asyncio.Task[None]]:
        """Training and judging under way."""
        return [job for job in self._jobs.values() if not job.done()]

    def at_work(self) -> set[str]:
        """The leases that are trained or judged now."""
        return set(self._jobs)

    # The loop

    async def run(self) -> None:
        """Run all steps that the ledger lacks, then tell the devices to stop."""
        for row in self._ledger.unfinished_leases():
            await self._noted(partial(self._take_up, row))
        last = self._ledger.last_step()
        if last >= 0 and not self._ledger.step_ended(last):
            await self._see_through(last)
        for step in range(self._ledger.last_step() + 1, self._config.steps.count):
            reports = await self._gather()
            await self._measure_complexities(reports)
            decided = await self._leasing.lease_step(step, reports)
            await self._noted(partial(self._ledger.begin_step, step, decided))
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
            busy = {row.device for row in self._ledger.open_leases()}
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
        """Wait until the step's leases are closed or its deadline has passed."""
        loop = asyncio.get_running_loop()
        end = loop.time() + self._config.steps.deadline_s
        while True:
            self._news.clear()
            # News come with every request, and reading all leases of a large step takes long.
            if not self._ledger.devices_of(step, "open") or loop.time() >= end:
                break
            await self._wait(self._news, end - loop.time())
        for row in self._ledger.step_leases(step):
            if row.state == "open":
                log.warning("step %d: %s is late", step, row.device)
                await self._noted(partial(self._ledger.close_lease, row.lease, "expired"))
        delays = [
            row.transferred_s for row in self._ledger.step_leases(step) if row.transferred_s is not None
        ]
        await self._noted(partial(self._ledger.end_step, step, max(delays, default=0.0)))
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
        await asyncio.gather(*self._jobs.values(), return_exceptions=True)

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
        kept = self._data(lease)
        if path != kept:
            kept.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, kept)
        self._ledger.data_complete(lease)
        self._start(lease, partial(self._train, row))

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
        return None if sha256 is None else self._adapter(sha256)

    async def adapter_received(self, device: str, lease: str, path: Path) -> None:
        """See ``Hub.adapter_received``."""
        row = self._row(device, lease)
        if row.kind != "train":
            raise AdapterError(f"lease {lease}: the server trains here, it takes no adapter")
        sha256 = await asyncio.to_thread(self._keep_adapter, path)
        self._ledger.adapter(lease, sha256, self._adapter(sha256).stat().st_size)
        self._start(lease, partial(self._evaluate, lease, device))

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
            self._forget_data(row)
        if row.adapter_sha256 is not None and row.accepted is None:
            self._start(row.lease, partial(self._evaluate, row.lease, row.device))
        elif row.data_complete and row.adapter_sha256 is None:
            self._start(row.lease, partial(self._train, row))
        self._finish(row.device, row.lease)

    def _start(self, lease: str, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        running = self._jobs.get(lease)
        if running is None or running.done():
            self._jobs[lease] = asyncio.create_task(self._guarded(lease, work))
            self._jobs[lease].add_done_callback(partial(self._ended, lease))

    def _ended(self, lease: str, job: asyncio.Task[None]) -> None:
        if self._jobs.get(lease) is job:
            del self._jobs[lease]

    async def _guarded(self, lease: str, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        while True:
            try:
                await work()
                return
            except Exception as error:
                known = isinstance(error, EmutuneError | OSError)
                log.error("lease %s: %s", lease, error, exc_info=not known)
                if not is_full(error):
                    break
            await asyncio.sleep(_DISK_FULL_S)
        # Whatever it was, the step must not wait for this lease.
        await self._noted(partial(self._ledger.close_lease, lease, "failed"))
        self._news.set()

    async def _noted(self, change: Callable[[], object]) -> None:
        """Make a change of the ledger, as soon as the disk has room for it."""
        while True:
            try:
                change()
                return
            except LedgerError as error:
                if not is_full(error):
                    raise
                log.error("%s", error)
            await asyncio.sleep(_DISK_FULL_S)

    async def _train(self, row: LeaseRow) -> None:
        """Train an uploaded task; its data stay until that is done, whatever comes between."""
        if self._row(row.device, row.lease).adapter_sha256 is None:
            await self._train_adapter(row)
        self._forget_data(row)
        self._wake(row.device)
        await self._evaluate(row.lease, row.device)

    async def _train_adapter(self, row: LeaseRow) -> None:
        out = self._work(row.lease) / "adapter.safetensors"
        start, training = row.message.start, row.message.training
        emulator = BASE if self._config.at_server.model == "full" else self._cached_emulator(row)
        job = TrainJob(
            catalogue=self._catalogue.directory,
            emulator=emulator,
            text=self._data(row.lease),
            start=None if start is None else self._adapter(start),
            out=out,
            work=out.parent,
            training=training,
        )
        try:
            await self._trainers.run(job)
            sha256 = await asyncio.to_thread(self._keep_adapter, out)
            self._ledger.adapter(row.lease, sha256, self._adapter(sha256).stat().st_size)
        except (EmutuneError, OSError) as error:
            if not is_full(error):
                self._forget_data(row)
            raise

    def _cached_emulator(self, row: LeaseRow) -> str:
        report = self._ledger.report_of(row.device, row.task)
        return report.emulator or self._leasing.emulators[-1].name

    def _forget_data(self, row: LeaseRow) -> None:
        data = self._data(row.lease)
        if data.exists():
            # Noted first: after a kill between the two it is deleted, and noted once, by the next start.
            self._ledger.audit("data deleted", row.device, row.lease, "after training")
            data.unlink()
        shutil.rmtree(self._work(row.lease), ignore_errors=True)

    async def _evaluate(self, lease: str, device: str) -> None:
        """Judge a lease's adapter against the one in service, one judgement after another."""
        async with self._one_judgement:
            row = self._row(device, lease)
            assert row.adapter_sha256 is not None
            if row.accepted is None:
                serving = self._ledger.in_service(device)
                before, after = await self._perplexities(device, [serving, row.adapter_sha256])
                self._ledger.evaluation(lease, before, after, after <= before)
        self._finish(device, lease)

    async def _perplexities(self, device: str, adapters: Sequence[str | None]) -> list[float]:
        outcome = await self._judge.run(
            JudgeJob(
                catalogue=self._catalogue.directory,
                text=self._config.acceptance.text_of(device),
                block=self._config.training.block,
                adapters=tuple(None if sha256 is None else self._adapter(sha256) for sha256 in adapters),
            )
        )
        values: list[float] = outcome["perplexity"]
        return values

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

    # What decisions need

    async def _measure_complexities(self, reports: Sequence[tuple[str, Report]]) -> None:
        """Of the text that is held back for devices which hold no emulator yet, as all do that are new."""
        untuned = self._scenario.quality.curve.untuned
        for device, report in reports:
            if report.perplexity_ratio is None and untuned and self._held_back_complexity(device) is None:
                (measured,) = await self._perplexities(device, [None])
                await self._noted(partial(self._ledger.set_meta, _untuned_on(device), repr(measured)))

    def _held_back_complexity(self, device: str) -> float | None:
        untuned = self._scenario.quality.curve.untuned
        measured = self._ledger.meta(_untuned_on(device))
        if measured is None or untuned is None:
            return None
        return self._scenario.quality.complexity_weight * (float(measured) / untuned - 1)

    def _last_gain(self, device: str) -> float | None:
        row = self._ledger.last_transfer(device)
        if row is None or not row.transferred_s or not row.transferred_bytes:
            return None
        leases = [other for other in self._ledger.step_leases(row.step) if other.predicted_bytes]
        sharers = sum(other.kind == row.kind for other in leases)
        uplink = row.kind == "upload"
        link = DrawnLink(self._scenario, self._config.shaping.seed, device)
        power = link.transmit_power_w if uplink else self._scenario.radio.downlink_power_w / sharers
        rate = 8 * row.transferred_bytes / row.transferred_s
        return gain_of_rate(self._scenario, rate, power, sharers, uplink=uplink)

    def _describe(self) -> FleetInfo:
        info, folder = self._catalogue.info, self._catalogue.directory / "tokenizer"
        files = sorted(path for path in folder.iterdir() if path.is_file())
        return FleetInfo(
            name=self._config.name,
            base=info.base,
            config=info.config,
            layers=info.layers,
            bottom=info.bottom,
            top=info.top,
            tokenizer={path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files},
            smallest_bytes=min(emulator.bytes for emulator in self._leasing.emulators),
        )

    # Files

    def _data(self, lease: str) -> Path:
        return self._config.server.directory / "data" / f"{lease}.txt"

    def _work(self, lease: str) -> Path:
        return self._config.server.directory / "work" / lease

    def _adapter(self, sha256: str) -> Path:
        return self._adapters / f"{sha256}.safetensors"

    def _keep_adapter(self, path: Path) -> str:
        """Move an adapter to where it is named by its content.

        Raises:
            AdapterError: it belongs to another model, or to other layers.
        """
        manifest = read_manifest(path)
        info = self._catalogue.info
        check_belongs(manifest, base=info.base, layers=info.layers, layer_map=info.adapter_layers)
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        # As new as if it had been written now, though a kill may have come after it was.
        os.utime(path)
        os.replace(path, self._adapter(sha256))
        return sha256

    def _row(self, device: str, lease: str) -> LeaseRow:
        row = self._ledger.lease(device, lease)
        if row is None:
            raise FleetError(f"lease {lease}: is not one of {device}")
        return row


def _trained_late(row: LeaseRow) -> bool:
    """Whether the server trains for a device that no longer waits, so that its failure is not the last word."""
    return row.state == "expired" and row.kind == "upload" and row.data_complete


def _untuned_on(device: str) -> str:
    """Where the ledger keeps the untuned model's perplexity on the text that is held back for a device."""
    return f"untuned perplexity of {device}"
