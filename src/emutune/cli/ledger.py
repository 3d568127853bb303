"""The command ``ledger``: what a fleet decided, and how far prediction and measurement are apart."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from emutune.cli.options import JsonFile
from emutune.cli.terminal import print_table, write_json
from emutune.errors import UsageError

if TYPE_CHECKING:
    from emutune.fleet.comparison import Comparison, Errors

# Narrow enough for a terminal of 80 columns.
_HEADINGS = ("step, UE", "trains, E", "MB", "delay, s", "perplexity", "adapter")


def ledger(
    database: Annotated[Path, typer.Argument(metavar="LEDGER", help="The file that emutune serve writes.")],
    json_file: JsonFile = None,
) -> None:
    """Print what was decided, sent and measured at every step, beside what was predicted."""
    from dataclasses import asdict

    from emutune.fleet.comparison import compare_steps, errors
    from emutune.fleet.ledger import Ledger

    if not database.is_file():
        raise UsageError(f"{database}: does not exist; give the ledger of a fleet that emutune serve has run")
    with Ledger(database) as opened:
        leases, totals = opened.comparison(), opened.totals()
    steps, apart = compare_steps(leases), errors(leases)
    print("measured/predicted; z = 1: the server trains, z = 0: a device, with retention E")
    print_table(_HEADINGS, [_cells(lease) for lease in leases])
    for lease in leases:
        if lease.reason:
            # A device may say anything, to a terminal too.
            reason = "".join(letter if letter.isprintable() else " " for letter in lease.reason)
            print(f"step {lease.step}, {lease.device}: {lease.state}: {reason}")
    trained = Counter(lease.trained_by for lease in leases)
    print(f"adapters trained by devices: {trained['device']:,}, by the server: {trained['server']:,}")
    for name, count in totals.items():
        print(f"{name}: {count:,}")
    _print_errors(apart)
    write_json(
        json_file,
        {
            "leases": [asdict(lease) | {"trained_by": lease.trained_by} for lease in leases],
            "steps": [asdict(step) for step in steps],
            "totals": totals,
            "errors": asdict(apart),
        },
    )


def _cells(lease: Comparison) -> tuple[str, ...]:
    """A lease as a row of the table."""
    name = f"{lease.step} {lease.device}"
    if lease.kind == "stop":
        return name, "stop", "", "", "", lease.state
    return (
        name,
        "server" if lease.at_server else f"device {lease.retention or 0:.3f}",
        _pair(lease.measured_bytes, lease.predicted_bytes, 1e6, 3),
        _pair(lease.measured_delay_s, lease.predicted_delay_s, 1.0, 2),
        _pair(lease.measured_perplexity, lease.predicted_perplexity, 1.0, 2),
        _adapter(lease),
    )


def _adapter(lease: Comparison) -> str:
    """What became of a lease's adapter; of one that was not evaluated, what became of the lease."""
    if lease.accepted is None:
        return lease.state
    late = "late, " if lease.state == "late" else ""
    return late + ("accepted" if lease.accepted else "rejected")


def _pair(measured: float | None, predicted: float | None, unit: float, digits: int) -> str:
    """Two values in a unit, a dash for one that is not there."""
    return "/".join("-" if value is None else f"{value / unit:.{digits}f}" for value in (measured, predicted))


def _print_errors(apart: Errors) -> None:
    """The medians, and of how many they are."""
    for what, percent, count, of in (
        ("delay", apart.delay_percent, apart.steps, "steps"),
        ("bytes", apart.bytes_percent, apart.transfers, "transfers"),
        ("perplexity", apart.perplexity_percent, apart.evaluations, "evaluations"),
    ):
        value = "nothing to compare yet" if percent is None else f"{percent:.2f} % over {count} {of}"
        print(f"median error of the {what}: {value}")
