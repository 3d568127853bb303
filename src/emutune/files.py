"""Writing files so that nothing is lost."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile

from emutune.errors import UsageError


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


def sync_directory(directory: Path) -> None:
    """Bring a directory's names to the medium; Windows, which opens no directory, does so by itself."""
    if os.name == "nt":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def saving(option: str, path: Path) -> Iterator[None]:
    """Say which option named what cannot be written, and what to do.

    Raises:
        UsageError: in place of an OSError.
    """
    try:
        yield
    except OSError as error:
        raise UsageError(f"{option} {path}: cannot be written: {error.strerror}; choose another") from error


def make_writable(option: str, directory: Path) -> None:
    """Make a directory, and write there and forget it: before long work, not after it.

    Args:
        option: that named the directory.
        directory: of what the work will write.

    Raises:
        UsageError: nothing can be written there.
    """
    with saving(option, directory):
        directory.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=directory):
            pass


def check_writable(option: str, path: Path | None) -> None:
    """Refuse a file that could not be written, before anything is computed for it.

    Args:
        option: that named the file.
        path: of the file, or None where it was not asked for.

    Raises:
        UsageError: it is a directory, or nothing can be written beside it.
    """
    if path is None:
        return
    if path.is_dir():
        raise UsageError(f"{option} {path}: is a directory; name a file in it")
    if not path.parent.exists():
        raise UsageError(f"{option} {path}: there is no directory {path.parent}; make it first")
    with saving(option, path), TemporaryFile(dir=path.parent):
        pass
