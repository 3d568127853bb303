"""The command ``fleet``: server and devices as processes of this machine."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

from emutune.cli.ledger import ledger
from emutune.cli.libraries import quiet_libraries
from emutune.cli.options import JsonFile
from emutune.cli.serve import FleetArgument, announce_dashboard
from emutune.cli.terminal import advance, interruptible, stage_bar
from emutune.errors import UsageError


def fleet(
    source: FleetArgument,
    devices: Annotated[int, typer.Option(min=1, max=64, help="How many; they are called ue1, ue2, ...")] = 3,
    catalogue: Annotated[
        Path | None, typer.Option(help="The emulators; those of the reference model if not given.")
    ] = None,
    policy: Annotated[
        str, typer.Option(help="A run's directory, or a rule: best_fixed, hold, lookahead, all_server, ...")
    ] = "best_fixed",
    fresh: Annotated[bool, typer.Option(help="Forget an earlier run of this fleet.")] = False,
    json_file: JsonFile = None,
) -> None:
    """Run a fleet on this machine: real processes, real TLS, links shaped as the fleet's file says."""
    quiet_libraries("fleet", "fleet")
    from emutune.fleet.config import LEDGER, load_fleet
    from emutune.fleet.local import local_devices, run_local_fleet, with_drawn_abilities
    from emutune.scenario import load_scenario

    config = load_fleet(source)
    directory = config.server.directory
    if fresh and directory.exists():
        _forget(directory)
    used = catalogue or _reference_catalogue(directory / "catalogue")
    with interruptible(f"the ledger in {directory} is kept; the same command goes on"):
        print(f"{devices} devices, {config.steps.count} steps; logs are in {directory / 'logs'}", flush=True)
        run_local_fleet(
            source,
            config,
            with_drawn_abilities(config, load_scenario(config.scenario), local_devices(config, devices)),
            used,
            policy,
            started=lambda url: announce_dashboard(url, directory),
        )
    ledger(directory / LEDGER, json_file=json_file)


def _forget(directory: Path) -> None:
    """Remove a fleet's directory, and nothing that is none."""
    from emutune.fleet.config import LEDGER

    if not (directory / LEDGER).exists():
        raise UsageError(f"--fresh: {directory} holds no ledger, so it is left alone; remove it yourself")
    shutil.rmtree(directory)


def _reference_catalogue(out: Path) -> Path:
    from emutune.tuning.build import Recipe, build_catalogue

    with stage_bar() as stage:
        build_catalogue(
            "reference", out, Recipe(), None, lambda name, progress: advance(stage, name, progress, 1)
        )
    return out
