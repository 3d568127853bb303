"""The dashboard of a server that starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from emutune.fleet.config import FleetConfig
from emutune.fleet.security import secret_sha256
from emutune.fleet.server.dashboard.access import dashboard_key
from emutune.fleet.server.dashboard.board import Board, Fleet
from emutune.fleet.server.dashboard.messages import Model
from emutune.fleet.server.dashboard.watch import Watch


class _Emulator(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def retention(self) -> float: ...

    @property
    def layers(self) -> Sequence[object]: ...


class _Info(Protocol):
    @property
    def base(self) -> str: ...

    @property
    def config(self) -> Mapping[str, Any]: ...

    @property
    def layers(self) -> int: ...


class Emulators(Protocol):
    """What the dashboard needs of a catalogue."""

    @property
    def info(self) -> _Info:
        """The model."""
        ...

    def emulators(self) -> Sequence[_Emulator]:
        """Its emulators."""
        ...


def open_board(config: FleetConfig, ledger: Path, catalogue: Emulators, policy: str) -> Board:
    """The dashboard of a fleet; its key is made if there is none.

    Args:
        config: the fleet's file.
        ledger: the server's file, which what is shown is read from over a connection of its own.
        catalogue: the emulators.
        policy: as the operator named it.

    Raises:
        FleetError: the key cannot be read or written.
    """
    info = catalogue.info
    fleet = Fleet(
        name=config.name,
        policy=policy,
        scenario=config.scenario,
        model=Model(kind=str(info.config.get("model_type", "unknown")), base=info.base, layers=info.layers),
        steps_total=config.steps.count,
        emulators={e.name: (e.retention, len(e.layers)) for e in catalogue.emulators()},
    )
    directory = config.server.directory
    return Board(
        fleet,
        ledger,
        directory / "uploads",
        Watch(),
        secret_sha256(dashboard_key(directory)),
    )
