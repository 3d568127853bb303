"""What comes from other packages and files, by name: entry points, ``module:name`` and ``file.py:name``."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from emutune.errors import UsageError, one_line

Group = Literal["emutune.policies", "emutune.learners", "emutune.scenarios"]


def entry_names(group: Group) -> list[str]:
    """Names under which installed packages offer something."""
    return sorted({entry.name for entry in entry_points(group=group)})


def load_entry(group: Group, name: str) -> Any:
    """What installed packages offer under a name.

    Raises:
        UsageError: nothing, two packages do, or it cannot be imported.
    """
    found: dict[str, EntryPoint] = {entry.value: entry for entry in entry_points(group=group, name=name)}
    if len(found) != 1:
        offered = " and ".join(found) or "no package"
        raise UsageError(f"{group} {name!r}: offered by {offered}; install one package that does")
    value, entry = found.popitem()
    with _importing(f"{group} {name!r} ({value})"):
        return entry.load()


def is_named(name: str) -> bool:
    """Whether a name says where a thing is: ``module:name`` or ``file.py:name``."""
    place, colon, thing = name.rpartition(":")
    return bool(place and colon and thing.isidentifier())


def load_named(name: str) -> Any:
    """What is called so in a module, or in a file.

    Args:
        name: ``module:name`` or ``file.py:name``; modules in the working directory are found as well.

    Raises:
        UsageError: there is no such module, file or name in it, or it cannot be imported.
    """
    place, _, thing = name.rpartition(":")
    with _importing(name):
        module = _of_file(place) if place.endswith(".py") else _of_name(place)
    if not hasattr(module, thing):
        mine = [known for known, value in vars(module).items() if _is_of(value, module)]
        raise UsageError(f"{name}: {place} has no {thing}; it has {', '.join(mine) or 'nothing of its own'}")
    return getattr(module, thing)


def _is_of(value: Any, module: ModuleType) -> bool:
    return getattr(value, "__module__", None) == module.__name__ and hasattr(value, "__name__")


def _of_name(name: str) -> ModuleType:
    with _also_in(Path.cwd()):
        return importlib.import_module(name)


def _of_file(place: str) -> ModuleType:
    path = Path(place).resolve()
    if not path.is_file():
        raise UsageError(f"{place}: no such file; give the path of the Python file before the colon")
    return _loaded(path, path.stat().st_mtime_ns)


@lru_cache
def _loaded(path: Path, changed_ns: int) -> ModuleType:
    """A file's module, the same one until the file changes: what is compiled for its objects stays of use."""
    spec = importlib.util.spec_from_file_location(f"{path.stem}_{changed_ns}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # where dataclasses look
    with _also_in(path.parent):
        spec.loader.exec_module(module)
    return module


@contextmanager
def _also_in(directory: Path) -> Iterator[None]:
    """Find modules of a directory too, after those that are installed."""
    sys.path.append(str(directory))
    try:
        yield
    finally:
        sys.path.remove(str(directory))


@contextmanager
def _importing(what: str) -> Iterator[None]:
    """Say in one line what kept somebody's code from being imported, and where."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(
            f"{what}: cannot be imported: {blame(error)}; put it right, or leave it out"
        ) from error


def blame(error: BaseException) -> str:
    """What somebody's code raised, and in which line."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = ""
    if isinstance(error, SyntaxError) or trace is None:
        trace = None
    elif not trace.tb_frame.f_code.co_filename.startswith("<frozen"):
        where = f" ({os.path.basename(trace.tb_frame.f_code.co_filename)}, line {trace.tb_lineno})"
    return f"{type(error).__name__}: {one_line(error)}{where}"
