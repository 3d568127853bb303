"""The transport over real sockets and real TLS."""

from __future__ import annotations

import asyncio
import hashlib
import random
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import httpx2
import pytest
from fake_server import credentials

from emutune.errors import FleetError
from emutune.fleet.device.cache import Cache
from emutune.fleet.device.client import Backoff, FleetClient
from emutune.fleet.device.network import tls_transport
from emutune.fleet.security import self_made_certificate, serving, trusting

BIG = random.Random(0).randbytes(9_000_000)
Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def served(directory: Path, handler: Handler) -> AsyncIterator[tuple[str, str]]:
    """A TLS server on loopback: its address, and the authority to trust."""
    made = self_made_certificate(directory, ["localhost", "127.0.0.1"])
    context = serving(made.certificate, made.key)
    server = await asyncio.start_server(handler, "127.0.0.1", 0, ssl=context)
    async with server:
        yield f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}", made.authority


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answers one request with its own body, or with the big one, and closes."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    length = re.search(r"content-length: (\d+)", head, re.IGNORECASE)
    body = await reader.readexactly(int(length[1])) if length else BIG
    writer.write(f"HTTP/1.1 200 OK\r\ncontent-length: {len(body)}\r\n\r\n".encode())
    writer.write(body)
    await writer.drain()
    writer.close()


def trusting_client(authority: str) -> httpx2.AsyncClient:
    return httpx2.AsyncClient(transport=tls_transport(trusting(authority)))


def test_bytes_arrive_as_they_are_both_ways(tmp_path: Path) -> None:
    async def go() -> None:
        async with served(tmp_path, echo) as (url, authority), trusting_client(authority) as client:
            assert (await client.get(url)).content == BIG
            assert (await client.put(url, content=BIG)).content == BIG

    asyncio.run(go())


def test_a_slow_reader_makes_the_peer_wait(tmp_path: Path) -> None:
    async def go() -> None:
        async with served(tmp_path, echo) as (url, authority), trusting_client(authority) as client:
            received = b""
            async with client.stream("GET", url) as response:
                async for piece in response.aiter_raw():
                    received += piece
                    await asyncio.sleep(0.002)
            assert received == BIG

    asyncio.run(go())


def test_another_authority_is_not_trusted(tmp_path: Path) -> None:
    async def go() -> None:
        stranger = self_made_certificate(tmp_path / "stranger", ["127.0.0.1"]).authority
        async with served(tmp_path / "own", echo) as (url, _):
            client = FleetClient(credentials(), tls_transport(trusting(stranger)), url=url)
            with pytest.raises(FleetError, match="not of the fleet"):
                await client.info()

    asyncio.run(go())


def test_connections_that_break_are_taken_up_again(tmp_path: Path) -> None:
    cuts = [3_000_000, 5_000_000]

    async def cutting(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        asked = re.search(r"bytes=(\d+)-", head)
        offset = int(asked[1]) if asked else 0
        rest = BIG[offset:]
        writer.write(
            f"HTTP/1.1 206 Partial\r\ncontent-length: {len(rest)}\r\n"
            f"content-range: bytes {offset}-{len(BIG) - 1}/{len(BIG)}\r\n\r\n".encode()
        )
        if cuts:
            writer.write(rest[: cuts.pop(0)])
            await writer.drain()
            writer.transport.abort()
        else:
            writer.write(rest)
            await writer.drain()
            writer.close()

    async def go() -> None:
        async with served(tmp_path / "ca", cutting) as (url, authority):
            backoff = Backoff(first_s=0.01, attempts=5)
            client = FleetClient(credentials(), tls_transport(trusting(authority)), url=url, backoff=backoff)
            async with client, Cache(tmp_path / "cache", 10**8) as cache:
                shard = {"sha256": hashlib.sha256(BIG).hexdigest(), "bytes": len(BIG)}
                emulator = {"base": "b" * 64, "name": "e", "outer": shard, "layers": [{"shard": shard}]}
                await cache.fetch(emulator, client, lambda done, total: None)
                assert cache.emulators.whole == {emulator["base"]: emulator}
        assert cuts == []

    asyncio.run(go())
