"""English text that every Python installation carries: the documentation of Python itself."""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from emutune.errors import DataError

# Packages whose text is kept from the reference model, so that each is a downstream task.
TASKS = ("asyncio", "email", "http", "unittest", "xml")
_LEFT_OUT = {
    *("site-packages", "dist-packages", "test", "tests"),
    *("idlelib", "lib2to3", "turtledemo", "ensurepip", "pydoc_data"),
}


def task_text(task: str) -> str:
    """The docstrings of one held-out package of the standard library.

    Raises:
        DataError: there is no such task, or the installation lacks the package's sources.
    """
    if task not in TASKS:
        raise DataError(f"task {task!r}: there is none of that name; the tasks are {', '.join(TASKS)}")
    text = "\n\n".join(_docstrings(_library() / task))
    if not text:
        raise DataError(f"task {task!r}: this Python has no sources of that package; use a full installation")
    return text


def reference_text() -> str:
    """What the reference model learns from: the language reference and all other packages' docstrings."""
    from pydoc_data.topics import topics

    root = _library()
    entries = sorted(
        path
        for path in root.iterdir()
        if path.name not in (*_LEFT_OUT, *TASKS) and not path.name.startswith("config-")
    )
    return "\n\n".join(
        [*(topics[key] for key in sorted(topics)), *(d for e in entries for d in _docstrings(e))]
    )


def _library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _docstrings(entry: Path) -> Iterator[str]:
    files = sorted(entry.rglob("*.py")) if entry.is_dir() else [entry] if entry.suffix == ".py" else []
    for path in files:
        if _LEFT_OUT.intersection(path.relative_to(entry).parts):
            continue
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                docstring = ast.get_docstring(node)
                if docstring:
                    yield docstring
