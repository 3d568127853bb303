"""The command ``join``: this machine becomes a device of a fleet. Torch waits until there is something to train."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from emutune.cli.grouped import grouped
from emutune.cli.libraries import expect_libraries
from emutune.cli.options import JsonFile
from emutune.cli.terminal import interruptible, stage_bar, write_json
from emutune.errors import UsageError

if TYPE_CHECKING:
    from emutune.fleet.device.client import FleetClient


@dataclass(frozen=True)
class Place:
    """Options of what a device works on and with, where it keeps it, and for how long."""

    data: Annotated[
        Path,
        typer.Option(
            help="Directory of texts to tune on, *.txt in UTF-8; MODEL/*.txt, where there are several."
        ),
    ]
    cache: Annotated[Path, typer.Option(help="Directory of what the device keeps.")] = Path("device")
    cache_mb: Annotated[int, typer.Option(min=1, help="The most that emulators may take there, MB.")] = 4096
    memory_gb: Annotated[
        float | None,
        typer.Option(
            min=0.0, help="Largest emulator to train with, GB; only the cache limits it, if not given."
        ),
    ] = None
    private: Annotated[
        bool, typer.Option("--private", help="The data never leave this device: train here, or not at all.")
    ] = False
    transmit_watts: Annotated[
        float | None, typer.Option(min=1e-6, max=1e6, help="Power that sending takes, W.")
    ] = None
    compute_watts: Annotated[
        float | None, typer.Option(min=1e-6, max=1e6, help="Power that training takes, W.")
    ] = None
    tasks: Annotated[
        int | None,
        typer.Option(min=1, help="Leave the fleet after so many; stay until it ends, if not given."),
    ] = None


@grouped
def join(
    url: Annotated[str, typer.Argument(metavar="URL", help="Of the fleet's server: https://HOST:PORT.")],
    credentials: Annotated[Path, typer.Option(help="The file that emutune enroll made for this device.")],
    place: Place,
    patience: Annotated[
        float,
        typer.Option(min=0.0, help="Hours without an answer of the server, after which to end; 0: never."),
    ] = 24.0,
    json_file: JsonFile = None,
) -> None:
    """Take part in a fleet: report tasks, fetch emulators, train adapters or let the server train them."""
    expect_libraries("fleet", "join")
    from emutune.fleet.device.client import FleetClient
    from emutune.fleet.device.network import tls_transport
    from emutune.fleet.device.patience import Backoff
    from emutune.fleet.loop import run
    from emutune.fleet.security import read_credentials, trusting

    if not url.startswith("https://"):
        raise UsageError(f"URL: must begin with https://, got {url!r}; emutune serve prints it")
    loaded = read_credentials(credentials)
    going_on = f"what was done is in {place.cache}; the same command goes on"
    with interruptible(going_on), stage_bar() as stage:
        backoff = Backoff(patience_s=patience * 3600 or None)
        transport = tls_transport(trusting(loaded.ca))
        client = FleetClient(loaded, transport, url=url, backoff=backoff, remark=_printed)
        done = run(_run(client, place, stage))
    print(f"{loaded.device}: {done} tasks done")
    write_json(json_file, {"device": loaded.device, "fleet": loaded.fleet, "tasks": done})


async def _run(client: FleetClient, place: Place, stage: Callable[..., None]) -> int:
    from emutune.fleet.device.abilities import Abilities
    from emutune.fleet.device.agent import run_device
    from emutune.fleet.device.telling import Telling

    memory = None if place.memory_gb is None else round(place.memory_gb * 1e9)
    async with client:
        return await run_device(
            client,
            place.data,
            place.cache,
            place.cache_mb * 1_000_000,
            place.tasks,
            Telling(stage, _printed),
            Abilities(memory, place.private, place.transmit_watts, place.compute_watts),
        )


def _printed(text: str) -> None:
    print(text, flush=True)
