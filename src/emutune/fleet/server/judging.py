"""How good adapters are, and how difficult tasks: the whole model's perplexity on text that is held back."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from emutune.fleet.config import FleetConfig
from emutune.fleet.ledger import Ledger
from emutune.fleet.rows import LeaseRow
from emutune.fleet.server.families import Families, Family
from emutune.fleet.server.jobs import noted
from emutune.fleet.server.ledger_thread import AskLedger
from emutune.fleet.server.pool import Pool
from emutune.fleet.server.worker import JudgeJob

# A device, and the foundation model of what it is to do.
Task = tuple[str, Family]


class Judging:
    """Asks the judge, and notes in the ledger what it says.

    Args:
        config: the fleet's file.
        ledger: where it is noted.
        families: the foundation models that are served, with the curves that complexities are relative to.
        judge: evaluates adapters.
        adapter: the file of an adapter, by its SHA-256.
    """

    def __init__(
        self,
        config: FleetConfig,
        ledger: AskLedger,
        families: Families,
        judge: Pool,
        adapter: Callable[[str], Path],
    ) -> None:
        self._config, self._ledger, self._families = config, ledger, families
        self._judge, self._adapter = judge, adapter
        self._one_judgement = asyncio.Lock()
        self._one_of: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._given_up: set[Task] = set()

    async def judge(self, row: LeaseRow) -> None:
        """Judge a lease's adapter against the one in service, one judgement after another."""
        async with self._one_of[row.device]:
            adapters = await self._ledger(_to_compare, row)
            if adapters:
                # Another device need not wait until this one is noted.
                async with self._one_judgement:
                    task = row.device, self._families.of(row.base)
                    before, after = await self._perplexities(task, adapters)
                await self._ledger(Ledger.evaluation, row.lease, before, after, after <= before)

    async def unmeasured(self, tasks: Sequence[Task]) -> list[Task]:
        """Those the complexity of whose held-back text can be measured and was not."""
        possible = [task for task in tasks if task[1].model.curve.untuned]
        if not possible:
            return []
        known = self._given_up | await self._ledger(_measured, possible)
        return [task for task in possible if task not in known]

    async def measure(self, task: Task) -> None:
        """Measure it."""
        (measured,) = await self._perplexities(task, [None])
        await noted(partial(self._ledger, Ledger.set_meta, _untuned_on(*task), repr(measured)))

    async def give_up(self, task: Task, reason: str) -> None:
        """Measure it no more until the server is started again."""
        self._given_up.add(task)
        await self._ledger(Ledger.audit, "complexity not measured", task[0], None, reason)

    async def _perplexities(self, task: Task, adapters: Sequence[str | None]) -> list[float]:
        device, family = task
        outcome = await self._judge.run(
            JudgeJob(
                catalogue=family.catalogue.directory,
                text=self._config.acceptance.text_of(device, family.name, first=family.key is None),
                block=self._config.training.block,
                adapters=tuple(None if sha256 is None else self._adapter(sha256) for sha256 in adapters),
            )
        )
        values: list[float] = outcome["perplexity"]
        return values


def complexity_of(ledger: Ledger, weight: float, device: str, family: Family) -> float | None:
    """Complexity c of the text of a model that is held back for a device; None if it was not measured.

    Args:
        ledger: where it is noted.
        weight: iota, the scenario's ``quality.complexity_weight``.
        device: whose text.
        family: the model.
    """
    untuned = family.model.curve.untuned
    measured = ledger.meta(_untuned_on(device, family))
    if measured is None or untuned is None:
        return None
    return weight * (float(measured) / untuned - 1)


def _measured(ledger: Ledger, tasks: Sequence[Task]) -> set[Task]:
    return {task for task in tasks if ledger.meta(_untuned_on(*task)) is not None}


def _to_compare(ledger: Ledger, row: LeaseRow) -> list[str | None]:
    """The adapter in service, and the one that a lease has made; none if there is nothing to judge."""
    now = ledger.lease(row.device, row.lease)
    if now is None or now.adapter_sha256 is None or now.accepted is not None:
        return []
    return [ledger.in_service(row.device, row.base), now.adapter_sha256]


def _untuned_on(device: str, family: Family) -> str:
    """Where the ledger keeps the untuned model's perplexity on the text that is held back for a device."""
    return f"untuned perplexity of {device}" + (f" in {family.key}" if family.key else "")
