"""What the HTTP routes need of the orchestrator; every call may be repeated and counts once."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from emutune.fleet.protocol import FleetInfo, Lease, Report, Result, Transferred
from emutune.tuning.adapter_manifest import Asked


class Hub(Protocol):
    """The server behind the routes. Devices are already authenticated; identifiers are already checked."""

    def info(self) -> FleetInfo:
        """What a device has to know before its first task."""
        ...

    async def reported(self, device: str, report: Report) -> None:
        """A device has a task."""
        ...

    async def next_lease(self, device: str, wait_s: float) -> Lease | None:
        """The device's open lease, as soon as there is one."""
        ...

    async def lease_of(self, device: str, lease: str) -> Lease | None:
        """A lease, whether open or not, if it is this device's."""
        ...

    async def data_size(self, device: str, lease: str) -> tuple[int, str]:
        """Bytes and SHA-256 that an upload must have."""
        ...

    async def data_received(self, device: str, lease: str, path: Path) -> None:
        """An upload is whole and verified."""
        ...

    async def transferred(self, device: str, lease: str, message: Transferred) -> None:
        """A device has what the lease names, or has sent it."""
        ...

    async def start_adapter(self, device: str, lease: str) -> Path | None:
        """The file that ``GET .../adapter`` answers with; None while there is none."""
        ...

    async def adapter_asked(self, device: str, lease: str) -> Asked:
        """The adapter that a lease to train is to end with."""
        ...

    async def adapter_received(self, device: str, lease: str, path: Path) -> None:
        """A device has put an adapter, already checked to be the one that was asked for."""
        ...

    async def result(self, device: str, lease: str, message: Result) -> None:
        """A lease is done."""
        ...

    async def left(self, device: str) -> None:
        """A device takes no part any more."""
        ...
