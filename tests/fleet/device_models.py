"""A tiny foundation model's catalogue, and a server in memory that serves it."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "tuning"))

from directories import catalogue_of, generated_text
from fake_server import FakeServer, fleet_info

from emutune.fleet.protocol import Lease, Training
from emutune.tuning.catalogue import Catalogue

TEXT = generated_text(4000, seed=3)
TRAINING = Training(adapter="lora", width=4, steps=12, batch=2, learning_rate=1e-2, block=32, seed=5)


def catalogue(directory: Path) -> Catalogue:
    return catalogue_of(directory)


def emulator(of: Catalogue, retention: float = 0.5) -> dict[str, Any]:
    return of.find(retention).model_dump(mode="json")


def serving(of: Catalogue, **changes: Any) -> FakeServer:
    files = {path.name: path.read_bytes() for path in (of.directory / "tokenizer").iterdir()}
    info = fleet_info(
        base=of.info.base,
        config=of.info.config,
        layers=of.info.layers,
        bottom=of.info.bottom,
        top=of.info.top,
        tokenizer={name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
        smallest_bytes=min(emulator.bytes for emulator in of.emulators()),
    )
    server = FakeServer(info, files=files, **changes)
    server.add(*(path.read_bytes() for path in (of.directory / "shards").iterdir()))
    return server


def leasing(kind: str, step: int = 0, **changes: Any) -> Any:
    """What makes a server answer every new report with a lease."""

    def on_report(server: FakeServer, report: dict[str, Any]) -> None:
        if any(lease.task == report["task"] for lease in server.leases):
            return
        number = len(server.leases)
        values = {
            "lease": f"l-{number}",
            "step": number,
            "kind": kind,
            "task": report["task"],
            "training": TRAINING,
        }
        server.leases.append(Lease(**values | changes))
        server.sizes[f"l-{number}"] = (report["data_bytes"], report["data_sha256"])

    return on_report
