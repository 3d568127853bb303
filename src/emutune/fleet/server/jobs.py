"""Work beside the steps: each piece of it has a name and is done once; steps wait for some of it, and only a while."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from functools import partial
from typing import Any

from emutune.errors import EmutuneError, LedgerError
from emutune.fleet import disk

log = logging.getLogger("emutune.fleet")

Work = Callable[[], Coroutine[Any, Any, None]]
_LONGEST_REASON = 500


class Jobs:
    """What is under way; a full disk delays it, anything else that goes wrong ends it."""

    def __init__(self) -> None:
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._overdue: set[asyncio.Task[None]] = set()

    @property
    def running(self) -> list[asyncio.Task[None]]:
        """What is not done yet."""
        return list(self._tasks.values())

    def named(self, prefix: str) -> set[str]:
        """The rest of the names that begin so."""
        return {name.removeprefix(prefix) for name in self._tasks if name.startswith(prefix)}

    def start(self, name: str, work: Work, failed: Callable[[str], Awaitable[object]]) -> None:
        """Begin a piece of work unless it is under way; ``failed`` changes the ledger, and is told the reason."""
        if name not in self._tasks:
            task = self._tasks[name] = asyncio.create_task(_guarded(name, work, failed))
            task.add_done_callback(partial(self._forget, name))

    async def allow(self, names: Iterable[str], seconds: float) -> None:
        """Wait for some of it for a while, and not at all while something that was waited for is still not done.

        So whatever hangs delays one step by so many seconds, and no other.
        """
        self._overdue = {task for task in self._overdue if not task.done()}
        tasks = {self._tasks[name] for name in names if name in self._tasks}
        if tasks and not self._overdue:
            _, self._overdue = await asyncio.wait(tasks, timeout=seconds)
            if self._overdue:
                log.warning("judging takes longer than %g s; steps go on without it", seconds)

    def _forget(self, name: str, task: asyncio.Task[None]) -> None:
        del self._tasks[name]


async def noted(change: Callable[[], Awaitable[object]]) -> None:
    """Make a change of the ledger, as soon as the disk has room for it."""
    while True:
        try:
            await change()
            return
        except LedgerError as error:
            if not disk.is_full(error):
                raise
            log.error("%s", error)
        await asyncio.sleep(disk.LOOK_AGAIN_S)


async def _guarded(name: str, work: Work, failed: Callable[[str], Awaitable[object]]) -> None:
    while True:
        try:
            await work()
            return
        except Exception as error:
            known = isinstance(error, EmutuneError | OSError)
            log.error("%s: %s", name, error, exc_info=not known)
            if not disk.is_full(error):
                text = str(error) if known else f"{type(error).__name__}: {error}"
                break
        await asyncio.sleep(disk.LOOK_AGAIN_S)
    reason = " ".join(text.split())[:_LONGEST_REASON]
    # Whatever it was, the step must not wait for it.
    await noted(partial(failed, reason))
