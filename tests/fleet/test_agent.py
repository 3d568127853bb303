"""A whole device against a server in memory: restarts, faults, and every way to be stopped."""

from __future__ import annotations

import asyncio
import json
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from device_models import TEXT, catalogue, emulator, leasing, serving
from fake_server import BASE, FakeServer, client_of, fleet_info, sha256

from emutune.errors import FleetError
from emutune.fleet.device import agent, errand
from emutune.fleet.device.abilities import Abilities
from emutune.fleet.device.agent import run_device
from emutune.fleet.device.telling import Telling
from emutune.fleet.protocol import Lease, ModelInfo, Result, Transferred
from emutune.tuning.catalogue import Catalogue

LIMIT = 10**7
OTHER = "c" * 64


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Catalogue:
    return catalogue(tmp_path_factory.mktemp("model"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.txt").write_text(TEXT)
    (folder / "b.txt").write_text(TEXT[::-1])
    (folder / "notes.md").write_text("not a task")
    return folder


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent, "_AFTER_FAILURE_S", 0.0)
    for module in (agent, errand):
        monkeypatch.setattr(module, "POLL_S", 0.3)


def device(
    server: FakeServer,
    data: Path,
    cache: Path,
    tasks: int | None = 1,
    limit: int = LIMIT,
    stage: Callable[[str, int, int, str], None] = lambda *told: None,
    **credentials: Any,
) -> tuple[int, list[str]]:
    remarks: list[str] = []

    async def go() -> int:
        async with asyncio.timeout(60), client_of(server, remarks, **credentials) as client:
            return await run_device(client, data, cache, limit, tasks, Telling(stage, remarks.append))

    return asyncio.run(go()), remarks


def test_a_device_trains_what_it_is_leased(built: Catalogue, data: Path, tmp_path: Path) -> None:
    wanted = emulator(built)
    server = serving(built, on_report=leasing("train", emulator=wanted))
    done, _ = device(server, data, tmp_path / "cache", tasks=2)
    assert done == 2
    assert server.left
    for lease in ("l-0", "l-1"):
        result = Result.model_validate(server.results[lease])
        assert result.outcome == "trained", result.reason
        assert result.adapter == sha256(server.adapters[lease])
        assert result.before is not None
        assert result.after is not None
    assert server.results["l-0"]["after"] < server.results["l-0"]["before"]
    moved = sum(built.find(0.5).shards.values())
    assert [server.transferred[lease]["bytes"] for lease in ("l-0", "l-1")] == [moved, 0]
    assert server.moved == moved
    first, second = (next(r for r in server.reports if r["task"] == lease.task) for lease in server.leases)
    assert first["data_sha256"] == sha256((data / "a.txt").read_bytes())
    assert second["data_sha256"] == sha256((data / "b.txt").read_bytes())
    assert (first["emulator"], second["emulator"]) == (None, wanted["name"])
    assert second["perplexity_ratio"] > 0
    assert not any((tmp_path / "cache" / "work").iterdir())
    assert stat.S_IMODE((tmp_path / "cache" / "device.key").stat().st_mode) == 0o600


def test_a_device_sends_its_text(data: Path, tmp_path: Path) -> None:
    server = FakeServer(fleet_info(), on_report=leasing("upload"), trained=b"an adapter", break_after=[1000])
    device(server, data, tmp_path / "cache")
    assert bytes(server.data["l-0"]) == (data / "a.txt").read_bytes()
    assert server.results["l-0"] == Result(outcome="received", adapter=sha256(b"an adapter")).model_dump()
    assert server.transferred["l-0"]["bytes"] == (data / "a.txt").stat().st_size
    assert (tmp_path / "cache" / "models" / BASE / "adapter.safetensors").read_bytes() == b"an adapter"


def test_a_lease_that_ends_without_an_adapter_is_given_up(data: Path, tmp_path: Path) -> None:
    def on_report(server: FakeServer, report: dict[str, Any]) -> None:
        leasing("upload")(server, report)

    server = FakeServer(fleet_info(), on_report=on_report)

    def stage(name: str, done: int, total: int, remark: str) -> None:
        if name == "waiting for the server's training":
            # As a server does whose training failed.
            server.leases[0] = server.leases[0].model_copy(update={"lease": "gone", "kind": "stop"})

    device(server, data, tmp_path / "cache", stage=stage)
    assert server.results["l-0"]["outcome"] == "failed"
    assert "without an adapter" in server.results["l-0"]["reason"]


class KilledError(BaseException):
    pass


@pytest.mark.parametrize("where", ["fetching the emulator", "training"])
def test_a_killed_device_goes_on(built: Catalogue, data: Path, tmp_path: Path, where: str) -> None:
    server = serving(built, on_report=leasing("train", emulator=emulator(built)))

    def kill(name: str, done: int, total: int, remark: str) -> None:
        if name == where and done > 0:
            raise KilledError

    for _ in range(2):
        with pytest.raises(KilledError):
            device(server, data, tmp_path / "cache", stage=kill)
    device(server, data, tmp_path / "cache")
    assert len({report["task"] for report in server.reports}) == 1
    assert len(server.leases) == 1
    assert server.results["l-0"]["outcome"] == "trained"
    assert server.transferred["l-0"]["bytes"] == sum(built.find(0.5).shards.values())
    undisturbed = serving(built, on_report=leasing("train", emulator=emulator(built)))
    device(undisturbed, data, tmp_path / "other")
    assert undisturbed.adapters["l-0"] == server.adapters["l-0"]


def test_what_was_trained_is_not_trained_again(built: Catalogue, data: Path, tmp_path: Path) -> None:
    server = serving(built, on_report=leasing("train", emulator=emulator(built)))
    steps = 0

    def count(name: str, done: int, total: int, remark: str) -> None:
        nonlocal steps
        steps += name == "training"

    server.failing.append(("PUT", "/v1/leases/l-0/adapter", 401))
    with pytest.raises(FleetError, match="revoked"):
        device(server, data, tmp_path / "cache", stage=count)
    before = steps
    assert before > 0
    device(server, data, tmp_path / "cache", stage=count)
    assert steps == before
    assert server.results["l-0"]["adapter"] == sha256(server.adapters["l-0"])


def test_a_shard_that_decays_is_fetched_again(built: Catalogue, data: Path, tmp_path: Path) -> None:
    server = serving(built, on_report=leasing("train", emulator=emulator(built)))
    damaged = tmp_path / "cache" / "shards" / f"{built.find(0.5).outer.sha256}.safetensors"

    def decay(name: str, done: int, total: int, remark: str) -> None:
        if name == "fetching the emulator" and done == total and damaged.exists():
            content = damaged.read_bytes()
            damaged.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))

    device(server, data, tmp_path / "cache", stage=decay)
    assert server.results["l-0"]["outcome"] == "trained"
    assert server.calls[f"GET /v1/shards/{built.find(0.5).outer.sha256}"] == 2


def test_training_starts_from_the_adapter_in_service(built: Catalogue, data: Path, tmp_path: Path) -> None:
    first = serving(built, on_report=leasing("train", emulator=emulator(built)))
    device(first, data, tmp_path / "one")
    start = first.adapters["l-0"]
    lease = leasing("train", emulator=emulator(built), start=sha256(start))
    server = serving(built, on_report=lease, start=start)
    device(server, data, tmp_path / "two")
    assert server.results["l-0"]["before"] == pytest.approx(first.results["l-0"]["after"], rel=1e-6)
    wrong = serving(built, on_report=lease, start=b"another")
    device(wrong, data, tmp_path / "three")
    assert "did not arrive whole" in wrong.results["l-0"]["reason"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"kind": "train"}, "lease.emulator"),
        ({"kind": "train", "emulator": {"name": "x"}}, "emulator.base"),
        ({"kind": "upload", "task": "of-somebody"}, "none of this device's"),
    ],
)
def test_what_cannot_be_done_fails_with_its_reason(
    data: Path, tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    lease = {"kind": "train", **change}
    server = FakeServer(fleet_info(), on_report=leasing(**lease))
    device(server, data, tmp_path / "cache")
    assert server.results["l-0"]["outcome"] == "failed"
    assert reason in server.results["l-0"]["reason"]


def test_a_text_that_was_changed_is_not_sent(data: Path, tmp_path: Path) -> None:
    def on_report(server: FakeServer, report: dict[str, Any]) -> None:
        leasing("upload")(server, report)
        (data / "a.txt").write_text("something else")

    server = FakeServer(fleet_info(), on_report=on_report, trained=b"x")
    device(server, data, tmp_path / "cache")
    assert "was changed" in server.results["l-0"]["reason"]
    assert server.data == {}


def test_a_lease_that_the_server_forgot_is_dropped(data: Path, tmp_path: Path) -> None:
    server = FakeServer(fleet_info(), on_report=leasing("upload"), trained=b"x")
    server.failing.append(("POST", "/v1/leases/l-0/transferred", 404))

    def stage(name: str, done: int, total: int, remark: str) -> None:
        if name == "waiting for a lease" and len(server.leases) == 1:
            server.results.setdefault("l-0", {})

    done, remarks = device(server, data, tmp_path / "cache", tasks=2, stage=stage)
    assert done == 2
    assert any("404" in remark for remark in remarks)
    assert server.results["l-1"]["outcome"] == "received"


def test_the_server_ends_the_work(data: Path, tmp_path: Path) -> None:
    server = FakeServer(fleet_info(), leases=[Lease(lease="stop-1", step=9, kind="stop")])
    done, remarks = device(server, data, tmp_path / "cache", tasks=None)
    assert done == 0
    assert not server.left
    assert "the server ends this device's work" in remarks


def test_ctrl_c_ends_training_within_a_step(built: Catalogue, data: Path, tmp_path: Path) -> None:
    server = serving(built, on_report=leasing("train", emulator=emulator(built)))
    seen: list[int] = []

    async def go() -> None:
        running = asyncio.current_task()
        assert running is not None
        loop = asyncio.get_running_loop()

        def stage(name: str, done: int, total: int, remark: str) -> None:
            if name == "training":
                seen.append(done)
                if len(seen) == 1:
                    loop.call_soon_threadsafe(running.cancel)

        telling = Telling(stage)
        await run_device(client_of(server), data, tmp_path / "cache", LIMIT, 1, telling)

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(go())
    assert "l-0" not in server.results
    device(server, data, tmp_path / "cache")
    assert server.results["l-0"]["outcome"] == "trained"


def test_the_count_of_tasks_survives_a_restart(data: Path, tmp_path: Path) -> None:
    server = FakeServer(fleet_info(), on_report=leasing("upload"), trained=b"x")

    def kill(name: str, done: int, total: int, remark: str) -> None:
        if name == "waiting for a lease" and len(server.results) == 2:
            raise KilledError

    with pytest.raises(KilledError):
        device(server, data, tmp_path / "cache", tasks=3, stage=kill)
    assert device(server, data, tmp_path / "cache", tasks=3)[0] == 3
    assert len(server.results) == 3
    # Finished is finished: the same command begins anew.
    assert device(server, data, tmp_path / "cache", tasks=1)[0] == 1
    assert len(server.results) == 4


def test_measured_times_do_not_change(data: Path, tmp_path: Path) -> None:
    server = FakeServer(fleet_info(), on_report=leasing("upload"))

    def kill(name: str, done: int, total: int, remark: str) -> None:
        if name == "waiting for the server's training":
            raise KilledError

    with pytest.raises(KilledError):
        device(server, data, tmp_path / "cache", stage=kill)
    told = Transferred.model_validate(server.transferred["l-0"])
    server.transferred.clear()
    server.trained = b"x"
    device(server, data, tmp_path / "cache")
    assert Transferred.model_validate(server.transferred["l-0"]) == told


def test_bad_data_directories_are_named(data: Path, tmp_path: Path) -> None:
    server = FakeServer(fleet_info())
    with pytest.raises(FleetError, match="cannot be read"):
        device(server, tmp_path / "nowhere", tmp_path / "cache")
    (data / "b.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FleetError, match=r"b\.txt: not UTF-8"):
        device(server, data, tmp_path / "cache")
    (data / "b.txt").write_text(" \n\n ")
    with pytest.raises(FleetError, match=r"b\.txt: holds no text"):
        device(server, data, tmp_path / "cache")
    for path in data.glob("*.txt"):
        path.unlink()
    with pytest.raises(FleetError, match=r"names that end with \.txt"):
        device(server, data, tmp_path / "cache")
    assert not server.calls


def two_models(data: Path, on_report: Callable[[FakeServer, dict[str, Any]], None]) -> FakeServer:
    """A server of two models, and a text of each."""
    second = ModelInfo(
        **fleet_info().model_dump(include=set(ModelInfo.model_fields)) | {"base": OTHER, "model": "b"}
    )
    (data / "b").mkdir()
    (data / "b.txt").rename(data / "b" / "text.txt")
    return FakeServer(fleet_info(model="a", others=(second,)), on_report=on_report, trained=b"x")


def test_a_task_is_of_the_model_that_its_folder_is_called_by(data: Path, tmp_path: Path) -> None:
    server = two_models(data, leasing("upload"))
    assert device(server, data, tmp_path / "cache", tasks=3)[0] == 3
    of = {report["task"]: report["model"] for report in server.reports}
    assert [of[lease.task] for lease in server.leases] == [BASE, OTHER, BASE]
    assert bytes(server.data["l-1"]) == (data / "b" / "text.txt").read_bytes()
    assert {path.parent.name for path in (tmp_path / "cache").glob("models/*/adapter.safetensors")} == {
        BASE,
        OTHER,
    }
    # A fleet of one model is told nothing of models, as servers were that knew of no others.
    alone = FakeServer(fleet_info(), on_report=leasing("upload"), trained=b"x")
    (data / BASE[:12]).mkdir()
    (data / "b" / "text.txt").rename(data / BASE[:12] / "text.txt")
    (data / "b").rmdir()
    device(alone, data, tmp_path / "cache2", tasks=2)
    assert not any({"model", "held"} & report.keys() for report in alone.reports)


def test_a_text_of_a_model_that_is_not_served_is_named(data: Path, tmp_path: Path) -> None:
    server = two_models(data, leasing("upload"))
    (data / "c").mkdir()
    (data / "c" / "text.txt").write_text(TEXT)
    with pytest.raises(FleetError, match=r"data/c: the fleet serves no model 'c', but a, b; give the folder"):
        device(server, data, tmp_path / "cache")
    assert not server.reports


def test_private_data_of_a_model_that_fits_nowhere_are_refused_at_once(data: Path, tmp_path: Path) -> None:
    server = two_models(data, leasing("upload"))
    large = server.info.others[0].model_copy(update={"smallest_bytes": LIMIT + 1})
    server.info = server.info.model_copy(update={"others": (large,)})

    async def join(private: bool) -> int:
        async with asyncio.timeout(60), client_of(server) as client:
            abilities = Abilities(private=private)
            return await run_device(client, data, tmp_path / "cache", LIMIT, 2, abilities=abilities)

    with pytest.raises(
        FleetError, match=r"--cache-mb: is 10, .* of the model b takes .* leave --private out"
    ):
        asyncio.run(join(private=True))
    assert not server.reports
    assert asyncio.run(join(private=False)) == 2


def test_another_fleets_cache_or_server_is_refused(data: Path, tmp_path: Path) -> None:
    server = FakeServer(fleet_info(), on_report=leasing("upload"), trained=b"x")
    device(server, data, tmp_path / "cache")
    with pytest.raises(FleetError, match="belongs to device 'ue1'"):
        device(server, data, tmp_path / "cache", device="ue2")
    other = FakeServer(fleet_info(name="other"))
    with pytest.raises(FleetError, match="is the fleet 'other'"):
        device(other, data, tmp_path / "cache2")
    with pytest.raises(FleetError, match="--cache-mb"):
        device(FakeServer(fleet_info(smallest_bytes=2 * LIMIT)), data, tmp_path / "cache3")


def test_damaged_memory_is_named(data: Path, tmp_path: Path) -> None:
    server = FakeServer(fleet_info(), on_report=leasing("upload"), trained=b"x")
    device(server, data, tmp_path / "cache")
    path = tmp_path / "cache" / "state.json"
    assert json.loads(path.read_text())["task"] is None
    (tmp_path / "cache" / "device.key").write_text("short")
    with pytest.raises(FleetError, match="key is damaged"):
        device(server, data, tmp_path / "cache")
    path.write_text("{")
    with pytest.raises(FleetError, match="delete it"):
        device(server, data, tmp_path / "cache")


@pytest.mark.parametrize("error", [KeyError("weight"), AssertionError("never so"), IndexError("token 97")])
def test_whatever_training_meets_is_the_leases_failure(
    built: Catalogue, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    from emutune.fleet.device import work

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(work, "train_adapter", fail)
    server = serving(built, on_report=leasing("train", emulator=emulator(built)))
    assert device(server, data, tmp_path / "cache")[0] == 1
    result = Result.model_validate(server.results["l-0"])
    assert result.outcome == "failed"
    assert result.reason == f"{type(error).__name__}: {error}"
