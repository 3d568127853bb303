"""Files that come in: data of uploads, piece by piece over any number of requests, and adapters."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import uuid
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from anyio import CancelScope
from anyio.to_thread import run_sync
from fastapi import Request
from safetensors import SafetensorError, safe_open

from emutune.files import sync_directory
from emutune.fleet.protocol import Received
from emutune.fleet.server.bodies import gathered, pieces
from emutune.fleet.server.refusals import Refused
from emutune.tuning.adapter_manifest import Asked

HEADER_BYTES = 1 << 20


@dataclass(frozen=True)
class Expected:
    """The data that a lease waits for.

    Attributes:
        lease: which; a name that was looked up.
        size: bytes of the whole.
        sha256: of the whole.
        taken: whether the data arrived whole and were taken over; that must outlive a kill.
        take: takes the file of the whole, verified data over, by moving or copying it; may be called again
            until ``taken`` says so.
    """

    lease: str
    size: int
    sha256: str
    taken: Callable[[], Awaitable[bool]]
    take: Callable[[Path], Awaitable[None]]


@dataclass
class _Upload:
    """One upload: only the latest request that goes on with it may write."""

    turn: int = 0
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class Uploads:
    """Data of leases as they arrive: ``LEASE.part``, and once they are whole and verified ``LEASE.data``.

    What arrived survives a kill at any moment.

    Args:
        directory: where they are.
        damaged: told of which lease the data were another than expected.
    """

    def __init__(self, directory: Path, damaged: Callable[[str], Awaitable[None]]) -> None:
        self._directory, self._damaged = directory, damaged
        self._open: dict[str, _Upload] = {}

    async def received(self, expected: Expected) -> Received:
        """How far an upload is; a request that still writes to it ends, since nobody waits for it."""
        upload = self._take_turn(expected.lease)
        async with upload.lock:
            return await self._settle(expected)

    async def append(self, request: Request, expected: Expected, offset: int) -> Received:
        """Write a request's body to where an upload ends.

        Whatever arrived before a connection broke or a disk was full stays.

        Raises:
            Refused: 409 if the upload ends elsewhere or another request goes on with it; 413 if there is
                more than the upload lacks, of which nothing is kept.
            OSError: the disk is full.
        """
        upload = self._take_turn(expected.lease)
        turn = upload.turn
        async with upload.lock:
            have = (await self._settle(expected)).bytes
        if offset != have:
            raise Refused(409, f"the server has {have} bytes; go on from there")
        if offset < expected.size:
            await self._write(request, expected, upload, turn, offset)
        else:
            async for _ in pieces(request, 0):
                pass
        async with upload.lock:
            return await self._settle(expected)

    async def discard(self, lease: str) -> bool:
        """Delete what arrived of an upload that nobody goes on with; whether there was any."""
        upload = self._take_turn(lease)
        async with upload.lock:
            there = [path for path in (self._part(lease), self._data(lease)) if path.exists()]
            for path in there:
                path.unlink()
        self._open.pop(lease, None)
        return bool(there)

    def begun(self) -> set[str]:
        """Leases of which something has arrived that was not taken over."""
        return {path.stem for pattern in ("*.part", "*.data") for path in self._directory.glob(pattern)}

    async def _write(
        self, request: Request, expected: Expected, upload: _Upload, turn: int, offset: int
    ) -> None:
        at, path = offset, self._part(expected.lease)
        file = await run_sync(_open_part, path)
        try:
            async for piece in gathered(pieces(request, expected.size - offset)):
                async with upload.lock:
                    if upload.turn != turn:
                        raise Refused(409, "another request goes on with this upload")
                    await run_sync(_write_all, file, piece, at)
                at += len(piece)
        except Refused as refused:
            if refused.status_code == 413 and upload.turn == turn:
                os.ftruncate(file, offset)
                at = offset
            raise
        finally:
            if at == 0 and upload.turn == turn:
                path.unlink(missing_ok=True)
            with CancelScope(shield=True):
                await run_sync(_sync_and_close, file)

    async def _settle(self, expected: Expected) -> Received:
        """How far it is; what has become whole is verified and taken over."""
        part, data = self._part(expected.lease), self._data(expected.lease)
        if await expected.taken():
            # A kill may have come before whoever copied the file could remove it.
            data.unlink(missing_ok=True)
            self._open.pop(expected.lease, None)
            return Received(bytes=expected.size, complete=True)
        if not data.exists():
            have = part.stat().st_size if part.exists() else 0
            if have < expected.size:
                return Received(bytes=have, complete=False)
            if have > expected.size or await run_sync(_sha256, part) != expected.sha256:
                await self._damaged(expected.lease)
                part.unlink()
                return Received(bytes=0, complete=False)
            await run_sync(_move, part, data)
        await expected.take(data)
        self._open.pop(expected.lease, None)
        return Received(bytes=expected.size, complete=True)

    def _take_turn(self, lease: str) -> _Upload:
        """Whoever writes to the upload of a lease notices, and ends."""
        upload = self._open.setdefault(lease, _Upload())
        upload.turn += 1
        return upload

    def _part(self, lease: str) -> Path:
        return self._directory / f"{lease}.part"

    def _data(self, lease: str) -> Path:
        return self._directory / f"{lease}.data"


async def receive_adapter(request: Request, directory: Path, limit: int, asked: Asked) -> tuple[Path, bool]:
    """Write a request's body as ``directory/SHA256.safetensors``, if it is the adapter that is asked for.

    Its header is checked before anything after it is kept, its values once they are there.

    Returns:
        The path, and whether it is new.

    Raises:
        Refused: 413 if it is too long, 422 if it is no safetensors file, has too long a header or numbers that are
            not finite.
        AdapterError: it is another adapter.
        OSError: the disk is full; nothing is left behind.
    """
    aside = directory / f"{uuid.uuid4().hex}.partial"
    digest, at, start = hashlib.sha256(), 0, b""
    length: int | None = None
    file = await run_sync(_open_part, aside)
    try:
        async for piece in gathered(pieces(request, limit)):
            if length is None:
                start += piece
                length = await run_sync(_check_start, start, limit, asked)
            if length is not None and at + len(piece) > length:
                raise Refused(422, "no safetensors file: it goes on after its tensors")
            await run_sync(_write_all, file, piece, at)
            digest.update(piece)
            at += len(piece)
        path = directory / f"{digest.hexdigest()}.safetensors"
        return path, await run_sync(_keep, file, aside, path)
    finally:
        os.close(file)
        with suppress(OSError):
            aside.unlink()


def _check_start(start: bytes, limit: int, asked: Asked) -> int | None:
    """Refuse a header that is too long, or another adapter's; how long the file is, once its header is whole."""
    length = int.from_bytes(start[:8], "little")
    if len(start) >= 8 and not 2 <= length <= min(HEADER_BYTES, limit):
        raise Refused(422, f"no safetensors file: its header must have at most {HEADER_BYTES} bytes")
    if len(start) >= 9 and start[8:9] != b"{":
        raise Refused(422, "no safetensors file: its header is no JSON object")
    if len(start) < 8 + length:
        return None
    try:
        header = json.loads(start[8 : 8 + length], object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise _no_safetensors(error) from error
    asked.check(header)
    return 8 + length + asked.bytes


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object; of a name that comes twice, readers differ about which counts."""
    if len({name for name, _ in pairs}) < len(pairs):
        raise ValueError("a name comes twice in its header")
    return dict(pairs)


def _check_safetensors(path: Path) -> None:
    """Compare a file's length with its header, and look at every number.

    Raises:
        Refused: 422.
    """
    try:
        with safe_open(path, "np") as opened:
            for name in opened.keys():  # noqa: SIM118
                if not np.isfinite(opened.get_tensor(name)).all():
                    raise ValueError(f"tensor {name} has numbers that are not finite")
    except (SafetensorError, ValueError) as error:
        raise _no_safetensors(error) from error


def _keep(file: int, aside: Path, path: Path) -> bool:
    """Move what was written to its place, once it is on the disk and checked; whether it is new there."""
    os.fsync(file)
    _check_safetensors(aside)
    new = not path.exists()
    _move(aside, path)
    return new


def _no_safetensors(error: Exception) -> Refused:
    return Refused(422, f"no safetensors file: {ascii(str(error))[:200]}")


def _open_part(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)


def _write_all(file: int, piece: bytes, at: int) -> None:
    view = memoryview(piece)
    while view:
        written = os.pwrite(file, view, at)
        view, at = view[written:], at + written


def _sync_and_close(file: int) -> None:
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _move(source: Path, target: Path) -> None:
    os.replace(source, target)
    sync_directory(target.parent)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
