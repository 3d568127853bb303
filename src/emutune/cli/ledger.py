"""The commands under ``emutune ledger``: what a fleet decided and measured, and forgetting what is old."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from emutune.cli.libraries import expect_libraries
from emutune.cli.options import JsonFile
from emutune.cli.terminal import print_table, write_json
from emutune.errors import UsageError

if TYPE_CHECKING:
    from emutune.fleet.comparison import Comparison, Errors

# Narrow enough for a terminal of 80 columns.
_HEADINGS = ("step, UE", "trains, E", "MB", "delay, s", "perplexity", "adapter")
# What is printed of a long ledger unless more is asked for.
_LEASES_SHOWN = 500


class _Printing(TyperGroup):
    """Commands of which ``show`` need not be named."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, *ctx.help_option_names):
            args = ["show", *args]
        return super().parse_args(ctx, args)


group = typer.Typer(
    cls=_Printing, help="What a fleet decided and measured: ledger LEDGER prints it.", no_args_is_help=True
)
Database = Annotated[Path, typer.Argument(metavar="LEDGER", help="The file that emutune serve writes.")]


@group.command("show")
def ledger(
    database: Database,
    steps: Annotated[
        str | None,
        typer.Option(
            metavar="A:B",
            help="Steps A to B - 1, as Python slices: 0:100, -50:, or : for all. The last ones if not given.",
        ),
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Print what was decided, sent and measured at every step, beside what was predicted."""
    from dataclasses import asdict

    from emutune.fleet.comparison import compare_steps, errors
    from emutune.fleet.ledger import Ledger

    chosen = None if steps is None else _slice(steps)
    _expect(database)
    with Ledger(database) as opened:
        last = opened.last_step()
        shown = opened.last_steps(_LEASES_SHOWN) if chosen is None else range(last + 1)[chosen]
        leases, totals, trained = opened.comparison(shown), opened.totals(), opened.trained()
        models = opened.models()
    compared, apart = compare_steps(leases), errors(leases)
    left_out = totals["steps"] - len(compared)
    print("measured/predicted; z = 1: the server trains, z = 0: a device, with retention E")
    print_table(_HEADINGS, [_cells(lease, models) for lease in leases])
    if left_out:
        print(
            f"{left_out:,} of {totals['steps']:,} steps are not printed; --steps A:B chooses, --steps : prints all"
        )
    for lease in leases:
        if lease.reason:
            # A device may say anything, to a terminal too.
            reason = "".join(letter if letter.isprintable() else " " for letter in lease.reason)
            print(f"step {lease.step}, {lease.device}: {lease.state}: {reason}")
    print(f"adapters trained by devices: {trained['device']:,}, by the server: {trained['server']:,}")
    for name, count in totals.items():
        print(f"{name}: {count:,}")
    _print_errors(apart)
    write_json(
        json_file,
        {
            "leases": [asdict(lease) | {"trained_by": lease.trained_by} for lease in leases],
            "models": [{"base": base, "name": name} for base, name in models.items()],
            "steps": [asdict(step) for step in compared],
            "steps_left_out": left_out,
            "totals": totals,
            "errors": asdict(apart),
        },
    )


@group.command("prune")
def prune(
    database: Database,
    keep: Annotated[int | None, typer.Option(min=1, help="Keep so many of the last steps.")] = None,
    before: Annotated[
        datetime | None,
        typer.Option(
            formats=["%Y-%m-%d", "%Y-%m-%dT%H:%M:%S"], help="Or: forget what was over by then, in UTC."
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    json_file: JsonFile = None,
) -> None:
    """Forget old steps, and the audit of their time; whatever a server goes on with stays. It may run meanwhile."""
    expect_libraries("fleet", "ledger prune")
    from dataclasses import asdict

    from emutune.fleet.pruning import Prunable, give_space_back

    if (keep is None) == (before is None):
        raise UsageError("--keep, --before: give one of them, to say how much is forgotten")
    _expect(database)
    size = database.stat().st_size
    with Prunable(database) as opened:
        old = opened.old(keep, None if before is None else before.replace(tzinfo=UTC))
        gone = opened.would_go(old) if dry_run else opened.prune(old)
        stay = opened.kept(old) - (gone.steps if dry_run else 0)
    print(
        f"{'would go' if dry_run else 'gone'}: {gone.steps:,} steps with {gone.leases:,} leases and "
        f"{gone.reports:,} reports, {gone.audit:,} rows of the audit"
    )
    if stay:
        print(f"{stay:,} older steps stay, since a server goes on with them")
    if not dry_run:
        if not give_space_back(database):
            print("the file keeps its size while a server uses it; prune again when that has ended")
        print(f"{database}: {size / 1e6:,.1f} MB before, {database.stat().st_size / 1e6:,.1f} MB now")
    write_json(
        json_file, asdict(gone) | {"kept": stay, "bytes_before": size, "bytes": database.stat().st_size}
    )


def _expect(database: Path) -> None:
    if not database.is_file():
        raise UsageError(f"{database}: does not exist; give the ledger of a fleet that emutune serve has run")


def _slice(text: str) -> slice:
    """``A:B`` as a slice."""
    try:
        first, last = (int(part) if part else None for part in text.split(":"))
    except ValueError as error:
        raise UsageError(f"--steps: must be A:B, such as 0:100 or -50:, got {text!r}") from error
    return slice(first, last)


def _cells(lease: Comparison, models: Mapping[str | None, str]) -> tuple[str, ...]:
    """A lease as a row of the table, with the name of its foundation model where there are several."""
    name = f"{lease.step} {lease.device}" + (f" {models[lease.base]}" if len(models) > 1 else "")
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
