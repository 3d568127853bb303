"""A fleet's server in memory, behind a mock transport, that breaks what it is told to break."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import httpx2

from emutune.fleet.device.client import Backoff, FleetClient
from emutune.fleet.protocol import FleetInfo, Lease
from emutune.fleet.security import Credentials

BASE = "b" * 64
TOKEN = "1" * 64
PIECE = 1000


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def manifest(name: str, shards: list[bytes]) -> dict[str, Any]:
    """What a cache needs of an emulator's manifest, and a field that it does not know."""
    first, *others = [{"sha256": sha256(content), "bytes": len(content)} for content in shards]
    layers = [{"index": index, "shard": shard} for index, shard in enumerate(others)]
    return {"base": BASE, "name": name, "outer": first, "layers": layers, "retention": 0.5}


@dataclass
class FakeServer:
    """Answers as the protocol says.

    Attributes:
        shards: content by SHA-256.
        break_after: bytes of a shard after which the connection breaks, one for each request to come.
        altered: how many shard downloads to come have a byte changed.
        failing: statuses that requests to come get instead of an answer, by method and path's beginning.
        calls: how often each method and route was asked.
        moved: bytes of shards that were sent.
    """

    info: FleetInfo
    shards: dict[str, bytes] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    data: dict[str, bytearray] = field(default_factory=dict)
    sizes: dict[str, tuple[int, str]] = field(default_factory=dict)
    leases: list[Lease] = field(default_factory=list)
    start: bytes | None = None
    trained: bytes | None = None
    ignore_range: bool = False
    twice: bool = False
    break_after: list[int] = field(default_factory=list)
    altered: int = 0
    failing: list[tuple[str, str, int]] = field(default_factory=list)
    unreachable: int = 0
    calls: Counter[str] = field(default_factory=Counter)
    moved: int = 0
    key: str | None = None
    reports: list[dict[str, Any]] = field(default_factory=list)
    transferred: dict[str, dict[str, Any]] = field(default_factory=dict)
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    adapters: dict[str, bytes] = field(default_factory=dict)
    left: bool = False
    on_report: Callable[[FakeServer, dict[str, Any]], None] = lambda server, report: None

    def add(self, *contents: bytes) -> None:
        self.shards |= {sha256(content): content for content in contents}

    async def __call__(self, request: httpx2.Request) -> httpx2.Response:
        path = request.url.path
        route = f"{request.method} {path}"
        self.calls[route] += 1
        if self.unreachable:
            self.unreachable -= 1
            raise httpx2.ConnectError("refused")
        for fault in self.failing:
            if fault[0] == request.method and path.startswith(fault[1]):
                self.failing.remove(fault)
                return httpx2.Response(fault[2])
        if self.twice and request.method in ("POST", "PUT"):
            # The request arrived, its answer did not.
            self.twice = False
            await self._answer(request, path)
            raise httpx2.ReadError("connection reset")
        return await self._answer(request, path)

    async def _answer(self, request: httpx2.Request, path: str) -> httpx2.Response:
        body = b"" if path.endswith("/data") and request.method == "PATCH" else await request.aread()
        if path == "/v1/enrolment":
            asked = json.loads(body)
            if asked["token"] != TOKEN or self.key not in (None, asked["key_sha256"]):
                return httpx2.Response(403)
            self.key = asked["key_sha256"]
            return httpx2.Response(204)
        if sha256(request.headers.get("authorization", "").removeprefix("Bearer ").encode()) != self.key:
            return httpx2.Response(401)
        if path == "/v1/fleet":
            return httpx2.Response(200, content=self.info.model_dump_json())
        if path == "/v1/reports":
            self.reports.append(json.loads(body))
            self.on_report(self, self.reports[-1])
            return httpx2.Response(204)
        if path == "/v1/leave":
            self.left = True
            return httpx2.Response(204)
        if path == "/v1/lease":
            return await self._lease(float(request.url.params["wait"]))
        if match := re.fullmatch("/v1/shards/([0-9a-f]{64})", path):
            return self._shard(request, match[1])
        if path.startswith("/v1/tokenizer/"):
            content = self.files.get(path.rpartition("/")[2])
            return httpx2.Response(404) if content is None else httpx2.Response(200, stream=_Body([content]))
        match = re.fullmatch("/v1/leases/([^/]+)/([a-z]+)", path)
        assert match, path
        return await self._about_lease(request, match[1], match[2], body)

    async def _lease(self, wait: float) -> httpx2.Response:
        for _ in range(max(1, round(wait / 0.02))):
            opened = [lease for lease in self.leases if lease.lease not in self.results]
            if opened:
                return httpx2.Response(200, content=opened[0].model_dump_json())
            await asyncio.sleep(0.02 if wait else 0)
        return httpx2.Response(204)

    def _shard(self, request: httpx2.Request, name: str) -> httpx2.Response:
        content = self.shards.get(name)
        if content is None:
            return httpx2.Response(404)
        asked = re.fullmatch(r"bytes=(\d+)-", request.headers.get("range", ""))
        offset = int(asked[1]) if asked and not self.ignore_range else 0
        if offset >= len(content):
            return httpx2.Response(416)
        if self.altered:
            self.altered -= 1
            content = content[:-1] + bytes([content[-1] ^ 1])
        rest = content[offset:]
        end = self.break_after.pop(0) if self.break_after else None
        headers = {"content-range": f"bytes {offset}-{len(content) - 1}/{len(content)}"} if offset else {}
        return httpx2.Response(206 if offset else 200, headers=headers, stream=_Body(self._pieces(rest, end)))

    def _pieces(self, content: bytes, end: int | None) -> list[bytes | None]:
        pieces: list[bytes | None] = []
        for first in range(0, len(content) if end is None else min(end, len(content)), PIECE):
            pieces.append(content[first : first + PIECE])
            self.moved += len(pieces[-1] or b"")
        return pieces if end is None else [*pieces, None]

    async def _about_lease(
        self, request: httpx2.Request, lease: str, what: str, body: bytes
    ) -> httpx2.Response:
        if what == "data":
            return await self._data(request, lease)
        if what == "transferred":
            self.transferred.setdefault(lease, json.loads(body))
        elif what == "result":
            self.results.setdefault(lease, json.loads(body))
        elif request.method == "PUT":
            self.adapters[lease] = body
        else:
            content = self.start if self.start is not None else self.trained
            return httpx2.Response(204) if content is None else httpx2.Response(200, stream=_Body([content]))
        return httpx2.Response(204)

    async def _data(self, request: httpx2.Request, lease: str) -> httpx2.Response:
        size, expected = self.sizes[lease]
        have = self.data.setdefault(lease, bytearray())
        if request.method == "PATCH":
            if int(request.url.params["offset"]) != len(have):
                return httpx2.Response(409)
            end = self.break_after.pop(0) if self.break_after else None
            async for piece in request.stream:
                have += piece
                if end is not None and len(have) >= end:
                    raise httpx2.WriteError("connection reset")
        complete = len(have) == size and sha256(bytes(have)) == expected
        if len(have) >= size and not complete:
            have.clear()
        return httpx2.Response(200, json={"bytes": len(have), "complete": complete})


class _Body(httpx2.AsyncByteStream):
    def __init__(self, pieces: list[bytes | None] | list[bytes]) -> None:
        self._pieces_left = pieces

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self._pieces_left:
            if piece is None:
                raise httpx2.ReadError("connection reset")
            yield piece


def fleet_info(**changes: Any) -> FleetInfo:
    values: dict[str, Any] = {
        "name": "fleet",
        "base": BASE,
        "config": {"model_type": "gpt2"},
        "layers": 6,
        "bottom": 1,
        "top": 1,
        "tokenizer": {},
        "smallest_bytes": 1000,
    }
    return FleetInfo(**values | changes)


def credentials(**changes: Any) -> Credentials:
    values = {"fleet": "fleet", "device": "ue1", "url": "https://server:1", "token": TOKEN, "ca": ""}
    return Credentials.model_construct(**values | changes)


def client_of(server: FakeServer, remarks: list[str] | None = None, **changes: Any) -> FleetClient:
    """A client that hardly waits."""
    return FleetClient(
        credentials(**changes),
        httpx2.MockTransport(server),
        backoff=Backoff(first_s=0.001, longest_s=0.004),
        remark=(remarks if remarks is not None else []).append,
    )


async def enrolled(server: FakeServer) -> FleetClient:
    client = client_of(server)
    await client.enrol("k" * 64, sha256(b"k" * 64))
    return client
