"""The commands around real models: ``catalogue``, ``calibrate``, ``tune``, ``plug``, ``reference``."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from emutune.cli.libraries import quiet_libraries
from emutune.cli.options import JsonFile, validated
from emutune.cli.terminal import interruptible, print_table, stage_bar, write_json
from emutune.errors import UsageError
from emutune.files import saving

if TYPE_CHECKING:
    from emutune.tuning.curve import Fit, Point

catalogue = typer.Typer(help="Emulators of a foundation model.", no_args_is_help=True)
reference = typer.Typer(help="The small foundation model that emutune ships.", no_args_is_help=True)

CatalogueArgument = Annotated[Path, typer.Argument(metavar="CATALOGUE", help="A catalogue's directory.")]
ModelArgument = Annotated[str, typer.Argument(metavar="MODEL_DIR", help="A model directory, or: reference.")]
Data = Annotated[Path, typer.Option(help="The task's text, UTF-8.")]
Learning = Annotated[int, typer.Option(min=1, help="Training steps.")]
Recipe = Annotated[str | None, typer.Option(help="Of which emulators; those built last if not given.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of everything random.")]


@catalogue.command("build")
def build(
    model: ModelArgument,
    out: Annotated[Path, typer.Option(help="The catalogue's directory; what it has is not built again.")],
    order: Annotated[str, typer.Option(help="importance (nested) or uniform.")] = "importance",
    compress: Annotated[str, typer.Option(help="Some of layer_drop,prune,quantize,distill.")] = "layer_drop",
    retentions: Annotated[
        str | None, typer.Option(help="Comma-separated; every possible one if not given.")
    ] = None,
    bottom: Annotated[int, typer.Option(min=0, help="Adapter layers at the bottom.")] = 2,
    top: Annotated[int, typer.Option(min=0, help="Adapter layers at the top.")] = 2,
    width_share: Annotated[float, typer.Option(help="Heads and channels that pruning leaves.")] = 0.75,
    bits: Annotated[int, typer.Option(help="8 or 4, of quantised weights.")] = 8,
    distill_steps: Learning = 400,
    data: Annotated[
        Path | None, typer.Option(help="Calibration text; Python's documentation if not given.")
    ] = None,
    seed: Seed = 0,
    json_file: JsonFile = None,
) -> None:
    """Make the emulators of a model, content-addressed; building twice builds nothing twice."""
    quiet_libraries("tuning", "catalogue build")
    from emutune.tuning.build import Recipe as BuildRecipe
    from emutune.tuning.build import build_catalogue
    from emutune.tuning.compression.distill import DISTILLATION
    from emutune.tuning.text import read_text

    recipe = validated(
        BuildRecipe,
        methods=tuple(compress.split(",")),
        order=order,
        retentions=None if retentions is None else numbers("--retentions", retentions),
        bottom=bottom,
        top=top,
        width_share=width_share,
        bits=bits,
        seed=seed,
        distillation=DISTILLATION.model_copy(update={"steps": distill_steps}),
    )
    text = None if data is None else read_text(data)
    with going_on(out), stage_bar() as stage:
        built = build_catalogue(
            model, out, recipe, text, lambda name, progress: advance(stage, name, progress, distill_steps)
        )
    show_rows(built, recipe.label, json_file)


@catalogue.command("show")
def show(directory: CatalogueArgument, recipe: Recipe = None, json_file: JsonFile = None) -> None:
    """Print the emulators of a catalogue: what they keep, weigh and are worth."""
    quiet_libraries("tuning", "catalogue show")
    from emutune.tuning.catalogue import open_catalogue

    opened = open_catalogue(directory)
    show_rows(opened, recipe or opened.info.recipe, json_file)


def show_rows(opened: Any, recipe: str, json_file: Path | None) -> None:
    """Table and figures of the emulators of a recipe."""
    from emutune.tuning.manifest import missing

    rows, previous = [], None
    emulators = opened.emulators(recipe)
    if not emulators:
        raise UsageError(
            f"{opened.directory}: no emulators of recipe {recipe!r}; run emutune catalogue build"
        )
    for emulator in emulators:
        rows.append(
            {
                "name": emulator.name,
                "retention": emulator.retention,
                "layers": len(emulator.layers),
                "kept": emulator.kept,
                "bytes": emulator.bytes,
                "bytes_missing": sum(missing(previous, emulator).values()),
                "perplexity": emulator.perplexity,
            }
        )
        previous = emulator
    print(f"{recipe}, base {opened.info.base[:12]}, {opened.info.bottom} + {opened.info.top} adapter layers")
    headings = ("retention", "layers", "MB", "MB missing", "perplexity", "kept between the adapter layers")
    print_table(
        headings,
        [
            (
                f"{row['retention']:.3f}",
                str(row["layers"]),
                f"{row['bytes'] / 1e6:.3f}",
                f"{row['bytes_missing'] / 1e6:.3f}",
                f"{row['perplexity']:.2f}",
                " ".join(map(str, row["kept"])),
            )
            for row in rows
        ],
    )
    write_json(json_file, {"recipe": recipe, "base": opened.info.base, "emulators": rows})


def calibrate(
    directory: CatalogueArgument,
    data: Data,
    task: Annotated[
        list[Path], typer.Option(help="Another task's text, whose complexity to measure. Repeatable.")
    ] = [],  # noqa: B006
    column: Annotated[
        str, typer.Option(help="zero_shot, tuned or plugged: the curve's perplexity.")
    ] = "plugged",
    fit: Annotated[str, typer.Option(help="quadratic or monotone: what a scenario uses.")] = "quadratic",
    steps: Annotated[
        int | None, typer.Option(min=1, help="Training steps; 60, or the fleet's, if not given.")
    ] = None,
    fleet: Annotated[
        str | None, typer.Option(help="Train as the fleet of this file does; if not given, whole layers.")
    ] = None,
    recipe: Recipe = None,
    seed: Seed = 0,
    out: Annotated[Path, typer.Option(help="The curve file; its plot stands beside it.")] = Path(
        "curve.toml"
    ),
    json_file: JsonFile = None,
) -> None:
    """Measure perplexity against retention: emulators as they are, tuned, and plugged in."""
    quiet_libraries("tuning", "calibrate")
    from emutune.files import replacing
    from emutune.tuning.catalogue import open_catalogue
    from emutune.tuning.curve import (
        CALIBRATION,
        COLUMNS,
        complexity,
        curve_file,
        fit_curve,
        whole_model_perplexity,
    )
    from emutune.tuning.curve import calibrate as run_calibration
    from emutune.tuning.text import read_text

    chosen(column, "--column", COLUMNS)
    chosen(fit, "--fit", ("quadratic", "monotone"))
    if out.suffix == ".png":
        raise UsageError(f"--out {out}: is where the plot would be; choose a name that ends with .toml")
    if len({path.stem for path in task}) < len(task):
        raise UsageError(
            "--task: two files have the same name, by which their complexities are told apart; rename one"
        )
    opened = open_catalogue(directory)
    text = read_text(data)
    tasks = {path.stem: read_text(path) for path in task}
    how: dict[str, Any] = {"training": CALIBRATION} if fleet is None else _as_fleet(fleet, opened)
    steps = steps or how["training"].steps
    how["training"] = how["training"].model_copy(update={"steps": steps, "seed": seed})
    with going_on(directory), stage_bar() as stage:
        points = run_calibration(
            opened,
            text,
            **how,
            recipe=recipe,
            report=lambda retention, progress: advance(stage, f"retention {retention:.3f}", progress, steps),
        )
    fits: dict[Any, Fit] = {name: fit_curve(points, name) for name in COLUMNS}
    wanted: Any = column
    print_curve(points, fits)
    measured = whole_model_perplexity(opened, {"": text, **tasks})
    complexities = {name: complexity(measured[name], measured[""]) for name in tasks}
    for name, value in complexities.items():
        print(
            f"complexity of {name}: {value:.2f} (iota 10; perplexity {measured[name]:.2f} against {measured['']:.2f})"
        )
    with saving("--out", out), replacing(out) as aside:
        aside.write_text(
            curve_file(
                opened,
                points,
                fits[wanted],
                wanted,
                monotone=fit == "monotone",
            ),
            "utf-8",
        )
    plot = out.with_suffix(".png")
    with saving("--out", plot):
        draw_curve(plot, points, fits)
    print(f'curve: {out}, plot: {plot}; in a scenario\'s section quality: curve = "{out.name}"')
    write_json(
        json_file,
        {
            "points": [point.model_dump() for point in points],
            "fits": {name: values.model_dump() for name, values in fits.items()},
            "complexity": complexities,
        },
    )


def _as_fleet(source: str, opened: Any) -> dict[str, Any]:
    """How a fleet trains the model of a catalogue, as arguments of a calibration."""
    from emutune.fleet.config import load_fleet
    from emutune.fleet.training import trainer_config
    from emutune.tuning.text import fitting_block

    training = load_fleet(source).training
    return {
        "training": trainer_config(training),
        "adapter": training.adapter,
        "width": training.width,
        "block": fitting_block(opened.config, training.block),
    }


def tune(
    directory: CatalogueArgument,
    data: Data,
    retention: Annotated[float, typer.Option(help="Of the emulator to train against.")] = 0.5,
    adapter: Annotated[str, typer.Option(help="layers, lora or bottleneck.")] = "layers",
    where: Annotated[str, typer.Option(help="device (the emulator) or server (the whole model).")] = "device",
    server_model: Annotated[
        str, typer.Option(help="With --where server: full, or cached for the device's emulator.")
    ] = "full",
    width: Annotated[int, typer.Option(min=1, help="Rank of LoRA, width of bottlenecks.")] = 8,
    steps: Learning = 120,
    learning_rate: Annotated[float, typer.Option(help="Its peak.")] = 1e-3,
    batch: Annotated[int, typer.Option(min=1, help="Blocks in one forward pass.")] = 8,
    accumulation: Annotated[int, typer.Option(min=1, help="Forward passes a step.")] = 1,
    block: Annotated[int | None, typer.Option(min=8, help="Tokens in a block; 256 if not given.")] = None,
    recipe: Recipe = None,
    seed: Seed = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    out: Annotated[
        Path, typer.Option(help="The adapter; one that is there is where training starts.")
    ] = Path("adapter.safetensors"),
    json_file: JsonFile = None,
) -> None:
    """Tune an adapter; it is kept only if the whole model with it plugged in gets better."""
    quiet_libraries("tuning", "tune")
    from dataclasses import asdict

    from emutune.tuning.catalogue import open_catalogue
    from emutune.tuning.text import read_text
    from emutune.tuning.trainer import TrainerConfig
    from emutune.tuning.tune import TuneConfig
    from emutune.tuning.tune import tune as run_tuning

    training = validated(
        TrainerConfig,
        steps=steps,
        batch=batch,
        accumulation=accumulation,
        learning_rate=learning_rate,
        seed=seed,
        score_every=max(1, min(20, steps // 4)),
    )
    config = validated(
        TuneConfig,
        retention=retention,
        where=where,
        server_model=server_model,
        recipe=recipe,
        adapter=adapter,
        width=width,
        block=block,
        training=training,
    )
    usable(device)
    opened, text = open_catalogue(directory), read_text(data)
    with going_on(out), stage_bar() as stage:
        result = run_tuning(
            opened,
            text,
            config,
            out,
            device=device,
            report=lambda progress: advance(stage, "tuning", progress, steps),
        )
    print_table(
        ("perplexity, test text", "before", "after"),
        [
            ("plugged into the whole model", f"{result.before:.2f}", f"{result.after:.2f}"),
            (
                f"emulator at {result.retention:.3f}",
                f"{result.emulator_before:.2f}",
                f"{result.emulator_after:.2f}",
            ),
        ],
    )
    print(f"{result.trainable:,} parameters trained, {result.tokens_per_s:,.0f} tokens/s")
    print(
        f"accepted: {out}"
        if result.accepted
        else "rejected: plugged in, no state was better; nothing was written"
    )
    write_json(json_file, asdict(result) | {"adapter": str(out) if result.accepted else None})


def plug(
    model: ModelArgument,
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="From emutune tune.")],
    out: Annotated[Path, typer.Option(help="A new directory, which transformers loads.")],
    data: Annotated[
        Path | None, typer.Option(help="Text to evaluate on; a worse model is not written.")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Write the foundation model with an adapter plugged in, once it was evaluated."""
    quiet_libraries("tuning", "plug")
    from emutune.tuning.plug import plug as run_plug
    from emutune.tuning.text import read_text

    with interruptible(f"{out} was not written"), stage_bar() as stage:
        stage("evaluating", 0, 1)
        plugged = run_plug(model, adapter, out, None if data is None else read_text(data))
    print(f"perplexity {plugged.before:.2f} before, {plugged.after:.2f} plugged in; written to {out}")
    write_json(json_file, {**plugged._asdict(), "out": str(out)})


@reference.command("build")
def build_reference(
    out: Annotated[Path, typer.Option(help="The model's directory.")] = Path("runs/reference"),
    steps: Annotated[
        int | None, typer.Option(min=1, help="Training steps; those of the shipped model.")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Train the reference model from Python's own documentation."""
    quiet_libraries("tuning", "reference build")
    from emutune.tuning.reference import REFERENCE_TRAINING, train_reference

    config = REFERENCE_TRAINING if steps is None else REFERENCE_TRAINING.model_copy(update={"steps": steps})
    with going_on(out), stage_bar() as stage:
        trained = train_reference(
            out, config, lambda progress: advance(stage, "training", progress, config.steps)
        )
    print(f"perplexity {trained.perplexity:.2f} on held-back text after {trained.progress.step} steps; {out}")
    write_json(
        json_file, {"perplexity": trained.perplexity, "scores": trained.progress.scores, "out": str(out)}
    )


@reference.command("tasks")
def write_tasks(
    out: Annotated[Path, typer.Option(help="Directory of the text files.")], json_file: JsonFile = None
) -> None:
    """Write the texts of the downstream tasks: packages of the standard library that the model has not seen."""
    from emutune.files import replacing
    from emutune.tuning.documentation import TASKS, task_text

    sizes = {}
    with saving("--out", out):
        out.mkdir(parents=True, exist_ok=True)
        for name in TASKS:
            path, text = out / f"{name}.txt", task_text(name)
            with replacing(path) as aside:
                aside.write_text(text, "utf-8")
            sizes[name] = len(text)
            print(f"{path}: {len(text):,} characters")
    write_json(json_file, sizes)


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


def going_on(out: Path) -> AbstractContextManager[None]:
    """On Ctrl-C, say that the work can go on."""
    return interruptible(f"what was done is kept beside {out}; the same command goes on")


def usable(device: str) -> None:
    """Refuse a device that is unknown, or that this machine does not have."""
    import torch

    chosen(device.partition(":")[0], "--device", ("cpu", "cuda"))
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(
            f"--device {device}: cannot be used ({str(error).splitlines()[0]}); choose cpu"
        ) from error


def numbers(option: str, text: str) -> tuple[float, ...]:
    """Comma-separated numbers."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise UsageError(f"{option}: must be numbers with commas between, got {text!r}") from error


def chosen(value: str, option: str, choices: tuple[str, ...]) -> None:
    """Refuse what is not among the choices."""
    if value not in choices:
        raise UsageError(f"{option}: must be one of {', '.join(choices)}, got {value!r}")
