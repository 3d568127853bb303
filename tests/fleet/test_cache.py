"""The cache: whole shards or none, within its quota, whatever breaks."""

from __future__ import annotations

import asyncio
import json
import os
import random
import resource
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from fake_server import BASE, FakeServer, enrolled, fleet_info, manifest, sha256
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from emutune.errors import FleetError
from emutune.fleet.device.cache import Cache
from emutune.fleet.device.client import FleetClient
from emutune.fleet.device.emulators import shards_of
from emutune.fleet.protocol import ModelInfo


def content(seed: int, size: int = 5000) -> bytes:
    return random.Random(seed).randbytes(size)


OUTER, *LAYERS = [content(seed) for seed in range(6)]
SMALL = manifest("small", [OUTER, LAYERS[0], LAYERS[1]])
LARGE = manifest("large", [OUTER, LAYERS[0], LAYERS[2], LAYERS[3], LAYERS[4]])


def quiet(done: int, total: int) -> None:
    assert 0 <= done <= total


def run(
    directory: Path,
    server: FakeServer,
    use: Callable[[Cache, FleetClient], Awaitable[Any]],
    limit: int = 10**6,
) -> Any:
    async def go() -> Any:
        server.add(OUTER, *LAYERS)
        client = await enrolled(server)
        async with Cache(directory, limit) as cache:
            return await use(cache, client)

    return asyncio.run(go())


def fetching(*emulators: dict[str, Any]) -> Callable[[Cache, FleetClient], Awaitable[Cache]]:
    async def use(cache: Cache, client: FleetClient) -> Cache:
        for emulator in emulators:
            await cache.fetch(emulator, client, quiet)
        return cache

    return use


def stored(directory: Path) -> dict[str, bytes]:
    return {path.stem: path.read_bytes() for path in (directory / "shards").iterdir()}


def named(directory: Path) -> list[dict[str, Any]]:
    """Manifests of the emulators that the disk says are there, the last used first."""
    path = directory / "held.json"
    rows = json.loads(path.read_text()) if path.exists() else []
    return [row["emulator"] for row in rows if row["emulator"] is not None]


def whole(emulator: dict[str, Any]) -> dict[str, bytes]:
    every = {sha256(piece): piece for piece in (OUTER, *LAYERS)}
    return {name: every[name] for name in shards_of(emulator)}


def test_an_emulator_survives_a_restart(tmp_path: Path) -> None:
    server = FakeServer(fleet_info())
    run(tmp_path, server, fetching(SMALL))
    moved = server.moved
    assert stored(tmp_path) == whole(SMALL)

    async def use(cache: Cache, client: FleetClient) -> None:
        assert cache.emulators.whole == {BASE: SMALL}
        await cache.fetch(SMALL, client, quiet)

    run(tmp_path, server, use)
    assert server.moved == moved == 3 * 5000


def test_only_what_is_missing_moves_and_what_is_not_needed_goes(tmp_path: Path) -> None:
    server = FakeServer(fleet_info())
    run(tmp_path, server, fetching(SMALL, LARGE))
    assert server.moved == 3 * 5000 + 3 * 5000
    assert stored(tmp_path) == whole(LARGE)
    assert named(tmp_path) == [LARGE]


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    breaks=st.lists(st.integers(0, 4999), max_size=8),
    altered=st.integers(0, 2),
    ignore_range=st.booleans(),
    failing=st.lists(st.sampled_from([500, 503, 429]), max_size=4),
)
def test_transfers_end_whole_whatever_breaks(
    tmp_path_factory: pytest.TempPathFactory,
    breaks: list[int],
    altered: int,
    ignore_range: bool,
    failing: list[int],
) -> None:
    directory = tmp_path_factory.mktemp("cache")
    server = FakeServer(
        fleet_info(),
        break_after=breaks,
        altered=altered,
        ignore_range=ignore_range,
        failing=[("GET", "/v1/shards/", status) for status in failing],
    )
    cache = run(directory, server, fetching(SMALL))
    assert cache.emulators.whole == {BASE: SMALL}
    assert stored(directory) == whole(SMALL)


def test_a_broken_transfer_goes_on_where_it_was(tmp_path: Path) -> None:
    server = FakeServer(fleet_info(), break_after=[3000, 1000])
    run(tmp_path, server, fetching(SMALL))
    assert server.moved == 3 * 5000


def test_partial_files_are_picked_up_after_a_kill(tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    (shards / f"{sha256(OUTER)}.partial").write_bytes(OUTER[:3000])
    (shards / f"{sha256(LAYERS[0])}.partial").write_bytes(LAYERS[0])
    (shards / f"{sha256(LAYERS[1])}.partial").write_bytes(LAYERS[1] + b"more")
    (shards / f"{sha256(LAYERS[4])}.partial").write_bytes(b"of another emulator")
    server = FakeServer(fleet_info())

    async def use(cache: Cache, client: FleetClient) -> None:
        assert cache.arrived(SMALL) >= 8000
        await cache.fetch(SMALL, client, quiet)

    run(tmp_path, server, use)
    assert server.moved == 2000 + 5000
    assert stored(tmp_path) == whole(SMALL)


def test_a_damaged_shard_is_dropped_at_the_start_and_fetched_again(tmp_path: Path) -> None:
    server = FakeServer(fleet_info())
    run(tmp_path, server, fetching(SMALL))
    path = tmp_path / "shards" / f"{sha256(OUTER)}.safetensors"
    path.write_bytes(OUTER[:-1] + b"\0")

    async def use(cache: Cache, client: FleetClient) -> None:
        assert cache.dropped == [sha256(OUTER)]
        assert cache.emulators.used == {BASE: None}
        assert cache.missing(SMALL) == {sha256(OUTER): 5000}
        await cache.fetch(SMALL, client, quiet)

    run(tmp_path, server, use)
    assert server.moved == 4 * 5000
    assert stored(tmp_path) == whole(SMALL)


def test_a_server_with_damaged_shards_is_named(tmp_path: Path) -> None:
    server = FakeServer(fleet_info(), altered=100)
    with pytest.raises(FleetError, match="arrived damaged 4 times"):
        run(tmp_path, server, fetching(SMALL))
    assert stored(tmp_path) == {}


@pytest.mark.parametrize("limit", [25_000, 29_999, 30_000, 10**6])
def test_the_quota_is_kept_at_every_moment(tmp_path: Path, limit: int) -> None:
    server = FakeServer(fleet_info())
    most = 0

    async def use(cache: Cache, client: FleetClient) -> None:
        def watch(done: int, total: int) -> None:
            nonlocal most
            most = max(most, sum(path.stat().st_size for path in (tmp_path / "shards").iterdir()))
            # A manifest on disk is of an emulator that is there as a whole.
            for emulator in named(tmp_path):
                assert whole(emulator).items() <= stored(tmp_path).items()

        for emulator in (SMALL, LARGE, SMALL):
            await cache.fetch(emulator, client, watch)

    run(tmp_path, server, use, limit)
    assert most <= limit
    assert stored(tmp_path) == whole(SMALL)


def test_an_emulator_beyond_the_quota_is_refused(tmp_path: Path) -> None:
    server = FakeServer(fleet_info())
    with pytest.raises(FleetError, match="--cache-mb"):
        run(tmp_path, server, fetching(LARGE), 24_999)
    assert server.moved == 0

    async def prepare(cache: Cache, client: FleetClient) -> None:
        await cache.prepare(fleet_info(smallest_bytes=2_000_001), client)

    with pytest.raises(FleetError, match="give at least 3"):
        run(tmp_path, server, prepare)


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        SMALL | {"layers": []},
        SMALL | {"outer": {"sha256": "../../etc/passwd", "bytes": 3}},
        SMALL | {"outer": {"sha256": "0" * 64, "bytes": 0}},
    ],
)
def test_what_is_no_manifest_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(FleetError, match="emulator"):
        shards_of(wrong)


def test_a_cache_has_one_user(tmp_path: Path) -> None:
    async def use(cache: Cache, client: FleetClient) -> None:
        with pytest.raises(FleetError, match="another device uses it"):
            async with Cache(tmp_path, 10**6):
                pass

    run(tmp_path, FakeServer(fleet_info()), use)


def test_the_tokenizer_is_fetched_once_and_verified(tmp_path: Path) -> None:
    files = {"tokenizer.json": content(9), "tokenizer_config.json": b"{}"}
    info = fleet_info(tokenizer={name: sha256(text) for name, text in files.items()})
    server = FakeServer(info, files=files)
    folder = tmp_path / "models" / BASE / "tokenizer"

    async def use(cache: Cache, client: FleetClient) -> None:
        await cache.prepare(info, client)

    run(tmp_path, server, use)
    (folder / "tokenizer.json").write_bytes(b"damaged")
    (folder / "old.json").write_bytes(b"of another model")
    run(tmp_path, server, use)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files
    assert server.calls["GET /v1/tokenizer/tokenizer_config.json"] == 1
    assert json.loads((folder.parent / "catalogue.json").read_text())["base"] == BASE


def test_a_tokenizer_stays_within_its_directory(tmp_path: Path) -> None:
    async def use(cache: Cache, client: FleetClient) -> None:
        await cache.prepare(fleet_info(tokenizer={"../device.key": "0" * 64}), client)

    with pytest.raises(FleetError, match="no plain name"):
        run(tmp_path, FakeServer(fleet_info()), use)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a file system")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk_is_named_and_nothing_is_left_half(small_disk: Path) -> None:
    big = [content(seed, 30_000) for seed in range(10, 13)]
    server = FakeServer(fleet_info())
    server.add(*big)
    run(small_disk, server, fetching(SMALL))
    with pytest.raises(FleetError, match="free some space"):
        run(small_disk, server, fetching(manifest("big", big)))
    # What is not needed went first; what is whole stays; the rest is gone.
    assert set(stored(small_disk)) <= {sha256(piece) for piece in big}
    run(small_disk, server, fetching(SMALL))
    assert set(stored(small_disk)) == set(whole(SMALL))


def fill_up(path: Path) -> None:
    with suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def test_a_disk_that_fills_during_a_transfer(small_disk: Path) -> None:
    server = FakeServer(fleet_info())

    async def use(cache: Cache, client: FleetClient) -> None:
        def fill(done: int, total: int) -> None:
            if done >= 2000 and not (small_disk / "else").exists():
                fill_up(small_disk / "else")

        await cache.fetch(SMALL, client, fill)

    with pytest.raises(FleetError, match="free some space"):
        run(small_disk, server, use)
    (small_disk / "else").unlink()
    run(small_disk, server, fetching(SMALL))
    assert stored(small_disk) == whole(SMALL)


def test_a_file_size_limit_is_a_full_disk(tmp_path: Path) -> None:
    script = f"""
import resource, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from fake_server import FakeServer, fleet_info
from test_cache import SMALL, fetching, run
from emutune.errors import FleetError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, {resource.getrlimit(resource.RLIMIT_FSIZE)[1]}))
try:
    run(Path({str(tmp_path)!r}), FakeServer(fleet_info()), fetching(SMALL))
except FleetError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "free some space" in done.stdout
    assert stored(tmp_path) == {}
    run(tmp_path, FakeServer(fleet_info()), fetching(SMALL))
    assert stored(tmp_path) == whole(SMALL)


def test_device_code_needs_no_torch() -> None:
    script = """
import re, sys
from pathlib import Path
import emutune.cli.join, emutune.fleet.device.agent, emutune.fleet.device.network
assert not {"torch", "jax", "fastapi", "transformers"} & set(sys.modules)
# Not ru_maxrss, which starts with what the parent had.
print(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 200_000


# Several foundation models

OTHER, THIRD = "c" * 64, "d" * 64
# Of three models, no piece of which is of two.
MODELS = {
    base: [
        manifest(f"{name}-{base[0]}", [content(10 * number + at) for at in pieces]) | {"base": base}
        for name, pieces in (("small", (1, 2, 3)), ("large", (1, 2, 4, 5, 6)))
    ]
    for number, base in enumerate((BASE, OTHER, THIRD), 1)
}
PIECES = {
    sha256(piece): piece
    for number in (1, 2, 3)
    for piece in (content(10 * number + at) for at in range(1, 7))
}


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    asked=st.lists(
        st.tuples(st.sampled_from([*MODELS]), st.integers(0, 1), st.sets(st.sampled_from([*MODELS]))),
        max_size=8,
    ),
    limit=st.integers(25_000, 70_000),
)
def test_emulators_of_several_models_stay_as_leases_say_and_the_quota_allows(
    tmp_path_factory: pytest.TempPathFactory, asked: list[tuple[str, int, set[str]]], limit: int
) -> None:
    """Against a list of emulators that is cut where it is too long, the last used first."""
    directory = tmp_path_factory.mktemp("cache")
    server = FakeServer(fleet_info(), shards=dict(PIECES))
    expected: list[dict[str, Any]] = []
    for base, size, keep in asked:
        emulator = MODELS[base][size]
        others = [one for one in expected if one["base"] in keep - {base}]
        expected = [emulator]
        room = limit - sum(shards_of(emulator).values())
        for other in others:
            room -= sum(shards_of(other).values())
            if room < 0:
                break
            expected.append(other)

        async def use(
            cache: Cache, client: FleetClient, emulator: dict[str, Any] = emulator, keep: set[str] = keep
        ) -> None:
            def watch(done: int, total: int) -> None:
                there = {path.stem: path.stat().st_size for path in (directory / "shards").iterdir()}
                assert sum(there.values()) <= limit
                assert all(shards_of(one).keys() <= there.keys() for one in named(directory))

            await cache.fetch(emulator, client, watch, keep)

        run(directory, server, use, limit)
        assert named(directory) == expected
        needed = {name for one in expected for name in shards_of(one)}
        assert {path.stem for path in (directory / "shards").iterdir()} == needed


def test_what_a_device_kept_that_knew_of_one_model_is_taken_over(tmp_path: Path) -> None:
    server = FakeServer(fleet_info())
    run(tmp_path, server, fetching(SMALL))
    (tmp_path / "held.json").unlink()
    (tmp_path / "current.json").write_text(json.dumps(SMALL))
    (tmp_path / "catalogue.json").write_text("{}")
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "adapter.safetensors").write_bytes(b"an adapter")
    moved = server.moved

    async def use(cache: Cache, client: FleetClient) -> None:
        assert cache.emulators.whole == {BASE: SMALL}
        await cache.prepare(server.info, client)
        await cache.fetch(SMALL, client, quiet)
        assert (await client.info()).models == (server.info,)

    run(tmp_path, server, use)
    run(tmp_path, server, fetching(LARGE, SMALL))
    assert server.moved == moved + 3 * 5000 + 5000
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"held.json", "lock", "models", "shards"}
    (tmp_path / "held.json").write_text("{")
    run(tmp_path, server, fetching(SMALL))
    assert named(tmp_path) == [SMALL]


def test_models_that_are_not_served_any_more_are_forgotten(tmp_path: Path) -> None:
    server = FakeServer(fleet_info(), shards=dict(PIECES))
    other = ModelInfo(
        **server.info.model_dump(include=set(ModelInfo.model_fields)) | {"base": OTHER, "model": "b"}
    )
    both = fleet_info(model="a", others=(other,))

    async def use(cache: Cache, client: FleetClient) -> None:
        await cache.prepare(both, client)
        for base in (BASE, OTHER):
            await cache.fetch(MODELS[base][0], client, quiet, MODELS)
        assert [*cache.emulators.whole] == [OTHER, BASE]
        assert {path.name for path in (tmp_path / "models").iterdir()} == {BASE, OTHER}
        await cache.prepare(fleet_info(), client)
        assert [*cache.emulators.used] == [BASE]
        assert {path.name for path in (tmp_path / "models").iterdir()} == {BASE}

    run(tmp_path, server, use)
