"""Processes of the command that start warm: forked from one that has imported what is slow to import.

What runs is the command itself, in a process of its own that a kill -9 ends like any other; only its first seconds,
in which nothing but imports happens, are left out. ``python warm_start.py`` is the process that forks.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

_READY = "ready"
_CHILDREN = ("emutune.fleet.server.worker", "emutune.fleet.server.deciding")


class WarmStart:
    """Starts commands; one process that is forked again and again.

    Args:
        cache: of compiled JAX programmes, which are the same in every run.
    """

    def __init__(self, cache: Path) -> None:
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        self._forking = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        self._changed = threading.Condition()
        self._started: list[int] = []
        self._ended: dict[int, int] = {}
        self._asked = 0
        assert self._forking.stdout is not None
        assert self._forking.stdout.readline().strip() == _READY
        self._reading = threading.Thread(target=self._read, daemon=True)
        self._reading.start()

    def start(self, arguments: Sequence[str], log: Path) -> WarmProcess:
        """Start ``emutune`` with arguments; what it says goes to a file."""
        log.parent.mkdir(parents=True, exist_ok=True)
        assert self._forking.stdin is not None
        with self._changed:
            place = self._asked
            self._asked += 1
            self._forking.stdin.write(json.dumps({"arguments": list(arguments), "log": str(log)}) + "\n")
            self._forking.stdin.flush()
            assert self._changed.wait_for(lambda: len(self._started) > place, 30)
            return WarmProcess(self, self._started[place])

    def close(self) -> None:
        """End the process that forks; those that it forked go on."""
        assert self._forking.stdin is not None
        self._forking.stdin.close()
        self._forking.wait(30)
        self._reading.join(30)
        assert self._forking.stdout is not None
        self._forking.stdout.close()

    def status(self, process: int, timeout: float | None = 0.0) -> int | None:
        """How a process ended; None if it has not within some time."""
        with self._changed:
            self._changed.wait_for(lambda: process in self._ended, timeout)
            return self._ended.get(process)

    def _read(self) -> None:
        assert self._forking.stdout is not None
        for line in self._forking.stdout:
            what, *numbers = line.split()
            with self._changed:
                if what == "started":
                    self._started.append(int(numbers[0]))
                else:
                    self._ended[int(numbers[0])] = int(numbers[1])
                self._changed.notify_all()


class WarmProcess:
    """One process, with those methods of ``subprocess.Popen`` that a fleet needs."""

    def __init__(self, starter: WarmStart, pid: int) -> None:
        self._starter, self.pid = starter, pid

    def poll(self) -> int | None:
        """See ``subprocess.Popen``."""
        return self._starter.status(self.pid)

    def wait(self, timeout: float | None = None) -> int:
        """See ``subprocess.Popen``."""
        status = self._starter.status(self.pid, timeout)
        if status is None:
            raise subprocess.TimeoutExpired("emutune", timeout or 0.0)
        return status

    def kill(self) -> None:
        """Kill -9."""
        if self.poll() is None:
            os.kill(self.pid, 9)


def _import() -> None:
    import fastapi
    import httpx2
    import jax
    import peft
    import torch
    import transformers.models.gpt2.modeling_gpt2
    import uvicorn

    import emutune.cli.main
    import emutune.fleet.device.work
    import emutune.fleet.server.decide
    import emutune.tuning.tuner

    del fastapi, httpx2, jax, peft, torch, transformers, uvicorn, emutune


def _forks() -> None:
    """Fork for every line of standard input, and tell what became of those that were forked."""
    _import()
    telling = threading.Lock()

    def tell(line: str) -> None:
        with telling:
            sys.__stdout__.write(line + "\n")  # type: ignore[union-attr]
            sys.__stdout__.flush()  # type: ignore[union-attr]

    def reap() -> None:
        while True:
            try:
                process, status = os.wait()
            except ChildProcessError:
                time.sleep(0.01)
                continue
            tell(f"ended {process} {os.waitstatus_to_exitcode(status)}")

    tell(_READY)
    reading = threading.Thread(target=reap, daemon=True)
    for line in sys.stdin:
        asked = json.loads(line)
        process = os.fork()
        if process == 0:
            _become(asked["arguments"], asked["log"])
        tell(f"started {process}")
        if not reading.is_alive():
            reading.start()


def _become(arguments: list[str], log: str) -> None:
    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.closerange(3, 256)
        _fork_children()
        sys.argv = ["emutune", *arguments]
        from emutune.cli.main import run

        run()
    except SystemExit as error:
        sys.stdout.flush()
        os._exit(error.code if isinstance(error.code, int) else 1)
    except BaseException:
        import traceback

        traceback.print_exc()
    os._exit(1)


def _fork_children() -> None:
    """Let the server's children be forked from it where they would be executed; all else about them is the same."""
    import asyncio

    execute = asyncio.create_subprocess_exec

    async def create(*words: str, **options: Any) -> Any:
        for module in _CHILDREN:
            if module in words:
                return await _Forked.start([*words[words.index(module) :]], options["limit"])
        return await execute(*words, **options)

    asyncio.create_subprocess_exec = create  # type: ignore[assignment]


class _Forked:
    """A forked child, with what the server needs of ``asyncio.subprocess.Process``."""

    def __init__(self, pid: int, stdin: Any, stdout: Any) -> None:
        import asyncio

        self.pid, self.stdin, self.stdout = pid, stdin, stdout
        self.returncode: int | None = None
        self._ending = asyncio.ensure_future(asyncio.to_thread(os.waitpid, pid, 0))
        self._ending.add_done_callback(self._ended)

    @classmethod
    async def start(cls, words: list[str], limit: int) -> _Forked:
        import asyncio

        (theirs, jobs), (outcomes, answers) = os.pipe(), os.pipe()
        sys.stdout.flush()
        process = os.fork()
        if process == 0:
            _work(words, theirs, answers)
        os.close(theirs)
        os.close(answers)
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(limit)
        await loop.connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(outcomes, "rb", 0)
        )
        transport, protocol = await loop.connect_write_pipe(
            lambda: asyncio.streams.FlowControlMixin(loop),  # type: ignore[attr-defined]
            os.fdopen(jobs, "wb", 0),
        )
        return cls(process, asyncio.StreamWriter(transport, protocol, None, loop), reader)

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    async def wait(self) -> int:
        await self._ending
        self._ended(self._ending)
        return int(self.returncode or 0)

    def _ended(self, ending: Any) -> None:
        if self.returncode is None and not ending.cancelled():
            self.returncode = os.waitstatus_to_exitcode(ending.result()[1])
            self.stdin.transport.abort()


def _work(words: list[str], *streams: int) -> None:
    try:
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        for place, stream in enumerate(streams):
            os.dup2(stream, place)
        os.closerange(3, 256)
        sys.argv = words
        # Its command line is that of this file.
        Path("/proc/self/comm").write_text(words[0].rpartition(".")[2])
        importlib.import_module(words[0]).main()
    except BaseException:
        os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    _forks()
