"""The ``emutune`` command. Nothing heavy is imported until a command runs."""

from __future__ import annotations

import sys
from typing import NoReturn

import typer

from emutune.cli import (
    calibrate,
    catalogue,
    devices,
    examine,
    fleet,
    join,
    learn,
    ledger,
    reference,
    serve,
    trace,
    tune,
)
from emutune.errors import EmutuneError

app = typer.Typer(
    name="emutune",
    help="Learn to orchestrate emulator-assisted tuning of foundation models on fleets of edge devices.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (
    examine.check,
    learn.train,
    learn.evaluate,
    examine.bound,
    examine.compare,
    examine.reproduce,
    calibrate.calibrate,
    tune.tune,
    tune.plug,
    serve.serve,
    serve.enroll,
    serve.revoke,
    join.join,
    fleet.fleet,
    devices.devices,
):
    app.command()(command)
app.add_typer(ledger.group, name="ledger")
app.add_typer(catalogue.catalogue, name="catalogue")
app.add_typer(reference.reference, name="reference")
app.add_typer(trace.trace, name="trace")


def run() -> NoReturn:
    """Entry point: exit status 2 and one line on a user's error, 130 on Ctrl-C."""
    try:
        app()
    except EmutuneError as error:
        print(f"emutune: {error}", file=sys.stderr)
        sys.exit(2)
    sys.exit(0)
