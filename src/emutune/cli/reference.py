"""The commands under ``emutune reference``: the small foundation models that emutune ships, and their tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from emutune.cli.libraries import quiet_libraries
from emutune.cli.options import JsonFile
from emutune.cli.terminal import advance, going_on, stage_bar, write_json
from emutune.files import replacing, saving

reference = typer.Typer(help="The small foundation models that emutune ships.", no_args_is_help=True)


Code = Annotated[bool, typer.Option("--code", help="Of the model of code, instead of the one of English.")]


@reference.command("build")
def build_reference(
    out: Annotated[Path, typer.Option(help="The model's directory.")] = Path("runs/reference"),
    steps: Annotated[
        int | None, typer.Option(min=1, help="Training steps; those of the shipped model.")
    ] = None,
    code: Code = False,
    json_file: JsonFile = None,
) -> None:
    """Train a reference model from Python's own documentation, or from its library's code."""
    quiet_libraries("tuning", "reference build")
    from emutune.tuning.reference import TRAININGS, train_reference

    model = _name(code)
    config = TRAININGS[model] if steps is None else TRAININGS[model].model_copy(update={"steps": steps})
    with going_on(out), stage_bar() as stage:
        trained = train_reference(
            out, config, lambda progress: advance(stage, "training", progress, config.steps), model
        )
    print(f"perplexity {trained.perplexity:.2f} on held-back text after {trained.progress.step} steps; {out}")
    write_json(
        json_file, {"perplexity": trained.perplexity, "scores": trained.progress.scores, "out": str(out)}
    )


@reference.command("tasks")
def write_tasks(
    out: Annotated[Path, typer.Option(help="Directory of the text files.")],
    code: Code = False,
    json_file: JsonFile = None,
) -> None:
    """Write the texts of the downstream tasks: packages of the standard library that the model has not seen."""
    from emutune.tuning.documentation import TASKS, task_text

    sizes = {}
    with saving("--out", out):
        out.mkdir(parents=True, exist_ok=True)
        for name in TASKS:
            path, text = out / f"{name}.txt", task_text(name, _name(code))
            with replacing(path) as aside:
                aside.write_text(text, "utf-8")
            sizes[name] = len(text)
            print(f"{path}: {len(text):,} characters")
    write_json(json_file, sizes)


def _name(code: bool) -> str:
    from emutune.tuning.documentation import REFERENCE, REFERENCE_CODE

    return REFERENCE_CODE if code else REFERENCE
