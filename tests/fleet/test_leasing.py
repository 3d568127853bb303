"""What a decision sees of each device, what becomes of it, and that no gain is seen before its time."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from ledgers import AskedHere, decision, report
from test_decide import rate
from whole_fleet import DecidingHere, WholeFleet, catalogue_at

from emutune.fleet.ledger import LeaseRow, Ledger
from emutune.fleet.protocol import Result
from emutune.fleet.server.choices import Candidate, Choice
from emutune.fleet.server.families import Families
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


class Measuring:
    """A pool that measures the same perplexity of every text."""

    async def run(self, job: Any) -> dict[str, Any]:
        return {"perplexity": [150.0]}


@contextmanager
def steps_of(fleet: WholeFleet, policy: str, sharing: str | None = None, **config: Any) -> Any:
    """The fleet's ledger, and what begins its next step with a task of every device."""
    for name in NAMES:
        fleet.add_device(name)
    for section, changes in config.items():
        part = getattr(fleet.config, section).model_copy(update=changes)
        fleet.config = fleet.config.model_copy(update={section: part})
    shaped = fleet.config.shaping.enabled
    decider = Noting(policy, fleet.decider.scenario, sharing=sharing, shaped=shaped)
    with opened_ledger(fleet.config) as ledger:

        async def begin(step: int, reported: dict[str, Any]) -> tuple[Candidate, ...]:
            for name in NAMES:
                ledger.report(name, report(f"{name}-{step}").model_copy(update=reported))
            pool, families = Measuring(), Families(decider.scenario, [fleet.catalogue])
            hub = Orchestrator(fleet.config, AskedHere(ledger), families, decider, pool, pool)
            running = asyncio.create_task(hub.run())
            while ledger.last_step() < step:
                await asyncio.wait([running], timeout=0.01)
                assert not running.done()
            running.cancel()
            await asyncio.wait([running])
            return decider.seen

        yield ledger, lambda step, **reported: asyncio.run(begin(step, reported))


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
    before: list[LeaseRow] = []
    with steps_of(fleet, policy, shaping={"byte_scale": 40.0, "time_scale": 8.0}) as (ledger, begin):
        for step in range(3):
            seen = begin(step)
            rows = ledger.step_leases(step)
            known = [json.loads(row.situation) for row in rows]
            assert len({each["gain"] for each in known}) == len(NAMES)

            def rate_of(each: dict[str, Any], row: LeaseRow) -> float:
                # All transfers of a step share one band.
                power, band = (each["transmit_power_w"], 1e5) if row.at_server else (60.0 / len(NAMES), 1e6)
                return rate(band, power, each["gain"], len(NAMES))

            for candidate, each, row in zip(seen, known, rows, strict=True):
                assert candidate.data_bytes == 40 * 1000
                # What is predicted is predicted with what was seen, of bytes of the scenario.
                seconds = 8 * 40 * row.predicted_bytes / rate_of(each, row)
                assert row.predicted_delay_s == pytest.approx(seconds, rel=1e-4)
            for each, row in zip(known, before, strict=bool(before)):
                # Eight seconds pass in one, and one byte stands for forty.
                assert row.rate_bps == pytest.approx(8 / 40 * rate_of(each, row), rel=1e-4)
            before = finish(ledger, step)


def test_a_device_is_seen_as_it_reports_and_judged_by_what_is_held_back(
    tmp_path: Path, catalogue: Catalogue
) -> None:
    fleet = WholeFleet(tmp_path, catalogue)
    quality, untuned = fleet.decider.scenario.quality, fleet.decider.scenario.quality.curve.untuned
    layers = fleet.decider.scenario.model.layers
    with steps_of(fleet, "fixed") as (ledger, begin):
        # Nothing is known of the first texts but what the whole model makes of those held back.
        held_back = 10 * (150.0 / untuned - 1)
        for candidate in begin(0):
            assert candidate.complexity == pytest.approx(held_back)
            assert candidate.held == (0,)
        before = finish(ledger, 0)
        kept = before[0]
        seen = begin(1, perplexity_ratio=1.5, emulator=kept.emulator_name)
        own = 10 * (1.5 * catalogue.find(1.0).perplexity / untuned - 1)
        for candidate, row in zip(seen, ledger.step_leases(1), strict=True):
            assert candidate.complexity == pytest.approx(own)
            assert candidate.held == (round(kept.retention * layers),) > (0,)
            assert row.predicted_bytes == 0
            # What will be measured is perplexity on the text that is held back.
            expected = quality.curve(kept.retention) * (held_back + 10) / 10
            assert row.predicted_perplexity == pytest.approx(expected, rel=1e-4)


def test_texts_beyond_the_limit_are_not_uploaded(tmp_path: Path, catalogue: Catalogue) -> None:
    fleet = WholeFleet(tmp_path, catalogue)
    with steps_of(fleet, "all_server", limits={"data_mb": 0.001}) as (ledger, begin):
        begin(0, perplexity_ratio=1.0, data_bytes=1000)
        assert {row.kind for row in finish(ledger, 0)} == {"upload"}
        begin(1, perplexity_ratio=1.0, data_bytes=1001)
        assert {row.kind for row in finish(ledger, 1)} == {"train"}


@pytest.mark.parametrize("sharing", ["equal", "none"])
def test_a_real_link_is_seen_by_its_transfers_in_each_direction(
    tmp_path: Path, catalogue: Catalogue, sharing: str
) -> None:
    fleet = WholeFleet(tmp_path, catalogue)
    # Two upload, two are sent an emulator, and one that holds what it needs moves nothing.
    kinds = {"ue1": 4000, "ue2": 5000, "ue3": -6000, "ue4": -7000, "ue5": 0}
    with steps_of(fleet, "fixed", shaping={"enabled": False, "byte_scale": 3.0}, sharing=sharing) as (
        ledger, begin
    ):  # fmt: skip
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
        alone = 3 * 8 / 2.0 * (2 if sharing == "equal" else 1)
        for name, moved in kinds.items():
            links = seen[name].uplink, seen[name].downlink
            # A direction in which nothing was moved has the middle of the others'.
            expected = [moved or 4500, 6500] if moved >= 0 else [4500, -moved]
            assert [link.rate_bps for link in links] == pytest.approx([alone * one for one in expected])
        for row in ledger.step_leases(1):
            link = seen[row.device].downlink
            parts = len(NAMES) if sharing == "equal" else 1
            assert row.gain is None
            assert row.predicted_delay_s == pytest.approx(
                parts * link.seconds(3 * row.predicted_bytes), rel=1e-4
            )


def test_a_real_link_of_which_nothing_is_known_is_that_of_the_middle(
    tmp_path: Path, catalogue: Catalogue
) -> None:
    with steps_of(WholeFleet(tmp_path, catalogue), "fixed", shaping={"enabled": False}) as (ledger, begin):
        for candidate in begin(0):
            assert (candidate.uplink, candidate.downlink) == (None, None)
            assert candidate.gain is None
        assert [row.gain for row in ledger.step_leases(0)] == pytest.approx([275.0**-2] * len(NAMES))
