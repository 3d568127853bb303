"""The six panels of Fig. 2: four training curves with bands, two bars over the number of UEs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

COLOURS = {
    "hmppo": "#0072B2",
    "ippo": "#D55E00",
    "random": "#7F7F7F",
    "best_fixed": "#009E73",
    "bound": "#000000",
}
_CURVES = {
    "episode_return": "episodic reward",
    "delay_min": "total delay (min)",
    "perplexity": "mean perplexity",
    "changes_per_ue": "emulator changes per UE",
}
# Where comparisons have what training records.
COMPARED = {
    "episode_return": "return_mean",
    "delay_min": "delay_min",
    "perplexity": "perplexity_mean",
    "changes_per_ue": "changes_per_ue",
}


def read_curves(run: Path) -> dict[str, Float[np.ndarray, "..."]]:
    """Evaluation curves of a run: ``steps``, and per figure an array (seeds, evaluations)."""
    seeds = [
        [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        for path in sorted(run.glob("seed-*/metrics.jsonl"))
    ]
    curves = {
        name: np.array([[row["evaluation"][name] for row in seed] for seed in seeds]) for name in _CURVES
    }
    return {"steps": np.array([row["steps"] for row in seeds[0]]), **curves}


def draw_fig2(
    curves: Mapping[str, Mapping[str, Float[np.ndarray, "..."]]], comparisons: Sequence[Mapping[str, Any]]
) -> Figure:
    """Draw the panels.

    Args:
        curves: of each learned policy, from ``read_curves``, at the first comparison's fleet size.
        comparisons: figures of ``compare``, one per fleet size.
    """
    figure = Figure(figsize=(11, 6.2), layout="constrained")
    panels = figure.subplots(2, 3).ravel()
    first = comparisons[0]
    for panel, (field, label) in zip(panels, _CURVES.items(), strict=False):
        for name, columns in curves.items():
            _draw_curve(panel, columns["steps"], columns[field], name)
        level = first["policies"]["random"][COMPARED[field]]
        panel.axhline(level, color=COLOURS["random"], linestyle="--", label="random")
        if field == "episode_return":
            panel.axhline(
                first["bound"]["return_mean"], color="black", linestyle=":", label="certified bound"
            )
        panel.set(xlabel="environment steps", ylabel=label, title=f"{label}, N = {first['ues']}")
        panel.ticklabel_format(axis="x", style="sci", scilimits=(0, 0))
    _draw_bars(panels[4], comparisons, "delay_min", "total delay (min)")
    panels[4].set_yscale("log")
    panels[4].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panels[4].yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    panels[4].yaxis.set_minor_locator(NullLocator())
    _draw_bars(panels[5], comparisons, "perplexity_mean", "mean perplexity")
    # One legend for all panels, outside of them: inside it would hide bars.
    legend = {
        label: handle
        for panel in (panels[5], panels[0])
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(legend.values(), legend.keys(), loc="outside upper center", ncols=len(legend), fontsize=9)
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
        panel.title.set_fontsize(10)
    return figure


def _draw_curve(panel: Axes, steps: np.ndarray, values: np.ndarray, name: str) -> None:
    """Mean over seeds, and the range in which the middle 80 % of them lie."""
    panel.plot(steps, values.mean(0), color=COLOURS[name], label=name, linewidth=1.4)
    low, high = np.quantile(values, [0.1, 0.9], axis=0)
    panel.fill_between(steps, low, high, color=COLOURS[name], alpha=0.2, linewidth=0)


def _draw_bars(panel: Axes, comparisons: Sequence[Mapping[str, Any]], key: str, label: str) -> None:
    names = list(comparisons[0]["policies"])
    positions, width = np.arange(len(comparisons)), 0.8 / len(names)
    for index, name in enumerate(names):
        heights = [one["policies"][name][key] for one in comparisons]
        offset = (index - (len(names) - 1) / 2) * width
        panel.bar(positions + offset, heights, width, color=COLOURS[name], label=name)
    panel.set_xticks(positions, [str(one["ues"]) for one in comparisons])
    panel.set(xlabel="number of UEs", ylabel=label, title=f"{label} by fleet size")
