"""Ledgers with something in them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

from emutune.fleet.ledger import Decision, Ledger
from emutune.fleet.protocol import Lease, Report, Result


class AskedHere:
    """A ledger that is asked in the thread of whoever asks."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    async def __call__(self, question: Callable[..., Any], /, *args: Any, **named: Any) -> Any:
        return question(self._ledger, *args, **named)


def digest(text: str) -> str:
    """Some SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()


def report(task: str) -> Report:
    """A report of a task."""
    return Report(task=task, data_bytes=1000, data_sha256=digest(task), cache_bytes=1 << 20)


def decision(step: int, device: str, task: str | None = None, **changes: object) -> Decision:
    """A lease to train an emulator that keeps half, or what the changes say."""
    values = {
        "device": device,
        "task": f"{device}-{step}" if task is None else task,
        "lease": f"{step}-{device}",
        "kind": "train",
        "retention": 0.5,
        "at_server": False,
        "emulator_name": "half",
        "predicted_bytes": 1000,
        "predicted_delay_s": 2.0,
        "predicted_perplexity": 20.0,
    } | changes
    message = Lease(lease=values["lease"], step=step, kind=values["kind"], task=values["task"])
    return Decision.model_validate(values | {"lease_json": message.model_dump_json()})


def add_devices(ledger: Ledger, *devices: str) -> None:
    """Devices that have enrolled."""
    for device in devices:
        ledger.add_device(device, digest(f"token {device}"))
        assert ledger.enrol(device, digest(f"token {device}"), digest(f"key {device}"))


def run_step(ledger: Ledger, step: int, *devices: str, accepted: bool = True) -> None:
    """A whole step, in which everything goes well."""
    for device in devices:
        ledger.report(device, report(f"{device}-{step}"))
    ledger.begin_step(step, [decision(step, device) for device in devices])
    for number, device in enumerate(devices):
        lease = f"{step}-{device}"
        ledger.transferred(lease, 1.0 + number, 1000 + number)
        ledger.adapter(lease, digest(lease), 64)
        ledger.evaluation(lease, 25.0, 21.0, accepted)
        ledger.result(lease, Result(outcome="trained", adapter=digest(lease), training_s=1.0))
        ledger.close_lease(lease, "done")
    ledger.end_step(step, float(len(devices)))
