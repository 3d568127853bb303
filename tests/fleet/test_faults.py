"""Whatever is killed, cut, altered, repeated, filled or set: a run ends in the ledger of one without a fault."""

from __future__ import annotations

import asyncio
import fcntl
import os
import random
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from device_models import leasing
from fake_server import FakeServer, client_of, credentials, fleet_info
from faulty_fleet import DEVICES, STEPS, Injector, Outcome, ProcessFleet, Wire, alive, judge
from faulty_memory import MemoryFleet, MemoryInjector
from small_disks import small_disk
from warm_start import WarmStart
from whole_fleet import catalogue_at

from emutune.errors import FleetError, LedgerError
from emutune.fleet.device import agent
from emutune.fleet.device.agent import run_device
from emutune.fleet.device.client import Backoff, FleetClient
from emutune.fleet.device.state import Arrival
from emutune.fleet.disk import is_full
from emutune.fleet.ledger import LeaseRow, Ledger
from emutune.fleet.local import COMMAND
from emutune.fleet.server.child import checked
from emutune.tuning.catalogue import Catalogue

POLICIES = ("fixed", "all_server")
# Of a run in this process, and of processes from the moment at which they have joined; both are shorter when warm.
MEMORY_SPAN_S, PROCESS_SPAN_S = 1.5, 2.0
# Shorter than a worker takes to start, so that a run on a fast machine does not end before its first fault.
SOON_S = 0.25


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> Catalogue:
    return catalogue_at(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WarmStart]:
    starter = WarmStart(tmp_path_factory.mktemp("jax"))
    yield starter
    starter.close()


@pytest.fixture(scope="module")
def expected(catalogue: Catalogue, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """Runs without a fault. That they are in this process makes no difference to what they come to."""
    folder = tmp_path_factory.mktemp("whole")
    return {policy: MemoryFleet(folder / policy, catalogue, policy).run() for policy in POLICIES}


def assert_same(expected: Outcome, found: Outcome) -> None:
    verdict = judge(expected, found)
    assert verdict.good, verdict.reasons


def test_runs_without_a_fault_lose_nothing(expected: dict[str, Outcome]) -> None:
    for policy, kind in (("fixed", "train"), ("all_server", "upload")):
        assert expected[policy].broken == ()
        assert expected[policy].totals["steps"] == 2
        assert expected[policy].totals[f"leases.{kind}.done"] == 4
        assert_same(expected[policy], expected[policy])
    assert not judge(expected["fixed"], expected["all_server"]).good


# Processes


def test_server_device_and_worker_are_killed(
    catalogue: Catalogue, warm: WarmStart, expected: dict[str, Outcome], tmp_path: Path
) -> None:
    injector = Injector(3, SOON_S)

    def kills(fleet: ProcessFleet) -> None:
        injector.kill_worker(fleet)
        injector.kill_device(fleet)
        injector.kill_server(fleet)

    found = ProcessFleet(tmp_path / "fleet", catalogue, "all_server", warm=warm).run(kills)
    assert injector.did
    assert_same(expected["all_server"], found)


def waiting_bytes(process: int) -> int:
    """What a process has not read yet of its standard input, a pipe."""
    with Path(f"/proc/{process}/fd/0").open("rb") as pipe:
        return int.from_bytes(fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)), "little")


def test_what_decides_is_killed_over_a_question(
    catalogue: Catalogue, warm: WarmStart, expected: dict[str, Outcome], tmp_path: Path
) -> None:
    fleet = ProcessFleet(tmp_path / "fleet", catalogue, "fixed", warm=warm)

    def all_wait() -> bool:
        with Ledger(fleet.directory / "ledger.sqlite") as ledger:
            assert ledger.last_step() < STEPS - 1
            return len(ledger.open_reports()) == DEVICES and not ledger.open_leases()

    def kill(fleet: ProcessFleet) -> None:
        (decider,) = fleet.deciders()
        os.kill(decider, signal.SIGSTOP)
        until = time.monotonic() + 60
        while not all_wait():
            assert time.monotonic() < until
            time.sleep(0.02)
        until = time.monotonic() + 3
        # None if it had taken the question when it was stopped.
        while not waiting_bytes(decider) and time.monotonic() < until:
            time.sleep(0.02)
        os.kill(decider, signal.SIGKILL)

    assert_same(expected["fixed"], fleet.run(kill))


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("what", ["kill_server", "kill_device", "kill_worker", "kill_decider", "decay"])
def test_a_process_is_killed(
    catalogue: Catalogue,
    warm: WarmStart,
    expected: dict[str, Outcome],
    tmp_path: Path,
    policy: str,
    what: str,
) -> None:
    if what == "decay" and policy == "all_server":
        pytest.skip("devices that upload hold no shards")
    injector = Injector(1, PROCESS_SPAN_S)
    found = ProcessFleet(tmp_path / "fleet", catalogue, policy, warm=warm).run(getattr(injector, what))
    assert_same(expected[policy], found)


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("alter", [False, True], ids=["cut", "altered"])
def test_connections_break(
    catalogue: Catalogue,
    warm: WarmStart,
    expected: dict[str, Outcome],
    tmp_path: Path,
    policy: str,
    alter: bool,
) -> None:
    fleet = ProcessFleet(
        tmp_path / "fleet", catalogue, policy, lambda port: Wire(port, 5, alter=alter), warm=warm
    )
    assert_same(expected[policy], fleet.run())
    assert fleet.wire is not None
    assert fleet.wire.hits


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
def test_the_disk_of_all_processes_is_full_for_a_while(
    catalogue: Catalogue, warm: WarmStart, expected: dict[str, Outcome], tmp_path: Path, policy: str
) -> None:
    needs_small_disks(tmp_path)
    fleet = ProcessFleet(tmp_path / "fleet", catalogue, policy, warm=warm)
    with small_disk(fleet.directory):
        found = fleet.run(Injector(4, PROCESS_SPAN_S).fill)
    assert_same(expected[policy], found)


@pytest.mark.slow
def test_processes_as_from_a_shell(
    catalogue: Catalogue, expected: dict[str, Outcome], tmp_path: Path
) -> None:
    injector = Injector(2, 10.0)
    found = ProcessFleet(tmp_path / "fleet", catalogue, "all_server").run(injector.kill_server)
    assert_same(expected["all_server"], found)


WATCHED = """
import atexit, sys
heavy = {"jax", "jaxlib", "torch", "transformers", "peft", "scipy"}
atexit.register(lambda: print("imported", *sorted(heavy & sys.modules.keys()), flush=True))
from emutune.cli.main import run
run()
"""


class WatchedFleet(ProcessFleet):
    """Its server says at its end what it has imported."""

    def _command(self, name: str) -> list[str]:
        command = super()._command(name)
        return [command[0], "-c", WATCHED, *command[len(COMMAND) :]] if name == "server" else command


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
def test_a_server_imports_neither_jax_nor_torch_in_a_whole_run(
    catalogue: Catalogue, expected: dict[str, Outcome], tmp_path: Path, policy: str
) -> None:
    fleet = WatchedFleet(tmp_path / "fleet", catalogue, policy)
    assert_same(expected[policy], fleet.run())
    assert fleet.log("server").read_text().splitlines()[-1] == "imported"


def test_a_worker_whose_server_is_already_gone_does_nothing() -> None:
    # The number of a process that is not its parent: what a worker sees whose server was killed while it started.
    worker = subprocess.Popen(
        [sys.executable, "-m", "emutune.fleet.server.worker", "1"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    assert worker.wait(30) == 1
    assert worker.stdin is not None
    worker.stdin.close()
    assert not alive(worker.pid)


# In this process


@pytest.mark.parametrize(
    ("what", "policy", "seed"),
    [
        ("duplicate", "fixed", 1),
        ("duplicate", "all_server", 2),
        ("reorder", "fixed", 3),
        pytest.param("reorder", "all_server", 4, marks=pytest.mark.slow),
        ("damage", "fixed", 5),
        pytest.param("damage", "all_server", 6, marks=pytest.mark.slow),
        ("jump_clock", "fixed", 7),
        pytest.param("jump_clock", "all_server", 8, marks=pytest.mark.slow),
        ("fill_device", "fixed", 9),
        pytest.param("fill_device", "all_server", 10, marks=pytest.mark.slow),
        pytest.param("fill_server", "fixed", 11, marks=pytest.mark.slow),
        ("fill_server", "all_server", 12),
    ],
)
def test_messages_clocks_and_disks(
    catalogue: Catalogue, expected: dict[str, Outcome], tmp_path: Path, what: str, policy: str, seed: int
) -> None:
    if what.startswith("fill"):
        needs_small_disks(tmp_path)
    injector = MemoryInjector(seed, MEMORY_SPAN_S)
    found = getattr(injector, what)(MemoryFleet(tmp_path / "fleet", catalogue, policy))
    assert_same(expected[policy], found)


def needs_small_disks(folder: Path) -> None:
    try:
        with small_disk(folder / "probe"):
            pass
    except PermissionError as error:
        pytest.skip(str(error))


# The moments that chance seldom meets


class KilledError(BaseException):
    pass


@pytest.mark.parametrize("kind", ["train", "upload"])
def test_a_device_killed_when_the_server_has_its_result_goes_on_with_the_next_task(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent, "_AFTER_FAILURE_S", 0.01)
    data = tmp_path / "data"
    data.mkdir()
    (data / "a.txt").write_text("a text")
    # A task of the one kind fails, for want of an emulator, and that of the other succeeds.
    server = FakeServer(fleet_info(), on_report=leasing(kind), trained=b"an adapter")

    def killed(request: Any) -> None:
        if request.url.path.endswith("/result"):
            raise KilledError

    async def once(kill: bool, tasks: int) -> int:
        async def answer(request: Any) -> Any:
            response = await server(request)
            if kill:
                killed(request)
            return response

        client = FleetClient(credentials(), httpx2.MockTransport(answer), backoff=Backoff(0.001, 0.004))
        async with client:
            return await run_device(client, data, tmp_path / "cache", 10**6, tasks)

    with pytest.raises(KilledError):
        asyncio.run(once(kill=True, tasks=2))
    assert len(server.results) == 1
    assert asyncio.run(asyncio.wait_for(once(kill=False, tasks=2), 30)) == 2
    assert len(server.results) == len({report["task"] for report in server.reports}) == 2


@pytest.mark.parametrize("restarted", [False, True])
def test_server_trains_on_for_a_device_that_no_longer_waits(
    catalogue: Catalogue, tmp_path: Path, restarted: bool
) -> None:
    fleet = MemoryFleet(tmp_path / "fleet", catalogue, "all_server")
    steps = fleet.config.steps.model_copy(update={"count": 1, "deadline_s": 0.5, "gather_s": 0.5})
    fleet.config = fleet.config.model_copy(update={"steps": steps})
    running = asyncio.Event()

    def waited_for(row: LeaseRow) -> bool:
        return row.state == "expired" and row.data_complete and row.transferred_s is not None

    async def interrupted() -> None:
        async with fleet.server() as work:
            trained = fleet.hub._trainers.run

            async def slow(job: Any) -> Any:
                if job.kind == "train":
                    await (asyncio.sleep(60) if restarted else running.wait())
                return await trained(job)

            fleet.hub._trainers.run = slow
            devices = [asyncio.create_task(fleet.device(name)) for name in ("ue1", "ue2")]
            while len(rows := await fleet.hub._ledger(Ledger.step_leases, 0)) < 2 or not all(
                map(waited_for, rows)
            ):
                await asyncio.sleep(0.02)
            for row in rows:
                failed = {"outcome": "failed", "reason": "the server ended the lease without an adapter"}
                await fleet.hub.result(row.device, row.lease, _result(failed))
                now = await fleet.hub._ledger(Ledger.lease, row.device, row.lease)
                assert now is not None
                assert now.state == "expired"
            running.set()
            for device in devices:
                device.cancel()
            await asyncio.gather(*devices, return_exceptions=True)
            if not restarted:
                await work

    async def again() -> None:
        async with fleet.server() as work:
            await work

    asyncio.run(asyncio.wait_for(interrupted(), 60))
    if restarted:
        asyncio.run(asyncio.wait_for(again(), 60))
    with fleet.ledger() as ledger:
        for row in ledger.step_leases(0):
            assert row.state == "late"
            assert row.accepted is not None
    assert not list((fleet.directory / "data").iterdir())


def _result(values: dict[str, str]) -> Any:
    from emutune.fleet.protocol import Result

    return Result.model_validate(values)


def test_a_device_ends_when_the_server_is_gone_for_longer_than_its_patience(tmp_path: Path) -> None:
    server = FakeServer(fleet_info())
    server.unreachable = 10**9
    client = client_of(server)
    client._patience.backoff = Backoff(first_s=0.001, longest_s=0.004, patience_s=0.2)
    begun = time.monotonic()
    with pytest.raises(FleetError, match="nothing is lost"):
        asyncio.run(client.info())
    assert time.monotonic() - begun >= 0.2


def test_patience_counts_from_the_last_answer() -> None:
    server = FakeServer(fleet_info(), key="0" * 64)
    client = client_of(server)
    client._patience.backoff = Backoff(first_s=0.05, longest_s=0.05, patience_s=0.15)

    async def calls() -> None:
        for _ in range(6):
            server.unreachable = 1
            with pytest.raises(FleetError, match="does not know this device"):
                await client.info()

    asyncio.run(calls())


def test_a_clock_that_was_in_1970_is_no_error() -> None:
    arrival = Arrival(boot="another", monotonic_s=0.0, wall_s=0.0)
    assert 0 <= arrival.seconds() <= 1e9


def test_full_disks_are_told_from_other_errors(tmp_path: Path) -> None:
    from safetensors import SafetensorError

    assert is_full(OSError(28, "No space left on device"))
    assert is_full(
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    )
    assert not is_full(None)
    assert not is_full(FleetError("damaged"))
    assert not is_full(PermissionError(13, "Permission denied"))
    with pytest.raises(FleetError) as full:
        checked({"error": "no room", "full": True})
    assert is_full(full.value)
    with pytest.raises(FleetError) as other:
        checked({"error": "too short", "full": False})
    assert not is_full(other.value)


def test_a_full_ledger_is_a_full_disk(tmp_path: Path) -> None:
    needs_small_disks(tmp_path)
    with small_disk(tmp_path / "disk", 1_000_000) as disk, Ledger(disk / "ledger.sqlite") as ledger:
        (disk / "ballast").write_bytes(bytes(os.statvfs(disk).f_bavail * 4096))
        with pytest.raises(LedgerError, match="free space") as full:
            ledger.set_meta("key", "x" * 1_000_000)
        assert is_full(full.value)
        (disk / "ballast").unlink()
        ledger.set_meta("key", "value")
        assert ledger.meta("key") == "value"


def test_damage_is_seen(expected: dict[str, Outcome]) -> None:
    """The judge of this file's runs is no rubber stamp."""
    whole = expected["fixed"]
    draw = random.Random(0)
    key = draw.choice(sorted(whole.leases))
    missing = {other: row for other, row in whole.leases.items() if other != key}
    verdict = judge(whole, Outcome(whole.totals, missing, whole.tasks, ()))
    assert verdict.lost == 1
    twice = {**whole.tasks, next(iter(whole.tasks)): 2}
    assert judge(whole, Outcome(whole.totals, whole.leases, twice, ())).duplicated == 1
    more = {**whole.totals, "bytes.train": whole.totals["bytes.train"] + 1}
    verdict = judge(whole, Outcome(more, whole.leases, whole.tasks, ()))
    assert verdict.duplicated == 1
    assert verdict.differing
