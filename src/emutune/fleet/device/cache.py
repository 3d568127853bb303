"""A device's cache: the shards of one emulator, whole and verified, within a quota.

CACHE/shards/<sha256>.safetensors   verified when they arrived, and again at every start
CACHE/shards/<sha256>.partial       what has arrived of a shard
CACHE/current.json                  manifest of the emulator that is there as a whole
CACHE/catalogue.json, tokenizer/    of the foundation model, for ``emutune.tuning.catalogue``
CACHE/lock                          held while a device uses the cache
"""

from __future__ import annotations

import asyncio
import errno
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

from filelock import FileLock, Timeout
from pydantic import BaseModel, Field, ValidationError

from emutune.errors import FleetError
from emutune.fleet.device.client import FleetClient
from emutune.fleet.device.files import (
    PartialFile,
    hash_file,
    remove_durably,
    replace_durably,
    write_durably,
)
from emutune.fleet.disk import no_room
from emutune.fleet.protocol import FleetInfo, Sha256

_NAME = re.compile(r"([0-9a-f]{64})\.(safetensors|partial)")
_DAMAGED_AT_MOST = 4
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})

Progress = Callable[[int, int], None]


class _Shard(BaseModel):
    sha256: Sha256
    bytes: int = Field(ge=1)


class _Layer(BaseModel):
    shard: _Shard


class _Manifest(BaseModel):
    """What of an emulator's manifest concerns a cache; the rest needs torch to be read."""

    base: Sha256
    name: str = Field(min_length=1, max_length=200)
    outer: _Shard
    layers: list[_Layer] = Field(min_length=1)


@dataclass(frozen=True)
class _Wanted:
    """A file that the server has.

    Attributes:
        route: where it is.
        sha256, size: of its content; the size is None where only the server knows it.
        aside, path: where it grows, and where it is once it is whole.
    """

    route: str
    sha256: str
    size: int | None
    aside: Path
    path: Path


def shards_of(emulator: Mapping[str, Any]) -> dict[str, int]:
    """Bytes of each distinct shard of an emulator, by its SHA-256.

    Args:
        emulator: its manifest, as JSON of ``emutune.tuning.manifest.Emulator``.

    Raises:
        FleetError: it is no manifest.
    """
    try:
        manifest = _Manifest.model_validate(emulator)
    except ValidationError as error:
        first = error.errors()[0]
        raise FleetError(f"emulator.{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    return {
        shard.sha256: shard.bytes for shard in (manifest.outer, *(layer.shard for layer in manifest.layers))
    }


class Cache:
    """A cache directory. Open it with ``async with``, which checks every shard.

    Attributes:
        directory: where it is; laid out as a catalogue without manifests.
        limit: the most bytes that shards, whole and partial, may take.
        held: bytes of the verified shards, by SHA-256.
        current: manifest of the emulator that is there as a whole.
        dropped: shards that were found damaged.
    """

    def __init__(self, directory: Path, limit: int) -> None:
        self.directory, self.limit = directory, limit
        self.held: dict[str, int] = {}
        self.current: dict[str, Any] | None = None
        self.dropped: list[str] = []
        self._folder = directory / "shards"
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="cache")
        self._lock = FileLock(directory / "lock", thread_local=False)

    async def __aenter__(self) -> Self:
        with self._writing():
            self._folder.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            await self.check()
        return self

    async def __aexit__(self, *error: object) -> None:
        self._pool.shutdown(wait=True)
        self._lock.release()

    async def check(self) -> list[str]:
        """Hash every shard and drop the damaged ones; returns those."""
        dropped = await self._in_thread(self._scan)
        self.dropped += dropped
        self.current = self._read_current()
        return dropped

    def missing(self, emulator: Mapping[str, Any]) -> dict[str, int]:
        """The shards that an emulator needs and the cache lacks: bytes by SHA-256."""
        return {sha256: size for sha256, size in shards_of(emulator).items() if sha256 not in self.held}

    def arrived(self, emulator: Mapping[str, Any]) -> int:
        """Bytes that are already there of the shards that are still missing."""
        sizes = (_size(self._partial(sha256)) for sha256 in self.missing(emulator))
        return sum(sizes)

    async def fetch(self, emulator: Mapping[str, Any], client: FleetClient, progress: Progress) -> None:
        """Hold an emulator: fetch what is missing, then forget what it does not need.

        What it does not need goes before, if there is no room for both.

        Args:
            emulator: its manifest.
            client: where shards come from.
            progress: told the bytes that are there, and all that were missing.

        Raises:
            FleetError: the emulator is larger than the cache, the disk is full, or the server sends
                damaged shards again and again.
        """
        needed = shards_of(emulator)
        if sum(needed.values()) > self.limit:
            raise FleetError(
                f"--cache-mb: the emulator has {sum(needed.values())} bytes, the cache may have {self.limit}; "
                f"give at least {_megabytes(sum(needed.values()))}"
            )
        with self._writing():
            self._make_room(needed)
            missing = self.missing(emulator)
            total, done = sum(missing.values()), 0
            for sha256, size in missing.items():
                await self._fetch_shard(client, sha256, size, partial(_told, progress, done, total))
                done += size
            if self.current != emulator:
                write_durably(self._current, json.dumps(emulator))
                self.current = dict(emulator)
            self._forget(set(self.held) - set(needed))

    async def prepare(self, info: FleetInfo, client: FleetClient) -> None:
        """Hold the model's description and tokenizer, as a catalogue has them.

        Raises:
            FleetError: the cache cannot hold the smallest emulator, or the files cannot be written.
        """
        if info.smallest_bytes > self.limit:
            raise FleetError(
                f"--cache-mb: the smallest emulator of the fleet {info.name!r} has {info.smallest_bytes} bytes, the "
                f"cache may have {self.limit}; give at least {_megabytes(info.smallest_bytes)}"
            )
        described = {
            "format_version": "1",
            "base": info.base,
            "config": info.config,
            "layers": info.layers,
            "bottom": info.bottom,
            "top": info.top,
            "text": "",
        }
        with self._writing():
            write_durably(self.directory / "catalogue.json", json.dumps(described, indent=1))
            if self.current is not None and self.current["base"] != info.base:
                self._forget_current()
            folder = self.directory / "tokenizer"
            folder.mkdir(exist_ok=True)
            for path in folder.iterdir():
                if path.name not in info.tokenizer:
                    path.unlink()
            for name, sha256 in info.tokenizer.items():
                await self._fetch_tokenizer_file(folder, name, sha256, client)

    async def fetch_adapter(self, client: FleetClient, lease: str, path: Path, wait_s: float) -> str | None:
        """Fetch the adapter of a lease to a file; its SHA-256, or None if there is none within some time."""
        aside = path.with_name(path.name + ".partial")
        with self._writing():
            async with PartialFile(aside, self._pool) as file:
                if not await client.adapter(lease, file, wait_s):
                    return None
                sha256 = await file.finish()
            replace_durably(aside, path)
        return sha256

    async def _fetch_tokenizer_file(self, folder: Path, name: str, sha256: str, client: FleetClient) -> None:
        if Path(name).name != name or name in ("", ".", ".."):
            raise FleetError(f"tokenizer: the server names a file {name!r}, which is no plain name")
        path = folder / name
        if path.is_file() and (await self._in_thread(lambda: hash_file(path)))[0] == sha256:
            return
        aside = self.directory / "tokenizer.partial"
        await self._download(client, _Wanted(f"/v1/tokenizer/{name}", sha256, None, aside, path))

    async def _fetch_shard(
        self, client: FleetClient, sha256: str, size: int, grown: Callable[[int], None]
    ) -> None:
        beginning = self._partial(sha256)
        # What is longer than the shard is not its beginning.
        if _size(beginning) > size:
            beginning.unlink()
        shard = _Wanted(f"/v1/shards/{sha256}", sha256, size, beginning, self._whole(sha256))
        await self._download(client, shard, grown)
        self.held[sha256] = size

    async def _download(
        self, client: FleetClient, wanted: _Wanted, grown: Callable[[int], None] = lambda size: None
    ) -> None:
        """Fetch a file until its content is what it should be."""
        for _ in range(_DAMAGED_AT_MOST):
            try:
                async with PartialFile(wanted.aside, self._pool, grown) as file:
                    await client.download(wanted.route, wanted.size, file)
                    found = await file.finish()
            except OSError as error:
                if error.errno in _FULL:
                    # Others need the space more than this needs its beginning.
                    wanted.aside.unlink(missing_ok=True)
                raise
            if found == wanted.sha256:
                replace_durably(wanted.aside, wanted.path)
                return
            wanted.aside.unlink(missing_ok=True)
            self.dropped.append(wanted.sha256)
        raise FleetError(
            f"{wanted.route}: arrived damaged {_DAMAGED_AT_MOST} times; check the server's catalogue and this disk"
        )

    def _make_room(self, needed: Mapping[str, int]) -> None:
        """Forget what an emulator does not need, if quota or disk cannot hold both."""
        for path in self._folder.glob("*.partial"):
            if path.stem not in needed or path.stem in self.held:
                path.unlink()
        missing = {sha256: size for sha256, size in needed.items() if sha256 not in self.held}
        arriving = sum(missing.values()) - sum(_size(self._partial(sha256)) for sha256 in missing)
        over = sum(self.held.values()) + sum(missing.values()) - self.limit
        over = max(over, arriving - shutil.disk_usage(self._folder).free)
        spare = sorted(set(self.held) - set(needed), key=lambda sha256: -self.held[sha256])
        leaving: set[str] = set()
        for sha256 in spare:
            if over <= 0:
                break
            over -= self.held[sha256]
            leaving.add(sha256)
        self._forget(leaving)
        free = shutil.disk_usage(self._folder).free
        if arriving > free:
            raise FleetError(
                f"--cache {self.directory}: {arriving} bytes have to arrive, the disk has {free} free; free some space"
            ) from no_room()

    def _forget(self, leaving: set[str]) -> None:
        if self.current is not None and leaving & set(shards_of(self.current)):
            self._forget_current()
        for sha256 in leaving:
            self._whole(sha256).unlink(missing_ok=True)
            self.held.pop(sha256, None)

    def _forget_current(self) -> None:
        # Before its shards: a manifest on disk is of an emulator that is there.
        remove_durably(self._current)
        self.current = None

    def _read_current(self) -> dict[str, Any] | None:
        try:
            emulator: dict[str, Any] = json.loads(self._current.read_text("utf-8"))
            return emulator if not self.missing(emulator) else None
        except (OSError, ValueError, FleetError):
            return None

    def _scan(self) -> list[str]:
        held: dict[str, int] = {}
        dropped = []
        for path in sorted(self._folder.iterdir()):
            name = _NAME.fullmatch(path.name)
            if name is None:
                path.unlink()
            elif name[2] == "safetensors":
                sha256, size = hash_file(path)
                if sha256 == name[1]:
                    held[sha256] = size
                else:
                    path.unlink()
                    dropped.append(name[1])
        self.held = held
        return dropped

    async def _in_thread(self, function: Callable[[], Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._pool, function)

    def _take_lock(self) -> None:
        try:
            self._lock.acquire(blocking=False)
        except Timeout as error:
            raise FleetError(
                f"--cache {self.directory}: another device uses it; choose another directory, or end that one"
            ) from error

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Say what to do about a cache that cannot be written."""
        try:
            yield
        except OSError as error:
            remedy = "free some space" if error.errno in _FULL else "choose another"
            raise FleetError(
                f"--cache {self.directory}: cannot be used ({error.strerror or error}); {remedy}"
            ) from error

    @property
    def _current(self) -> Path:
        return self.directory / "current.json"

    def _whole(self, sha256: str) -> Path:
        return self._folder / f"{sha256}.safetensors"

    def _partial(self, sha256: str) -> Path:
        return self._folder / f"{sha256}.partial"


def _told(progress: Progress, before: int, total: int, arrived: int) -> None:
    progress(before + arrived, total)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _megabytes(size: int) -> int:
    return -(-size // 1_000_000)
