"""Disks of a few megabytes, real ones, which can be filled."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

DISK_BYTES = 6_000_000
_BLOCK = 4096


@contextmanager
def small_disk(folder: Path, size: int = DISK_BYTES) -> Iterator[Path]:
    """A file system of so many bytes at a folder; what is already there moves onto it.

    Raises:
        PermissionError: only root may mount.
    """
    if os.geteuid() != 0:
        raise PermissionError("mounting a small disk needs root")
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder.with_name(folder.name + ".before")
    folder.rename(kept)
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=False
    )
    if mounted.returncode:
        folder.rmdir()
        kept.rename(folder)
        raise PermissionError("a small disk cannot be mounted here")
    subprocess.run(["cp", "-a", f"{kept}/.", str(folder)], check=True)
    try:
        yield folder
    finally:
        after = folder.with_name(folder.name + ".after")
        (folder / "ballast").unlink(missing_ok=True)
        subprocess.run(["cp", "-a", f"{folder}/.", str(after)], check=True)
        subprocess.run(["umount", "-l", str(folder)], check=True)
        subprocess.run(["rm", "-rf", str(kept)], check=True)
        folder.rmdir()
        after.rename(folder)


def fill(folder: Path, left: int) -> None:
    """Leave so many bytes free on a disk."""
    with (folder / "ballast").open("wb", buffering=0) as file, suppress(OSError):
        while (free := os.statvfs(folder).f_bavail * _BLOCK - left) > 0:
            file.write(bytes(min(free, 1 << 18)))
