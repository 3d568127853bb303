"""Writing files so that nothing is lost."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to, whose file takes the place of ``path`` once the block ends without an error.

    Whatever interrupts the writing, a full disk too, an earlier file of that name stays whole.
    """
    aside = path.with_name(path.name + ".partial")
    try:
        yield aside
        os.replace(aside, path)
    except BaseException:
        with suppress(OSError):
            aside.unlink()
        raise
