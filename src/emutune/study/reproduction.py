"""The paper's experiments: Fig. 2 and Table I over N = 6 to 9, beside the paper's own numbers."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jinja2 import Environment
from markupsafe import Markup
from matplotlib.figure import Figure

from emutune.files import make_writable, replacing, saving
from emutune.scenario import load_scenario
from emutune.study.comparison import LEARNED, Effort, Progress, compare
from emutune.study.figures import COMPARED, draw_fig2, read_curves
from emutune.study.paper_table import TABLE_I, PaperRow, paper_ratio

POLICIES = ("random", "best_fixed", "ippo", "hmppo")


def reproduce(directory: str | Path, *, quick: bool = False, progress: Progress | None = None) -> Path:
    """Run the paper's experiments and write ``report.html`` with its figures and data.

    Args:
        directory: where runs, figures and report go; an interrupted reproduction is resumed.
        quick: 2 seeds, N = 6 and 9, and 16 episodes instead of 10, N = 6 to 9 and 64.
        progress: called with a line on what is being done.

    Returns:
        The path of the report.

    Raises:
        CheckpointError: a run cannot be written, or is damaged.
        UsageError: the results cannot be written.
    """
    directory, say = Path(directory), progress or (lambda line: None)
    make_writable("--out", directory)
    sizes, seeds, episodes = ((6, 9), 2, 16) if quick else ((6, 7, 8, 9), 10, 64)
    comparisons = []
    for ues in sizes:
        scenario = load_scenario("paper", [f"fleet.ues={ues}"])
        comparisons.append(
            compare(
                scenario,
                POLICIES,
                Effort(seeds, episodes),
                directory=directory / "runs",
                progress=lambda line, ues=ues: say(f"N = {ues}: {line}"),  # type: ignore[misc]
            )
        )
    curves = {name: read_curves(Path(comparisons[0]["policies"][name]["run"])) for name in ("hmppo", "ippo")}
    figure = draw_fig2(curves, comparisons)
    command = "emutune reproduce" + (" --quick" if quick else "")
    page = render_report(figure, comparisons, steps=LEARNED["hmppo"].steps, command=command)
    with saving("--out", directory):
        _write_results(directory, figure, comparisons, page)
    return directory / "report.html"


def _write_results(
    directory: Path, figure: Figure, comparisons: Sequence[Mapping[str, Any]], page: str
) -> None:
    for suffix in ("png", "svg"):
        with replacing(directory / f"fig2.{suffix}") as aside:
            figure.savefig(aside, format=suffix, dpi=160)
    with replacing(directory / "figures.json") as aside:
        aside.write_text(json.dumps(comparisons, indent=2) + "\n", "utf-8")
    with replacing(directory / "figures.csv") as aside:
        _write_csv(aside, comparisons)
    with replacing(directory / "report.html") as aside:
        aside.write_text(page, "utf-8")


def render_report(
    figure: Figure, comparisons: Sequence[Mapping[str, Any]], *, steps: int, command: str
) -> str:
    """One self-contained page."""
    template = Environment(autoescape=True).from_string(
        (resources.files("emutune.study") / "report.html.jinja").read_text("utf-8")
    )
    return template.render(
        title="Orchestrating the paper's fleet",
        seeds=comparisons[0]["seeds"],
        steps=f"{steps:,}",
        command=command,
        versions=f"emutune {version('emutune')}, JAX {version('jax')}",
        episodes=comparisons[0]["bound"]["episodes"],
        figure=Markup(_svg(figure)),
        comparisons=comparisons,
        ratios=list(_ratio_rows(comparisons)),
    )


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _ratio_rows(comparisons: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    for one in comparisons:
        if one["ues"] not in TABLE_I:
            continue
        for name in ("hmppo", "ippo"):
            cells: list[float | None] = []
            for field in PaperRow._fields:
                ours, random = (one["policies"][each][COMPARED[field]] for each in (name, "random"))
                cells += [paper_ratio(one["ues"], name, field), ours / random]
            yield {"label": f"{one['ues']}, {name}", "cells": cells}


def _write_csv(path: Path, comparisons: Sequence[Mapping[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        fields = [key for key in comparisons[0]["policies"]["random"] if key not in ("return_ci", "run")]
        writer.writerow(["ues", "policy", *fields])
        for one in comparisons:
            for name, row in one["policies"].items():
                writer.writerow([one["ues"], name, *(row[field] for field in fields)])
