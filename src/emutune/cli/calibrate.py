"""The command ``calibrate``: perplexity against retention, for a scenario."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from emutune.cli.grouped import grouped
from emutune.cli.libraries import quiet_libraries
from emutune.cli.options import CatalogueArgument, Data, JsonFile, RecipeName, Seed, chosen
from emutune.cli.terminal import advance, going_on, print_table, stage_bar, write_json
from emutune.errors import UsageError
from emutune.files import replacing, saving

if TYPE_CHECKING:
    from emutune.tuning.catalogue import Catalogue
    from emutune.tuning.curve import Fit, Point
    from emutune.tuning.tuner import AdapterTraining


@dataclass(frozen=True)
class Shape:
    """Options of which curve is written."""

    column: Annotated[str, typer.Option(help="zero_shot, tuned or plugged: the curve's perplexity.")] = (
        "plugged"
    )
    fit: Annotated[str, typer.Option(help="quadratic or monotone: what a scenario uses.")] = "quadratic"


@dataclass(frozen=True)
class Measuring:
    """Options of how each emulator is measured."""

    steps: Annotated[
        int | None, typer.Option(min=1, help="Training steps; 60, or the fleet's, if not given.")
    ] = None
    fleet: Annotated[
        str | None, typer.Option(help="Train as the fleet of this file does; if not given, whole layers.")
    ] = None
    recipe: RecipeName = None
    seed: Seed = 0

    def adapter_training(self, opened: Catalogue) -> AdapterTraining:
        """How the adapter layers of each emulator of a catalogue are trained."""
        from emutune.tuning.curve import CALIBRATION

        how = CALIBRATION if self.fleet is None else _as_fleet(self.fleet, opened)
        changed = {"steps": self.steps or how.training.steps, "seed": self.seed}
        training = how.training.model_copy(update=changed)
        return how.model_copy(update={"recipe": self.recipe, "training": training})


def _as_fleet(source: str, opened: Catalogue) -> AdapterTraining:
    """How a fleet trains the model of a catalogue."""
    from emutune.fleet.config import load_fleet
    from emutune.fleet.training import trainer_config
    from emutune.tuning.text import fitting_block
    from emutune.tuning.tuner import AdapterTraining

    training = load_fleet(source).training
    return AdapterTraining(
        adapter=training.adapter,
        width=training.width,
        block=fitting_block(opened.config, training.block),
        training=trainer_config(training),
    )


@grouped
def calibrate(
    directory: CatalogueArgument,
    data: Data,
    *,
    task: Annotated[
        list[Path], typer.Option(help="Another task's text, whose complexity to measure. Repeatable.")
    ] = [],  # noqa: B006
    shape: Shape,
    measuring: Measuring,
    out: Annotated[Path, typer.Option(help="The curve file; its plot stands beside it.")] = Path(
        "curve.toml"
    ),
    json_file: JsonFile = None,
) -> None:
    """Measure perplexity against retention: emulators as they are, tuned, and plugged in."""
    quiet_libraries("tuning", "calibrate")
    from emutune.tuning.catalogue import open_catalogue
    from emutune.tuning.curve import COLUMNS, fit_curve
    from emutune.tuning.curve import calibrate as run_calibration
    from emutune.tuning.text import read_text

    chosen(shape.column, "--column", COLUMNS)
    chosen(shape.fit, "--fit", ("quadratic", "monotone"))
    if out.suffix == ".png":
        raise UsageError(f"--out {out}: is where the plot would be; choose a name that ends with .toml")
    if len({path.stem for path in task}) < len(task):
        raise UsageError(
            "--task: two files have the same name, by which their complexities are told apart; rename one"
        )
    opened = open_catalogue(directory)
    text = read_text(data)
    tasks = {path.stem: read_text(path) for path in task}
    how = measuring.adapter_training(opened)
    with going_on(directory), stage_bar() as stage:
        points = run_calibration(
            opened,
            text,
            how,
            report=lambda retention, progress: advance(
                stage, f"retention {retention:.3f}", progress, how.training.steps
            ),
        )
    fits: dict[Any, Fit] = {name: fit_curve(points, name) for name in COLUMNS}
    print_curve(points, fits)
    complexities = measure_complexities(opened, text, tasks)
    write_curve(out, opened, points, fits, shape)
    figures = {
        "points": [point.model_dump() for point in points],
        "fits": {name: values.model_dump() for name, values in fits.items()},
        "complexity": complexities,
    }
    write_json(json_file, figures)


def measure_complexities(opened: Catalogue, text: str, tasks: dict[str, str]) -> dict[str, float]:
    """Measure and print the complexity of tasks, by name, against the curve's text."""
    from emutune.tuning.curve import complexity, whole_model_perplexity

    measured = whole_model_perplexity(opened, {"": text, **tasks})
    complexities = {name: complexity(measured[name], measured[""]) for name in tasks}
    for name, value in complexities.items():
        print(
            f"complexity of {name}: {value:.2f} (iota 10; perplexity {measured[name]:.2f} against {measured['']:.2f})"
        )
    return complexities


def write_curve(
    out: Path, opened: Catalogue, points: list[Point], fits: dict[Any, Fit], shape: Shape
) -> None:
    """Write the curve file, and its plot beside it."""
    from emutune.tuning.curve import curve_file

    wanted: Any = shape.column
    with saving("--out", out), replacing(out) as aside:
        content = curve_file(opened, points, fits[wanted], wanted, monotone=shape.fit == "monotone")
        aside.write_text(content, "utf-8")
    plot = out.with_suffix(".png")
    with saving("--out", plot):
        draw_curve(plot, points, fits)
    print(f'curve: {out}, plot: {plot}; in a scenario\'s section quality: curve = "{out.name}"')


def print_curve(points: list[Point], fits: dict[Any, Fit]) -> None:
    """The measured perplexities, and how well a quadratic describes them."""
    headings = ("retention", "MB", "zero-shot", "tuned", "plugged in", "tokens/s")
    print_table(
        headings,
        [
            (
                f"{point.retention:.3f}",
                f"{point.bytes / 1e6:.2f}",
                f"{point.zero_shot:.2f}",
                f"{point.tuned:.2f}",
                f"{point.plugged:.2f}",
                f"{point.tokens_per_s:,.0f}",
            )
            for point in points
        ],
    )
    for name, fit in fits.items():
        print(
            f"{name}: {fit.quadratic:.4g} E^2 + {fit.linear:.4g} E + {fit.constant:.4g}, R^2 {fit.r_squared:.4f}, "
            f"worst residual {fit.worst_residual:.3g}"
        )


def draw_curve(path: Path, points: list[Point], fits: dict[Any, Fit]) -> None:
    """Measured points, quadratics and monotone interpolants, as a picture."""
    import numpy as np
    from matplotlib.figure import Figure

    from emutune.tuning.curve import interpolant

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    panel = figure.subplots()
    grid = np.linspace(points[0].retention, points[-1].retention, 200)
    labels = {
        "zero_shot": "emulator, zero-shot",
        "tuned": "emulator, tuned",
        "plugged": "plugged into the whole model",
    }
    for name, fit in fits.items():
        marks = panel.plot(
            [p.retention for p in points], [getattr(p, name) for p in points], "o", label=labels[name]
        )
        colour = marks[0].get_color()
        panel.plot(
            grid, np.polyval([fit.quadratic, fit.linear, fit.constant], grid), "--", color=colour, linewidth=1
        )
        panel.plot(grid, [interpolant(points, fit)(value) for value in grid], color=colour, linewidth=1)
    panel.set(xlabel="retention E (share of the middle layers kept)", ylabel="perplexity")
    panel.plot([], [], "k--", linewidth=1, label="quadratic fit")
    panel.plot([], [], "k-", linewidth=1, label="monotone interpolant")
    panel.legend(frameon=False)
    figure.savefig(path, dpi=150)
