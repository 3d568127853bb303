"""The dashboard of a server that starts."""

from __future__ import annotations

from pathlib import Path

from emutune.fleet.config import FleetConfig
from emutune.fleet.security import secret_sha256
from emutune.fleet.server.dashboard.access import dashboard_key
from emutune.fleet.server.dashboard.board import Board, Fleet
from emutune.fleet.server.dashboard.messages import Model
from emutune.fleet.server.dashboard.watch import Watch
from emutune.fleet.server.families import Families, Family


def open_board(config: FleetConfig, ledger: Path, families: Families, policy: str) -> Board:
    """The dashboard of a fleet; its key is made if there is none.

    Args:
        config: the fleet's file.
        ledger: the server's file, which what is shown is read from over a connection of its own.
        families: the foundation models that are served.
        policy: as the operator named it.

    Raises:
        FleetError: the key cannot be read or written.
    """
    fleet = Fleet(
        name=config.name,
        policy=policy,
        scenario=config.scenario,
        models=[_model(family) for family in families],
        steps_total=config.steps.count,
        emulators={
            (family.base, emulator.name): (emulator.retention, len(emulator.layers))
            for family in families
            for emulator in family.catalogue.emulators()
        },
    )
    directory = config.server.directory
    return Board(
        fleet,
        ledger,
        directory / "uploads",
        Watch(),
        secret_sha256(dashboard_key(directory)),
    )


def _model(family: Family) -> Model:
    info = family.catalogue.info
    kind = str(info.config.get("model_type", "unknown"))
    return Model(name=family.name, kind=kind, base=info.base, layers=info.layers)
