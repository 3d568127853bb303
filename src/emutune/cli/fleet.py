"""The command ``fleet``: a whole fleet on this machine, as its file says or as a shipped world does."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from emutune.cli.grouped import grouped
from emutune.cli.jax_setup import prepare_jax
from emutune.cli.ledger import ledger
from emutune.cli.libraries import quiet_libraries
from emutune.cli.options import JsonFile
from emutune.cli.serve import announce_dashboard
from emutune.cli.terminal import advance, interruptible, print_table, stage_bar, write_json
from emutune.errors import UsageError

if TYPE_CHECKING:
    from emutune.fleet.rehearsal import Rehearsal

_ROOT = Path("runs/fleets")
_HEADINGS = ("policy", "cost", "predicted", "simulated", "delay, s", "predicted", "steps")


@dataclass(frozen=True)
class Episode:
    """Options of the one episode that a world runs."""

    steps: Annotated[int, typer.Option(min=1, max=1000, help="Of the episode that a world runs.")] = 10
    seed: Annotated[int, typer.Option(min=0, help="Of what a world draws.")] = 0
    only_prepare: Annotated[
        bool,
        typer.Option("--only-prepare", help="Write a world's scenario, to train a policy in, and end."),
    ] = False


@grouped
def fleet(
    source: Annotated[
        str,
        typer.Argument(
            metavar="FLEET.toml|WORLD",
            help="The fleet's file, the shipped one: demo, or a shipped world's name.",
        ),
    ],
    episode: Episode,
    devices: Annotated[int, typer.Option(min=1, max=64, help="How many; they are called ue1, ue2, ...")] = 3,
    catalogue: Annotated[
        list[Path] | None,
        typer.Option(help="Emulators, once for each foundation model; those that are shipped if not given."),
    ] = None,
    policy: Annotated[
        str,
        typer.Option(
            help="A run's directory, or a rule: best_fixed, hold, lookahead, all_server, ...; in a world, several "
            "with commas between them run one after another on the same tasks and links."
        ),
    ] = "best_fixed",
    fresh: Annotated[bool, typer.Option(help="Forget an earlier run of this fleet.")] = False,
    json_file: JsonFile = None,
) -> None:
    """Run a fleet on this machine: real processes, real TLS, links and speeds shaped as the scenario says."""
    quiet_libraries("fleet", "fleet")
    from emutune.scenario import shipped_scenarios

    if source in shipped_scenarios():
        prepare_jax()
        rehearsal = _prepared(source, devices, catalogue, episode)
        if not episode.only_prepare:
            rows = _run_policies(rehearsal, policy.split(","), fresh)
            write_json(json_file, {"world": source, "policies": rows})
    else:
        _run_file(source, devices, catalogue, policy, fresh, json_file)


def _run_file(
    source: str, devices: int, catalogue: list[Path] | None, policy: str, fresh: bool, json_file: JsonFile
) -> None:
    from emutune.fleet.config import LEDGER, load_fleet
    from emutune.fleet.local import local_devices, run_local_fleet, with_drawn_abilities
    from emutune.scenario import load_scenario

    config = load_fleet(source)
    directory = config.server.directory
    if fresh and directory.exists():
        _forget(directory)
    used = catalogue or [_reference_catalogue(directory / "catalogue")]
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


def _prepared(world: str, devices: int, catalogue: list[Path] | None, episode: Episode) -> Rehearsal:
    from emutune.fleet.rehearsal import rehearse

    used = catalogue or _shipped_catalogues(world)
    rehearsal = rehearse(world, _ROOT / world, used, devices, episode.steps, episode.seed)
    scenario = rehearsal.root / "scenario.toml"
    print(f"{scenario}: what the fleet runs; emutune train {scenario} learns a policy for it")
    return rehearsal


def _run_policies(rehearsal: Rehearsal, policies: list[str], fresh: bool) -> list[dict[str, Any]]:
    for policy in policies:
        rehearsal.check(policy)
    with interruptible(f"the ledgers in {rehearsal.root} are kept; the same command goes on"):
        rows = [_run_policy(rehearsal, policy, fresh) for policy in policies]
    print(
        "cost and delay of the whole episode; predicted before each step, simulated on the same tasks and links"
    )
    print_table(_HEADINGS, [_cells(row) for row in rows])
    return rows


def _run_policy(rehearsal: Rehearsal, policy: str, fresh: bool) -> dict[str, Any]:
    from emutune.fleet.local import run_local_fleet
    from emutune.fleet.rehearsal import figures_of

    file = rehearsal.fleet_file(policy)
    if fresh and file.parent.exists():
        _forget(file.parent)
    config, members = rehearsal.prepare(policy)
    directory = config.server.directory
    print(
        f"{policy}: {len(members)} devices, {rehearsal.steps} steps, {rehearsal.time_scale:g} s of the world in one; "
        f"logs are in {directory / 'logs'}",
        flush=True,
    )
    run_local_fleet(
        file,
        config,
        members,
        rehearsal.catalogues,
        policy,
        started=lambda url: announce_dashboard(url, directory),
    )
    return {"policy": policy, **figures_of(rehearsal, policy)}


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    names = ("cost", "predicted_cost", "simulated_cost", "delay_s", "predicted_delay_s")
    digits = (3, 3, 3, 1, 1)
    cells = (f"{row[name]:.{places}f}" for name, places in zip(names, digits, strict=True))
    return row["policy"], *cells, str(row["steps"])


def _forget(directory: Path) -> None:
    """Remove a fleet's directory, and nothing that is none."""
    from emutune.fleet.config import LEDGER

    if not (directory / LEDGER).exists():
        raise UsageError(f"--fresh: {directory} holds no ledger, so it is left alone; remove it yourself")
    shutil.rmtree(directory)


def _reference_catalogue(out: Path) -> Path:
    from emutune.fleet.rehearsal import shipped_catalogue

    with stage_bar() as stage:
        shipped_catalogue("reference", out, lambda name, progress: advance(stage, name, progress, 1))
    return out


def _shipped_catalogues(world: str) -> list[Path]:
    from emutune.fleet.rehearsal import shipped_catalogues

    with stage_bar() as stage:
        return shipped_catalogues(
            world, _ROOT / "catalogues", lambda name, progress: advance(stage, name, progress, 1)
        )
