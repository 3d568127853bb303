"""Options that belong together, as one dataclass that a command takes in their place."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import is_dataclass
from functools import wraps
from typing import Any, get_type_hints


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose parameters of dataclass types are options in groups: each field is an option of its own.

    Args:
        command: its other parameters, and the fields, are annotated as Typer reads them.
    """
    kinds = get_type_hints(command)
    groups: dict[str, Any] = {name: kind for name, kind in kinds.items() if is_dataclass(kind)}
    members = {name: _parameters(kind) for name, kind in groups.items()}

    @wraps(command)
    def spread(**values: Any) -> None:
        for name, kind in groups.items():
            values[name] = kind(**{member.name: values.pop(member.name) for member in members[name]})
        command(**values)

    parameters: list[inspect.Parameter] = []
    for parameter in _parameters(command):
        parameters += members.get(parameter.name, [parameter])
    spread.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    spread.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return spread


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    """Those of a function or a dataclass, by name alone: some that must be given may follow some that need not."""
    signature = inspect.signature(function, eval_str=True)
    return [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in signature.parameters.values()
    ]
