"""What a device runs on: nothing that only POSIX has, on the device's side and in whatever it imports."""

from __future__ import annotations

import ast
import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import emutune
from emutune import files
from emutune.fleet.device.cache import Cache

SOURCE = Path(emutune.__file__).parent
POSIX_MODULES = {"crypt", "fcntl", "grp", "pty", "pwd", "resource", "syslog", "termios", "tty"}
POSIX_NAMES = {
    *(
        "fork",
        "forkpty",
        "sendfile",
        "pread",
        "pwrite",
        "readv",
        "writev",
        "getuid",
        "geteuid",
        "chown",
        "mkfifo",
    ),
    *("killpg", "setsid", "sched_getaffinity", "O_CLOEXEC", "O_DIRECTORY", "O_NOFOLLOW", "O_NONBLOCK"),
    *("add_signal_handler", "SIGKILL", "SIGHUP", "SIGUSR1", "SIGALRM", "setitimer", "AF_UNIX"),
}
# These run with the server, which is not for Windows.
OF_THE_SERVER = SOURCE / "fleet" / "server"
# Asks first whether there is one.
ASKED = {("cli/jax_setup.py", "sched_getaffinity")}


def trees() -> Iterator[tuple[Path, ast.Module]]:
    for path in sorted(SOURCE.rglob("*.py")):
        yield path, ast.parse(path.read_text("utf-8"))


def test_no_module_imports_what_only_posix_has() -> None:
    for path, tree in trees():
        # What the server imports when it runs is not imported where it is refused.
        for node in tree.body if OF_THE_SERVER in path.parents else ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not POSIX_MODULES & set(names), path


def test_only_the_server_uses_names_that_only_posix_has() -> None:
    found = {
        (path.relative_to(SOURCE).as_posix(), node.attr)
        for path, tree in trees()
        if OF_THE_SERVER not in path.parents
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr in POSIX_NAMES
    }
    assert found <= ASKED


def test_directories_that_cannot_be_opened_are_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = os.open

    def on_windows(path: Path, *how: int, **more: int) -> int:
        if Path(path).is_dir():
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *how, **more)

    monkeypatch.setattr(os, "open", on_windows)
    with pytest.raises(PermissionError):
        files.sync_directory(tmp_path)
    # Not for the whole of os, whose name says which paths there are.
    monkeypatch.setattr(files, "os", type("Windows", (), {"name": "nt", "open": on_windows}))
    files.sync_directory(tmp_path)


def test_a_cache_that_was_let_go_can_be_used_again(tmp_path: Path) -> None:
    async def use() -> None:
        for _ in range(2):
            async with Cache(tmp_path, 10**6):
                pass

    asyncio.run(use())
