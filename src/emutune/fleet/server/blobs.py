"""Files that go out: shards, adapters and the tokenizer, whole or in part."""

from __future__ import annotations

import asyncio
import os
import re
import stat
from collections.abc import AsyncIterator
from io import FileIO
from pathlib import Path

from anyio import CancelScope
from anyio.to_thread import run_sync
from fastapi import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from emutune.fleet.server.refusals import Refused
from emutune.fleet.shaping import TokenBucket

PIECE_BYTES = 1 << 20
_RANGE = re.compile(r"bytes=(\d{1,18})?-(\d{1,18})?")


class _FileResponse(StreamingResponse):
    """Part of an open file, read piece by piece in a thread while the piece before it is sent."""

    def __init__(
        self,
        file: FileIO,
        part: range,
        pace: TokenBucket | None,
        status: int,
        headers: dict[str, str],
    ) -> None:
        super().__init__(self._pieces(), status, headers, "application/octet-stream")
        self._file, self._part, self._pace = file, part, pace

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._file.close()

    async def _pieces(self) -> AsyncIterator[bytes]:
        loop = asyncio.get_running_loop()
        size = PIECE_BYTES if self._pace is None else self._pace.piece_bytes
        at = self._part.start

        def ahead() -> asyncio.Future[bytes]:
            wanted = min(size, self._part.stop - at)
            return loop.run_in_executor(None, os.pread, self._file.fileno(), wanted, at)

        pending = ahead()
        try:
            while at < self._part.stop:
                piece = await asyncio.shield(pending)
                if not piece:
                    raise RuntimeError("a file became shorter while it was sent")
                at += len(piece)
                pending = ahead()
                if self._pace is not None:
                    await self._pace.take(len(piece))
                yield piece
        finally:
            # The file must not be closed under the thread that reads it.
            with CancelScope(shield=True):
                await asyncio.wait({pending})


async def send_file(
    request: Request, path: Path, pace: TokenBucket | None = None, tag: str | None = None
) -> Response:
    """A file, or the part of it that the request's ``Range`` asks for.

    Args:
        request: whose ``Range`` and ``If-Range`` count.
        path: of the file.
        pace: the link it goes over; as fast as can be if None.
        tag: what identifies its content.

    Raises:
        Refused: 404 if there is no such file, 416 if the range lies outside.
    """
    try:
        file = await run_sync(lambda: FileIO(path, "r"))
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise Refused(404, "there is no such file") from error
    try:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise Refused(404, "there is no such file")
        part = _part(request, status.st_size, tag)
    except BaseException:
        file.close()
        raise
    headers = {"Accept-Ranges": "bytes"}
    if tag is not None:
        headers["ETag"] = f'"{tag}"'
    if part is None:
        part = range(status.st_size)
        return _FileResponse(file, part, pace, 200, {**headers, "Content-Length": str(len(part))})
    headers |= {
        "Content-Length": str(len(part)),
        "Content-Range": f"bytes {part.start}-{part.stop - 1}/{status.st_size}",
    }
    return _FileResponse(file, part, pace, 206, headers)


def _part(request: Request, size: int, tag: str | None) -> range | None:
    """The bytes that are asked for; None if all, which also answers a range that cannot be understood."""
    match = _RANGE.fullmatch(request.headers.get("range", "").strip())
    if match is None or match.groups() == (None, None):
        return None
    if_range = request.headers.get("if-range")
    if if_range is not None and if_range != f'"{tag}"':
        return None
    first, last = match.groups()
    if first is None:
        part = range(max(0, size - int(last)), size)
    else:
        part = range(int(first), size if last is None else min(int(last) + 1, size))
        if last is not None and int(last) < int(first):
            return None
    if not part:
        raise Refused(
            416, f"the file has {size} bytes", {"Content-Range": f"bytes */{size}", "Accept-Ranges": "bytes"}
        )
    return part
