"""The ledger off the event loop: what waits is done in one transaction, and answered when that is on the disk."""

from __future__ import annotations

import asyncio
import os
import sqlite3
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from datetime import datetime
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, Concatenate, NamedTuple, ParamSpec, Protocol, Self, TypeVar

from emutune.errors import LedgerError
from emutune.fleet.database import utc_now
from emutune.fleet.ledger import Ledger

P = ParamSpec("P")
Answer = TypeVar("Answer")


class AskLedger(Protocol):
    """A ledger that is asked from an event loop; see ``LedgerThread``."""

    async def __call__(
        self, question: Callable[Concatenate[Ledger, P], Answer], /, *args: P.args, **named: P.kwargs
    ) -> Answer:
        """What a function of the ledger comes to; all that it changed is on the disk."""
        ...


class _Asked(NamedTuple):
    question: Callable[[Ledger], Any]
    answer: asyncio.Future[Any]


class _Outcome(NamedTuple):
    value: Any
    error: Exception | None


class LedgerThread:
    """A ledger in a thread of its own (group commit).

    A question is a function of the ledger that changes nothing else: it is asked again if what it was asked together
    with could not be done.

    Args:
        path: of the ledger; opened before this returns.
        now: see ``Ledger``.

    Raises:
        LedgerError: see ``Ledger``.
    """

    def __init__(self, path: str | os.PathLike[str], now: Callable[[], datetime] = utc_now) -> None:
        self.path = Path(path)
        self._waiting: SimpleQueue[_Asked | None] = SimpleQueue()
        self._closed = False
        opened: Future[None] = Future()
        self._thread = Thread(target=self._run, args=(now, opened), name="ledger", daemon=True)
        self._thread.start()
        opened.result()

    async def __call__(
        self, question: Callable[Concatenate[Ledger, P], Answer], /, *args: P.args, **named: P.kwargs
    ) -> Answer:
        """See ``AskLedger``.

        Raises:
            LedgerError: it cannot be read or written, or is closed.
        """
        if self._closed:
            raise LedgerError(f"{self.path}: is closed; open it again")
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting.put(_Asked(lambda ledger: question(ledger, *args, **named), answer))
        return await answer

    def close(self) -> None:
        """Answer what was asked, and close the file."""
        self._closed = True
        self._waiting.put(None)
        self._thread.join()

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    def _run(self, now: Callable[[], datetime], opened: Future[None]) -> None:
        try:
            ledger = Ledger(self.path, now)
        except BaseException as error:
            opened.set_exception(error)
            return
        opened.set_result(None)
        with ledger:
            while asked := self._next():
                _tell(asked, _outcomes(ledger, asked))

    def _next(self) -> list[_Asked]:
        """All that waits; nothing once it is to be closed."""
        first, asked = self._waiting.get(), []
        with suppress(Empty):
            while first is not None:
                asked.append(first)
                first = self._waiting.get_nowait()
            if asked:
                self._waiting.put(None)
        return asked


def _outcomes(ledger: Ledger, asked: list[_Asked]) -> list[_Outcome]:
    try:
        with ledger.together():
            return [_outcome(ledger, each, together=True) for each in asked]
    except LedgerError:
        # Each for itself, so that what cannot be done keeps nothing else from being done.
        return [_outcome(ledger, each, together=False) for each in asked]


def _outcome(ledger: Ledger, asked: _Asked, *, together: bool) -> _Outcome:
    try:
        return _Outcome(asked.question(ledger), None)
    except Exception as error:
        if together and isinstance(error.__cause__, sqlite3.Error):
            raise
        return _Outcome(None, error)


def _tell(asked: list[_Asked], outcomes: list[_Outcome]) -> None:
    """Wake who asked, all of an event loop at once."""
    told: dict[asyncio.AbstractEventLoop, list[Callable[[], None]]] = defaultdict(list)
    for each, outcome in zip(asked, outcomes, strict=True):
        told[each.answer.get_loop()].append(partial(_settle, each.answer, outcome))
    for loop, settle in told.items():
        # Of a loop that has ended nobody waits.
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(_call_all, settle)


def _call_all(functions: list[Callable[[], None]]) -> None:
    for function in functions:
        function()


def _settle(answer: asyncio.Future[Any], outcome: _Outcome) -> None:
    if answer.done():
        return
    if outcome.error is None:
        answer.set_result(outcome.value)
    else:
        answer.set_exception(outcome.error)
