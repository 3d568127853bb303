"""Training at the server (z = 1): from a task's uploaded text to its adapter."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from emutune.errors import EmutuneError
from emutune.fleet.config import FleetConfig
from emutune.fleet.disk import is_full
from emutune.fleet.ledger import Ledger
from emutune.fleet.rows import LeaseRow
from emutune.fleet.server.families import Families
from emutune.fleet.server.ledger_thread import AskLedger
from emutune.fleet.server.pool import Pool
from emutune.fleet.server.worker import TrainJob
from emutune.tuning.inventory import BASE


class Trained(NamedTuple):
    """A trained adapter's file, which ``AtServer.forget`` deletes, and how long a processor was busy with it."""

    path: Path
    processor_s: float


class AtServer:
    """Has uploaded tasks trained, and deletes their data after that.

    Args:
        config: the fleet's file.
        ledger: where deletions are noted.
        families: the foundation models that are served.
        trainers: do the training.
        adapter: the file of an adapter, by its SHA-256.
    """

    def __init__(
        self,
        config: FleetConfig,
        ledger: AskLedger,
        families: Families,
        trainers: Pool,
        adapter: Callable[[str], Path],
    ) -> None:
        self._config, self._ledger, self._families = config, ledger, families
        self._trainers, self._adapter = trainers, adapter

    def data(self, lease: str) -> Path:
        """Where the uploaded text of a lease is."""
        return self._config.server.directory / "data" / f"{lease}.txt"

    async def train(self, row: LeaseRow) -> Trained:
        """Train an uploaded task; its data stay until ``forget``, unless they are at fault.

        Raises:
            FleetError: see ``Pool.run``.
        """
        work = self._work(row.lease)
        start, training = row.message.start, row.message.training
        job = TrainJob(
            catalogue=self._families.of(row.base).catalogue.directory,
            emulator=BASE if self._config.at_server.model == "full" else await self._cached_emulator(row),
            text=self.data(row.lease),
            start=None if start is None else self._adapter(start),
            out=work / "adapter.safetensors",
            work=work,
            training=training,
        )
        try:
            outcome = await self._trainers.run(job)
        except (EmutuneError, OSError) as error:
            if not is_full(error):
                await self.forget(row)
            raise
        return Trained(job.out, outcome.get("processor_s", 0.0))

    async def forget(self, row: LeaseRow) -> None:
        """Delete a task's data, and all that its training left."""
        data = self.data(row.lease)
        if data.exists():
            # Noted first: after a kill between the two it is deleted, and noted once, by the next start.
            await self._ledger(Ledger.audit, "data deleted", row.device, row.lease, "after training")
            data.unlink(missing_ok=True)
        shutil.rmtree(self._work(row.lease), ignore_errors=True)

    async def _cached_emulator(self, row: LeaseRow) -> str:
        """The emulator of a device, or the largest that it could have."""
        report = await self._ledger(Ledger.report_of, row.device, row.task)
        return report.emulator or self._families.of(row.base).emulators[-1].name

    def _work(self, lease: str) -> Path:
        return self._config.server.directory / "work" / lease
