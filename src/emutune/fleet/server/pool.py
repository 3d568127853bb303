"""Who does the server's jobs: worker processes of this machine, or a Ray cluster."""

from __future__ import annotations

import asyncio
import os
from typing import Any, Protocol

from emutune.errors import FleetError
from emutune.extras import expect_extra
from emutune.fleet.server.child import ATTEMPTS, Child, checked
from emutune.fleet.server.worker import JudgeJob, TrainJob

_WORKER = "emutune.fleet.server.worker"


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
        self._free: asyncio.Queue[Child] = asyncio.Queue()
        self._workers = [Child(_WORKER, quiet=True) for _ in range(workers)]
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
            return await worker.ask(
                job.model_dump_json(),
                f"{job.kind}: its worker died {ATTEMPTS} times; look for lack of memory, or lower at_server.workers",
            )
        finally:
            self._free.put_nowait(worker)

    async def close(self) -> None:
        """See ``Pool.close``."""
        for worker in self._workers:
            await worker.stop()


class RayPool:
    """Jobs on a Ray cluster, whose machines see the server's files under the same paths."""

    def __init__(self, workers: int) -> None:
        expect_extra("ray", 'at_server.pool = "ray"', FleetError)
        import ray

        from emutune.fleet.server.worker import outcome_of

        if not ray.is_initialized():
            ray.init(address=os.environ.get("RAY_ADDRESS"), log_to_driver=False)
        self._task = ray.remote(max_retries=ATTEMPTS)(outcome_of)
        self._turns = asyncio.Semaphore(workers)

    async def run(self, job: TrainJob | JudgeJob) -> dict[str, Any]:
        """See ``Pool.run``."""
        async with self._turns:
            outcome: dict[str, Any] = await self._task.remote(job.model_dump_json())
        return checked(outcome)

    async def close(self) -> None:
        """See ``Pool.close``; the cluster goes on."""


def open_pool(kind: str, workers: int) -> Pool:
    """The pool that a fleet's file asks for.

    Raises:
        FleetError: Ray is not installed.
    """
    return RayPool(workers) if kind == "ray" else ProcessPool(workers)
