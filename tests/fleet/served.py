"""A fleet's application over the real ledger, and a hub that only remembers what it was told."""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2

from emutune.errors import AdapterError
from emutune.fleet.config import Limits
from emutune.fleet.ledger import Decision, Ledger
from emutune.fleet.protocol import FleetInfo, Lease, Report, Result, Transferred
from emutune.fleet.security import new_secret, secret_sha256
from emutune.fleet.server.app import create_app
from emutune.fleet.server.dashboard.board import Board, Fleet
from emutune.fleet.server.dashboard.messages import Model
from emutune.fleet.server.dashboard.watch import Watch
from emutune.fleet.server.ledger_thread import LedgerThread
from emutune.fleet.shaping import TokenBucket
from emutune.tuning.adapter_manifest import AdapterManifest, Asked
from emutune.tuning.manifest import Emulator

DATA = b"how a thing is done, and why " * 3000
SHARD = random.Random(5).randbytes(3 * (1 << 20) + 17)
# A shard of the catalogue that no lease names.
UNLEASED = "3" * 64
TOKENIZER = b'{"words": 3}'
SHA = hashlib.sha256(SHARD).hexdigest()
KEYS = {"ue1": new_secret(), "ue2": new_secret(), "gone": new_secret()}
DASHBOARD_KEY = new_secret()
# Of the adapter that the lease to train asks for.
MANIFEST = AdapterManifest(
    base="b" * 64, layers=6, layer_map=(0, 5), kind="lora", width=4, retention=0.5, emulator="half"
)
TOKENS = {name: new_secret() for name in (*KEYS, "new")}


@dataclass
class Hub:
    """Remembers; the ledger says which leases there are."""

    ledger: Ledger
    directory: Path
    told: list[tuple[Any, ...]] = field(default_factory=list)
    refuses: bool = False
    trained: Path | None = None
    shapes: dict[str, tuple[int, ...]] = field(default_factory=lambda: {"weight": (8,)})

    def info(self) -> FleetInfo:
        return FleetInfo(
            name="test",
            base="b" * 64,
            config={"model_type": "llama"},
            layers=6,
            bottom=1,
            top=1,
            tokenizer={"tokenizer.json": hashlib.sha256(TOKENIZER).hexdigest()},
            smallest_bytes=10,
        )

    async def reported(self, device: str, report: Report) -> None:
        self.ledger.report(device, report)

    async def next_lease(self, device: str, wait_s: float) -> Lease | None:
        return self.ledger.open_lease(device)

    async def lease_of(self, device: str, lease: str) -> Lease | None:
        row = self.ledger.lease(device, lease)
        return None if row is None else row.message

    async def data_size(self, device: str, lease: str) -> tuple[int, str]:
        return len(DATA), hashlib.sha256(DATA).hexdigest()

    async def data_received(self, device: str, lease: str, path: Path) -> None:
        self.told.append(("data", device, lease, path.read_bytes()))
        os.replace(path, self.directory / lease)
        self.ledger.data_complete(lease)

    async def transferred(self, device: str, lease: str, message: Transferred) -> None:
        self.ledger.transferred(lease, message.seconds, message.bytes)

    async def start_adapter(self, device: str, lease: str) -> Path | None:
        return self.trained

    async def adapter_asked(self, device: str, lease: str) -> Asked:
        return Asked(MANIFEST, self.shapes)

    async def adapter_received(self, device: str, lease: str, path: Path) -> None:
        if self.refuses:
            raise AdapterError("adapter: was tuned on another model; tune it again")
        self.told.append(("adapter", device, lease, path))
        self.ledger.adapter(lease, path.stem, path.stat().st_size)

    async def result(self, device: str, lease: str, message: Result) -> None:
        self.ledger.result(lease, message)

    async def left(self, device: str) -> None:
        self.ledger.leave(device)


def board_of(ledger: Ledger, uploads: Path, steps_total: int = 5, **changes: Any) -> Board:
    """The dashboard of a ledger, opened by ``DASHBOARD_KEY``."""
    fleet = {
        "name": "test",
        "policy": "fixed",
        "scenario": "reference",
        "models": [Model(name="tiny", kind="llama", base="b" * 64, layers=6)],
        "steps_total": steps_total,
        "emulators": {("b" * 64, "half"): (0.5, 4)},
    }
    watch = Watch()
    return Board(Fleet(**fleet | changes), ledger.path, uploads, watch, secret_sha256(DASHBOARD_KEY))


class Served:
    """An application with two devices, one of which trains and one uploads, and one that was revoked."""

    def __init__(self, directory: Path, limits: Limits | None = None, rate_bps: float | None = None) -> None:
        self.directory = directory
        self.catalogue, self.work = directory / "catalogue", directory / "work"
        (self.catalogue / "shards").mkdir(parents=True, exist_ok=True)
        (self.catalogue / "tokenizer").mkdir(exist_ok=True)
        (self.catalogue / "shards" / f"{SHA}.safetensors").write_bytes(SHARD)
        (self.catalogue / "shards" / f"{UNLEASED}.safetensors").write_bytes(b"a part of the model")
        (self.catalogue / "tokenizer" / "tokenizer.json").write_bytes(TOKENIZER)
        (self.catalogue / "catalogue.json").write_text("secret of the catalogue")
        self.ledger = Ledger(directory / "ledger.sqlite")
        self._fill()
        self.asked = LedgerThread(self.ledger.path)
        self.hub = Hub(self.ledger, directory)
        self.bucket = None if rate_bps is None else TokenBucket(rate_bps)
        self.board = board_of(self.ledger, self.work / "uploads")
        self.app = create_app(
            self.hub,
            self.asked,
            {"b" * 64: self.catalogue},
            self.work,
            limits or Limits(data_mb=1, adapter_mb=0.1),
            lambda device, lease: self.bucket,
            self.board,
        )

    def _fill(self) -> None:
        if self.ledger.devices():
            return
        for name, token in TOKENS.items():
            self.ledger.add_device(name, secret_sha256(token))
            if name in KEYS:
                assert self.ledger.enrol(name, secret_sha256(token), secret_sha256(KEYS[name]))
        self.ledger.revoke("gone")
        leases = {
            "ue1": Lease(lease="train-1", step=0, kind="train", task="t1", emulator=emulator()),
            "ue2": Lease(lease="upload-1", step=0, kind="upload", task="t1"),
        }
        self.ledger.begin_step(
            0,
            [
                Decision(
                    device=device,
                    task="t1",
                    lease=lease.lease,
                    kind=lease.kind,
                    at_server=lease.kind == "upload",
                    lease_json=lease.model_dump_json(),
                )
                for device, lease in leases.items()
            ],
        )

    def client(self, device: str | None = None, key: str | None = None) -> httpx2.AsyncClient:
        """A client in memory that brings a device's key."""
        key = KEYS[device] if device is not None else key
        return httpx2.AsyncClient(
            transport=httpx2.ASGITransport(self.app),
            base_url="https://fleet",
            headers={} if key is None else {"Authorization": f"Bearer {key}"},
        )

    def state(self) -> dict[str, Any]:
        """Everything that a refused request must leave as it was."""
        files = {
            str(path.relative_to(self.directory)): path.read_bytes()
            for folder in (self.catalogue, self.work)
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        return {
            "files": files,
            "devices": self.ledger.devices(),
            "leases": [self.ledger.lease("ue1", "train-1"), self.ledger.lease("ue2", "upload-1")],
            "reports": self.ledger.open_reports(),
            "told": list(self.hub.told),
        }

    def close(self) -> None:
        self.board.close()
        self.asked.close()
        self.ledger.close()


@contextmanager
def served(directory: Path, limits: Limits | None = None, rate_bps: float | None = None):
    """A ``Served`` that is closed."""
    fleet = Served(directory, limits, rate_bps)
    try:
        yield fleet
    finally:
        fleet.close()


def emulator(names: Sequence[str] = (SHA, *(digit * 64 for digit in "015"))) -> dict[str, Any]:
    """What a lease to train names: the shard, and some that a test may make files of."""
    outer, *layers = ({"sha256": sha256, "bytes": len(SHARD)} for sha256 in names)
    built = Emulator(
        base="b" * 64,
        name="half",
        recipe="r",
        method=("layer_drop",),
        order="uniform",
        retention=0.5,
        kept=(1,),
        seed=0,
        outer=outer,
        layers=[{"index": index, "shard": shard} for index, shard in enumerate(layers)],
    )
    return json.loads(built.model_dump_json())


def report(task: str = "t2") -> dict[str, Any]:
    """A report that the server takes."""
    return {"task": task, "data_bytes": 5, "data_sha256": "0" * 64, "cache_bytes": 100}


def safetensors(tensors: dict[str, int] | None = None, number: int = 0) -> bytes:
    """An adapter's file of float32 vectors of so many elements, all of whose bytes are a number."""
    header: dict[str, Any] = {"__metadata__": {"manifest": MANIFEST.model_dump_json()}}
    at = 0
    for name, count in (tensors or {"weight": 8}).items():
        header[name] = {"dtype": "F32", "shape": [count], "data_offsets": [at, at + 4 * count]}
        at += 4 * count
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + bytes([number]) * at
