"""A fleet of two foundation models: what is of one is kept apart from what is of the other, from task to adapter."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from faulty_fleet import ProcessFleet, judge
from faulty_memory import MemoryFleet
from ledgers import add_devices, decision, digest
from warm_start import WarmStart
from whole_fleet import WholeFleet, scenario_of, two_catalogues

from emutune.cli.ledger import _cells
from emutune.errors import AdapterError, FleetError
from emutune.fleet.config import Acceptance
from emutune.fleet.ledger import Ledger
from emutune.fleet.protocol import Lease, Report
from emutune.fleet.pruning import Prunable
from emutune.fleet.rows import LeaseRow
from emutune.fleet.server.adapters import Adapters
from emutune.fleet.server.families import Families, UntrainableError
from emutune.fleet.server.run import _same_fleet
from emutune.tuning.adapters import load_adapter
from emutune.tuning.catalogue import Catalogue, open_catalogue

NAMES = ("ue1", "ue2")
Two = tuple[Catalogue, Catalogue]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Two:
    return two_catalogues(tmp_path_factory.mktemp("models"))


def patient(fleet: WholeFleet, *names: str) -> WholeFleet:
    """With devices, none of which is late or begun without because a machine is busy."""
    steps = fleet.config.steps.model_copy(update={"gather_s": 300.0, "deadline_s": 300.0})
    fleet.config = fleet.config.model_copy(update={"steps": steps})
    for name in names:
        fleet.add_device(name)
    return fleet


def rows_of(fleet: WholeFleet) -> list[LeaseRow]:
    with fleet.ledger() as ledger:
        return [row for step in range(ledger.last_step() + 1) for row in ledger.step_leases(step)]


async def run(fleet: WholeFleet) -> None:
    async with fleet.server() as work:
        await asyncio.gather(*map(fleet.device, NAMES), work)


@pytest.mark.parametrize(("policy", "cache_gb"), [("fixed", 0.05), ("fixed", None), ("all_server", None)])
def test_each_task_is_trained_and_judged_with_its_own_model(
    tmp_path: Path, two: Two, policy: str, cache_gb: float | None
) -> None:
    fleet = patient(WholeFleet(tmp_path / "fleet", *two, count=4, policy=policy, cache_gb=cache_gb), *NAMES)
    asyncio.run(run(fleet))
    rows, adapters = rows_of(fleet), fleet.config.server.directory / "adapters"
    alpha, beta = (catalogue.info.base for catalogue in two)
    serving: dict[tuple[str, str | None], str | None] = {}
    assert len(rows) == 8
    for row in rows:
        assert row.state == "done", row.result
        # The folder beta comes before text.txt.
        base = None if row.step % 2 else beta
        assert row.base == base
        assert row.adapter_sha256 is not None
        manifest, _ = load_adapter(adapters / f"{row.adapter_sha256}.safetensors")
        assert manifest.base == (base or alpha)
        assert row.message.start == serving.get((row.device, base))
        if row.accepted:
            serving[row.device, base] = row.adapter_sha256
        assert row.transferred_bytes == row.predicted_bytes
        if policy == "fixed":
            # With room for both each emulator moves once, and without it whenever the model changes.
            assert bool(row.predicted_bytes) == (row.step < 2 or cache_gb is None)
            assert row.message.emulator is not None
            assert row.message.emulator["base"] == (base or alpha)
            kept = {alpha, beta} - {base or alpha} if cache_gb and row.step else set()
            assert set(row.message.keep) == kept
    with fleet.ledger() as ledger:
        for (device, base), sha256 in serving.items():
            assert ledger.in_service(device, base) == sha256
            assert (
                ledger.meta(f"untuned perplexity of {device}" + (f" in {base}" if base else "")) is not None
            )
    if policy == "fixed":
        held = json.loads((tmp_path / "fleet" / "ue1" / "cache" / "held.json").read_text())
        assert [row["base"] for row in held] == [alpha, beta]
        assert [row["emulator"] is not None for row in held] == [True, cache_gb is not None]


def test_an_adapter_of_another_model_than_the_leases_is_refused(tmp_path: Path, two: Two) -> None:
    fleet = patient(WholeFleet(tmp_path / "fleet", *two, count=1), "ue1")
    sent: list[int] = []

    async def scenario() -> None:
        async with fleet.server() as work:
            handle = fleet.carrier.handle_async_request

            async def altered(request: Any) -> Any:
                if request.method == "PUT" and request.url.path.endswith("/adapter"):
                    # As if it had been trained for the other model.
                    content = (await request.aread()).replace(
                        two[1].info.base.encode(), two[0].info.base.encode()
                    )
                    request = type(request)("PUT", request.url, headers=request.headers, content=content)
                    answer = await handle(request)
                    sent.append(answer.status_code)
                    return answer
                return await handle(request)

            fleet.carrier.handle_async_request = altered  # type: ignore[method-assign]
            await asyncio.gather(fleet.device("ue1"), work)

    asyncio.run(scenario())
    (row,) = rows_of(fleet)
    assert sent == [422]
    assert (row.state, row.adapter_sha256, row.base) == ("failed", None, two[1].info.base)
    assert not list((fleet.config.server.directory / "adapters").glob("*"))


def test_what_the_server_trained_is_kept_only_for_its_own_model(tmp_path: Path, two: Two) -> None:
    fleet = patient(WholeFleet(tmp_path / "fleet", *two, count=1, policy="all_server"), "ue1")
    asyncio.run(run_alone(fleet))
    (made,) = (fleet.config.server.directory / "adapters").glob("*.safetensors")
    with pytest.raises(AdapterError, match="was tuned on the model"):
        Adapters(tmp_path).keep(made, two[0].info)
    assert Adapters(tmp_path).keep(made, two[1].info) == made.stem


async def run_alone(fleet: WholeFleet) -> None:
    async with fleet.server() as work:
        await asyncio.gather(fleet.device("ue1"), work)


# Processes


def used_last(cache: Path) -> str | None:
    """Base of the emulator that a device took up last, as its disk says."""
    path = cache / "held.json"
    return json.loads(path.read_text())[0]["base"] if path.exists() else None


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WarmStart]:
    starter = WarmStart(tmp_path_factory.mktemp("jax"))
    yield starter
    starter.close()


def test_a_device_of_two_models_that_is_killed_goes_on(tmp_path: Path, two: Two, warm: WarmStart) -> None:
    """Killed when it has fetched the first model's emulator, and again when it trains the other one's."""
    expected = MemoryFleet(tmp_path / "memory", two[0], "fixed", two[1]).run()
    fleet = ProcessFleet(tmp_path / "fleet", two[0], "fixed", warm=warm, others=two[1:])
    killed: list[str | None] = []

    def kill(fleet: ProcessFleet) -> None:
        cache = fleet.devices[0].cache
        for there in (
            lambda: any((cache / "shards").glob("*")),
            lambda: used_last(cache) == two[0].info.base,
        ):
            while not there():
                if fleet.running["server"].poll() is not None:
                    return
                time.sleep(0.001)
            fleet.kill("ue1")
            killed.append(used_last(cache))
            fleet.start("ue1")

    found = fleet.run(kill)
    assert killed[1:] == [two[0].info.base]
    verdict = judge(expected, found)
    assert verdict.good, verdict.reasons
    with Ledger(fleet.directory / "ledger.sqlite") as ledger:
        assert ledger.models() == {None: "alpha", two[1].info.base: "beta"}


# Which models there are


def test_catalogues_that_are_not_those_of_the_scenario_are_refused(two: Two, tmp_path: Path) -> None:
    alpha, beta = two
    both = scenario_of(alpha, beta)
    for catalogues, message in (
        ([alpha], "given 1 times, .* has 2 foundation models"),
        ([alpha, beta, alpha], "given 3 times"),
        ([alpha, open_catalogue(alpha.directory)], r"alpha: is of the model \w+, as is .*alpha"),
        ([beta, alpha], "beta: was made from the model .*, but model of the policy's scenario"),
    ):
        with pytest.raises(FleetError, match=message):
            Families(both, catalogues)
    first = both.model_copy(update={"model": both.model.model_copy(update={"base": None})})
    other = scenario_of(alpha, alpha)
    with pytest.raises(FleetError, match=r"but families\.others\.0 of the policy's scenario"):
        Families(first.model_copy(update={"families": other.families}), [alpha, beta])
    with pytest.raises(FleetError, match=r"given 2 times, .* has 1 foundation models"):
        Families(scenario_of(alpha), two)


def test_models_are_called_as_their_catalogues_or_by_their_hashes(two: Two, tmp_path: Path) -> None:
    scenario = scenario_of(*two)
    assert [family.name for family in Families(scenario, two)] == ["alpha", "beta"]
    same = []
    for number, catalogue in enumerate(two):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "same").symlink_to(catalogue.directory)
        (tmp_path / str(number) / "Same").mkdir()
        same.append(Catalogue(tmp_path / str(number) / "Same", catalogue.info))
    for one, catalogue in zip(same, two, strict=True):
        (one.directory / "emulators").symlink_to(catalogue.directory / "emulators")
    hashes = [catalogue.info.base[:12] for catalogue in two]
    assert [family.name for family in Families(scenario, same)] == hashes


def test_a_task_of_a_model_that_is_not_served_is_refused(two: Two) -> None:
    families = Families(scenario_of(*two), two)
    report = Report(task="t", data_bytes=5, data_sha256="0" * 64, cache_bytes=10**9, model="0" * 64)
    with pytest.raises(
        UntrainableError, match=r"model: the fleet serves no 0{12}, but alpha \(\w{12}\), beta"
    ):
        families.check(report)
    beta = two[1].info.base
    small = families.of(beta).emulators[0].bytes
    for model, cache_bytes in ((None, 10**9), (beta, small)):
        families.check(
            report.model_copy(update={"model": model, "cache_bytes": cache_bytes, "private": True})
        )
    unfit = report.model_copy(update={"model": beta, "cache_bytes": small - 1})
    families.check(unfit)
    with pytest.raises(UntrainableError, match="memory_bytes: is below"):
        families.check(unfit.model_copy(update={"private": True}))


def test_a_report_says_what_is_held_of_every_model_and_what_was_used_last(two: Two) -> None:
    families = Families(scenario_of(*two), two)
    alpha, beta = (catalogue.info.base for catalogue in two)
    name = two[1].emulators()[0].name
    report = Report(task="t", data_bytes=5, data_sha256="0" * 64, cache_bytes=10**9)
    held, none = two[1].emulators()[0], None
    for model, emulator, used, expected, age in (
        (None, None, (), (none, none), (0, 1)),
        (beta, name, ((beta, name),), (none, held), (1, 0)),
        (None, None, ((beta, name), (alpha, None)), (none, held), (1, 0)),
        (None, None, ((alpha, None), (beta, name)), (none, held), (0, 1)),
    ):
        told = report.model_copy(update={"model": model, "emulator": emulator, "held": used})
        assert families.held(told) == expected
        assert families.age(told) == age


# The ledger


def test_a_server_goes_on_only_with_all_models_that_its_ledger_knows(tmp_path: Path, two: Two) -> None:
    fleet = WholeFleet(tmp_path / "fleet", *two)
    both, one = Families(scenario_of(*two), two), Families(scenario_of(two[0]), two[:1])
    with fleet.ledger() as ledger:
        # A model may join a fleet.
        for families in (one, both, both):
            _same_fleet(ledger, fleet.config, families)
        assert ledger.models() == {None: "alpha", two[1].info.base: "beta"}
        with pytest.raises(
            FleetError, match=r"has tasks of the model beta \(\w{12}\), and no --catalogue is of it"
        ):
            _same_fleet(ledger, fleet.config, one)
        turned = Families(scenario_of(two[1], two[0]), two[::-1])
        with pytest.raises(FleetError, match="has tasks of the model beta"):
            _same_fleet(ledger, fleet.config, turned)


def test_a_device_has_an_adapter_of_each_model_in_service(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        add_devices(ledger, "ue1")
        bases = (None, "b" * 64, None, "b" * 64, "c" * 64)
        for step, base in enumerate(bases):
            ledger.begin_step(step, [decision(step, "ue1", base=base)])
        for step in (1, 0, 3, 2):
            ledger.adapter(f"{step}-ue1", digest(str(step)), 64)
            ledger.evaluation(f"{step}-ue1", 25.0, 21.0, True)
        assert [ledger.in_service("ue1", base) for base in (None, "b" * 64, "c" * 64)] == [
            digest("2"), digest("3"), None
        ]  # fmt: skip
        assert [row.base for step in range(5) for row in ledger.step_leases(step)] == list(bases)
        compared = ledger.comparison()
        assert [row.base for row in compared] == list(bases)
        names = {None: "alpha", "b" * 64: "beta", "c" * 64: "gamma"}
        assert [_cells(row, names)[0] for row in compared[:2]] == ["0 ue1 alpha", "1 ue1 beta"]
        assert _cells(compared[0], {None: "alpha"})[0] == "0 ue1"
        for step in range(5):
            ledger.close_lease(f"{step}-ue1", "done")
        later = datetime(2100, 1, 1, tzinfo=UTC)
        # What another model's adapter superseded is still needed, and nothing else.
        assert [ledger.adapter_needed(digest(str(step)), later) for step in range(4)] == [
            False,
            False,
            True,
            True,
        ]


def test_what_is_pruned_leaves_an_adapter_of_each_model_in_service(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        add_devices(ledger, "ue1")
        bases = ("b" * 64, None, "b" * 64, None, None, None)
        for step, base in enumerate(bases):
            ledger.begin_step(step, [decision(step, "ue1", base=base)])
            ledger.adapter(f"{step}-ue1", digest(str(step)), 64)
            ledger.evaluation(f"{step}-ue1", 25.0, 21.0, step != 4)
            ledger.transferred(f"{step}-ue1", 1.0, 5)
            ledger.close_lease(f"{step}-ue1", "done")
            ledger.end_step(step, 1.0)
    with Prunable(tmp_path / "ledger.sqlite") as old:
        assert old.prune(old.old(keep=1)).steps == 4
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        assert [ledger.in_service("ue1", base) for base in (None, "b" * 64)] == [digest("5"), digest("2")]
        assert [step for step in range(6) if ledger.step_leases(step)] == [2, 5]


def test_each_model_has_its_own_text_that_is_held_back(tmp_path: Path) -> None:
    acceptance = Acceptance(held_back=tmp_path)
    expected: dict[bool, Path | None] = {True: None, False: None}
    for name, of_first, of_other in (
        ("default.txt", True, True),
        ("ue1.txt", True, False),
        ("ue1/beta.txt", False, True),
        ("ue1/alpha.txt", True, False),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text")
        expected = {
            True: tmp_path / name if of_first else expected[True],
            False: tmp_path / name if of_other else expected[False],
        }
        for first, model in ((True, "alpha"), (False, "beta")):
            assert acceptance.text_of("ue1", model, first=first) == expected[first]


def test_messages_of_a_fleet_of_one_model_name_none(two: Two) -> None:
    families = Families(scenario_of(two[0]), two[:1])
    fields, others = families.describe()
    assert others == ()
    assert fields["model"] is None
    report = Report(task="t", data_bytes=5, data_sha256="0" * 64, cache_bytes=1)
    lease = Lease(lease="l", step=0, kind="train")
    assert not {"model", "held", "keep"} & {
        *json.loads(report.model_dump_json()),
        *json.loads(lease.model_dump_json()),
    }
