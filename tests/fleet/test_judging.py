"""Whatever the judge does, steps go on: what is judged or measured for one device delays no other."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from whole_fleet import WholeFleet, catalogue_at

from emutune.errors import AdapterError, CatalogueError, FleetError
from emutune.fleet.ledger import Ledger
from emutune.fleet.server.jobs import Jobs
from emutune.fleet.server.worker import JudgeJob, run_job
from emutune.tuning.adapters import save_adapter
from emutune.tuning.catalogue import Catalogue

NAMES = ("ue1", "ue2")
# Longer than a device takes to report on a busy machine.
GATHER_S = 5.0
UNTUNED = {"perplexity": [10.0]}
JUDGED = {"perplexity": [10.0, 9.0]}


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> Catalogue:
    return catalogue_at(tmp_path_factory.mktemp("model"))


def fleet_of(folder: Path, catalogue: Catalogue, count: int = 3) -> WholeFleet:
    fleet = WholeFleet(folder, catalogue, count=count)
    # If anything waited for the judge until a deadline, the test would end before.
    steps = fleet.config.steps.model_copy(update={"gather_s": GATHER_S, "deadline_s": 1000.0})
    fleet.config = fleet.config.model_copy(update={"steps": steps})
    for name in NAMES:
        fleet.add_device(name)
    return fleet


def is_judgement(job: JudgeJob) -> bool:
    return len(job.adapters) == 2


class Judge:
    """Answers at once, but for the first job of a kind, over which it hangs until it is released."""

    def __init__(self, hangs_over: Callable[[JudgeJob], bool]) -> None:
        self._hangs_over = hangs_over
        self.hung, self.released = asyncio.Event(), asyncio.Event()

    async def run(self, job: JudgeJob) -> dict[str, Any]:
        if self._hangs_over(job) and not self.hung.is_set():
            self.hung.set()
            await self.released.wait()
        return JUDGED if is_judgement(job) else UNTUNED


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("over", ["a judgement", "a measurement"])
def test_a_judge_that_hangs_keeps_no_device_waiting(tmp_path: Path, catalogue: Catalogue, over: str) -> None:
    fleet = fleet_of(tmp_path, catalogue)

    async def scenario() -> None:
        judge = Judge(lambda job: is_judgement(job) == (over == "a judgement"))
        async with fleet.server() as work:
            fleet.hub._judge.run = judge.run
            devices = [asyncio.create_task(fleet.device(name)) for name in NAMES]
            with fleet.ledger() as ledger:
                await until(lambda: ledger.step_ended(2))
                assert judge.hung.is_set()
                assert not work.done()
                leases = [row for step in range(3) for row in ledger.step_leases(step)]
                assert [row.device for row in leases] == [*NAMES] * 3
                assert all(row.result is not None for row in leases)
                if over == "a judgement":
                    # One judgement after another: none was made, and none was waited for more than once.
                    assert {row.state for row in leases} == {"open"}
                    assert {row.message.start for row in leases} == {None}
                else:
                    middle = fleet.decider.scenario.tasks.complexity
                    assert leases[0].complexity == (middle.min + middle.max) / 2
                judge.released.set()
                await asyncio.gather(work, *devices)

    asyncio.run(scenario())
    with fleet.ledger() as ledger:
        rows = [row for step in range(3) for row in ledger.step_leases(step)]
        assert {(row.state, row.accepted) for row in rows} == {("done", True)}


def test_only_one_step_waits_for_what_hangs() -> None:
    async def scenario() -> None:
        jobs, hanging = Jobs(), asyncio.Event()

        async def hang() -> None:
            await hanging.wait()

        async def soon() -> None:
            await asyncio.sleep(0.05)

        begun = time.monotonic()
        jobs.start("quick", soon, print)
        await jobs.allow(["quick", "never started"], 10.0)
        assert 0.04 < time.monotonic() - begun < 5
        jobs.start("slow", hang, print)
        await jobs.allow(["slow"], 0.2)
        begun = time.monotonic()
        jobs.start("quick", soon, print)
        await jobs.allow(["slow", "quick"], 10.0)
        assert time.monotonic() - begun < 5
        assert len(jobs.running) == 2
        hanging.set()
        await asyncio.gather(*jobs.running)
        assert jobs.running == []
        begun = time.monotonic()
        jobs.start("quick", soon, print)
        await jobs.allow(["quick"], 10.0)
        assert time.monotonic() - begun > 0.04, "what hung is over, so steps wait again"

    asyncio.run(asyncio.wait_for(scenario(), 30))


@pytest.mark.parametrize("error", [FleetError("judge: was not done"), KeyError("weight"), MemoryError()])
def test_a_job_that_fails_fails_its_lease_alone_and_says_why(
    tmp_path: Path, catalogue: Catalogue, error: Exception
) -> None:
    fleet = fleet_of(tmp_path, catalogue, count=2)
    asked: list[JudgeJob] = []

    async def judge(job: JudgeJob) -> dict[str, Any]:
        asked.append(job)
        if not is_judgement(job) or sum(map(is_judgement, asked)) == 1:
            raise error
        return JUDGED

    async def scenario() -> None:
        async with fleet.server() as work:
            fleet.hub._judge.run = judge
            await asyncio.gather(work, *map(fleet.device, NAMES))

    asyncio.run(scenario())
    reason = str(error) if isinstance(error, FleetError) else f"{type(error).__name__}: {error}"
    with fleet.ledger() as ledger:
        rows = [row for step in range(2) for row in ledger.step_leases(step)]
        assert sorted(row.state for row in rows) == ["done", "done", "done", "failed"]
        (failed,) = (row for row in rows if row.state == "failed")
        told = {row.lease: row.reason for row in ledger.comparison() if row.reason}
        assert told == {failed.lease: reason.strip()}
        unmeasured = [row for row in ledger.audit_rows() if row.event == "complexity not measured"]
        assert {(row.device, row.detail) for row in unmeasured} == {(name, reason.strip()) for name in NAMES}
        # A text that cannot be measured is not measured again at every step.
        assert sum(not is_judgement(job) for job in asked) == len(NAMES)


def test_the_judge_takes_only_adapters_of_its_catalogue(tmp_path: Path, catalogue: Catalogue) -> None:
    manifest = catalogue.adapter_manifest(catalogue.base(), "lora", 2)
    for changes, message in (
        ({"base": "c" * 64}, "tuned on the model cccccccccccc"),
        ({"layer_map": (0,)}, "here the adapter layers are"),
        ({"width": 10**12}, "not those of these layers"),
    ):
        path = tmp_path / "adapter.safetensors"
        save_adapter(path, manifest.model_copy(update=changes), {})
        with pytest.raises(AdapterError, match=message):
            run_job(JudgeJob(catalogue=catalogue.directory, text=None, block=16, adapters=(path,)))


def test_a_catalogue_that_does_not_say_what_adapters_are_made_of_is_refused_at_once(
    tmp_path: Path, catalogue: Catalogue
) -> None:
    fleet = fleet_of(tmp_path, catalogue)
    for known, remedy in (({}, "build again"), ({"layers": {}}, "choose one of layers")):
        info = catalogue.info.model_copy(update={"adapters": known})
        fleet.catalogue = Catalogue(catalogue.directory, info)

        async def scenario() -> None:
            async with fleet.server():
                pass

        with pytest.raises(CatalogueError, match=remedy):
            asyncio.run(scenario())


def test_a_device_at_work_is_one_that_has_something_left_to_do(tmp_path: Path, catalogue: Catalogue) -> None:
    fleet = fleet_of(tmp_path, catalogue, count=1)

    async def scenario(ledger: Ledger) -> None:
        judge = Judge(is_judgement)
        async with fleet.server() as work:
            fleet.hub._judge.run = judge.run
            fleet.carrier.hold("ue2", "adapter", 1.0)
            devices = [asyncio.create_task(fleet.device(name)) for name in NAMES]
            await until(lambda: ledger.at_work() == {*NAMES})
            assert ledger.at_work(0) == {*NAMES}
            assert ledger.at_work(1) == set()
            await until(lambda: ledger.at_work() == {"ue2"})
            assert {row.device for row in ledger.open_leases()} == {*NAMES}
            judge.released.set()
            await asyncio.gather(work, *devices)
        assert ledger.at_work() == set()

    with fleet.ledger() as ledger:
        asyncio.run(scenario(ledger))
