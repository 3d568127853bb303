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
    Learning,
    ModelArgument,
    RecipeName,
    Seed,
    validated,
)
from emutune.cli.terminal import advance, going_on, print_table, stage_bar, write_json
from emutune.errors import UsageError

if TYPE_CHECKING:
    from emutune.tuning.build import Recipe

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
    distill_steps: Learning = 400

    def recipe(self, seed: int) -> Recipe:
        """The recipe that they say."""
        from emutune.tuning.build import Recipe
        from emutune.tuning.compression.distill import DISTILLATION

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
            distillation=DISTILLATION.model_copy(update={"steps": self.distill_steps}),
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
    seed: Seed = 0,
    json_file: JsonFile = None,
) -> None:
    """Make the emulators of a model, content-addressed; building twice builds nothing twice."""
    quiet_libraries("tuning", "catalogue build")
    from emutune.tuning.build import build_catalogue
    from emutune.tuning.text import read_text

    recipe = making.recipe(seed)
    text = None if data is None else read_text(data)
    with going_on(out), stage_bar() as stage:
        built = build_catalogue(
            model,
            out,
            recipe,
            text,
            lambda name, progress: advance(stage, name, progress, making.distill_steps),
        )
    show_rows(built, recipe.label, json_file)


@catalogue.command("show")
def show(directory: CatalogueArgument, recipe: RecipeName = None, json_file: JsonFile = None) -> None:
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


def numbers(option: str, text: str) -> tuple[float, ...]:
    """Comma-separated numbers."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise UsageError(f"{option}: must be numbers with commas between, got {text!r}") from error
