"""Files that outlive a crash, and files that arrive in pieces."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from emutune.files import sync_directory

# Large enough that the writing thread is seldom waited for, small beside what a device has.
_WRITTEN_AT_ONCE = 1 << 20
_WAITING_AT_MOST = 4
_HASHED_AT_ONCE = 1 << 20


def write_durably(path: Path, text: str) -> None:
    """Write a small file: after a crash or a power cut it is there as it was before, or as it is now."""
    aside = path.with_name(path.name + ".partial")
    with aside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    replace_durably(aside, path)


def replace_durably(aside: Path, path: Path) -> None:
    """Give a file that is already on the medium its name, on the medium too."""
    os.replace(aside, path)
    sync_directory(path.parent)


def remove_durably(path: Path) -> None:
    """Remove a file; nothing that happens later reaches the medium before this."""
    path.unlink(missing_ok=True)
    sync_directory(path.parent)


def hash_file(path: Path) -> tuple[str, int]:
    """SHA-256 and bytes of a file, in constant memory."""
    digest, size = _hash_so_far(path)
    return digest.hexdigest(), size


def _hash_so_far(path: Path) -> tuple[Any, int]:
    digest, size = hashlib.sha256(), 0
    buffer = bytearray(_HASHED_AT_ONCE)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(view[:count])
            size += count
    return digest, size


class PartialFile:
    """A file that grows as its bytes arrive, hashed and written by a thread of its own.

    Use it as an asynchronous context manager. What was already there is kept and hashed first.
    """

    def __init__(
        self, path: Path, pool: ThreadPoolExecutor, grown: Callable[[int], None] = lambda size: None
    ) -> None:
        """Open nothing yet.

        Args:
            path: where the bytes go.
            pool: one thread, so that pieces are written in their order.
            grown: told the file's size after every piece.
        """
        self.path = path
        self._pool, self._grown = pool, grown
        self._size = 0
        self._pieces: list[bytes] = []
        self._gathered = 0
        self._writing: deque[asyncio.Future[None]] = deque()
        self._file: Any = None
        self._digest: Any = None
        self._failed: OSError | None = None

    @property
    def size(self) -> int:
        """Bytes so far, written or about to be."""
        return self._size

    async def __aenter__(self) -> Self:
        self._size = await self._run(self._open)
        try:
            self._grown(self._size)
        except BaseException:
            self._pool.submit(self._close, [])
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Behind whatever is still being written. What has arrived is kept, however this ended.
        pending, self._pieces = self._pieces, []
        self._pool.submit(self._close, pending)

    async def write(self, piece: bytes) -> None:
        """Append a piece; waits if the medium is slower than the network."""
        self._pieces.append(piece)
        self._gathered += len(piece)
        self._size += len(piece)
        self._grown(self._size)
        if self._gathered >= _WRITTEN_AT_ONCE:
            await self._flush()

    async def restart(self) -> None:
        """Throw away what is there."""
        await self._settle()
        await self._run(self._empty)
        self._size = 0
        self._grown(0)

    async def finish(self) -> str:
        """Bring everything to the medium; returns the SHA-256 of all bytes."""
        await self._settle()
        return await self._run(self._sync)

    async def _flush(self) -> None:
        pieces, self._pieces, self._gathered = self._pieces, [], 0
        while len(self._writing) >= _WAITING_AT_MOST:
            await self._writing.popleft()
        loop = asyncio.get_running_loop()
        future = loop.run_in_executor(self._pool, self._append, pieces)
        future.add_done_callback(_retrieve)
        self._writing.append(future)

    async def _settle(self) -> None:
        await self._flush()
        while self._writing:
            await self._writing.popleft()

    async def _run(self, function: Callable[[], Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._pool, function)

    def _open(self) -> int:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.touch()
        self._digest, size = _hash_so_far(self.path)
        self._file = self.path.open("ab", buffering=0)
        return size

    def _append(self, pieces: list[bytes]) -> None:
        if self._failed is not None:
            raise self._failed
        try:
            for piece in pieces:
                view = memoryview(piece)
                # A write may take a part, as it does shortly before the medium is full.
                while view:
                    written = self._file.write(view)
                    self._digest.update(view[:written])
                    view = view[written:]
        except OSError as error:
            # Nothing may follow, or there would be a gap.
            self._failed = error
            raise

    def _empty(self) -> None:
        self._file.truncate(0)
        self._digest = hashlib.sha256()

    def _sync(self) -> str:
        os.fsync(self._file.fileno())
        digest: str = self._digest.hexdigest()
        return digest

    def _close(self, pending: list[bytes]) -> None:
        if self._file is None:
            return
        try:
            if self._failed is None:
                self._append(pending)
        finally:
            self._file.close()


def _retrieve(future: asyncio.Future[None]) -> None:
    # Its error is raised by whatever comes next; if nothing does, it is not missed.
    if not future.cancelled():
        future.exception()
