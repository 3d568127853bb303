"""The figure of a comparison: every policy's cost with its interval, and the band in which the optimum lies."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from emutune.errors import UsageError
from emutune.files import check_writable, replacing, saving

_SUFFIXES = (".png", ".svg", ".pdf")
# Colours that the colour-blind tell apart; the markers differ as well, for print.
_LEARNED, _RULE, _BAND = "#D55E00", "#0072B2", "#009E73"
# What costs so many times as much over the bound as the median policy does is written at the edge, not drawn to scale.
_FAR = 2.5


def check_figure_path(path: Path | None) -> None:
    """Refuse a figure that could not be written, before anything is computed for it.

    Raises:
        UsageError: the suffix names no format, or nothing can be written there.
    """
    if path is None:
        return
    if path.suffix not in _SUFFIXES:
        raise UsageError(f"--figure {path}: its suffix must be one of {', '.join(_SUFFIXES)}")
    check_writable("--figure", path)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure, whole or not at all.

    Raises:
        UsageError: the file cannot be written.
    """
    with saving("--figure", path), replacing(path) as aside:
        figure.savefig(aside, format=path.suffix[1:], dpi=150)


def draw_comparison(figures: Mapping[str, Any]) -> Figure:
    """Draw a comparison, the cheapest policy at the top.

    Between the certified bound and the cheapest policy lies a shaded band: the optimum is somewhere in it.

    Args:
        figures: of ``emutune.study.compare``.
    """
    bound = -figures["bound"]["return_mean"]
    rows = sorted(figures["policies"].items(), key=lambda item: item[1]["return_mean"])
    best = min(-row["return_mean"] for _, row in rows)
    edge = _edge(bound, [row for _, row in rows])
    figure = Figure(figsize=(7.2, 1.5 + 0.38 * len(rows)), layout="constrained")
    axes = figure.subplots()
    axes.axvspan(bound, best, color=_BAND, alpha=0.18, linewidth=0)
    axes.axvline(bound, color="black", linestyle=":", linewidth=1.2)
    for place, (_, row) in enumerate(rows):
        _draw_policy(axes, place, row, edge)
    names = [f"{name}   {row['decision_ms']:.2g} ms" for name, row in rows]
    axes.set_yticks(range(len(rows)), names)
    axes.set_ylim(-0.7, len(rows) - 0.3)
    margin = 0.04 * (edge - bound)
    axes.set_xlim(bound - margin, edge + margin)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", linewidth=0.4, alpha=0.5)
    axes.set_xlabel("cost of an episode, with 95 % intervals")
    band = f"bound to best known: {100 * (best / bound - 1):.1f} %"
    axes.text(bound + margin / 4, -0.6, band, fontsize=8, color="#00664A", va="bottom")
    title = f"{figures['scenario']}, N = {figures['ues']}, {figures['bound']['episodes']} common episodes"
    axes.set_title(title, fontsize=10, loc="left")
    _add_legend(figure, axes, rows)
    return figure


def _edge(bound: float, rows: list[Mapping[str, Any]]) -> float:
    """Where the axis ends: beyond the intervals of all but those that would squash the others."""
    over = sorted(-row["return_mean"] - bound for row in rows)
    far = _FAR * over[(len(over) - 1) // 2]
    ends = [-row["return_ci"][0] for row in rows if -row["return_mean"] - bound <= far]
    return max(*ends, bound * 1.001)


def _draw_policy(axes: Axes, place: int, row: Mapping[str, Any], edge: float) -> None:
    cost = -row["return_mean"]
    learned = row["run"] is not None
    colour, marker = (_LEARNED, "D") if learned else (_RULE, "o")
    if cost > edge:
        axes.annotate(
            f"{cost:.0f} \N{RIGHTWARDS ARROW}",
            (edge, place),
            ha="right",
            va="center",
            color=colour,
            fontsize=9,
        )
        return
    high, low = (-end for end in row["return_ci"])
    axes.plot([low, high], [place, place], color=colour, linewidth=1.6, solid_capstyle="butt")
    axes.plot(cost, place, marker, color=colour, markersize=6)
    if learned:
        # Costs over the bound are shares of the bound's, which the mean's own gives back.
        worst = cost * (1 + row["worst_seed_cost_over_bound_percent"] / 100)
        worst /= 1 + row["cost_over_bound_percent"] / 100
        axes.plot(worst, place, "|", color=colour, markersize=12, markeredgewidth=1.6)


def _add_legend(figure: Figure, axes: Axes, rows: list[tuple[str, Mapping[str, Any]]]) -> None:
    kinds = {row["run"] is not None for _, row in rows}
    axes.plot([], [], ":", color="black", label="certified bound")
    if False in kinds:
        axes.plot([], [], "o-", color=_RULE, label="not learned")
    if True in kinds:
        axes.plot([], [], "D-", color=_LEARNED, label="learned, mean of seeds")
        axes.plot([], [], "|", color=_LEARNED, markersize=12, markeredgewidth=1.6, label="its worst seed")
    # Outside of the axes, where it hides no interval.
    figure.legend(loc="outside upper right", ncols=4, fontsize=8, frameon=False)
