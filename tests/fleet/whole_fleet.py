"""A whole fleet in one process: real agents, real application, real orchestrator, requests carried in memory."""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
from directories import catalogue_of, generated_text

from emutune.fleet.config import LEDGER, FleetConfig, load_fleet
from emutune.fleet.database import utc_now
from emutune.fleet.device import work
from emutune.fleet.device.abilities import ANYTHING, Abilities
from emutune.fleet.device.agent import run_device
from emutune.fleet.device.client import Backoff, FleetClient
from emutune.fleet.ledger import Ledger
from emutune.fleet.security import read_credentials
from emutune.fleet.server.app import create_app
from emutune.fleet.server.choices import Candidate, Choice, Forecast, Opening
from emutune.fleet.server.decide import open_decider
from emutune.fleet.server.families import Families
from emutune.fleet.server.ledger_thread import LedgerThread
from emutune.fleet.server.orchestrator import Orchestrator
from emutune.fleet.server.run import Links, enrol_device
from emutune.fleet.server.worker import run_job
from emutune.scenario import Scenario, load_scenario
from emutune.tuning.catalogue import Catalogue, open_catalogue

FLEET = """
name = "test"
[server]
port = 8443
[steps]
count = {count}
gather_s = 10.0
deadline_s = 60.0
[shaping]
time_scale = 1000.0
[training]
steps = 2
batch = 2
block = 16
width = 2
"""


# Making a model is no matter for two threads at once, and no two devices share a process outside of tests.
_ONE_AT_A_TIME = threading.Lock()


def alone(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        with _ONE_AT_A_TIME:
            return function(*arguments, **named)

    return call


work.train_adapter = alone(work.train_adapter)
work.perplexity_ratio = alone(work.perplexity_ratio)


class ThreadPool:
    """Does jobs in this process."""

    async def run(self, job: Any) -> dict[str, Any]:
        return await asyncio.to_thread(alone(run_job), job)

    async def close(self) -> None:
        pass


class DecidingHere:
    """Decides in this process."""

    def __init__(self, policy: str, scenario: Scenario, **opening: Any) -> None:
        self._decider = open_decider(Opening(policy=policy, scenario=scenario, **opening))
        self.scenario = self._decider.scenario

    async def decide(self, step: int, candidates: Sequence[Candidate]) -> list[Choice]:
        return self._decider.decide(step, candidates)

    async def forecast(self, *question: Any) -> list[Forecast]:
        return self._decider.forecast(*question)


def catalogue_at(folder: Path) -> Catalogue:
    """A tiny model's emulators; eight layers, six of them between the adapter layers."""
    if (folder / "catalogue" / "catalogue.json").exists():
        return open_catalogue(folder / "catalogue")
    return catalogue_of(folder)


def two_catalogues(folder: Path) -> tuple[Catalogue, Catalogue]:
    """Emulators of two tiny models, which are called alpha and beta."""
    return (
        catalogue_of(folder / "one", name="alpha"),
        catalogue_of(folder / "other", "llama", name="beta"),
    )


def scenario_of(catalogue: Catalogue, *others: Catalogue, cache_gb: float | None = None) -> Scenario:
    """A world of the models of catalogues, which are as large as the first there."""
    layers = len(catalogue.info.middle)
    changes = [
        f"model.layers={layers}",
        f'model.base="{catalogue.info.base}"',
        f"retention.min={1 / layers}",
        "retention.max=1.0",
    ]
    if others:
        rows = ", ".join(
            f'{{size_gb=0.003179968, layers={len(other.info.middle)}, base="{other.info.base}"}}'
            for other in others
        )
        cache = "" if cache_gb is None else f", cache_gb={cache_gb}"
        changes.append(f"families={{persistence=0.5, others=[{rows}]{cache}}}")
    return load_scenario("reference", changes)


@dataclass
class Carrier(httpx2.AsyncBaseTransport):
    """Carries requests to the application that runs now; while none runs, nothing connects."""

    app: Any = None
    held: dict[str, tuple[str, float]] = field(default_factory=dict)
    under_way: set[asyncio.Task[Any]] = field(default_factory=set)

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        await self._held_back(request)
        if (app := self.app) is None:
            raise httpx2.ConnectError("nobody listens")
        task = asyncio.ensure_future(httpx2.ASGITransport(app).handle_async_request(request))
        self.under_way.add(task)
        try:
            return await task
        except asyncio.CancelledError as error:
            if task.cancelled() and self.app is not app:
                raise httpx2.ReadError("the server went away") from error
            raise
        finally:
            self.under_way.discard(task)

    def hold(self, device: str, last_part: str, seconds: float) -> None:
        """Keep a device's next request whose path ends so for a while."""
        self.held[device] = (last_part, seconds)

    async def _held_back(self, request: httpx2.Request) -> None:
        for device, (last_part, seconds) in list(self.held.items()):
            path = request.url.path
            if path.endswith(last_part) and f"-{device}/" in path:
                del self.held[device]
                await asyncio.sleep(seconds)

    def cut(self) -> None:
        """The server is gone, and with it every request under way."""
        self.app = None
        for task in self.under_way:
            task.cancel()


def write_texts(data: Path, seed: int, others: Sequence[str] = (), words: int = 1200) -> None:
    """A device's text of the first model, and one of each other."""
    data.mkdir(parents=True, exist_ok=True)
    (data / "text.txt").write_text(generated_text(words, seed=seed))
    for number, name in enumerate(others, 1):
        (data / name).mkdir()
        (data / name / "text.txt").write_text(generated_text(words, seed=seed + 100 * number))


class WholeFleet:
    """Server and devices in one process.

    Attributes:
        now: what the server's ledger notes as the time.
    """

    now = staticmethod(utc_now)

    def __init__(
        self,
        folder: Path,
        catalogue: Catalogue,
        *others: Catalogue,
        count: int = 3,
        policy: str = "fixed",
        cache_gb: float | None = None,
    ) -> None:
        self.folder, self.catalogue, self.others = folder, catalogue, others
        folder.mkdir(exist_ok=True)
        file = folder / "fleet.toml"
        file.write_text(FLEET.format(count=count))
        self.config: FleetConfig = load_fleet(file)
        scenario = scenario_of(catalogue, *others, cache_gb=cache_gb)
        self.decider = DecidingHere(policy, scenario, shaped=self.config.shaping.enabled)
        self.carrier = Carrier()
        held_back = self.config.server.directory / "held_back"
        held_back.mkdir(parents=True)
        (held_back / "default.txt").write_text(generated_text(400, seed=9))

    def add_device(self, name: str, words: int = 1200) -> None:
        enrol_device(self.config, name, self.folder / f"{name}.json")
        data = self.folder / name / "data"
        write_texts(data, int(name[2:]), [other.directory.name for other in self.others], words)

    @asynccontextmanager
    async def server(self) -> Any:
        """The server, as long as the block lasts; yields the task that ends with the last step."""
        with ExitStack() as stack:
            ledger = stack.enter_context(LedgerThread(self.config.server.directory / LEDGER, self.now))
            pool = ThreadPool()
            families = Families(self.decider.scenario, [self.catalogue, *self.others])
            hub = Orchestrator(self.config, ledger, families, self.decider, pool, pool)
            self.carrier.app = create_app(
                hub,
                ledger,
                {family.base: family.catalogue.directory for family in families},
                self.config.server.directory,
                self.config.limits,
                Links().bucket,
            )
            self.hub = hub
            steps = asyncio.create_task(hub.run())
            try:
                yield steps
            finally:
                self.carrier.cut()
                steps.cancel()
                for job in hub.jobs:
                    job.cancel()
                await asyncio.gather(steps, *hub.jobs, return_exceptions=True)

    async def device(
        self,
        name: str,
        tasks: int | None = None,
        cache_bytes: int = 10**9,
        abilities: Abilities = ANYTHING,
    ) -> int:
        """A device at work."""
        backoff = Backoff(first_s=0.01, longest_s=0.05)
        client = FleetClient(read_credentials(self.folder / f"{name}.json"), self.carrier, backoff=backoff)
        async with client:
            folder = self.folder / name
            data, cache = folder / "data", folder / "cache"
            return await run_device(client, data, cache, cache_bytes, tasks, abilities=abilities)

    def ledger(self) -> Ledger:
        return Ledger(self.config.server.directory / "ledger.sqlite")
