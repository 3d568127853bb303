"""Text that every Python installation carries: the documentation of Python itself, and its library's sources."""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from emutune.errors import DataError

# The models that emutune ships: what the first one learns from is English, what the second one does is code.
REFERENCE, REFERENCE_CODE = MODELS = "reference", "reference-code"
# Packages whose text is kept from the reference models, so that each is a downstream task.
TASKS = ("asyncio", "email", "http", "unittest", "xml")
_LEFT_OUT = {
    *("site-packages", "dist-packages", "test", "tests"),
    *("idlelib", "lib2to3", "turtledemo", "ensurepip", "pydoc_data"),
}


def task_text(task: str, model: str = REFERENCE) -> str:
    """One held-out package of the standard library: its docstrings, or for the model of code its sources.

    Raises:
        DataError: there is no such task, or the installation lacks the package's sources.
    """
    if task not in TASKS:
        raise DataError(f"task {task!r}: there is none of that name; the tasks are {', '.join(TASKS)}")
    text = "\n\n".join(_texts(_library() / task, model))
    if not text:
        raise DataError(f"task {task!r}: this Python has no sources of that package; use a full installation")
    return text


def reference_text(model: str = REFERENCE) -> str:
    """What a reference model learns from: the language reference and all other packages' docstrings, or the sources."""
    root = _library()
    entries = sorted(
        path
        for path in root.iterdir()
        if path.name not in (*_LEFT_OUT, *TASKS) and not path.name.startswith("config-")
    )
    texts = [text for entry in entries for text in _texts(entry, model)]
    if model == REFERENCE:
        from pydoc_data.topics import topics

        texts = [*(topics[key] for key in sorted(topics)), *texts]
    return "\n\n".join(texts)


def _library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _texts(entry: Path, model: str) -> Iterator[str]:
    """What a model reads of a module or a package."""
    files = sorted(entry.rglob("*.py")) if entry.is_dir() else [entry] if entry.suffix == ".py" else []
    for path in files:
        if not _LEFT_OUT.intersection(path.relative_to(entry).parts):
            yield from _docstrings(path) if model == REFERENCE else [path.read_text("utf-8").strip()]


def _docstrings(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring:
                yield docstring
