"""The commands under ``emutune trace``: bring throughput traces in, write them out, make one up."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from emutune.cli.grouped import grouped
from emutune.cli.options import JsonFile
from emutune.cli.terminal import write_json

if TYPE_CHECKING:
    from emutune.scenario.trace import Rates

trace = typer.Typer(help="Throughput traces for scenarios: import, export, synthesize.", no_args_is_help=True)

Out = Annotated[Path, typer.Option(help="The trace to write.")]


@dataclass(frozen=True)
class Reading:
    """Options of how a recording is read; see ``import_trace``."""

    uplink: Annotated[Path | None, typer.Option(help="The uplink's mahimahi file.")] = None
    interval_s: Annotated[float, typer.Option(help="Seconds of each row of the trace.")] = 1.0
    drop_zeros: Annotated[bool, typer.Option("--drop-zeros", help="Drop rows of zero rate.")] = False
    max_gap_s: Annotated[float | None, typer.Option(help="Close longer pauses than this.")] = None


@trace.command("import")
@grouped
def import_(
    form: Annotated[str, typer.Argument(metavar="FORMAT", help="mahimahi, raca or csv.")],
    path: Annotated[Path, typer.Argument(help="The file; with mahimahi the downlink's.")],
    out: Out,
    reading: Reading,
    json_file: JsonFile = None,
) -> None:
    """Bring a trace into the form that scenarios read, and say what was kept and dropped."""
    from emutune.scenario.trace import write_trace
    from emutune.scenario.trace_formats import import_trace

    rates, account = import_trace(form, path, **asdict(reading))
    write_trace(out, rates)
    for line in account.lines():
        print(line)
    _print_trace(out, rates)
    figures = {
        "rows": account.rows,
        "kept": account.kept,
        "dropped": {reason: len(lines) for reason, lines in account.dropped.items()},
        "gaps": len(account.gaps),
        "intervals": len(rates.downlink_mbps),
        "interval_s": rates.interval_s,
    }
    write_json(json_file, figures)


@trace.command()
def export(
    path: Annotated[Path, typer.Argument(help="A trace, as emutune trace import writes it.")],
    mahimahi: Annotated[bool, typer.Option("--mahimahi", help="Delivery opportunities in ms.")] = False,
    out: Annotated[Path | None, typer.Option(help="Name of the files, before .down and .up.")] = None,
) -> None:
    """Write a trace as mahimahi reads it: a file for the downlink and one for the uplink."""
    from emutune.errors import UsageError
    from emutune.scenario.trace import opportunities_ms, read_trace, write_text

    if not mahimahi:
        raise UsageError("trace export: name the form to write: --mahimahi")
    rates, stem = read_trace(path), out or path.with_suffix("")
    for suffix, column in ((".down", rates.downlink_mbps), (".up", rates.uplink_mbps)):
        target = stem.with_name(stem.name + suffix)
        write_text(target, map(str, opportunities_ms(column, rates.interval_s)))
        print(f"{target}: {len(column) * rates.interval_s:g} s")


@trace.command()
def synthesize(
    out: Out,
    seconds: Annotated[int, typer.Option(help="How long.")] = 3600,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    interval_s: Annotated[int, typer.Option(help="Seconds of each row.")] = 1,
) -> None:
    """Make a trace up: levels of signal quality that last minutes, and handovers."""
    from emutune.scenario.synthetic_trace import synthesize_trace
    from emutune.scenario.trace import write_trace

    rates = synthesize_trace(seconds, seed, interval_s)
    write_trace(out, rates)
    _print_trace(out, rates)


def _print_trace(path: Path, rates: Rates) -> None:
    count = len(rates.downlink_mbps)
    down, up = (sum(column) / count for column in (rates.downlink_mbps, rates.uplink_mbps))
    print(
        f"{path}: {count} intervals of {rates.interval_s:g} s, mean {down:.3g} Mbit/s down and {up:.3g} up; "
        f'in a scenario: [trace] file = "{path.name}"'
    )
