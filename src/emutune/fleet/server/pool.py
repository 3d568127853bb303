"""Who does the server's jobs: worker processes of this machine, or a Ray cluster."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from contextlib import suppress
from typing import Any, Protocol

from emutune.errors import FleetError
from emutune.fleet.disk import no_room
from emutune.fleet.server.worker import JudgeJob, TrainJob

_ATTEMPTS = 10
_LINE_LIMIT = 1 << 20


class Pool(Protocol):
    """Does jobs, each until it is done."""

    async def run(self, job: TrainJob | JudgeJob) -> dict[str, Any]:
        """Outcome of a job.

        Raises:
            FleetError: the job itself is at fault, or its process died again and again.
        """
        ...

    async def close(self) -> None:
        """Let go of the workers; jobs that run are given up."""
        ...


class ProcessPool:
    """Worker processes that live from job to job; one that dies is replaced, and its job done again."""

    def __init__(self, workers: int) -> None:
        self._free: asyncio.Queue[_Worker] = asyncio.Queue()
        self._workers = [_Worker() for _ in range(workers)]
        for worker in self._workers:
            self._free.put_nowait(worker)

    @property
    def processes(self) -> list[int]:
        """Identifiers of the processes that run."""
        return [worker.pid for worker in self._workers if worker.pid is not None]

    async def run(self, job: TrainJob | JudgeJob) -> dict[str, Any]:
        """See ``Pool.run``."""
        worker = await self._free.get()
        try:
            for _ in range(_ATTEMPTS):
                outcome = await worker.do(job.model_dump_json())
                if outcome is not None:
                    return checked(outcome)
        finally:
            self._free.put_nowait(worker)
        raise FleetError(
            f"{job.kind}: its worker died {_ATTEMPTS} times; look for lack of memory, or lower at_server.workers"
        )

    async def close(self) -> None:
        """See ``Pool.close``."""
        for worker in self._workers:
            await worker.stop()


class _Worker:
    def __init__(self) -> None:
        self._process: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int | None:
        alive = self._process is not None and self._process.returncode is None
        return self._process.pid if alive and self._process is not None else None

    async def do(self, job: str) -> dict[str, Any] | None:
        """Outcome of a job; None if the process died over it."""
        process = await self._running()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(job.encode() + b"\n")
            await process.stdin.drain()
            line = await process.stdout.readline()
            outcome: dict[str, Any] = json.loads(line)
            return outcome
        except (ConnectionError, ValueError):
            await self.stop()
            return None
        except asyncio.CancelledError:
            # Its answer would otherwise be taken for the next job's.
            await self.stop()
            raise

    async def _running(self) -> asyncio.subprocess.Process:
        if self._process is None or self._process.returncode is not None:
            environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "emutune.fleet.server.worker", str(os.getpid())),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.DEVNULL,
                env=environment,
                limit=_LINE_LIMIT,
            )
        return self._process

    async def stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            # It may end between two looks at it.
            with suppress(ProcessLookupError):
                if process.returncode is None:
                    process.kill()
            await process.wait()


class RayPool:
    """Jobs on a Ray cluster, whose machines see the server's files under the same paths."""

    def __init__(self, workers: int) -> None:
        try:
            import ray
        except ImportError as error:
            raise FleetError(
                'at_server.pool: "ray" needs Ray; pip install \'emutune[ray]\', or choose "processes"'
            ) from error
        from emutune.fleet.server.worker import outcome_of

        if not ray.is_initialized():
            ray.init(address=os.environ.get("RAY_ADDRESS"), log_to_driver=False)
        self._task = ray.remote(max_retries=_ATTEMPTS)(outcome_of)
        self._turns = asyncio.Semaphore(workers)

    async def run(self, job: TrainJob | JudgeJob) -> dict[str, Any]:
        """See ``Pool.run``."""
        async with self._turns:
            outcome: dict[str, Any] = await self._task.remote(job.model_dump_json())
        return checked(outcome)

    async def close(self) -> None:
        """See ``Pool.close``; the cluster goes on."""


def checked(outcome: dict[str, Any]) -> dict[str, Any]:
    """An outcome that is no error.

    Raises:
        FleetError: it is one; ``is_full`` tells whether only the disk had no room.
    """
    if outcome.get("full"):
        raise FleetError(outcome["error"]) from no_room()
    if "error" in outcome:
        raise FleetError(outcome["error"])
    return outcome


def open_pool(kind: str, workers: int) -> Pool:
    """The pool that a fleet's file asks for.

    Raises:
        FleetError: Ray is not installed.
    """
    return RayPool(workers) if kind == "ray" else ProcessPool(workers)
