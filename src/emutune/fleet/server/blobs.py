"""Files that go out: shards, adapters and the tokenizer, whole or in part."""

from __future__ import annotations

import asyncio
import os
import re
import stat
from collections.abc import AsyncGenerator
from contextlib import aclosing
from io import FileIO
from pathlib import Path

from anyio import CancelScope
from fastapi import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from emutune.fleet.server.refusals import Refused
from emutune.fleet.shaping import TokenBucket

PIECE_BYTES = 1 << 20
_MEDIA_TYPE = "application/octet-stream"
_RANGE = re.compile(r"bytes=(\d{1,18})?-(\d{1,18})?")


class SentFile(Response):
    """A file, or the part of it that the request's ``Range`` asks for.

    It is opened where it is sent and nowhere before: a request that is dropped in between leaves no open file.

    Args:
        request: whose ``Range`` and ``If-Range`` count.
        path: of the file.
        pace: the link it goes over; as fast as can be if None.
        tag: what identifies its content.

    Raises:
        Refused: when it is sent; 404 if there is no such file, 416 if the range lies outside.
    """

    def __init__(
        self, request: Request, path: Path, pace: TokenBucket | None = None, tag: str | None = None
    ) -> None:
        super().__init__()
        self._request, self._path, self._pace, self._tag = request, path, pace, tag

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Open the file and send it."""
        try:
            file = FileIO(self._path, "r")
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
            raise Refused(404, "there is no such file") from error
        with file:
            part, status, headers = self._head(file)
            async with aclosing(_pieces(file, part, self._pace)) as pieces:
                await StreamingResponse(pieces, status, headers, _MEDIA_TYPE)(scope, receive, send)

    def _head(self, file: FileIO) -> tuple[range, int, dict[str, str]]:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise Refused(404, "there is no such file")
        part = _part(self._request, status.st_size, self._tag)
        code = 200 if part is None else 206
        headers = {"Accept-Ranges": "bytes"}
        if self._tag is not None:
            headers["ETag"] = f'"{self._tag}"'
        if part is None:
            part = range(status.st_size)
        else:
            headers["Content-Range"] = f"bytes {part.start}-{part.stop - 1}/{status.st_size}"
        headers["Content-Length"] = str(len(part))
        return part, code, headers


async def _pieces(file: FileIO, part: range, pace: TokenBucket | None) -> AsyncGenerator[bytes]:
    """Part of an open file, read piece by piece in a thread while the piece before it is sent."""
    loop = asyncio.get_running_loop()
    size = PIECE_BYTES if pace is None else pace.piece_bytes
    at = part.start

    def ahead() -> asyncio.Future[bytes]:
        wanted = min(size, part.stop - at)
        return loop.run_in_executor(None, os.pread, file.fileno(), wanted, at)

    pending = ahead()
    try:
        while at < part.stop:
            piece = await asyncio.shield(pending)
            if not piece:
                raise RuntimeError("a file became shorter while it was sent")
            at += len(piece)
            pending = ahead()
            if pace is not None:
                await pace.take(len(piece))
            yield piece
    finally:
        # The file must not be closed under the thread that reads it.
        with CancelScope(shield=True):
            await asyncio.wait({pending})


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
