"""What commands share at the terminal: progress, interruption, tables, figures on disk."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from emutune.files import replacing, saving

_COLUMNS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "return": lambda row: f"{row['return_mean']:.2f}",
    "95 % interval": lambda row: "{:.2f} to {:.2f}".format(*row["return_ci"]),
    "over\nbound %": lambda row: f"{row['cost_over_bound_percent']:.2f}",
    "worst\nseed %": lambda row: f"{row['worst_seed_cost_over_bound_percent']:.2f}",
    "delay /\nrandom": lambda row: f"{row['delay_ratio_to_random']:.3f}",
    "per-\nplexity": lambda row: f"{row['perplexity_mean']:.2f}",
    "changes\nper UE": lambda row: f"{row['changes_per_ue']:.2f}",
}


_LINKS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "distance\nm": lambda row: f"{row['distance_m']:.0f}-{row['last_distance_m']:.0f}",
    "line of\nsight %": lambda row: f"{100 * row['line_of_sight_share']:.0f}",
    "path\nloss dB": lambda row: f"{row['path_loss_db']:.0f}",
    "SNR up,\ndown dB": lambda row: f"{row['uplink_snr_db']:z.0f}, {row['downlink_snr_db']:z.0f}",
    "Mbit/s\nup, down": lambda row: f"{row['uplink_mbps']:.3g}, {row['downlink_mbps']:.3g}",
    "upload\ns": lambda row: f"{row['upload_s']:.3g}",
    "emulator\ns": lambda row: f"{row['smallest_emulator_s']:.3g}-{row['largest_emulator_s']:.3g}",
}
_LINK_NEEDS = {"distance\nm": "distance_m", "line of\nsight %": "line_of_sight_share"}
_LINKS_SHOWN = 12


@contextmanager
def progress_bar(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a bar on standard error, if that is a terminal; yields what advances it by a number."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(label, total=total)
        yield lambda count: bar.advance(task, count)


@contextmanager
def stage_bar() -> Iterator[Callable[..., None]]:
    """A bar on standard error for work in stages; yields what is told stage, steps done, steps, and a remark."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[remark]}"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("starting", total=1, remark="")
        last = ""

        def show(stage: str, done: int, total: int, remark: str = "") -> None:
            nonlocal last
            if stage != last:
                bar.reset(task)
                last = stage
            bar.update(task, description=stage, completed=done, total=total, remark=remark)

        yield show


def advance(stage: Callable[[str, int, int, str], None], name: str, progress: Any, total: int) -> None:
    """Show a training's progress, or a stage without one."""
    if progress is None:
        stage(name, 0, 1, "")
    else:
        stage(
            name,
            progress.step,
            total,
            f"loss {progress.losses[-1]:.3f}, {progress.tokens_per_s:,.0f} tokens/s",
        )


def print_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table whose columns, but for the first, stand right."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


@contextmanager
def interruptible(outcome: str) -> Iterator[None]:
    """On Ctrl-C, say what became of the work and leave with status 130."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"\nstopped; {outcome}", file=sys.stderr)
        sys.exit(130)


def resumable(out: Path) -> AbstractContextManager[None]:
    """On Ctrl-C, say how learning goes on."""
    return interruptible(f"what was learned is in {out}; the same command resumes it")


def going_on(out: Path) -> AbstractContextManager[None]:
    """On Ctrl-C, say that the work can go on."""
    return interruptible(f"what was done is kept beside {out}; the same command goes on")


def print_comparison(figures: Mapping[str, Any]) -> None:
    """The table of ``compare``, which fits into 80 columns."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table("policy", box=box.SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False)
    for heading in _COLUMNS:
        table.add_column(heading, justify="right", no_wrap=True)
    for name, row in figures["policies"].items():
        table.add_row(name, *(column(row) for column in _COLUMNS.values()))
    Console().print(table)
    bound = figures["bound"]
    print(
        f"certified bound: {bound['return_mean']:.2f} on {bound['episodes']} episodes, "
        f"N = {figures['ues']}, {figures['seeds']} seeds of each learned policy"
    )


def write_json(path: Path | None, figures: Any) -> None:
    """Write the figures of a command, whole or not at all.

    Raises:
        UsageError: the file cannot be written.
    """
    if path is None:
        return
    with saving("--json", path), replacing(path) as aside:
        aside.write_text(json.dumps(figures, indent=2) + "\n", "utf-8")


def print_links(links: Sequence[Mapping[str, Any]]) -> None:
    """Print the links of a fleet's UEs, each alone; of a large fleet some, from the best to the worst."""
    order = sorted(range(len(links)), key=lambda n: links[n]["path_loss_db"])
    if len(order) > _LINKS_SHOWN:
        step = (len(order) - 1) / (_LINKS_SHOWN - 1)
        order = [order[round(index * step)] for index in range(_LINKS_SHOWN)]
    columns = [name for name in _LINKS if _LINK_NEEDS.get(name, "path_loss_db") in links[0]]
    print("links in the first held-out episode, each UE alone:")
    print_table(["UE", *columns], [[str(n), *(_LINKS[name](links[n]) for name in columns)] for n in order])
