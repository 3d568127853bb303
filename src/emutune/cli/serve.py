"""The commands of a fleet's server: ``serve``, ``enroll`` and ``revoke``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from emutune.cli.jax_setup import prepare_jax
from emutune.cli.libraries import expect_libraries
from emutune.cli.terminal import interruptible

FleetArgument = Annotated[
    str, typer.Argument(metavar="FLEET.toml", help="The fleet's file, or the shipped one: demo.")
]


def serve(
    fleet: FleetArgument,
    catalogue: Annotated[
        list[Path],
        typer.Option(
            help="The emulators: a catalogue's directory; one for each model of the scenario, in order."
        ),
    ],
    policy: Annotated[
        str, typer.Option(help="A run's directory, or a rule: best_fixed, hold, lookahead, all_server, ...")
    ],
    retention: Annotated[float | None, typer.Option(help="Retention of the fixed policy.")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="Instead of the file's.")] = None,
    verbose: Annotated[
        bool, typer.Option(help="Log every event, not only refusals, late devices and errors.")
    ] = False,
) -> None:
    """Serve a fleet: decide for every device and step, send emulators, train what is uploaded, keep the ledger."""
    expect_libraries("fleet", "serve")
    prepare_jax()
    from emutune.fleet.config import LEDGER, load_fleet
    from emutune.fleet.loop import run
    from emutune.fleet.server.choices import opening_of
    from emutune.fleet.server.deciding import deciding
    from emutune.fleet.server.families import model_names
    from emutune.fleet.server.logs import log_to_stderr
    from emutune.fleet.server.run import run_server
    from emutune.scenario import load_scenario
    from emutune.tuning.inventory import open_inventory

    log_to_stderr(verbose=verbose)
    config = load_fleet(fleet)
    if port is not None:
        config = config.model_copy(update={"server": config.server.model_copy(update={"port": port})})
    scenario, opened = load_scenario(config.scenario), [open_inventory(one) for one in catalogue]
    ledger = config.server.directory / LEDGER

    async def serving() -> None:
        async with deciding(opening_of(config, policy, scenario, retention)) as decider:
            await run_server(
                config,
                opened,
                decider,
                started=lambda url: _announce(config.name, url, config.server.directory, model_names(opened)),
                stepped=lambda step: print(f"step {step + 1} of {config.steps.count} ended", flush=True),
                policy=_policy_name(policy, retention),
            )

    with interruptible(f"the ledger {ledger} is kept; the same command goes on"):
        run(serving())
    print(f"all steps are done; emutune ledger {ledger}")


def _announce(name: str, url: str, directory: Path, models: Sequence[str]) -> None:
    print(f"serving {name} at {url}", flush=True)
    if len(models) > 1:
        print(f"models: {', '.join(models)}; folders of texts are called so", flush=True)
    announce_dashboard(url, directory)


def announce_dashboard(url: str, directory: Path) -> None:
    """Say where a server's dashboard is; its key is for a person's eyes, not for a file that keeps the output.

    Args:
        url: of the server.
        directory: the server's.
    """
    from emutune.fleet.server.dashboard.access import KEY_FILE, dashboard_key, dashboard_url

    if sys.stdout.isatty():
        print(f"dashboard: {dashboard_url(url, dashboard_key(directory))}", flush=True)
    else:
        print(f"dashboard: {dashboard_url(url)}, its key is in {directory / KEY_FILE}", flush=True)


def _policy_name(policy: str, retention: float | None) -> str:
    return policy if retention is None else f"{policy}, retention {retention:g}"


def enroll(
    fleet: FleetArgument,
    device: Annotated[str, typer.Argument(help="A name: lower case letters, digits, hyphens.")],
    out: Annotated[Path | None, typer.Option(help="Credentials file; DEVICE.json if not given.")] = None,
    url: Annotated[str | None, typer.Option(help="Where the device reaches the server.")] = None,
) -> None:
    """Write the one-time credentials with which a device may join."""
    expect_libraries("fleet", "enroll")
    from emutune.fleet.config import load_fleet
    from emutune.fleet.server.run import enrol_device

    path = out or Path(f"{device}.json")
    reached = enrol_device(load_fleet(fleet), device, path, url)
    print(f"{path}: carry it to the device, then there: emutune join {reached} --credentials {path.name}")


def revoke(fleet: FleetArgument, device: Annotated[str, typer.Argument(help="Its name.")]) -> None:
    """Refuse a device from now on."""
    expect_libraries("fleet", "revoke")
    from emutune.fleet.config import load_fleet
    from emutune.fleet.server.run import opened_ledger

    with opened_ledger(load_fleet(fleet)) as ledger:
        ledger.revoke(device)
    print(f"{device} is refused from now on; emutune enroll lets it in again")
