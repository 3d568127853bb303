"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeVar

import typer
from pydantic import BaseModel, ValidationError

from emutune.errors import UsageError
from emutune.files import check_writable

Configuration = TypeVar("Configuration", bound=BaseModel)

ScenarioArgument = Annotated[
    str, typer.Argument(metavar="SCENARIO", help="A file, or a shipped name: paper.")
]
Overrides = Annotated[list[str], typer.Option("--set", help="Override a field: fleet.ues=9. Repeatable.")]


def _writable(path: Path | None) -> Path | None:
    check_writable("--json", path)
    return path


JsonFile = Annotated[
    Path | None, typer.Option("--json", callback=_writable, help="Write the figures to this file.")
]
CatalogueArgument = Annotated[Path, typer.Argument(metavar="CATALOGUE", help="A catalogue's directory.")]
ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="A model directory, a GGUF file, or: reference.")
]
Data = Annotated[Path, typer.Option(help="The task's text, UTF-8.")]
Learning = Annotated[int, typer.Option(min=1, help="Training steps.")]
RecipeName = Annotated[str | None, typer.Option(help="Of which emulators; those built last if not given.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of everything random.")]
Episodes = Annotated[int, typer.Option(min=1, help="Held-out episodes.")]
Seeds = Annotated[int, typer.Option(min=1, help="Training seeds: 0, 1, ...")]
Steps = Annotated[int | None, typer.Option(min=1, help="Environment steps of training.")]


def validated(kind: type[Configuration], **values: object) -> Configuration:
    """A configuration from options; a wrong one is named as the command calls it."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        field = {"methods": "compress"}.get(name := str(first["loc"][0]), name)
        raise UsageError(f"--{field.replace('_', '-')}: {first['msg']}, got {first['input']!r}") from error


def chosen(value: str, option: str, choices: tuple[str, ...]) -> None:
    """Refuse what is not among the choices."""
    if value not in choices:
        raise UsageError(f"{option}: must be one of {', '.join(choices)}, got {value!r}")
