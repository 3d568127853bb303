"""A small fleet of real processes over TLS, what goes wrong with it, and what it must come to all the same."""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from directories import generated_text
from small_disks import fill
from warm_start import WarmProcess, WarmStart
from whole_fleet import scenario_of, write_texts

from emutune.fleet.config import FleetConfig, load_fleet
from emutune.fleet.ledger import Ledger
from emutune.fleet.local import COMMAND, LocalDevice, enrol_missing, free_port, local_devices, start
from emutune.scenario import dump_scenario
from emutune.tuning.catalogue import Catalogue

STEPS = 2
DEVICES = 2
LONGEST_S = 150.0
FLEET = """
name = "test"
scenario = "{scenario}"
[server]
port = {port}
directory = "fleet"
[steps]
count = {steps}
gather_s = 60.0
deadline_s = 120.0
[shaping]
time_scale = {time_scale}
[training]
steps = 2
batch = 2
block = 16
width = 2
"""


# What a run came to


@dataclass(frozen=True)
class Outcome:
    """What the ledger of a run says, without times; the same for every run of the same work.

    Attributes:
        totals: of ``Ledger.totals``.
        leases: by step and device: kind, state, bytes, adapter, whether that was accepted, and the device's outcome.
        tasks: leases of each device and task; each must have one.
        broken: what contradicts the ledger on the server's disk.
    """

    totals: dict[str, int]
    leases: dict[tuple[int, str], tuple[Any, ...]]
    tasks: dict[tuple[str, str], int]
    broken: tuple[str, ...]


def outcome(directory: Path) -> Outcome:
    """The outcome of the run whose server kept its files in a directory."""
    with Ledger(directory / "ledger.sqlite") as ledger:
        rows = [row for step in range(ledger.last_step() + 1) for row in ledger.step_leases(step)]
        deleted = [row.lease for row in ledger.audit_rows() if row.event == "data deleted"]
        broken = [f"step {step} did not end" for step in range(STEPS) if not ledger.step_ended(step)]
        totals = ledger.totals()
    for row in rows:
        path = directory / "adapters" / f"{row.adapter_sha256}.safetensors"
        if row.adapter_sha256 and (
            not path.exists() or hashlib.sha256(path.read_bytes()).hexdigest() != row.adapter_sha256
        ):
            broken.append(f"{row.lease}: its adapter is not there")
        if row.kind == "upload" and deleted.count(row.lease) != 1:
            broken.append(f"{row.lease}: {deleted.count(row.lease)} deletions of its data")
    for folder in ("data", "uploads", "work"):
        if (directory / folder).is_dir():
            broken += [f"{folder}/{path.name} was left behind" for path in (directory / folder).iterdir()]
    leases = {
        (row.step, row.device): (
            *(row.kind, row.state, row.transferred_bytes, row.adapter_sha256, row.accepted),
            None if row.result is None else row.result.outcome,
        )
        for row in rows
    }
    return Outcome(totals, leases, Counter((row.device, row.task) for row in rows), tuple(broken))


@dataclass(frozen=True)
class Verdict:
    """A run beside one without a fault.

    Attributes:
        lost: leases that are not there, not closed as they were, without their adapter, or whose data stayed.
        duplicated: leases, tasks or bytes that are there more often.
        differing: whether any number of the ledger differs.
        reasons: what was found, for people.
    """

    lost: int
    duplicated: int
    differing: bool
    reasons: tuple[str, ...]

    @property
    def good(self) -> bool:
        return not (self.lost or self.duplicated or self.differing)


def judge(expected: Outcome, found: Outcome) -> Verdict:
    """What a fault has changed."""
    reasons = [*found.broken]
    lost, duplicated = len(found.broken), 0
    for key, row in expected.leases.items():
        if found.leases.get(key) != row:
            lost += 1
            reasons.append(f"lease {key}: {found.leases.get(key)} instead of {row}")
    for key in found.leases.keys() - expected.leases.keys():
        duplicated += 1
        reasons.append(f"lease {key}: there is none without a fault")
    for task, count in found.tasks.items():
        if count > 1:
            duplicated += 1
            reasons.append(f"task {task}: {count} leases")
    for name in expected.totals.keys() | found.totals.keys():
        before, now = expected.totals.get(name, 0), found.totals.get(name, 0)
        if now != before:
            duplicated += now > before and name.startswith("bytes")
            reasons.append(f"{name}: {now} instead of {before}")
    return Verdict(lost, duplicated, expected.totals != found.totals, tuple(reasons))


# The fleet


class ProcessFleet:
    """Server and devices as the commands run them, each a process of its own.

    Args:
        folder: of everything; made.
        catalogue: the emulators.
        policy: rule that decides.
        through: what the devices reach the server through, told the server's port; its own port is where they go.
        warm: starts processes without their imports; without it they start as from a shell.
        others: emulators of other models than the first.
    """

    def __init__(
        self,
        folder: Path,
        catalogue: Catalogue,
        policy: str,
        through: Callable[[int], Wire] | None = None,
        warm: WarmStart | None = None,
        others: Sequence[Catalogue] = (),
    ) -> None:
        folder.mkdir(parents=True)
        self.folder, self.catalogues, self.policy, self._warm = folder, [catalogue, *others], policy, warm
        self.port = free_port("127.0.0.1")
        self.wire = None if through is None else through(self.port)
        self.file = folder / "fleet.toml"
        (folder / "scenario.toml").write_text(dump_scenario(scenario_of(*self.catalogues)))
        self.file.write_text(
            FLEET.format(scenario=folder / "scenario.toml", port=self.port, steps=STEPS, time_scale=1000.0)
        )
        self.config: FleetConfig = load_fleet(self.file)
        self.devices = local_devices(self.config, DEVICES)
        for device in self.devices:
            write_texts(device.data, int(device.name[2:]), [other.directory.name for other in others])
        held_back = self.config.server.directory / "held_back"
        held_back.mkdir(parents=True)
        (held_back / "default.txt").write_text(generated_text(400, seed=9))
        enrol_missing(self.config, self.devices, f"https://127.0.0.1:{self.port}")
        self.running: dict[str, subprocess.Popen[str] | WarmProcess] = {}
        self.said: list[str] = []

    @property
    def directory(self) -> Path:
        return self.config.server.directory

    def log(self, name: str) -> Path:
        return self.folder / "logs" / f"{name}.log"

    def start(self, name: str) -> None:
        """Start the server or a device, with the same command every time."""
        command = self._command(name)
        if self._warm is None:
            self.running[name] = start(command, self.log(name))
        else:
            self.running[name] = self._warm.start(command[len(COMMAND) :], self.log(name))

    def kill(self, name: str) -> None:
        """Kill -9."""
        self.running[name].kill()
        self.running[name].wait()

    def children(self) -> list[int]:
        """Processes of the server that runs now."""
        return children(self.running["server"].pid)

    def workers(self) -> list[int]:
        """Those that train and judge."""
        return [child for child in self.children() if runs(child, "worker")]

    def deciders(self) -> list[int]:
        """The one that decides; none while it starts."""
        return [child for child in self.children() if runs(child, "deciding")]

    def run(self, fault: Callable[[ProcessFleet], None] = lambda fleet: None) -> Outcome:
        """Run the fleet to its end, with a fault on the way.

        The fault is called once all devices have joined; what it kills it starts again.
        """
        end = time.monotonic() + LONGEST_S
        try:
            self.start("server")
            self._until(lambda: "serving" in self._said_by("server"), end)
            for device in self.devices:
                self.start(device.name)
            for device in self.devices:
                self._until(lambda name=device.name: "joined" in self._said_by(name), end)  # type: ignore[misc]
            self.joined_at = time.monotonic()
            fault(self)
            self._until(lambda: self.running["server"].poll() is not None, end)
            self.span_s = time.monotonic() - self.joined_at
            self._let_go(end)
            ended = {name: process.wait(20) for name, process in self.running.items()}
            assert not any(ended.values()), (ended, self.tail())
        finally:
            if self.wire is not None:
                self.wire.close()
            for process in self.running.values():
                if process.poll() is None:
                    process.kill()
                process.wait()
        return outcome(self.directory)

    def tail(self) -> str:
        """The last lines of all logs."""
        return "\n".join(
            f"{path.name}: {line}"
            for path in sorted((self.folder / "logs").glob("*.log"))
            for line in path.read_text().splitlines()[-6:]
        )

    def _let_go(self, end: float) -> None:
        """The server that is started again, its steps done, ends the devices that it missed."""
        devices = [self.running[device.name] for device in self.devices]
        until = time.monotonic() + 5
        while any(process.poll() is None for process in devices):
            if time.monotonic() > until and self.running["server"].poll() is not None:
                self.said.append("a device was let go by another start of the server")
                self.start("server")
            assert time.monotonic() < end, self.tail()
            time.sleep(0.05)

    def _until(self, condition: Callable[[], bool], end: float) -> None:
        while not condition():
            for name, process in self.running.items():
                assert not process.poll(), (name, process.poll(), self.tail())
            assert time.monotonic() < end, f"the run does not end:\n{self.tail()}"
            time.sleep(0.02)

    def _said_by(self, name: str) -> str:
        return self.log(name).read_text() if self.log(name).exists() else ""

    def _command(self, name: str) -> list[str]:
        if name == "server":
            catalogues = [part for one in self.catalogues for part in ("--catalogue", str(one.directory))]
            return [*COMMAND, "serve", str(self.file), *catalogues, "--policy", self.policy, "--verbose"]
        device: LocalDevice = next(device for device in self.devices if device.name == name)
        port = self.port if self.wire is None else self.wire.port
        return device.command(f"https://127.0.0.1:{port}")


def children(parent: int) -> list[int]:
    """Processes whose parent a process is."""
    try:
        listed = Path(f"/proc/{parent}/task/{parent}/children").read_text()
    except OSError:
        return []
    return [int(number) for number in listed.split()]


def runs(process: int, module: str) -> bool:
    """Whether a process runs a module of ``emutune.fleet.server``, started warm or as from a shell."""
    try:
        words = Path(f"/proc/{process}/cmdline").read_text().split("\0")
        return (
            f"emutune.fleet.server.{module}" in words
            or Path(f"/proc/{process}/comm").read_text().strip() == module
        )
    except OSError:
        return False


def alive(process: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


# What goes wrong with processes


@dataclass
class Injector:
    """Faults at moments that a seed decides.

    Args:
        seed: of all that is drawn.
        span_s: how long a run takes from the moment at which all have joined.
    """

    seed: int
    span_s: float
    did: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)

    def kill_server(self, fleet: ProcessFleet) -> None:
        """Kill -9 of the server, once or twice; its children must not outlive it for long."""
        for _ in range(self.random.choice((1, 1, 2))):
            if not self._wait(fleet, "server"):
                return
            left = fleet.children()
            fleet.kill("server")
            self.did.append(f"server killed, {len(left)} children")
            time.sleep(self.random.uniform(0, 0.5))
            fleet.start("server")
            until = time.monotonic() + 5
            while any(map(alive, left)):
                assert time.monotonic() < until, "a child outlives its server"
                time.sleep(0.02)

    def kill_device(self, fleet: ProcessFleet) -> None:
        """Kill -9 of a device, once or twice."""
        for _ in range(self.random.choice((1, 1, 2))):
            name = self.random.choice([device.name for device in fleet.devices])
            if not self._wait(fleet, name):
                return
            fleet.kill(name)
            self.did.append(f"{name} killed")
            time.sleep(self.random.uniform(0, 0.5))
            fleet.start(name)

    def kill_worker(self, fleet: ProcessFleet) -> None:
        """Kill -9 of a process that trains or judges, at most as late as it has done its first job."""
        for _ in range(self.random.choice((1, 1, 2))):
            while not (workers := fleet.workers()):
                if fleet.running["server"].poll() is not None:
                    return
                time.sleep(0.01)
            time.sleep(self.random.uniform(0, self.span_s))
            worker = self.random.choice(workers)
            if worker in fleet.workers():
                with suppress(ProcessLookupError):
                    os.kill(worker, signal.SIGKILL)
                    self.did.append("worker killed")

    def kill_decider(self, fleet: ProcessFleet) -> None:
        """Kill -9 of the process that decides, once or twice; before that it is stopped, so that questions wait."""
        for _ in range(self.random.choice((1, 1, 2))):
            if not self._wait(fleet, "server"):
                return
            for decider in fleet.deciders():
                with suppress(ProcessLookupError):
                    os.kill(decider, signal.SIGSTOP)
                    time.sleep(self.random.uniform(0, self.span_s))
                    os.kill(decider, signal.SIGKILL)
                    self.did.append("decider killed")

    def decay(self, fleet: ProcessFleet) -> None:
        """Kill -9 of a device while it works on a lease whose shards have arrived; then one of them is damaged.

        What decays between two leases has to move for the next one, and rightly counts there.
        """
        device = self.random.choice(fleet.devices)
        state = device.cache / "state.json"
        while '"transferred": {' not in (state.read_text() if state.exists() else ""):
            if fleet.running["server"].poll() is not None:
                return
            time.sleep(0.002)
        time.sleep(self.random.uniform(0, 0.1))
        if fleet.running[device.name].poll() is not None:
            return
        fleet.kill(device.name)
        if '"transferred": {' in state.read_text():
            shards = sorted((device.cache / "shards").glob("*.safetensors"))
            damage(self.random.choice(shards), self.random)
            self.did.append(f"a shard of {device.name} damaged")
        fleet.start(device.name)

    def fill(self, fleet: ProcessFleet) -> None:
        """The disk of server and devices, which must be a small one, is full for a while, once or twice."""
        for _ in range(self.random.choice((1, 2))):
            if not self._wait(fleet, "server"):
                return
            left = int(10 ** self.random.uniform(3.6, 5.6))
            fill(fleet.directory, left)
            self.did.append(f"{left} bytes left")
            time.sleep(self.random.uniform(0.5, 4.0))
            (fleet.directory / "ballast").unlink()

    def _wait(self, fleet: ProcessFleet, name: str) -> bool:
        """Until a moment within the run; False if that comes after its end."""
        time.sleep(self.random.uniform(0, self.span_s))
        return fleet.running[name].poll() is None and fleet.running["server"].poll() is None


def damage(path: Path, draw: random.Random) -> None:
    """Flip one bit of a file, or cut it short."""
    content = bytearray(path.read_bytes())
    if draw.random() < 0.25:
        del content[draw.randrange(len(content)) :]
    else:
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


class Wire:
    """What carries TCP to a server, and cuts connections or alters a byte where a seed says so.

    Args:
        target: the server's port.
        seed: of the places.
        faults: how many connections meet one; those that come later are left alone.
        alter: flip a bit instead of cutting.
    """

    def __init__(self, target: int, seed: int, faults: int = 12, *, alter: bool = False) -> None:
        self._random, self._target, self._alter = random.Random(seed), target, alter
        self._left, self.hits = faults, 0
        self._loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._listener = socket.socket()
        self._listener.bind(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Carry nothing any more."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._carry, sock=self._listener))
        self._loop.run_forever()
        server.close()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0.05))
        self._loop.close()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        place = None
        if self._left > 0:
            self._left -= 1
            # Small ones fall into the handshake and the first messages, large ones into a transfer.
            place = int(10 ** self._random.uniform(2.0, 5.7))
        try:
            there, back = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            writer.transport.abort()
            return
        counted = Counter[str]()

        async def one_way(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            nonlocal place
            with suppress(OSError):
                while piece := await source.read(1 << 14):
                    counted["bytes"] += len(piece)
                    if place is not None and counted["bytes"] > place:
                        self.hits += 1
                        if not self._alter:
                            keep = len(piece) - (counted["bytes"] - place)
                            sink.write(piece[: max(0, keep)])
                            await sink.drain()
                            return
                        place = None
                        altered = bytearray(piece)
                        altered[self._random.randrange(len(piece))] ^= 1 << self._random.randrange(8)
                        piece = bytes(altered)
                    sink.write(piece)
                    await sink.drain()

        ways = [asyncio.ensure_future(one_way(reader, back)), asyncio.ensure_future(one_way(there, writer))]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            for side in (back, writer):
                side.transport.abort()


def fresh(folder: Path) -> Path:
    """A folder that is not there any more."""
    shutil.rmtree(folder, ignore_errors=True)
    return folder
