"""A fleet's server from its file: everything opened, checked and started."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from emutune.errors import FleetError
from emutune.fleet.config import FleetConfig, Server
from emutune.fleet.ledger import Ledger
from emutune.fleet.protocol import Lease
from emutune.fleet.security import (
    LOOPBACK,
    Certificate,
    Credentials,
    new_secret,
    own_certificate,
    secret_sha256,
    self_made_certificate,
    write_credentials,
)
from emutune.fleet.server.app import create_app, serve
from emutune.fleet.server.choices import Deciding
from emutune.fleet.server.dashboard.opening import open_board
from emutune.fleet.server.deciding import warm_up
from emutune.fleet.server.orchestrator import Orchestrator
from emutune.fleet.server.pool import Pool, ProcessPool, open_pool
from emutune.fleet.server.routes import Shared
from emutune.fleet.shaping import TokenBucket
from emutune.tuning.inventory import Inventory

LEDGER = "ledger.sqlite"


def certificate_of(config: FleetConfig) -> Certificate:
    """The user's certificate, or one of the fleet's own authority, which is made when there is none.

    Raises:
        FleetError: it cannot be read, its key is another's, or it is not for a name that devices use.
    """
    server = config.server
    if server.certificate is None or server.key is None:
        return self_made_certificate(server.directory / "tls", server.reached_as)
    for name in server.reached_as:
        found = own_certificate(server.certificate, server.key, name, server.authority)
    return found


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
    url = url or f"https://{_bracketed(server.reached_as[0])}:{server.port}"
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
    named = {name.lower() for name in server.reached_as}
    if server.certificate is None:
        named.update(LOOPBACK)
    if parts.hostname not in named:
        raise FleetError(
            f"--url: devices would not trust a server at {parts.hostname}, which its certificate does not name; add "
            "it to server.names in the fleet's file"
        )


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


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
    catalogue: Inventory,
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
        catalogue: the emulators.
        decider: the policy.
        started: told the URL once devices can come.
        stepped: told the number of every step that ends.
        judge: evaluates adapters; a worker process of its own if not given.
        policy: its name, for the dashboard.

    Raises:
        EmutuneError: something in the file cannot be had; nothing was changed.
    """
    certificate = certificate_of(config)
    with _only_one(config), opened_ledger(config) as ledger:
        _same_fleet(ledger, config, catalogue)
        await warm_up(decider, max(1, sum(not row.revoked and not row.left for row in ledger.devices())))
        async with _pools(config, judge) as (trainers, judging):
            hub = Orchestrator(config, ledger, catalogue, decider, trainers, judging, stepped)
            board = open_board(config, ledger, catalogue, policy)
            app = create_app(
                hub,
                ledger,
                catalogue.directory,
                config.server.directory,
                config.limits,
                Links().bucket,
                board,
            )
            server = config.server
            listening = await serve(app, server.host, server.port, certificate.certificate, certificate.key)
            started(f"https://{_bracketed(server.reached_as[0])}:{listening.port}")
            try:
                await _until_told(asyncio.create_task(hub.run()))
                await _forget_uploads(app.state.fleet)
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
    import fcntl

    directory = config.server.directory
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "server.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise FleetError(
                f"server.directory: {directory} is used by another server; end that one, or choose another directory"
            ) from error
        lock.write(str(os.getpid()))
        yield


def _same_fleet(ledger: Ledger, config: FleetConfig, catalogue: Inventory) -> None:
    for key, value in (("fleet", config.name), ("base", catalogue.info.base)):
        noted = ledger.meta(key)
        if noted not in (None, value):
            raise FleetError(
                f"server.directory: its ledger is of {key} {str(noted)[:40]!r}, not {value[:40]!r}; choose another "
                "directory for another fleet"
            )
        ledger.set_meta(key, value)
