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
from emutune.fleet.server.jobs import noted
from emutune.fleet.server.ledger_thread import AskLedger
from emutune.fleet.server.pool import Pool
from emutune.fleet.server.worker import JudgeJob
from emutune.scenario import Scenario


class Judging:
    """Asks the judge, and notes in the ledger what it says.

    Args:
        config: the fleet's file.
        ledger: where it is noted.
        catalogue: directory of the emulators.
        scenario: that the policy knows, with the curve that complexities are relative to.
        judge: evaluates adapters.
        adapter: the file of an adapter, by its SHA-256.
    """

    def __init__(
        self,
        config: FleetConfig,
        ledger: AskLedger,
        catalogue: Path,
        scenario: Scenario,
        judge: Pool,
        adapter: Callable[[str], Path],
    ) -> None:
        self._config, self._ledger, self._catalogue = config, ledger, catalogue
        self._scenario, self._judge, self._adapter = scenario, judge, adapter
        self._one_judgement = asyncio.Lock()
        self._one_of: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._given_up: set[str] = set()

    async def judge(self, row: LeaseRow) -> None:
        """Judge a lease's adapter against the one in service, one judgement after another."""
        async with self._one_of[row.device]:
            adapters = await self._ledger(_to_compare, row)
            if adapters:
                # Another device need not wait until this one is noted.
                async with self._one_judgement:
                    before, after = await self._perplexities(row.device, adapters)
                await self._ledger(Ledger.evaluation, row.lease, before, after, after <= before)

    async def unmeasured(self, devices: Sequence[str]) -> list[str]:
        """The devices the complexity of whose held-back text can be measured and was not."""
        if not self._scenario.quality.curve.untuned or not devices:
            return []
        known = self._given_up | await self._ledger(_measured, devices)
        return [device for device in devices if device not in known]

    async def measure(self, device: str) -> None:
        """Measure it."""
        (measured,) = await self._perplexities(device, [None])
        await noted(partial(self._ledger, Ledger.set_meta, _untuned_on(device), repr(measured)))

    async def give_up(self, device: str, reason: str) -> None:
        """Measure it no more until the server is started again."""
        self._given_up.add(device)
        await self._ledger(Ledger.audit, "complexity not measured", device, None, reason)

    async def _perplexities(self, device: str, adapters: Sequence[str | None]) -> list[float]:
        outcome = await self._judge.run(
            JudgeJob(
                catalogue=self._catalogue,
                text=self._config.acceptance.text_of(device),
                block=self._config.training.block,
                adapters=tuple(None if sha256 is None else self._adapter(sha256) for sha256 in adapters),
            )
        )
        values: list[float] = outcome["perplexity"]
        return values


def complexity_of(ledger: Ledger, scenario: Scenario, device: str) -> float | None:
    """Complexity c of the text that is held back for a device; None if it was not measured."""
    untuned = scenario.quality.curve.untuned
    measured = ledger.meta(_untuned_on(device))
    if measured is None or untuned is None:
        return None
    return scenario.quality.complexity_weight * (float(measured) / untuned - 1)


def _measured(ledger: Ledger, devices: Sequence[str]) -> set[str]:
    return {device for device in devices if ledger.meta(_untuned_on(device)) is not None}


def _to_compare(ledger: Ledger, row: LeaseRow) -> list[str | None]:
    """The adapter in service, and the one that a lease has made; none if there is nothing to judge."""
    now = ledger.lease(row.device, row.lease)
    if now is None or now.adapter_sha256 is None or now.accepted is not None:
        return []
    return [ledger.in_service(row.device), now.adapter_sha256]


def _untuned_on(device: str) -> str:
    """Where the ledger keeps the untuned model's perplexity on the text that is held back for a device."""
    return f"untuned perplexity of {device}"
