"""A whole fleet on this machine: the server and every device a process of its own, over TLS on loopback."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

from emutune.errors import FleetError
from emutune.files import replacing
from emutune.fleet.addresses import url_of
from emutune.fleet.config import EVERY_ADDRESS, FleetConfig
from emutune.fleet.device.abilities import ANYTHING, Abilities
from emutune.fleet.server.run import enrol_device, opened_ledger
from emutune.scenario import Scenario

COMMAND = (sys.executable, "-c", "from emutune.cli.main import run; run()")
_START_S = 120.0
# Every fifth paragraph of a task's text is kept from the device, for the server to judge adapters on.
_HELD_BACK = 5


@dataclass(frozen=True)
class LocalDevice:
    """Where a device of this machine keeps its things, and what it can."""

    name: str
    directory: Path
    abilities: Abilities = ANYTHING

    @property
    def credentials(self) -> Path:
        """Its credentials file."""
        return self.directory / "credentials.json"

    @property
    def data(self) -> Path:
        """Its tasks' texts."""
        return self.directory / "data"

    @property
    def cache(self) -> Path:
        """Its emulator."""
        return self.directory / "cache"

    def command(self, url: str) -> list[str]:
        """What runs it."""
        options = ("--credentials", self.credentials, "--data", self.data, "--cache", self.cache)
        memory = self.abilities.memory_bytes
        limits = [] if memory is None else ["--memory-gb", repr(memory / 1e9)]
        limits += ["--private"] if self.abilities.private else []
        return [*COMMAND, "join", url, *map(str, options), *limits]


def local_devices(config: FleetConfig, count: int) -> list[LocalDevice]:
    """Devices ``ue1``, ``ue2``, ... below the server's directory."""
    root = config.server.directory / "devices"
    return [LocalDevice(f"ue{number}", root / f"ue{number}") for number in range(1, count + 1)]


def with_drawn_abilities(
    config: FleetConfig, scenario: Scenario, devices: Sequence[LocalDevice]
) -> list[LocalDevice]:
    """Devices that can what the scenario's laws say, where it has some; the same for the same seed and number."""
    if not config.shaping.enabled or (scenario.memory is None and scenario.privacy is None):
        return list(devices)
    import jax
    import numpy as np

    from emutune.world import build_world
    from emutune.world.devices import draw_devices

    fleet = scenario.fleet.model_copy(update={"ues": len(devices)})
    laws = build_world(scenario.model_copy(update={"fleet": fleet})).devices
    drawn = draw_devices(jax.random.key(config.shaping.seed), laws, len(devices))
    private = np.zeros(len(devices), bool) if drawn.private is None else np.asarray(drawn.private)
    bits = np.full(len(devices), np.inf) if drawn.memory_bits is None else np.asarray(drawn.memory_bits)
    memory = [int(each / 8 / config.shaping.byte_scale) if np.isfinite(each) else None for each in bits]
    return [
        replace(device, abilities=Abilities(room, bool(own)))
        for device, room, own in zip(devices, memory, private, strict=True)
    ]


def write_documentation_tasks(config: FleetConfig, devices: Sequence[LocalDevice]) -> None:
    """Give each device that has no text one about Python, and the server what is held back of it."""
    from emutune.tuning.documentation import TASKS, task_text

    held_back = config.acceptance.held_back
    for number, device in enumerate(devices):
        if device.data.is_dir() and any(device.data.glob("*.txt")):
            continue
        task = TASKS[number % len(TASKS)]
        paragraphs = task_text(task).split("\n\n")
        kept = [text for number, text in enumerate(paragraphs) if number % _HELD_BACK]
        _write(device.data / f"{task}.txt", "\n\n".join(kept))
        if held_back is not None and not (held_back / f"{device.name}.txt").exists():
            _write(held_back / f"{device.name}.txt", "\n\n".join(paragraphs[::_HELD_BACK]))


def enrol_missing(config: FleetConfig, devices: Sequence[LocalDevice], url: str) -> None:
    """Credentials for every device that has none."""
    with opened_ledger(config) as ledger:
        known = {row.name for row in ledger.devices() if not row.revoked}
    for device in devices:
        if device.name not in known or not device.credentials.exists():
            enrol_device(config, device.name, device.credentials, url)


def free_port(host: str) -> int:
    """A port that nobody listens on."""
    family, kind, protocol, _, address = socket.getaddrinfo(host or None, 0, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind, protocol) as found:
        found.bind(address)
        return int(found.getsockname()[1])


@contextmanager
def processes() -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that are ended with the block, each given a moment to put its things away."""
    running: list[subprocess.Popen[str]] = []
    try:
        yield running
    finally:
        for process in running:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
        for process in running:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def start(command: Sequence[str], log: Path) -> subprocess.Popen[str]:
    """Start a process of the fleet; what it says goes to a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    # Every process computes with one thread: several of more threads than cores only wait for each other.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with log.open("a") as file:
        return subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment,
            text=True,
        )


def wait_for_server(process: subprocess.Popen[str], log: Path, url: str) -> None:
    """Until it answers.

    Raises:
        FleetError: it ended instead; the message is its own.
    """
    parts = urlsplit(url)
    address = str(parts.hostname), parts.port or 443
    end = time.monotonic() + _START_S
    while time.monotonic() < end:
        if process.poll() is not None:
            raise FleetError(f"the server ended: {_last_line(log)}")
        with suppress(OSError), socket.create_connection(address, timeout=0.2):
            return
        time.sleep(0.05)
    raise FleetError(f"the server did not start within {_START_S:g} s; see {log}")


def run_local_fleet(
    source: str | Path,
    config: FleetConfig,
    devices: Sequence[LocalDevice],
    catalogues: Sequence[Path],
    policy: str,
    started: Callable[[str], None] = lambda url: None,
) -> None:
    """Run a fleet on this machine until its steps are done.

    Args:
        source: the fleet's file, as the server is to read it.
        config: what it says.
        devices: who takes part.
        catalogues: the emulators, of each foundation model.
        policy: a run's directory, or a rule's name.
        started: told the server's URL once it answers.

    Raises:
        FleetError: the server ended early; the message is its own.
    """
    host = config.server.host
    port = config.server.port or free_port(host)
    # Where it listens at every address, the one that every certificate of its own names.
    url = url_of("localhost" if host in EVERY_ADDRESS else host, port)
    logs = config.server.directory / "logs"
    write_documentation_tasks(config, devices)
    enrol_missing(config, devices, url)
    emulators = [word for catalogue in catalogues for word in ("--catalogue", str(catalogue))]
    serve = [*COMMAND, "serve", str(source), *emulators, "--policy", policy]
    with processes() as running:
        server = start([*serve, "--port", str(port)], logs / "server.log")
        running.append(server)
        wait_for_server(server, logs / "server.log", url)
        started(url)
        for device in devices:
            running.append(start(device.command(url), logs / f"{device.name}.log"))
        while server.poll() is None:
            _check_devices(devices, running[1:], logs)
            time.sleep(0.1)
        if server.returncode:
            raise FleetError(f"the server ended: {_last_line(logs / 'server.log')}")
        for process in running:
            # A device that did not hear the server's end is ended with the block.
            with suppress(subprocess.TimeoutExpired):
                process.wait(30)


def _check_devices(
    devices: Sequence[LocalDevice], running: Sequence[subprocess.Popen[str]], logs: Path
) -> None:
    """A device that the user has to do something about ends all; one that was killed is lost, as in the field."""
    for device, process in zip(devices, running, strict=True):
        if process.poll() == 2:
            raise FleetError(f"device {device.name} ended: {_last_line(logs / f'{device.name}.log')}")


def _last_line(log: Path) -> str:
    lines = log.read_text("utf-8", errors="replace").strip().splitlines()
    return lines[-1].removeprefix("emutune: ") if lines else f"see {log}"


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as aside:
            aside.write_text(text, "utf-8")
    except OSError as error:
        raise FleetError(f"{path}: cannot be written ({error.strerror}); free some space") from error
