"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ScenarioArgument = Annotated[
    str, typer.Argument(metavar="SCENARIO", help="A file, or a shipped name: paper.")
]
Overrides = Annotated[list[str], typer.Option("--set", help="Override a field: fleet.ues=9. Repeatable.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")]
Episodes = Annotated[int, typer.Option(min=1, help="Held-out episodes.")]
Seeds = Annotated[int, typer.Option(min=1, help="Training seeds: 0, 1, ...")]
Steps = Annotated[int | None, typer.Option(min=1, help="Environment steps of training.")]
