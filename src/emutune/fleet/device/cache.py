"""A device's cache: the shards of emulators, whole and verified, within a quota.

CACHE/shards/<sha256>.safetensors   verified when they arrived, and again at every start
CACHE/shards/<sha256>.partial       what has arrived of a shard
CACHE/held.json, models/<base>/     see ``emutune.fleet.device.emulators``
CACHE/lock                          held while a device uses the cache
"""

from __future__ import annotations

import asyncio
import errno
import json
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

from filelock import FileLock, Timeout

from emutune.errors import FleetError
from emutune.fleet.device.client import FleetClient
from emutune.fleet.device.emulators import Emulators, model_folder, shards_of
from emutune.fleet.device.files import (
    PartialFile,
    hash_file,
    replace_durably,
    write_durably,
)
from emutune.fleet.disk import no_room
from emutune.fleet.protocol import FleetInfo, ModelInfo

_NAME = re.compile(r"([0-9a-f]{64})\.(safetensors|partial)")
_DAMAGED_AT_MOST = 4
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})

Progress = Callable[[int, int], None]


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


class Cache:
    """A cache directory. Open it with ``async with``, which checks every shard.

    Attributes:
        directory: where it is.
        limit: the most bytes that shards, whole and partial, may take.
        held: bytes of the verified shards, by SHA-256.
        emulators: those that are there as a whole.
        dropped: shards that were found damaged.
    """

    def __init__(self, directory: Path, limit: int) -> None:
        self.directory, self.limit = directory, limit
        self.held: dict[str, int] = {}
        self.emulators = Emulators(directory)
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
        self.emulators.read(self.held)
        return dropped

    def missing(self, emulator: Mapping[str, Any]) -> dict[str, int]:
        """The shards that an emulator needs and the cache lacks: bytes by SHA-256."""
        return {sha256: size for sha256, size in shards_of(emulator).items() if sha256 not in self.held}

    def arrived(self, emulator: Mapping[str, Any]) -> int:
        """Bytes that are already there of the shards that are still missing."""
        sizes = (_size(self._partial(sha256)) for sha256 in self.missing(emulator))
        return sum(sizes)

    async def fetch(
        self, emulator: Mapping[str, Any], client: FleetClient, progress: Progress, keep: Collection[str] = ()
    ) -> None:
        """Hold an emulator: fetch what is missing, then forget what neither it nor those that stay need.

        What is to be forgotten goes before, if there is no room for all, and of the emulators that were to stay those
        used longest ago.

        Args:
            emulator: its manifest.
            client: where shards come from.
            progress: told the bytes that are there, and all that were missing.
            keep: bases of the other models whose emulators stay.

        Raises:
            FleetError: the emulator is larger than the cache, the disk is full, or the server sends
                damaged shards again and again.
        """
        needed = shards_of(emulator)
        if sum(needed.values()) > self.limit:
            raise FleetError(
                f"--cache-mb: the emulator has {sum(needed.values())} bytes, the cache may have {self.limit}; "
                f"give at least {megabytes(sum(needed.values()))}"
            )
        with self._writing():
            self._make_room(needed, self._kept(emulator, keep))
            missing = self.missing(emulator)
            total, done = sum(missing.values()), 0
            for sha256, size in missing.items():
                await self._fetch_shard(client, sha256, size, partial(_told, progress, done, total))
                done += size
            self.emulators.use(dict(emulator))
            self._forget(set(self.held).difference(needed, *self._kept(emulator, keep)))

    def _kept(self, emulator: Mapping[str, Any], keep: Collection[str]) -> list[set[str]]:
        """Shards of the emulators of other models that are to stay, the last used first."""
        return [
            set(shards_of(other))
            for base, other in self.emulators.whole.items()
            if base in keep and base != emulator["base"]
        ]

    async def prepare(self, info: FleetInfo, client: FleetClient) -> None:
        """Hold the description and the tokenizer of every model, as a catalogue has them.

        Raises:
            FleetError: the cache cannot hold the smallest emulator of any, or the files cannot be written.
        """
        smallest = min(model.smallest_bytes for model in info.models)
        if smallest > self.limit:
            raise FleetError(
                f"--cache-mb: the smallest emulator of the fleet {info.name!r} has {smallest} bytes, the "
                f"cache may have {self.limit}; give at least {megabytes(smallest)}"
            )
        with self._writing():
            self.emulators.serve([model.base for model in info.models])
            for model in info.models:
                await self._prepare_model(model, "" if model is info else f"?model={model.base}", client)
            self._tidy({model.base for model in info.models})

    def _tidy(self, bases: Collection[str]) -> None:
        """Delete what is of models that are not served, and where a device kept things that knew of one."""
        for folder in (self.directory / "models").iterdir():
            if folder.name not in bases:
                shutil.rmtree(folder, ignore_errors=True)
        for name in ("catalogue.json", "adapter.safetensors"):
            (self.directory / name).unlink(missing_ok=True)
        shutil.rmtree(self.directory / "tokenizer", ignore_errors=True)

    async def _prepare_model(self, model: ModelInfo, asked: str, client: FleetClient) -> None:
        described = {
            "format_version": "1",
            "base": model.base,
            "config": model.config,
            "layers": model.layers,
            "bottom": model.bottom,
            "top": model.top,
            "text": "",
        }
        home = model_folder(self.directory, model.base)
        folder = home / "tokenizer"
        folder.mkdir(parents=True, exist_ok=True)
        write_durably(home / "catalogue.json", json.dumps(described, indent=1))
        for path in folder.iterdir():
            if path.name not in model.tokenizer:
                path.unlink()
        for name, sha256 in model.tokenizer.items():
            await self._fetch_tokenizer_file(folder, name, sha256, asked, client)

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

    async def _fetch_tokenizer_file(
        self, folder: Path, name: str, sha256: str, asked: str, client: FleetClient
    ) -> None:
        if Path(name).name != name or name in ("", ".", ".."):
            raise FleetError(f"tokenizer: the server names a file {name!r}, which is no plain name")
        path = folder / name
        if path.is_file() and (await self._in_thread(lambda: hash_file(path)))[0] == sha256:
            return
        aside = self.directory / "tokenizer.partial"
        await self._download(client, _Wanted(f"/v1/tokenizer/{name}{asked}", sha256, None, aside, path))

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

    def _make_room(self, needed: Mapping[str, int], kept: list[set[str]]) -> None:
        """Forget what an emulator does not need, if quota or disk cannot hold all."""
        for path in self._folder.glob("*.partial"):
            if path.stem not in needed or path.stem in self.held:
                path.unlink()
        missing = {sha256: size for sha256, size in needed.items() if sha256 not in self.held}
        arriving = sum(missing.values()) - sum(_size(self._partial(sha256)) for sha256 in missing)
        over = sum(self.held.values()) + sum(missing.values()) - self.limit
        over = max(over, arriving - shutil.disk_usage(self._folder).free)
        leaving: set[str] = set()
        for some in self._spare(needed, kept):
            if over <= 0:
                break
            over -= sum(self.held[sha256] for sha256 in some)
            leaving |= some
        self._forget(leaving)
        free = shutil.disk_usage(self._folder).free
        if arriving > free:
            raise FleetError(
                f"--cache {self.directory}: {arriving} bytes have to arrive, the disk has {free} free; free some space"
            ) from no_room()

    def _spare(self, needed: Mapping[str, int], kept: list[set[str]]) -> Iterator[set[str]]:
        """What may go, one after another: what nobody needs by its size, then emulators, longest unused first."""
        loose = set(self.held).difference(needed, *kept)
        yield from ({sha256} for sha256 in sorted(loose, key=lambda sha256: -self.held[sha256]))
        for last in reversed(range(len(kept))):
            yield kept[last].difference(needed, *kept[:last])

    def _forget(self, leaving: set[str]) -> None:
        self.emulators.give_up(leaving)
        for sha256 in leaving:
            self._whole(sha256).unlink(missing_ok=True)
            self.held.pop(sha256, None)

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


def megabytes(size: int) -> int:
    """The whole number of MB that holds so many bytes."""
    return -(-size // 1_000_000)
