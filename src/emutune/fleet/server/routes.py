"""What is done on each route of the protocol; the devices that ask are authenticated here."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, NamedTuple

from fastapi import Depends, Header, Query, Request, Response
from fastapi import Path as InPath
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.types import ASGIApp, Receive, Scope, Send

from emutune.errors import AdapterError
from emutune.fleet.config import Limits
from emutune.fleet.ledger import Ledger
from emutune.fleet.protocol import (
    Enrolment,
    FleetInfo,
    Identifier,
    Lease,
    Received,
    Report,
    Result,
    Sha256,
    Transferred,
)
from emutune.fleet.server import bodies
from emutune.fleet.server.blobs import SentFile
from emutune.fleet.server.connections import Connection
from emutune.fleet.server.families import UntrainableError
from emutune.fleet.server.hub import Hub
from emutune.fleet.server.intake import Expected, Uploads, receive_adapter
from emutune.fleet.server.ledger_thread import AskLedger
from emutune.fleet.server.places import Places
from emutune.fleet.server.refusals import Refused
from emutune.fleet.shaping import TokenBucket
from emutune.tuning.manifest import Emulator

log = logging.getLogger(__name__)

BucketOf = Callable[[str, Lease], TokenBucket | None]
LONGEST_WAIT_S = 30.0
_LOOK_AGAIN_S = 0.1
_TOKENIZER_FILE = "^[0-9A-Za-z_][0-9A-Za-z._-]{0,127}$"

_bearer = HTTPBearer(
    auto_error=False, description="The hexadecimal key that the device drew and enrolled with."
)


class _Granted(NamedTuple):
    """What a device may fetch: its last lease to train, and the shards of the emulator of that, which is of a model."""

    lease: Lease
    base: str
    shards: frozenset[str]


class Shared:
    """What the routes share."""

    def __init__(
        self,
        hub: Hub,
        ledger: AskLedger,
        catalogues: Mapping[str, Path],
        work: Path,
        limits: Limits,
        bucket_of: BucketOf,
    ) -> None:
        self.hub, self.ledger, self.catalogues, self.bucket_of = hub, ledger, catalogues, bucket_of
        self._granted: dict[str, _Granted] = {}
        self.adapters = work / "adapters"
        self.data_bytes, self.adapter_bytes = int(limits.data_mb * 1e6), int(limits.adapter_mb * 1e6)
        self.open_tasks = limits.open_tasks
        self.places = Places(ledger)
        uploads = work / "uploads"
        for folder in (self.adapters, uploads):
            folder.mkdir(parents=True, exist_ok=True)
        for cut_short in self.adapters.glob("*.partial"):
            cut_short.unlink()
        self.uploads = Uploads(uploads, self._damaged)

    def leased(self, device: str, lease: Lease) -> None:
        """A device is told of a lease: what it may fetch is looked up again, if that is another."""
        granted = self._granted.get(device)
        if granted is not None and lease.kind == "train" and granted.lease.lease != lease.lease:
            del self._granted[device]

    async def shard_for(self, device: str, sha256: str) -> tuple[Path, str, TokenBucket | None]:
        """The file of a shard of the device's last emulator, and the lease and the link that it goes over, also late.

        Raises:
            Refused: 404, as if there were no such shard, if that emulator has none; who needs a part of the
                model for no lease of its own is not given it.
        """
        granted = self._granted.get(device)
        if granted is None or sha256 not in granted.shards:
            granted = await self.ledger(_granted, device)
            if granted is None or sha256 not in granted.shards:
                raise Refused(404, "there is no such file")
            self._granted[device] = granted
        path = self.catalogues[granted.base] / "shards" / f"{sha256}.safetensors"
        return path, granted.lease.lease, self.bucket_of(device, granted.lease)

    async def expected(self, device: str, lease: str) -> Expected:
        """The data that an upload lease waits for."""
        size, sha256 = await self.hub.data_size(device, lease)

        async def taken() -> bool:
            row = await self.ledger(Ledger.lease, device, lease)
            return row is not None and row.data_complete

        async def take(path: Path) -> None:
            await self.hub.data_received(device, lease, path)

        return Expected(lease, size, sha256, taken, take)

    async def forget(self, device: str | None, lease: str, reason: str) -> None:
        """Delete what arrived of an upload that nobody goes on with, and note that."""
        if await self.uploads.discard(lease):
            await self.ledger(Ledger.audit, "data deleted", device, lease, reason)

    async def _damaged(self, lease: str) -> None:
        detail = "the data that arrived have another SHA-256 than reported; they are to be sent again"
        log.warning("lease %s: %s", lease, detail)
        await self.ledger(Ledger.audit, "damaged upload", None, lease, detail)


def _granted(ledger: Ledger, device: str) -> _Granted | None:
    lease = ledger.last_training(device)
    if lease is None or lease.emulator is None:
        return None
    emulator = Emulator.model_validate(lease.emulator)
    # Of the manifest, which is most of a lease, nothing else is of use.
    told = lease.model_copy(update={"emulator": None})
    return _Granted(told, sys.intern(emulator.base), frozenset(map(sys.intern, emulator.shards)))


class Asker(NamedTuple):
    """A device that asks."""

    fleet: Shared
    device: str


class Leased(NamedTuple):
    """A device that asks about a lease of its own."""

    fleet: Shared
    device: str
    lease: Lease


# Every dependency costs every request, and each use of it again, so that there are few and nested ones.
async def _asker(
    request: Request, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]
) -> Asker:
    """Who asks. Every request costs one hash and one look-up, whatever key it brings."""
    fleet: Shared = request.app.state.fleet
    key = "" if credentials is None else credentials.credentials
    key_sha256 = hashlib.sha256(key.encode()).hexdigest()
    name = await fleet.ledger(Ledger.device_of_key, key_sha256)
    if name is None or not key:
        raise Refused(401, "the key is missing, unknown or revoked", {"WWW-Authenticate": "Bearer"})
    request.state.device = name
    _identify(request, name, key_sha256)
    host = "" if request.client is None else request.client.host
    request.state.use = await fleet.places.begin(name, host)
    return Asker(fleet, name)


def _identify(request: Request, device: str, key_sha256: str) -> None:
    """The connection of a request is a device's from now on."""
    connection: Connection | None = getattr(request.state, "connection", None)
    if connection is not None and not connection.identified(device, key_sha256):
        raise Refused(
            503, "the server has no room for more devices", {"Retry-After": "10", "Connection": "close"}
        )


class Using:
    """Middleware that ends the use of a device's key with its request."""

    def __init__(self, app: ASGIApp, places: Places) -> None:
        self._app, self._places = app, places

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        try:
            await self._app(scope, receive, send)
        finally:
            use = scope.get("state", {}).get("use")
            if use is not None:
                self._places.end(use)


Asking = Annotated[Asker, Depends(_asker)]


async def _leased(request: Request, asker: Asking, lease: Annotated[Identifier, InPath()]) -> Leased:
    """The lease of the path, if it is the asking device's; whether it is another's stays unsaid."""
    fleet, device = asker
    found = await fleet.hub.lease_of(device, lease)
    if found is None:
        raise Refused(404, f"{device} has no lease {lease}")
    request.state.lease = lease
    return Leased(fleet, device, found)


AboutLease = Annotated[Leased, Depends(_leased)]


async def _upload(leased: AboutLease) -> Leased:
    lease = leased.lease
    if lease.kind != "upload":
        raise Refused(409, f"lease {lease.lease} is of kind {lease.kind}, which sends no data")
    return leased


Uploading = Annotated[Leased, Depends(_upload)]
Wait = Annotated[float, Query(ge=0, le=LONGEST_WAIT_S, description="Seconds to wait for an answer to come.")]
RangeHeader = Annotated[str | None, Header(alias="Range", description="`bytes=N-` goes on from byte N.")]


async def enrolment(request: Request) -> None:
    """A device takes its place with the token from its credentials file."""
    fleet: Shared = request.app.state.fleet
    asked = await bodies.message(request, Enrolment)
    token_sha256 = hashlib.sha256(asked.token.encode()).hexdigest()
    if not await fleet.ledger(Ledger.enrol, asked.device, token_sha256, asked.key_sha256):
        raise Refused(403, f"{asked.device}: the token is unknown or was used with another key")
    _identify(request, asked.device, asked.key_sha256)
    log.info("%s enrolled", asked.device)


async def fleet_info(asker: Asking) -> FleetInfo:
    """What a device has to know before its first task."""
    return asker.fleet.hub.info()


async def reports(request: Request, asker: Asking) -> None:
    """A device has a task."""
    fleet, device = asker
    report = await bodies.message(request, Report)
    if not await fleet.ledger(Ledger.may_report, device, report.task, fleet.open_tasks):
        raise Refused(
            429,
            f"nothing was decided yet about the last {fleet.open_tasks} tasks of this device; wait until that is done",
            {"Retry-After": "10"},
        )
    try:
        await fleet.hub.reported(device, report)
    except UntrainableError as error:
        raise Refused(422, str(error)) from error


async def lease(asker: Asking, wait: Wait = 0.0) -> Response:
    """The device's lease, as soon as there is one."""
    fleet, device = asker
    found = await fleet.hub.next_lease(device, wait)
    if found is None:
        return Response(status_code=204)
    fleet.leased(device, found)
    # Not as an object, which would be checked and copied once more: all devices are told at the same time.
    return Response(found.model_dump_json(), media_type="application/json")


async def shard(
    request: Request,
    asker: Asking,
    sha256: Annotated[Sha256, InPath()],
    range_: RangeHeader = None,
) -> Response:
    """A shard of the emulator that the device's last lease to train names, over the link of that lease."""
    fleet, device = asker
    path, request.state.fetched_for, link = await fleet.shard_for(device, sha256)
    return SentFile(request, path, link, tag=sha256)


async def tokenizer(
    request: Request,
    asker: Asking,
    name: Annotated[str, InPath(pattern=_TOKENIZER_FILE)],
    model: Annotated[Sha256 | None, Query(description="Hash of the model; the first if not given.")] = None,
    range_: RangeHeader = None,
) -> Response:
    """A file of a model's tokenizer."""
    fleet = asker.fleet
    found = next((one for one in fleet.hub.info().models if model in (None, one.base)), None)
    sha256 = None if found is None else found.tokenizer.get(name)
    if found is None or sha256 is None:
        raise Refused(404, "the tokenizer has no such file; GET /v1/fleet names them")
    return SentFile(request, fleet.catalogues[found.base] / "tokenizer" / name, tag=sha256)


async def get_adapter(
    request: Request,
    leased: AboutLease,
    wait: Wait = 0.0,
    range_: RangeHeader = None,
) -> Response:
    """The adapter that training starts from, or with ``upload`` the one that the server trained."""
    fleet, device, lease = leased
    may_come = lease.kind == "upload" or lease.start is not None
    until = time.monotonic() + wait
    while (path := await fleet.hub.start_adapter(device, lease.lease)) is None:
        if not may_come or time.monotonic() >= until:
            return Response(status_code=204)
        await asyncio.sleep(_LOOK_AGAIN_S)
    return SentFile(request, path)


async def put_adapter(request: Request, leased: AboutLease) -> None:
    """The adapter that the device trained."""
    fleet, device, lease = leased
    if lease.kind != "train":
        raise Refused(409, f"lease {lease.lease} is of kind {lease.kind}, which takes no adapter")
    asked = await fleet.hub.adapter_asked(device, lease.lease)
    path, new = await receive_adapter(request, fleet.adapters, fleet.adapter_bytes, asked)
    row = await fleet.ledger(Ledger.lease, device, lease.lease)
    first = None if row is None else row.adapter_sha256
    if first is not None and path.stem != first:
        log.info("%s: lease %s has an adapter; another one does not count", device, lease.lease)
        if new:
            path.unlink(missing_ok=True)
        return
    try:
        await fleet.hub.adapter_received(device, lease.lease, path)
    except AdapterError:
        if new:
            path.unlink(missing_ok=True)
        raise


async def get_data(leased: Uploading) -> Received:
    """How far an upload is; ends a request that still writes to it."""
    fleet, device, lease = leased
    return await fleet.uploads.received(await fleet.expected(device, lease.lease))


async def patch_data(
    request: Request,
    leased: Uploading,
    offset: Annotated[int, Query(ge=0, le=1 << 50, description="The byte that the body starts with.")],
) -> Received:
    """The bytes of an upload from ``offset`` on; when it is whole, its SHA-256 is checked.

    If that is not the one reported, the upload starts again: the answer is ``{"bytes": 0, "complete": false}``.
    """
    fleet, device, lease = leased
    expected = await fleet.expected(device, lease.lease)
    if expected.size > fleet.data_bytes:
        raise Refused(413, f"a task may have at most {fleet.data_bytes} bytes of data here")
    return await fleet.uploads.append(request, expected, offset)


async def transferred(request: Request, leased: AboutLease) -> None:
    """The device has what its lease names, or has sent it."""
    fleet, device, lease = leased
    await fleet.hub.transferred(device, lease.lease, await bodies.message(request, Transferred))


async def result(request: Request, leased: AboutLease) -> None:
    """The device is done with a lease."""
    fleet, device, lease = leased
    message = await bodies.message(request, Result)
    await fleet.hub.result(device, lease.lease, message)
    if message.outcome == "failed":
        await fleet.forget(device, lease.lease, "the lease failed")


async def leave(asker: Asking) -> None:
    """The device takes no part any more."""
    fleet, device = asker
    lease = await fleet.ledger(Ledger.open_lease, device)
    await fleet.hub.left(device)
    if lease is not None:
        await fleet.forget(device, lease.lease, "the device left")
