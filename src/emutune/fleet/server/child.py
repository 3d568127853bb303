"""Processes of the server's own that answer questions: JSON objects, one a line, each way.

A question holds all that its answer depends on, so that whichever process gets it comes to the same answer, and a
question over which a process died is asked again.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from emutune.errors import EmutuneError, FleetError
from emutune.fleet.disk import is_full, no_room

ATTEMPTS = 10
# An answer about a hundred thousand devices fits.
_LINE_LIMIT = 1 << 24


class Child:
    """One process, started for the first question, and again if it has died; asked one question at a time.

    Args:
        module: what it runs; its ``main`` calls ``answer_lines``.
        quiet: drop what it writes to standard error, which is the server's otherwise.
        arguments: more of them, for its ``main``.
    """

    def __init__(self, module: str, *, quiet: bool, arguments: Sequence[str] = ()) -> None:
        self._module, self._quiet, self._arguments = module, quiet, arguments
        self._process: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int | None:
        """Identifier of the process, if it runs."""
        alive = self._process is not None and self._process.returncode is None
        return self._process.pid if alive and self._process is not None else None

    async def ask(self, question: str, dying: str) -> dict[str, Any]:
        """The answer to a question, which a JSON object on one line is.

        Args:
            question: likewise.
            dying: says what died, and what may be done about it.

        Raises:
            FleetError: the answer is an error, or the process died over the question again and again.
        """
        for _ in range(ATTEMPTS):
            answer = await self._ask_once(question)
            if answer is not None:
                if answer.get("unexpected"):
                    # Who knows what it left behind.
                    await self.stop()
                return checked(answer)
        raise FleetError(dying)

    async def stop(self) -> None:
        """Kill the process, if it runs."""
        process, self._process = self._process, None
        if process is not None:
            # It may end between two looks at it.
            with suppress(ProcessLookupError):
                if process.returncode is None:
                    process.kill()
            await process.wait()

    async def _ask_once(self, question: str) -> dict[str, Any] | None:
        """None if the process died over it."""
        process = await self._running()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(question.encode() + b"\n")
            await process.stdin.drain()
            line = await process.stdout.readline()
            answer = json.loads(line)
            if not isinstance(answer, dict):
                raise ValueError("its answer is no JSON object")
            return answer
        # The last is what uvloop says of a pipe whose reader has just died.
        except (ConnectionError, ValueError, RuntimeError):
            await self.stop()
            return None
        except asyncio.CancelledError:
            # Its answer would otherwise be taken for the next question's.
            await self.stop()
            raise

    async def _running(self) -> asyncio.subprocess.Process:
        if self._process is None or self._process.returncode is not None:
            environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", self._module, str(os.getpid()), *self._arguments),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.DEVNULL if self._quiet else None,
                env=environment,
                limit=_LINE_LIMIT,
            )
        return self._process


def checked(answer: dict[str, Any]) -> dict[str, Any]:
    """An answer that is no error.

    Raises:
        FleetError: it is one; ``is_full`` tells whether only the disk had no room.
    """
    if answer.get("full"):
        raise FleetError(answer["error"]) from no_room()
    if "error" in answer:
        raise FleetError(answer["error"])
    return answer


# In the child


def answer_lines(answer: Callable[[str], dict[str, Any]]) -> None:
    """Answer the lines of standard input until it ends, or the server does, whose process is the argument."""
    # A server that was killed while this process still started is no longer its parent.
    server = int(sys.argv[1]) if len(sys.argv) > 1 else os.getppid()
    # Ctrl-C reaches all processes of a terminal; it is for the server to say when this one ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with, args=(server,), daemon=True).start()
    # Whatever a library prints is no answer.
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        said = faults_as_answers(partial(answer, line))
        print(json.dumps(said), file=answers, flush=True)


def errors_as_answers(function: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a function returns; an error that the user can put right becomes ``{"error": message}``.

    With ``"full": true`` the disk had no room, and the question may be asked again.
    """
    try:
        return function()
    except (EmutuneError, OSError) as error:
        full = is_full(error)
        if not (full or isinstance(error, EmutuneError)):
            raise
        return {"error": str(error), "full": full}


def faults_as_answers(function: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a function returns; whatever else it raises becomes ``{"error": message, "unexpected": true}``.

    The process should then answer no more.
    """
    try:
        return function()
    except BaseException as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}", "unexpected": True}


def _die_with(parent: int) -> None:
    """A server that is started again gives the work to another process; two must not write to one checkpoint."""
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)
