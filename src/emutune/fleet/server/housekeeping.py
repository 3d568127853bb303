"""What a server lets go of while it runs: files that nobody needs any more."""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import Awaitable, Callable, Collection
from datetime import UTC, datetime, timedelta
from pathlib import Path

from emutune.errors import EmutuneError
from emutune.fleet.ledger import Ledger
from emutune.fleet.server.ledger_thread import AskLedger

log = logging.getLogger(__name__)

_EVERY_S = 3600.0
Forget = Callable[[str | None, str, str], Awaitable[None]]


class Housekeeping:
    """Deletes superseded and rejected adapters, and what is left of uploads whose leases are over.

    An adapter that is in service, or that a lease which is not over has made or starts from, is never deleted, and
    neither is a file that was written in the last so many days, whatever the ledger says of it. So a kill at any
    moment leaves files that are needed, or files that the next round deletes.

    Args:
        ledger: knows what is needed.
        directory: the server's.
        days: for which files stay that are not needed any more.
        at_work: the leases that the server trains or judges now.
        forget: deletes what arrived of an upload, and notes that, given its device, its lease and a reason.
    """

    def __init__(
        self,
        ledger: AskLedger,
        directory: Path,
        days: float,
        at_work: Callable[[], Collection[str]],
        forget: Forget,
    ) -> None:
        self._ledger, self._directory = ledger, directory
        self._kept, self._at_work, self._forget = timedelta(days=days), at_work, forget

    async def run(self) -> None:
        """Tidy up now and every hour, until cancelled."""
        while True:
            try:
                await self.tidy()
            except (EmutuneError, OSError) as error:
                log.error("housekeeping: %s; going on in an hour", error)
            await asyncio.sleep(_EVERY_S)

    async def tidy(self) -> None:
        """One round.

        Raises:
            LedgerError: the ledger cannot be read or written.
            OSError: a file cannot be deleted.
        """
        since = datetime.now(UTC) - self._kept
        await self._delete_adapters(since)
        for path in self._old("uploads/*", since):
            row = await self._ledger(Ledger.find_lease, path.stem)
            if row is None or row.state != "open":
                await self._forget(None if row is None else row.device, path.stem, "nobody goes on with it")
        await self._delete_work()

    async def _delete_adapters(self, since: datetime) -> None:
        old = self._old("adapters/*.safetensors", since)
        unneeded = await self._ledger(_unneeded, [path.stem for path in old], since) if old else set()
        # Again, since one of the same content may have come meanwhile.
        for path in self._old("adapters/*.safetensors", since):
            if path.stem in unneeded:
                path.unlink()
                log.info("adapter %s: deleted, it was superseded or rejected", path.stem)

    async def _delete_work(self) -> None:
        """What a job left whose lease was closed before it ended, if a kill kept it from being deleted then."""
        for path in (*self._directory.glob("data/*.txt"), *self._directory.glob("work/*")):
            lease = path.name.removesuffix(".txt")
            row = await self._ledger(Ledger.find_lease, lease)
            if lease in self._at_work() or (row is not None and row.state in ("open", "expired")):
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                device = None if row is None else row.device
                await self._ledger(Ledger.audit, "data deleted", device, lease, "the lease is over")
                path.unlink(missing_ok=True)

    def _old(self, pattern: str, since: datetime) -> list[Path]:
        """Files that were last written before some moment."""
        return [path for path in self._directory.glob(pattern) if path.stat().st_mtime < since.timestamp()]


def _unneeded(ledger: Ledger, adapters: list[str], since: datetime) -> set[str]:
    running = ledger.running_adapters()
    return {each for each in adapters if each not in running and not ledger.adapter_needed(each, since)}
