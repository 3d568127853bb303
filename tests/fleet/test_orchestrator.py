"""The loop of a fleet, with real agents and real training, over requests carried in memory."""

from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path
from typing import Any

import pytest
from whole_fleet import WholeFleet, catalogue_at

from emutune.errors import FleetError
from emutune.fleet.device.abilities import Abilities
from emutune.fleet.ledger import Ledger
from emutune.fleet.protocol import Report
from emutune.fleet.server.families import UntrainableError
from emutune.tuning.adapters import load_adapter
from emutune.tuning.catalogue import Catalogue

NAMES = ("ue1", "ue2")
# What a run comes to whoever is interrupted.
STEADY = ("steps", "leases", "bytes.train", "bytes.upload")


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> Catalogue:
    return catalogue_at(tmp_path_factory.mktemp("model"))


def fleet_of(folder: Path, catalogue: Catalogue, **options: Any) -> WholeFleet:
    fleet = WholeFleet(folder, catalogue, **options)
    for name in NAMES:
        fleet.add_device(name)
    return fleet


async def run(fleet: WholeFleet, names: tuple[str, ...] = NAMES) -> list[int]:
    async with fleet.server() as work:
        done, _ = await asyncio.gather(asyncio.gather(*map(fleet.device, names)), work)
    return done


def steady(ledger: Ledger) -> dict[str, int]:
    return {name: value for name, value in ledger.totals().items() if name.startswith(STEADY)}


def test_devices_fetch_train_and_return_adapters_for_every_step(tmp_path: Path, catalogue: Catalogue) -> None:
    fleet = fleet_of(tmp_path, catalogue)
    assert asyncio.run(run(fleet)) == [3, 3]
    with fleet.ledger() as ledger:
        rows = [row for step in range(3) for row in ledger.step_leases(step)]
        assert ledger.totals().get("leases.train.done") == len(rows) == 6, rows
        assert not ledger.open_leases()
        for row in rows:
            assert row.transferred_bytes == row.predicted_bytes
            assert row.result is not None
            assert row.result.outcome == "trained"
            assert row.adapter_sha256 == row.result.adapter
            assert row.accepted == (row.after <= row.before)
        # An emulator crosses the link once; as long as the policy keeps it, nothing is sent again.
        assert [bool(row.transferred_bytes) for row in rows] == [True, True, False, False, False, False]


def test_server_trains_what_is_uploaded_and_deletes_the_data(tmp_path: Path, catalogue: Catalogue) -> None:
    fleet = fleet_of(tmp_path, catalogue, policy="all_server", count=2)
    assert asyncio.run(run(fleet)) == [2, 2]
    directory = fleet.config.server.directory
    assert not fleet.hub.at_work(), "jobs that ended are let go"
    with fleet.ledger() as ledger:
        rows = [row for step in range(2) for row in ledger.step_leases(step)]
        assert ledger.totals()["leases.upload.done"] == len(rows) == 4
        for row in rows:
            text = tmp_path / row.device / "data" / "text.txt"
            assert row.transferred_bytes == row.predicted_bytes == text.stat().st_size
            assert row.result is not None
            assert row.result.adapter == row.adapter_sha256
        deleted = [row.lease for row in ledger.audit_rows() if row.event == "data deleted"]
        assert sorted(deleted) == sorted(row.lease for row in rows)
    words = (tmp_path / "ue1" / "data" / "text.txt").read_bytes()[:200]
    left = [path for path in directory.glob("**/*") if path.is_file() and "held_back" not in path.parts]
    assert left
    assert not [path for path in left if words in path.read_bytes()]


def test_training_goes_on_from_the_adapter_in_service(tmp_path: Path, catalogue: Catalogue) -> None:
    fleet = fleet_of(tmp_path, catalogue)
    asyncio.run(run(fleet))
    with fleet.ledger() as ledger:
        serving: dict[str, str | None] = dict.fromkeys(NAMES)
        for step in range(3):
            for row in ledger.step_leases(step):
                assert row.message.start == serving[row.device]
                if row.accepted:
                    serving[row.device] = row.adapter_sha256
        assert {name: ledger.in_service(name) for name in NAMES} == serving
    for sha256 in filter(None, serving.values()):
        manifest, _ = load_adapter(fleet.config.server.directory / "adapters" / f"{sha256}.safetensors")
        assert manifest.base == catalogue.info.base


def test_adapter_that_makes_the_model_worse_stays_out_of_service(
    tmp_path: Path, catalogue: Catalogue
) -> None:
    fleet = fleet_of(tmp_path, catalogue, count=1)
    worse = {"perplexity": [10.0, 10.5]}

    async def judged(job: Any) -> dict[str, Any]:
        return worse if job.kind == "judge" and len(job.adapters) == 2 else {"perplexity": [10.0]}

    async def scenario() -> None:
        async with fleet.server() as work:
            fleet.hub._judge.run = judged
            await asyncio.gather(*map(fleet.device, NAMES), work)

    asyncio.run(scenario())
    with fleet.ledger() as ledger:
        assert [row.accepted for row in ledger.step_leases(0)] == [False, False]
        assert [ledger.in_service(name) for name in NAMES] == [None, None]


def test_straggler_is_late_and_its_result_is_kept(tmp_path: Path, catalogue: Catalogue) -> None:
    fleet = fleet_of(tmp_path, catalogue, count=2)
    steps = fleet.config.steps.model_copy(update={"deadline_s": 1.5, "gather_s": 0.5})
    fleet.config = fleet.config.model_copy(update={"steps": steps})

    async def scenario() -> None:
        async with fleet.server() as work:
            quick = asyncio.create_task(fleet.device("ue1"))
            fleet.carrier.hold("ue2", "result", 4.0)
            slow = asyncio.create_task(fleet.device("ue2"))
            await asyncio.gather(work, quick, slow)

    asyncio.run(scenario())
    with fleet.ledger() as ledger:
        first = {row.device: row for row in ledger.step_leases(0)}
        assert first["ue2"].state == "late"
        assert first["ue2"].accepted is not None
        assert ledger.last_step() == 1


def test_device_joins_and_leaves_between_steps(tmp_path: Path, catalogue: Catalogue) -> None:
    fleet = fleet_of(tmp_path, catalogue, count=3)
    steps = fleet.config.steps.model_copy(update={"gather_s": 1.0})
    fleet.config = fleet.config.model_copy(update={"steps": steps})

    async def scenario() -> list[int]:
        async with fleet.server() as work:
            staying = asyncio.create_task(fleet.device("ue1"))
            leaving = asyncio.create_task(fleet.device("ue2", tasks=1))
            done = await asyncio.gather(staying, leaving)
            await work
        return done

    assert asyncio.run(scenario()) == [3, 1]
    with fleet.ledger() as ledger:
        assert {row.device for row in ledger.step_leases(2)} == {"ue1"}


@pytest.mark.parametrize("policy", ["fixed", "all_server"])
def test_server_that_goes_and_comes_back_loses_nothing_and_counts_nothing_twice(
    tmp_path: Path, catalogue: Catalogue, policy: str
) -> None:
    whole = fleet_of(tmp_path / "whole", catalogue, policy=policy)
    asyncio.run(run(whole))
    with whole.ledger() as ledger:
        expected = steady(ledger)
    broken = fleet_of(tmp_path / "broken", catalogue, policy=policy)
    moments = random.Random(7)

    async def scenario() -> int:
        devices = [asyncio.create_task(broken.device(name)) for name in NAMES]
        starts = 0
        while not all(device.done() for device in devices):
            starts += 1
            async with broken.server() as work:
                await asyncio.wait([work], timeout=moments.uniform(0.05, 0.8) + 0.05 * starts)
                if work.done():
                    work.result()
                    await asyncio.wait(devices, timeout=2)
        return starts

    assert asyncio.run(asyncio.wait_for(scenario(), 60)) > 1
    with broken.ledger() as ledger:
        assert steady(ledger) == expected


def test_catalogue_of_another_model_is_refused(tmp_path: Path, catalogue: Catalogue) -> None:
    fleet = fleet_of(tmp_path, catalogue)
    other = fleet.decider.scenario.model.model_copy(update={"base": "0" * 64})
    fleet.decider.scenario = fleet.decider.scenario.model_copy(update={"model": other})

    async def scenario() -> None:
        async with fleet.server():
            pass

    with pytest.raises(FleetError, match="was made from the model"):
        asyncio.run(scenario())


def test_what_devices_can_and_may_is_known_before_it_is_decided(tmp_path: Path, catalogue: Catalogue) -> None:
    fleet = fleet_of(tmp_path, catalogue, count=1)
    for name in ("ue3", "ue4"):
        fleet.add_device(name)
    sizes = [emulator.bytes for emulator in catalogue.emulators()]
    able = {
        "ue1": Abilities(),
        "ue2": Abilities(memory_bytes=sizes[1]),
        "ue3": Abilities(memory_bytes=sizes[0] - 1),
        "ue4": Abilities(memory_bytes=sizes[0], private=True),
    }

    async def scenario() -> None:
        async with fleet.server() as work:
            await asyncio.gather(work, *(fleet.device(name, abilities=each) for name, each in able.items()))

    asyncio.run(scenario())
    with fleet.ledger() as ledger:
        by_device = {row.device: row for row in ledger.step_leases(0)}
    names = [emulator.name for emulator in catalogue.emulators()]
    assert by_device["ue1"].emulator_name == names[-1]
    assert by_device["ue2"].emulator_name == names[1]
    # No emulator fits, and nothing keeps its data.
    assert by_device["ue3"].at_server
    assert by_device["ue4"].emulator_name == names[0]
    assert all(row.state == "done" for row in by_device.values())


def test_private_data_stay_whatever_the_policy_wants(tmp_path: Path, catalogue: Catalogue) -> None:
    fleet = fleet_of(tmp_path, catalogue, count=2, policy="all_server")

    async def scenario() -> None:
        async with fleet.server() as work:
            await asyncio.gather(
                work, fleet.device("ue1"), fleet.device("ue2", abilities=Abilities(private=True))
            )

    asyncio.run(scenario())
    with fleet.ledger() as ledger:
        rows = [row for step in range(ledger.last_step() + 1) for row in ledger.step_leases(step)]
    assert {row.device: row.at_server for row in rows} == {"ue1": True, "ue2": False}
    assert all(row.state == "done" for row in rows)


def test_private_device_that_can_hold_no_emulator_is_refused_by_itself_and_by_the_server(
    tmp_path: Path, catalogue: Catalogue
) -> None:
    fleet = fleet_of(tmp_path, catalogue, count=1)
    unfit = Abilities(memory_bytes=catalogue.emulators()[0].bytes - 1, private=True)

    async def scenario() -> None:
        async with fleet.server():
            with pytest.raises(FleetError, match=r"--memory-gb: is .* leave --private out"):
                await fleet.device("ue1", abilities=unfit)
            report = Report(
                task="t-0", data_bytes=5, data_sha256="0" * 64, cache_bytes=10**9,
                memory_bytes=unfit.memory_bytes, private=True,
            )  # fmt: skip
            with pytest.raises(UntrainableError, match="memory_bytes: is below"):
                await fleet.hub.reported("ue1", report)

    asyncio.run(scenario())


def test_device_whose_cache_is_small_gets_an_emulator_that_fits(tmp_path: Path, catalogue: Catalogue) -> None:
    fleet = fleet_of(tmp_path, catalogue, count=1)
    sizes = [emulator.bytes for emulator in catalogue.emulators()]

    async def scenario() -> None:
        async with fleet.server() as work:
            await asyncio.gather(work, fleet.device("ue1"), fleet.device("ue2", cache_bytes=sizes[1]))

    asyncio.run(scenario())
    with fleet.ledger() as ledger:
        by_device = {row.device: row for row in ledger.step_leases(0)}
    assert by_device["ue2"].emulator_name == catalogue.emulators()[1].name
    assert (
        json.loads(by_device["ue1"].message.model_dump_json())["emulator"]["retention"]
        > by_device["ue2"].retention
    )
