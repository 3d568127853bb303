"""What a decision sees of each link: the gain that the transfers before it amount to, never one that is to come."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from ledgers import decision, report
from test_decide import rate
from whole_fleet import DecidingHere, ThreadPool, WholeFleet, catalogue_at

from emutune.fleet.ledger import LeaseRow, Ledger
from emutune.fleet.protocol import Result
from emutune.fleet.server.choices import Candidate, Choice
from emutune.fleet.server.links import DrawnLink
from emutune.fleet.server.orchestrator import Orchestrator
from emutune.fleet.server.run import opened_ledger
from emutune.tuning.catalogue import Catalogue

NAMES = ("ue1", "ue2", "ue3", "ue4", "ue5")


class Noting(DecidingHere):
    """Decides in this process, and notes what it saw."""

    seen: tuple[Candidate, ...] = ()

    async def decide(self, step: int, candidates: Sequence[Candidate]) -> list[Choice]:
        self.seen = tuple(candidates)
        return await super().decide(step, candidates)


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> Catalogue:
    return catalogue_at(tmp_path_factory.mktemp("model"))


@contextmanager
def steps_of(fleet: WholeFleet, policy: str) -> Any:
    """The fleet's ledger, and what begins its next step with a task of every device."""
    for name in NAMES:
        fleet.add_device(name)
    decider = Noting(policy, fleet.decider.scenario)
    with opened_ledger(fleet.config) as ledger:

        async def begin(step: int) -> tuple[Candidate, ...]:
            for name in NAMES:
                ledger.report(name, report(f"{name}-{step}").model_copy(update={"perplexity_ratio": 1.0}))
            pool = ThreadPool()
            hub = Orchestrator(fleet.config, ledger, fleet.catalogue, decider, pool, pool)
            running = asyncio.create_task(hub.run())
            while ledger.last_step() < step:
                await asyncio.wait([running], timeout=0.01)
            running.cancel()
            await asyncio.wait([running])
            return decider.seen

        yield ledger, lambda step: asyncio.run(begin(step))


def finish(ledger: Ledger, step: int, seconds: float = 2.0) -> list[LeaseRow]:
    """Every lease of a step comes to its end, and moves the bytes that it was to move."""
    for row in ledger.step_leases(step):
        ledger.transferred(row.lease, seconds, row.predicted_bytes)
        ledger.result(row.lease, Result(outcome="failed", reason="as the test wants"))
        ledger.close_lease(row.lease, "failed")
    ledger.end_step(step, seconds)
    return ledger.step_leases(step)


@pytest.mark.parametrize("policy", ["all_server", "fixed"])
def test_a_shaped_link_is_seen_as_it_was_in_the_step_before(
    tmp_path: Path, catalogue: Catalogue, policy: str
) -> None:
    fleet = WholeFleet(tmp_path, catalogue)
    scale = fleet.config.shaping.time_scale
    before: list[LeaseRow] = []
    with steps_of(fleet, policy) as (ledger, begin):
        for step in range(3):
            seen = begin(step)
            assert len({candidate.gain for candidate in seen}) == len(NAMES)
            for candidate, row in zip(seen, before, strict=bool(before)):
                # All transfers of a step share one band.
                power, band = (candidate.transmit_power_w, 1e5) if row.at_server else (60.0 / len(NAMES), 1e6)
                assert row.rate_bps == pytest.approx(
                    scale * rate(band, power, candidate.gain, len(NAMES)), rel=1e-4
                )
            before = finish(ledger, step)


def test_a_real_link_is_seen_by_its_last_transfer_among_those_of_its_own_band(
    tmp_path: Path, catalogue: Catalogue
) -> None:
    fleet = WholeFleet(tmp_path, catalogue)
    shaping = fleet.config.shaping.model_copy(update={"enabled": False})
    fleet.config = fleet.config.model_copy(update={"shaping": shaping})
    # Two upload, two are sent an emulator, and one that holds what it needs moves nothing.
    kinds = {"ue1": 4000, "ue2": 5000, "ue3": -6000, "ue4": -7000, "ue5": 0}
    with steps_of(fleet, "fixed") as (ledger, begin):
        decided = [
            decision(0, name, kind="upload", at_server=True, retention=None, emulator_name=None,
                     predicted_bytes=moved)
            if moved > 0 else decision(0, name, predicted_bytes=-moved)
            for name, moved in kinds.items()
        ]  # fmt: skip
        for name in NAMES:
            ledger.report(name, report(f"{name}-0"))
        ledger.begin_step(0, decided)
        finish(ledger, 0)
        seen = dict(zip(NAMES, begin(1), strict=True))
        for name, moved in kinds.items():
            if moved:
                link = DrawnLink(fleet.decider.scenario, shaping.seed, name)
                power, band = (link.transmit_power_w, 1e5) if moved > 0 else (60.0 / 2, 1e6)
                assert rate(band, power, seen[name].gain, 2) == pytest.approx(8 * abs(moved) / 2.0, rel=1e-6)
        # Of this link nothing is known but where devices are.
        assert seen["ue5"].gain == pytest.approx(275.0**-2)
