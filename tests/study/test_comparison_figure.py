"""The figure of a comparison shows what the figures say: the band, every policy, and who is far off."""

from __future__ import annotations

from pathlib import Path

import pytest

from emutune.errors import UsageError
from emutune.study.comparison_figure import check_figure_path, draw_comparison, save_figure


def row(cost: float, *, run: str | None = None, worst: float = 0.0) -> dict[str, object]:
    return {
        "return_mean": -cost,
        "return_ci": [-cost - 1, -cost + 1],
        "cost_over_bound_percent": cost - 100,
        "worst_seed_cost_over_bound_percent": cost - 100 + worst,
        "decision_ms": 0.25,
        "run": run,
    }


def some(policies: dict[str, object]) -> dict[str, object]:
    return {
        "scenario": "families",
        "ues": 6,
        "seeds": 10,
        "bound": {"return_mean": -100.0, "episodes": 64},
        "policies": policies,
    }


def points(figure) -> dict[float, str]:
    """Where a policy's point is: cost to marker."""
    axes = figure.axes[0]
    return {
        round(float(line.get_xdata()[0]), 6): str(line.get_marker())
        for line in axes.lines
        if len(line.get_xdata()) == 1 and len(line.get_ydata()) == 1
    }


def test_band_points_and_worst_seed_are_the_figures() -> None:
    figure = draw_comparison(
        some({"hold": row(120.0), "lookahead": row(110.0), "hmppo": row(112.0, run="x", worst=3.0)})
    )
    axes = figure.axes[0]
    band = axes.patches[0]
    assert (band.get_x(), band.get_x() + band.get_width()) == (100.0, 110.0)
    assert "bound to best known: 10.0 %" in [text.get_text() for text in axes.texts]
    assert points(figure) == {120.0: "o", 110.0: "o", 112.0: "D", 115.0: "|"}
    # The cheapest is at the top.
    assert [label.get_text().split()[0] for label in axes.get_yticklabels()] == ["hold", "hmppo", "lookahead"]


def test_one_policy_that_is_far_off_does_not_squash_the_others() -> None:
    near = {"lookahead": row(107.0), "hold": row(109.0), "count_table": row(108.0)}
    figure = draw_comparison(some({"random": row(400.0), **near}))
    axes = figure.axes[0]
    assert axes.get_xlim()[1] < 112
    assert "400 \N{RIGHTWARDS ARROW}" in [text.get_text() for text in axes.texts]
    assert sorted(points(figure)) == [107.0, 108.0, 109.0]
    assert sorted(points(draw_comparison(some({"random": row(400.0)})))) == [400.0]


def test_a_figure_that_could_not_be_written_is_refused_first(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"its suffix must be one of \.png, \.svg, \.pdf"):
        check_figure_path(tmp_path / "figure.jpeg2")
    with pytest.raises(UsageError, match="there is no directory"):
        check_figure_path(tmp_path / "missing" / "figure.png")
    check_figure_path(None)
    check_figure_path(tmp_path / "figure.svg")
    save_figure(draw_comparison(some({"hold": row(120.0)})), tmp_path / "figure.svg")
    assert (tmp_path / "figure.svg").read_text("utf-8").lstrip().startswith("<?xml")
    assert list(tmp_path.iterdir()) == [tmp_path / "figure.svg"]
