"""The commands under ``emutune catalogue``: make the emulators of a model, and show them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from emutune.cli.grouped import grouped
from emutune.cli.libraries import quiet_libraries
from emutune.cli.options import (
    CatalogueArgument,
    JsonFile,
    ModelArgument,
    RecipeName,
    Seed,
    validated,
)
from emutune.cli.terminal import advance, going_on, print_table, stage_bar, write_json
from emutune.errors import UsageError
from emutune.files import saving

if TYPE_CHECKING:
    from emutune.tuning.catalogue import Catalogue
    from emutune.tuning.frontier import Level
    from emutune.tuning.manifest import Emulator
    from emutune.tuning.recipe import Recipe

catalogue = typer.Typer(help="Emulators of a foundation model.", no_args_is_help=True)


@dataclass(frozen=True)
class Making:
    """Options of how emulators are made."""

    order: Annotated[str, typer.Option(help="loss, importance (both nested) or uniform.")] = "loss"
    compress: Annotated[str, typer.Option(help="Some of layer_drop,prune,quantize,distill.")] = "layer_drop"
    retentions: Annotated[
        str | None, typer.Option(help="Comma-separated; every possible one if not given.")
    ] = None
    bottom: Annotated[int, typer.Option(min=0, help="Adapter layers at the bottom.")] = 2
    top: Annotated[int, typer.Option(min=0, help="Adapter layers at the top.")] = 2
    width_share: Annotated[float, typer.Option(help="Heads and channels that pruning leaves.")] = 0.75
    bits: Annotated[int, typer.Option(help="8, 4 or 3, of quantised weights.")] = 4
    distill_tokens: Annotated[
        int, typer.Option(min=256, help="Budget of distillation; how long it takes is said at its beginning.")
    ] = 819_200

    def recipe(self, seed: int) -> Recipe:
        """The recipe that they say."""
        from emutune.tuning.build import Recipe
        from emutune.tuning.compression.distill import budgeted

        return validated(
            Recipe,
            methods=tuple(self.compress.split(",")),
            order=self.order,
            retentions=None if self.retentions is None else numbers("--retentions", self.retentions),
            bottom=self.bottom,
            top=self.top,
            width_share=self.width_share,
            bits=self.bits,
            seed=seed,
            distillation=budgeted(self.distill_tokens),
        )


@catalogue.command("build")
@grouped
def build(
    model: ModelArgument,
    out: Annotated[Path, typer.Option(help="The catalogue's directory; what it has is not built again.")],
    making: Making,
    data: Annotated[
        Path | None, typer.Option(help="Calibration text; Python's documentation if not given.")
    ] = None,
    frontier: Annotated[
        bool,
        typer.Option("--frontier", help="As they are and rounded; levels of those that no other beats."),
    ] = False,
    seed: Seed = 0,
    json_file: JsonFile = None,
) -> None:
    """Make the emulators of a model, content-addressed; building twice builds nothing twice."""
    quiet_libraries("tuning", "catalogue build")
    from emutune.tuning.build import build_catalogue
    from emutune.tuning.text import read_text

    recipe = making.recipe(seed).model_copy(update={"frontier": frontier})
    text = None if data is None else read_text(data)
    with going_on(out), stage_bar() as stage:
        built = build_catalogue(
            model,
            out,
            recipe,
            text,
            lambda name, progress: advance(stage, name, progress, recipe.distillation.steps),
            lambda line: print(line, flush=True),
        )
    show_rows(built, recipe.label, json_file)


@catalogue.command("show")
def show(
    directory: CatalogueArgument,
    recipe: RecipeName = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw perplexity against bytes of all emulators to this picture.")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Print the emulators of a catalogue: what they keep, weigh and are worth; and which no other beats."""
    quiet_libraries("tuning", "catalogue show")
    from emutune.tuning.catalogue import open_catalogue
    from emutune.tuning.doubts import warn_of

    opened = open_catalogue(directory)
    show_rows(opened, recipe or opened.info.recipe, json_file)
    warn_of(opened, recipe or opened.info.recipe)
    if plot is not None:
        with saving("--plot", plot):
            draw_frontier(plot, opened)
        print(f"plot: {plot}")


def show_rows(opened: Catalogue, recipe: str, json_file: Path | None) -> None:
    """Table and figures of the emulators of a recipe, and of those of all recipes that no other beats."""
    from emutune.tuning.frontier import frontier, levels

    rows = _rows(opened, recipe)
    print(f"{recipe}, base {opened.info.base[:12]}, {opened.info.bottom} + {opened.info.top} adapter layers")
    print_table(
        ("retention", "layers", "bits", "MB", "MB missing", "perplexity", "kept between the adapter layers"),
        [
            (
                f"{row['retention']:.3f}",
                str(row["layers"]),
                str(row["bits"] or ""),
                f"{row['bytes'] / 1e6:.3f}",
                f"{row['bytes_missing'] / 1e6:.3f}",
                f"{row['perplexity']:.2f}",
                " ".join(map(str, row["kept"])),
            )
            for row in rows
        ],
    )
    unbeaten = [_figures(level) for level in frontier(levels(opened))]
    print("of all recipes, those that no other beats in bytes, memory, operations and perplexity:")
    print_table(
        ("emulator", "layers", "MB", "MB to train in", "Mflop a token", "perplexity"),
        [
            (
                row["name"],
                str(row["layers"]),
                f"{row['bytes'] / 1e6:.3f}",
                f"{row['memory_bytes'] / 1e6:.1f}",
                f"{row['operations'] / 1e6:.1f}",
                f"{row['perplexity']:.2f}",
            )
            for row in unbeaten
        ],
    )
    figures = {"recipe": recipe, "base": opened.info.base, "emulators": rows, "frontier": unbeaten}
    write_json(json_file, figures)


def _rows(opened: Catalogue, recipe: str) -> list[dict[str, Any]]:
    """The emulators of a recipe, and what each lacks where the one before it is there."""
    from emutune.tuning.manifest import missing

    emulators = opened.emulators(recipe)
    if not emulators:
        raise UsageError(
            f"{opened.directory}: no emulators of recipe {recipe!r}; run emutune catalogue build"
        )
    return [
        {
            "name": emulator.name,
            "retention": emulator.retention,
            "layers": len(emulator.layers),
            "bits": _bits(emulator),
            "kept": emulator.kept,
            "bytes": emulator.bytes,
            "bytes_missing": sum(missing(previous, emulator).values()),
            "perplexity": emulator.perplexity,
        }
        for previous, emulator in zip([None, *emulators], emulators, strict=False)
    ]


def _bits(emulator: Emulator) -> int | None:
    """Of its rounded weights."""
    return min((entry.bits for entry in emulator.layers if entry.bits is not None), default=None)


def _figures(level: Level) -> dict[str, Any]:
    return {
        "name": level.emulator.name,
        "recipe": level.emulator.recipe,
        "layers": len(level.emulator.layers),
        "bytes": level.bytes,
        "memory_bytes": level.memory_bytes,
        "operations": level.operations,
        "perplexity": level.perplexity,
    }


def draw_frontier(path: Path, opened: Catalogue) -> None:
    """All emulators by recipe, perplexity against bytes, with a ring around those that no other beats."""
    from matplotlib.figure import Figure

    from emutune.tuning.frontier import frontier, levels

    found = levels(opened)
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    panel = figure.subplots()
    for recipe in sorted({level.emulator.recipe for level in found}):
        ours = sorted((level.bytes, level.perplexity) for level in found if level.emulator.recipe == recipe)
        panel.plot([size / 1e6 for size, _ in ours], [value for _, value in ours], ".-", label=recipe)
    unbeaten = frontier(found)
    panel.plot(
        [level.bytes / 1e6 for level in unbeaten],
        [level.perplexity for level in unbeaten],
        "ko",
        markersize=9,
        fillstyle="none",
        label="not beaten",
    )
    panel.set(xlabel="MB to send", ylabel="perplexity", yscale="log")
    panel.legend(frameon=False)
    figure.savefig(path, dpi=150)


def numbers(option: str, text: str) -> tuple[float, ...]:
    """Comma-separated numbers."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise UsageError(f"{option}: must be numbers with commas between, got {text!r}") from error
