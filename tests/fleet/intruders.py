"""What somebody may try who should not be let in, and how the server must answer: one row an attack.

Every attack is a request to an application as ``served.Served`` makes it, and must leave everything as it was.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import ssl
import struct
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
from served import (
    DASHBOARD_KEY,
    DATA,
    KEYS,
    MANIFEST,
    SHA,
    TOKENS,
    UNLEASED,
    Served,
    report,
    safetensors,
)

Body = bytes | Callable[[], AsyncIterator[bytes]]


@dataclass(frozen=True)
class Attack:
    """One request.

    Attributes:
        device: whose key it brings; ``key`` otherwise, or none.
        body: bytes, or a function that streams them without saying how many there are.
        statuses: with which the server may answer.
    """

    name: str
    method: str
    path: str
    statuses: tuple[int, ...]
    device: str | None = None
    key: str | None = None
    body: Body = b""
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What came of an attack.

    Attributes:
        refused: the status is one that it may be.
        noted: the ledger has one more row about a refusal.
        unchanged: nothing else is different from before.
    """

    attack: Attack
    status: int
    text: str
    refused: bool
    noted: bool
    unchanged: bool

    @property
    def let_in(self) -> bool:
        return not (self.refused and self.unchanged)


def _endless(piece: bytes, count: int) -> Callable[[], AsyncIterator[bytes]]:
    async def stream() -> AsyncIterator[bytes]:
        for _ in range(count):
            yield piece

    return stream


def _enrolment(**changes: str) -> bytes:
    message = {"device": "new", "token": TOKENS["new"], "key_sha256": "1" * 64} | changes
    return json.dumps(message).encode()


def _header(header: Any, length: int | None = None, rest: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + rest


def _tensor(**changes: Any) -> dict[str, Any]:
    """A header of the adapter that is asked for, but for changes of its tensor."""
    tensor = {"dtype": "F32", "shape": [8], "data_offsets": [0, 32]}
    return {"__metadata__": {"manifest": MANIFEST.model_dump_json()}, "weight": tensor | changes}


def _says(*lost: str, **changes: Any) -> bytes:
    """An adapter whose manifest says something else than was asked for, or does not say something."""
    manifest = json.loads(MANIFEST.model_dump_json()) | changes
    text = json.dumps({name: value for name, value in manifest.items() if name not in lost})
    return _header(_tensor() | {"__metadata__": {"manifest": text}}, rest=bytes(32))


TRAIN, UPLOAD = "/v1/leases/train-1", "/v1/leases/upload-1"
RESULT = json.dumps({"outcome": "trained", "adapter": "2" * 64}).encode()

_ROUTES = [
    ("GET", "/v1/fleet", b""),
    ("POST", "/v1/reports", json.dumps(report()).encode()),
    ("GET", "/v1/lease", b""),
    ("GET", f"/v1/shards/{SHA}", b""),
    ("GET", "/v1/tokenizer/tokenizer.json", b""),
    ("GET", f"{TRAIN}/adapter", b""),
    ("PUT", f"{TRAIN}/adapter", safetensors()),
    ("GET", f"{UPLOAD}/data", b""),
    ("PATCH", f"{UPLOAD}/data?offset=0", DATA),
    ("POST", f"{TRAIN}/transferred", b'{"seconds": 1, "bytes": 1}'),
    ("POST", f"{TRAIN}/result", RESULT),
    ("POST", "/v1/leave", b""),
]
_DASHBOARD = ("/v1/dashboard", "/v1/dashboard/steps/0")
_STRANGERS: list[tuple[str, dict[str, Any]]] = [
    ("no key", {}),
    ("unknown key", {"key": "3" * 64}),
    ("empty key", {"headers": {"Authorization": "Bearer "}}),
    ("revoked key", {"device": "gone"}),
    ("key's hash for key", {"key": hashlib.sha256(KEYS["ue1"].encode()).hexdigest()}),
    ("token for key", {"key": TOKENS["ue1"]}),
    ("upper case", {"key": KEYS["ue1"].upper().replace("0", "F")}),
    ("basic", {"headers": {"Authorization": f"Basic {KEYS['ue1']}"}}),
    ("injection", {"key": "' OR '1'='1"}),
    ("long key", {"key": "a" * 8000}),
    ("not ASCII", {"headers": {"Authorization": "Bearer \xe9\xff"}}),
]

AUTHENTICATION = [
    Attack(f"{name}: {method} {path}", method, path, (401,), body=body, **brings)
    for name, brings in _STRANGERS
    for method, path, body in (*_ROUTES, *(("GET", path, b"") for path in _DASHBOARD))
]

# Neither a device nor anybody else may look, and who may look is no device.
DASHBOARD = (
    [
        Attack(f"dashboard, {name}: {path}", "GET", path, (401,), **brings)
        for name, brings in [
            ("a device's key", {"device": "ue1"}),
            ("its own hash", {"key": hashlib.sha256(DASHBOARD_KEY.encode()).hexdigest()}),
            ("key in another case", {"key": DASHBOARD_KEY.upper() + "F"}),
            ("key in another header", {"headers": {"X-Key": DASHBOARD_KEY}}),
        ]
        for path in _DASHBOARD
    ]
    + [
        Attack(f"dashboard's key: {method} {path}", method, path, (401,), body=body, key=DASHBOARD_KEY)
        for method, path, body in _ROUTES
    ]
    + [
        Attack(
            "dashboard's key as a token",
            "POST",
            "/v1/enrolment",
            (403,),
            body=_enrolment(token=DASHBOARD_KEY),
        ),
        Attack("step: negative", "GET", "/v1/dashboard/steps/-1", (422,), key=DASHBOARD_KEY),
        Attack("step: text", "GET", "/v1/dashboard/steps/0%20OR%201", (422,), key=DASHBOARD_KEY),
        Attack("step: none", "GET", "/v1/dashboard/steps/7", (404,), key=DASHBOARD_KEY),
        Attack("page: traversal", "GET", "/dashboard/..%2Fdashboard.key", (404,)),
        Attack("page: the key's file", "GET", "/dashboard/dashboard.key", (404,)),
        Attack("page: module", "GET", "/dashboard/board.py", (404,)),
        Attack("page: method", "POST", "/dashboard", (405,)),
    ]
)

OTHERS_LEASES = [
    Attack(f"another's lease: {method} {path}", method, path, (404,), device=thief, body=body)
    for method, path, body in _ROUTES
    if "/leases/" in path
    for thief in [("ue2" if "train-1" in path else "ue1")]
] + [
    Attack("shard of another's lease", "GET", f"/v1/shards/{SHA}", (404,), device="ue2"),
    Attack("shard of no lease", "GET", f"/v1/shards/{UNLEASED}", (404,), device="ue1"),
    Attack("lease that does not exist", "GET", "/v1/leases/none/data", (404,), device="ue2"),
    Attack("lease: wildcard", "GET", "/v1/leases/%25/data", (422,), device="ue2"),
    Attack("lease: injection", "GET", "/v1/leases/'%20OR%201=1--/data", (422,), device="ue2"),
    Attack("lease: newline", "GET", "/v1/leases/upload-1%0A/data", (422,), device="ue2"),
    Attack("lease: too long", "GET", f"/v1/leases/{'a' * 65}/data", (422,), device="ue2"),
]

ENROLMENT = [
    Attack(
        "replayed with another key",
        "POST",
        "/v1/enrolment",
        (403,),
        body=_enrolment(device="ue1", token=TOKENS["ue1"]),
    ),
    Attack(
        "revoked token", "POST", "/v1/enrolment", (403,), body=_enrolment(device="gone", token=TOKENS["gone"])
    ),
    Attack(
        "revoked token and its key",
        "POST",
        "/v1/enrolment",
        (403,),
        body=_enrolment(
            device="gone", token=TOKENS["gone"], key_sha256=hashlib.sha256(KEYS["gone"].encode()).hexdigest()
        ),
    ),
    Attack("unknown token", "POST", "/v1/enrolment", (403,), body=_enrolment(token="4" * 64)),
    Attack("another's token", "POST", "/v1/enrolment", (403,), body=_enrolment(token=TOKENS["ue1"])),
    Attack(
        "another's key",
        "POST",
        "/v1/enrolment",
        (403,),
        body=_enrolment(key_sha256=hashlib.sha256(KEYS["ue1"].encode()).hexdigest()),
    ),
    Attack("unknown device", "POST", "/v1/enrolment", (403,), body=_enrolment(device="nobody")),
    Attack("device: traversal", "POST", "/v1/enrolment", (422,), body=_enrolment(device="../ue1")),
    Attack("device: newline", "POST", "/v1/enrolment", (422,), body=_enrolment(device="new\n")),
    Attack("token: short", "POST", "/v1/enrolment", (422,), body=_enrolment(token="")),
    Attack(
        "token: hash of it",
        "POST",
        "/v1/enrolment",
        (403,),
        body=_enrolment(token=hashlib.sha256(TOKENS["new"].encode()).hexdigest()),
    ),
    Attack("unknown field", "POST", "/v1/enrolment", (422,), body=_enrolment(admin="yes")),
]

_BROKEN_JSON = {
    "empty": b"",
    "cut short": b'{"task": "t2", ',
    "no object": b"[1, 2]",
    "null": b"null",
    "not UTF-8": b'{"task": "\xff\xfe"}',
    "deep": b"[" * 60000,
    "deep objects": b'{"a":' * 10000,
    "huge number": b'{"task": "t2", "data_bytes": 1' + b"0" * 5000 + b"}",
    "NaN": json.dumps(report() | {"gain": float("nan")}).encode(),
    "infinity": json.dumps(report() | {"perplexity_ratio": float("inf")}).encode(),
    "negative": json.dumps(report() | {"data_bytes": -1}).encode(),
    "text for number": json.dumps(report() | {"data_bytes": "5"}).encode(),
    "true for number": json.dumps(report() | {"data_bytes": True}).encode(),
    "unknown field": json.dumps(report() | {"device": "ue2"}).encode(),
    "surrogate": b'{"task": "\\ud800"}',
    "task: traversal": json.dumps(report("../../t")).encode(),
    "pickle": b"\x80\x04\x95\x10\x00\x00\x00cos\nsystem\n",
}
_MESSAGES = {
    "/v1/reports": "ue1",
    f"{TRAIN}/transferred": "ue1",
    f"{TRAIN}/result": "ue1",
    "/v1/enrolment": None,
}

MALFORMED = [
    Attack(f"JSON {name}: {path}", "POST", path, (422,), device=device, body=body)
    for path, device in _MESSAGES.items()
    for name, body in _BROKEN_JSON.items()
] + [
    Attack("offset: negative", "PATCH", f"{UPLOAD}/data?offset=-1", (422,), device="ue2", body=b"a"),
    Attack("offset: none", "PATCH", f"{UPLOAD}/data", (422,), device="ue2", body=b"a"),
    Attack("offset: huge", "PATCH", f"{UPLOAD}/data?offset={1 << 70}", (422,), device="ue2", body=b"a"),
    Attack("wait: for ever", "GET", "/v1/lease?wait=1e9", (422,), device="ue1"),
    Attack("wait: NaN", "GET", "/v1/lease?wait=nan", (422,), device="ue1"),
]

_BIG = b"x" * (1 << 16)
OVERSIZED = [
    Attack(f"{how}: {method} {path}", method, path, (413,), device=device, body=body)
    for method, path, device in (
        ("POST", "/v1/reports", "ue1"),
        ("POST", "/v1/enrolment", None),
        ("POST", f"{TRAIN}/transferred", "ue1"),
        ("POST", f"{TRAIN}/result", "ue1"),
        ("PATCH", f"{UPLOAD}/data?offset=0", "ue2"),
    )
    for how, body in (("declared", _BIG * 3), ("streamed", _endless(_BIG, 64)))
] + [
    # What goes on after an adapter's tensors is no adapter, however long it is.
    Attack(f"{how}: adapter", "PUT", f"{TRAIN}/adapter", (413, 422), device="ue1", body=body)
    for how, body in (
        ("declared", safetensors({"weight": 30_000})),
        ("streamed", _endless(safetensors(), 64)),
    )
]

_BROKEN_SAFETENSORS = {
    "empty": b"",
    "shorter than its length": b"\x08\x00",
    "header of 2**63": (1 << 63).to_bytes(8, "little") + b"{}",
    "header of 99 MB": (99_000_000).to_bytes(8, "little") + b"{" * 100,
    "header longer than the file": _header(_tensor(), length=5000),
    "header of no bytes": bytes(8),
    "no object": _header(b"[1, 2, 3]"),
    "no JSON": _header(b"{not JSON at all}"),
    "not UTF-8": _header(b'{"\xff\xfe": 1}'),
    "deep": _header(b'{"a":' * 15000),
    "pickle": b"\x80\x04\x95" + bytes(50),
    "zip": b"PK\x03\x04" + bytes(100),
    "offsets beyond the file": _header(_tensor(data_offsets=[0, 1 << 40]), rest=bytes(32)),
    "offsets backwards": _header(_tensor(data_offsets=[32, 0]), rest=bytes(32)),
    "negative offsets": _header(_tensor(data_offsets=[-32, 0]), rest=bytes(32)),
    "shape overflows": _header(_tensor(shape=[1 << 62, 1 << 62]), rest=bytes(32)),
    "shape and offsets differ": _header(_tensor(data_offsets=[0, 12]), rest=bytes(32)),
    "unknown type": _header(_tensor(dtype="OBJECT"), rest=bytes(32)),
    "overlap": _header(
        _tensor() | {"other": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}, rest=bytes(32)
    ),
    "more bytes than tensors": _header(_tensor(), rest=bytes(80)),
    "fewer bytes than tensors": _header(_tensor(), rest=bytes(4)),
    "metadata is no text": _header(_tensor() | {"__metadata__": {"manifest": {"a": 1}}}, rest=bytes(32)),
    "a name twice": _header(
        json.dumps(_tensor(shape=[9]))[:-1].encode() + b", " + json.dumps(_tensor()).encode()[1:],
        rest=bytes(32),
    ),
}
# Files that are adapters, but not the one that was asked for; what they would cost is in their headers alone.
_OTHER_ADAPTERS = {
    "no manifest": _header({"weight": _tensor()["weight"]}, rest=bytes(32)),
    "manifest that is no JSON": _header(_tensor() | {"__metadata__": {"manifest": "{"}}, rest=bytes(32)),
    "manifest deep": _header(_tensor() | {"__metadata__": {"manifest": "[" * 90000}}, rest=bytes(32)),
    "width of 10**12": _says(width=10**12),
    "width of 60000": _says(width=60_000),
    "width of 10**4000": _says(width=10**4000),
    "width of 0": _says(width=0),
    "width below 0": _says(width=-4),
    "width is no number": _says(width=float("nan")),
    "whole layers": _says(kind="layers", width=0),
    "bottlenecks": _says(kind="bottleneck"),
    "kind of its own": _says(kind="pickle"),
    "base of another model": _says(base="c" * 64),
    "base of no line": _says(base="b\n\x1b[2J" * 999),
    "more layers": _says(layers=10**15),
    "layers below 0": _says(layers=-1),
    "other layers": _says(layer_map=[0, 4]),
    "one layer twice": _says(layer_map=[0, 5, 5]),
    "no layers": _says(layer_map=[]),
    "layers beyond": _says(layer_map=[0, 10**12]),
    "very many layers": _says(layer_map=[*range(9000)]),
    "another emulator": _says(emulator="third"),
    "another retention": _says(retention=0.25),
    "retention of none": _says("retention"),
    "perplexity that is no number": _says(perplexity=float("nan")),
    "no tensors": _header({"__metadata__": _tensor()["__metadata__"]}),
    "no header": _header({}),
    "tensor of another name": _header(
        {"__metadata__": _tensor()["__metadata__"], "other": _tensor()["weight"]}, rest=bytes(32)
    ),
    "tensor of a name of no line": _header(
        _tensor() | {"a\n\x1b[2J\u202e" * 99: {"dtype": "F32", "shape": [0], "data_offsets": [32, 32]}},
        rest=bytes(32),
    ),
    "one more tensor": _header(
        _tensor() | {"more": {"dtype": "F32", "shape": [1], "data_offsets": [32, 36]}}, rest=bytes(36)
    ),
    "one more tensor of nothing": _header(
        _tensor() | {"more": {"dtype": "F32", "shape": [0], "data_offsets": [32, 32]}}, rest=bytes(32)
    ),
    "wide tensor": _header(_tensor(shape=[10**12], data_offsets=[0, 4 * 10**12])),
    "flat tensor": _header(_tensor(shape=[2, 4]), rest=bytes(32)),
    "tensor of one number": _header(_tensor(shape=[], data_offsets=[0, 4]), rest=bytes(4)),
    "shorter tensor": _header(_tensor(shape=[7], data_offsets=[0, 28]), rest=bytes(28)),
    "tensor that is none": _header(_tensor() | {"weight": [1, 2]}, rest=bytes(32)),
    "double precision": _header(_tensor(dtype="F64", data_offsets=[0, 64]), rest=bytes(64)),
    "half precision": _header(_tensor(dtype="BF16", data_offsets=[0, 16]), rest=bytes(16)),
    "integers": _header(_tensor(dtype="I32"), rest=bytes(32)),
    "not a number": _header(_tensor(), rest=struct.pack("<8f", *[0.0] * 7, float("nan"))),
    "infinity": _header(_tensor(), rest=struct.pack("<8f", float("-inf"), *[0.0] * 7)),
}
ADAPTERS = [
    Attack(f"{what} {name}", "PUT", f"{TRAIN}/adapter", (422,), device="ue1", body=body)
    for what, bodies in (("safetensors", _BROKEN_SAFETENSORS), ("adapter", _OTHER_ADAPTERS))
    for name, body in bodies.items()
]

_OUTSIDE = [
    "..%2F..%2Fledger.sqlite",
    "../../ledger.sqlite",
    "..%2fcatalogue.json",
    "%2e%2e%2f%2e%2e%2fledger.sqlite",
    "..%252f..%252fledger.sqlite",
    "..%5c..%5cledger.sqlite",
    "%2Fetc%2Fpasswd",
    "/etc/passwd",
    f"{SHA}.safetensors",
    f"{SHA}%00.safetensors",
    f"{SHA}%0A",
    SHA.upper().replace("0", "A"),
    f"{SHA[:-1]}*",
    "0" * 64,
    "..",
    "",
]
TRAVERSAL = (
    [
        Attack(f"{path}{name}", "GET", path + name, (404, 422), device="ue1")
        for path in ("/v1/shards/", "/v1/tokenizer/")
        for name in _OUTSIDE
    ]
    + [
        Attack(f"{path}", "GET", path, (404, 422), device="ue1")
        for path in (
            "/v1/tokenizer/catalogue.json",
            "/v1/leases/..%2F..%2Fledger.sqlite/adapter",
            "/v1/leases/..%2F..%2Fledger.sqlite/data",
            "/catalogue/catalogue.json",
            "/v1/../catalogue.json",
            "/docs",
            "/v1/admin",
        )
    ]
    + [Attack("method", "DELETE", f"/v1/shards/{SHA}", (405,), device="ue1")]
)

ATTACKS = [
    *AUTHENTICATION,
    *DASHBOARD,
    *OTHERS_LEASES,
    *ENROLMENT,
    *MALFORMED,
    *OVERSIZED,
    *ADAPTERS,
    *TRAVERSAL,
]


# Connections that stay: what each sends at once, and then again and again; none even shakes hands if that is None.
CROWDS: dict[str, tuple[bytes | None, bytes]] = {
    "no handshake": (None, b""),
    "no request": (b"", b""),
    "slow head": (b"GET /v1/fleet HTTP/1.1\r\nHost: fleet\r\n", b"X-More: 1\r\n"),
    "slow second head": (
        b"GET /v1/fleet HTTP/1.1\r\nHost: fleet\r\n\r\nGET /v1/fleet HTTP/1.1\r\n",
        b"X-More: 1\r\n",
    ),
    "slow message": (b"POST /v1/enrolment HTTP/1.1\r\nHost: fleet\r\nContent-Length: 5000\r\n\r\n{", b" "),
}


@asynccontextmanager
async def crowd(
    kind: str, port: int, context: ssl.SSLContext, count: int, pause_s: float, source: str = "127.0.0.1"
) -> AsyncIterator[list[asyncio.Task[None]]]:
    """So many connections at once; yields them, each done once the server has closed it."""
    first, again = CROWDS[kind]

    async def stay() -> None:
        with suppress(OSError, asyncio.IncompleteReadError):
            tls = None if first is None else context
            reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=tls, local_addr=(source, 0))
            try:
                writer.write(first or b"")
                gone = asyncio.create_task(reader.read(-1))
                while not (await asyncio.wait({gone}, timeout=pause_s))[0]:
                    writer.write(again)
                gone.result()
            finally:
                writer.transport.abort()

    staying = [asyncio.create_task(stay()) for _ in range(count)]
    try:
        yield staying
    finally:
        for task in staying:
            task.cancel()
        await asyncio.gather(*staying, return_exceptions=True)


async def attempt(fleet: Served, attack: Attack) -> Outcome:
    """Try it in memory."""
    before, rows = fleet.state(), len(fleet.ledger.audit_rows())
    async with fleet.client(attack.device, attack.key) as client:
        status, text = await send(client, attack)
    noted = [row for row in fleet.ledger.audit_rows()[rows:] if row.event == "refused"]
    return Outcome(
        attack,
        status,
        text,
        refused=status in attack.statuses,
        noted=bool(noted),
        unchanged=fleet.state() == before,
    )


async def send(client: httpx2.AsyncClient, attack: Attack) -> tuple[int, str]:
    """Send it over any client; its status and text."""
    content = attack.body if isinstance(attack.body, bytes) else attack.body()
    headers = {name: value.encode("latin-1") for name, value in attack.headers.items()}
    # A URL that is built from text would be tidied up first.
    url = httpx2.URL(str(client.base_url).rstrip("/")).copy_with(raw_path=attack.path.encode())
    response = await client.request(attack.method, url, content=content, headers=headers)
    return response.status_code, response.text


async def count(directory: Path, attacks: Sequence[Attack] = ATTACKS) -> dict[str, int]:
    """Try them, for a benchmark: how many were tried, let in, and not noted in the ledger."""
    directory.mkdir(parents=True, exist_ok=True)
    fleet = Served(directory)
    try:
        outcomes = [await attempt(fleet, attack) for attack in attacks]
    finally:
        fleet.close()
    return {
        "tried": len(outcomes),
        "let_in": sum(outcome.let_in for outcome in outcomes),
        "not_noted": sum(not outcome.noted for outcome in outcomes),
    }
