"""A fleet's server from its file: everything opened, checked and started."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from filelock import FileLock, Timeout

from emutune.errors import FleetError
from emutune.fleet.addresses import same_host, url_of
from emutune.fleet.config import LEDGER, LOCK, FleetConfig, Server
from emutune.fleet.ledger import Ledger
from emutune.fleet.protocol import Lease
from emutune.fleet.security import (
    LOOPBACK,
    Credentials,
    new_secret,
    secret_sha256,
    write_credentials,
)
from emutune.fleet.server.app import create_app, serve
from emutune.fleet.server.choices import Deciding
from emutune.fleet.server.dashboard.opening import open_board
from emutune.fleet.server.deciding import warm_up
from emutune.fleet.server.families import Families
from emutune.fleet.server.housekeeping import Housekeeping
from emutune.fleet.server.ledger_thread import LedgerThread
from emutune.fleet.server.orchestrator import Orchestrator
from emutune.fleet.server.pool import Pool, ProcessPool, open_pool
from emutune.fleet.server.renewal import Renewal, certificate_of
from emutune.fleet.server.routes import Shared
from emutune.fleet.shaping import TokenBucket
from emutune.tuning.inventory import Inventory


def enrol_device(config: FleetConfig, device: str, out: Path, url: str | None = None) -> str:
    """Add a device, or give it another token, and write its credentials file; returns the URL in it.

    Args:
        config: the fleet's file.
        device: its name.
        out: the credentials file; only the token's hash stays here.
        url: where the device reaches the server; from the fleet's file if not given.

    Raises:
        FleetError: the port is not fixed, the certificate is not for the URL's host, or the file cannot be
            written.
    """
    server = config.server
    if url is None and server.port == 0:
        raise FleetError("server.port: is 0, so the server's URL is not known yet; set a port, or give --url")
    url = url or url_of(server.reached_as[0], server.port)
    _certified(url, server)
    token, certificate = new_secret(), certificate_of(config)
    with opened_ledger(config) as ledger:
        write_credentials(
            out,
            Credentials(
                fleet=config.name,
                device=device,
                url=url,
                token=token,
                ca=certificate.authority,
            ),
        )
        ledger.add_device(device, secret_sha256(token))
    return url


def _certified(url: str, server: Server) -> None:
    """Devices must be able to check who answers at the URL that they are given."""
    parts = urlsplit(url)
    if parts.scheme != "https" or not parts.hostname:
        raise FleetError(f"--url: {url!r} is no URL of a fleet's server; give https://HOST:PORT")
    named = {same_host(name) for name in server.reached_as}
    if server.certificate is None:
        named.update(LOOPBACK)
    if same_host(parts.hostname) not in named:
        raise FleetError(
            f"--url: devices would not trust a server at {parts.hostname}, which its certificate does not name; add "
            "it to server.names in the fleet's file"
        )


@contextmanager
def opened_ledger(config: FleetConfig) -> Iterator[Ledger]:
    """The fleet's ledger."""
    directory = config.server.directory
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FleetError(f"server.directory: {directory} cannot be made ({error.strerror})") from error
    ledger = Ledger(directory / LEDGER)
    try:
        yield ledger
    finally:
        ledger.close()


async def run_server(
    config: FleetConfig,
    catalogues: Sequence[Inventory],
    decider: Deciding,
    *,
    started: Callable[[str], None] = lambda url: None,
    stepped: Callable[[int], None] = lambda step: None,
    judge: Pool | None = None,
    policy: str = "",
) -> None:
    """Serve a fleet until its steps are done, or until it is told to end.

    Args:
        config: the fleet's file.
        catalogues: the emulators of each foundation model of the policy's scenario, in their order.
        decider: the policy.
        started: told the URL once devices can come.
        stepped: told the number of every step that ends.
        judge: evaluates adapters; a worker process of its own if not given.
        policy: its name, for the dashboard.

    Raises:
        EmutuneError: something in the file cannot be had; nothing was changed.
    """
    if os.name == "nt":
        raise FleetError(
            "a fleet's server runs on Linux and macOS, not on Windows, whose machines can be devices"
        )
    families = Families(decider.scenario, catalogues)
    server, certificate = config.server, certificate_of(config)
    with _only_one(config), LedgerThread(server.directory / LEDGER) as ledger:
        await ledger(_same_fleet, config, families)
        devices = await ledger(Ledger.devices)
        await warm_up(decider, max(1, sum(not row.revoked and not row.left for row in devices)))
        async with _pools(config, judge) as (trainers, judging):
            hub = Orchestrator(config, ledger, families, decider, trainers, judging, stepped)
            board = open_board(config, ledger.path, families, policy)
            directories = {family.base: family.catalogue.directory for family in families}
            app = create_app(hub, ledger, directories, server.directory, config.limits, Links().bucket, board)
            listening = await serve(app, server.host, server.port, certificate.certificate, certificate.key)
            started(url_of(server.reached_as[0], listening.port))
            shared: Shared = app.state.fleet
            renewal = Renewal(config, certificate, listening.show)
            tidying = Housekeeping(ledger, server.directory, config.keep.days, hub.at_work, shared.forget)
            try:
                async with _beside(renewal.run(), tidying.run()):
                    await _until_told(asyncio.create_task(hub.run()))
                    await _forget_uploads(shared)
            finally:
                for job in hub.jobs:
                    job.cancel()
                await board.say_farewell()
                await listening.stop()
                board.close()


async def _forget_uploads(shared: Shared) -> None:
    """Once all steps are done nobody goes on with an upload."""
    for lease in sorted(shared.uploads.begun()):
        await shared.forget(None, lease, "all steps are done")


class Links:
    """The shaped downlink of every device: one bucket a lease."""

    def __init__(self) -> None:
        self._buckets: dict[str, tuple[str, TokenBucket]] = {}

    def bucket(self, device: str, lease: Lease) -> TokenBucket | None:
        """The bucket of a device's lease; None if the link is not shaped."""
        if lease.rate_bps is None:
            return None
        name, bucket = self._buckets.get(device, ("", None))
        if bucket is None or name != lease.lease:
            bucket = TokenBucket(lease.rate_bps)
            self._buckets[device] = (lease.lease, bucket)
        return bucket


async def _until_told(work: asyncio.Task[None]) -> None:
    """Until the work is done; SIGINT and SIGTERM end it before, and the next start goes on."""
    loop, told = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, told.set)
    waiting = asyncio.create_task(told.wait())
    try:
        await asyncio.wait([work, waiting], return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise KeyboardInterrupt
        work.result()
    finally:
        for task in (work, waiting):
            task.cancel()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


@asynccontextmanager
async def _beside(*work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Work that is done meanwhile, for as long as the block takes."""
    running = [asyncio.create_task(one) for one in work]
    try:
        yield
    finally:
        for task in running:
            task.cancel()


@asynccontextmanager
async def _pools(config: FleetConfig, judge: Pool | None) -> AsyncIterator[tuple[Pool, Pool]]:
    trainers = open_pool(config.at_server.pool, config.at_server.workers, config.jobs)
    # Judging waits for no training.
    judging = ProcessPool(1, config.jobs) if judge is None else judge
    try:
        yield trainers, judging
    finally:
        await trainers.close()
        await judging.close()


@contextmanager
def _only_one(config: FleetConfig) -> Iterator[None]:
    """Two servers on one ledger would both decide; the lock ends with the process, however it ends."""
    directory = config.server.directory
    directory.mkdir(parents=True, exist_ok=True)
    try:
        held = FileLock(directory / LOCK).acquire(blocking=False)
    except Timeout as error:
        raise FleetError(
            f"server.directory: {directory} is used by another server; end that one, or choose another directory"
        ) from error
    with held:
        yield


def _same_fleet(ledger: Ledger, config: FleetConfig, families: Families) -> None:
    for base, name in ledger.models().items():
        if base is not None and base not in {family.key for family in families}:
            raise FleetError(
                f"server.directory: its ledger has tasks of the model {name} ({base[:12]}), and no --catalogue is of "
                "it; give one, or choose another directory"
            )
    for key, value in (("fleet", config.name), ("base", next(iter(families)).base)):
        noted = ledger.meta(key)
        if noted not in (None, value):
            raise FleetError(
                f"server.directory: its ledger is of {key} {str(noted)[:40]!r}, not {value[:40]!r}; choose another "
                "directory for another fleet"
            )
        ledger.set_meta(key, value)
    ledger.set_models({family.key: family.name for family in families})
