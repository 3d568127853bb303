"""Who does the server's jobs: worker processes of this machine, or a Ray cluster."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from emutune.errors import FleetError
from emutune.extras import expect_extra
from emutune.fleet.config import JobLimits
from emutune.fleet.server.child import ATTEMPTS, Child, checked
from emutune.fleet.server.worker import JudgeJob, TrainJob

_WORKER = "emutune.fleet.server.worker"
_DEFAULT = JobLimits()
_CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")


class Pool(Protocol):
    """Does jobs, each until it is done."""

    async def run(self, job: TrainJob | JudgeJob) -> dict[str, Any]:
        """Outcome of a job.

        Raises:
            FleetError: the job itself is at fault, took more time or memory than it may, or its process died again and
                again.
        """
        ...

    async def close(self) -> None:
        """Let go of the workers; jobs that run are given up."""
        ...


class ProcessPool:
    """Worker processes that live from job to job; one that dies is replaced, and its job done again.

    Args:
        workers: how many.
        limits: of every job.
    """

    def __init__(self, workers: int, limits: JobLimits = _DEFAULT) -> None:
        self._limits = limits
        memory = str(memory_bytes(limits))
        self._free: asyncio.Queue[Child] = asyncio.Queue()
        self._workers = [Child(_WORKER, quiet=True, arguments=[memory]) for _ in range(workers)]
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
            async with _in_time(job, self._limits):
                return await worker.ask(
                    job.model_dump_json(),
                    f"{job.kind}: its worker died {ATTEMPTS} times; look for lack of memory, or lower "
                    "at_server.workers",
                )
        finally:
            self._free.put_nowait(worker)

    async def close(self) -> None:
        """See ``Pool.close``."""
        for worker in self._workers:
            await worker.stop()


class RayPool:
    """Jobs on a Ray cluster, whose machines see the server's files under the same paths; see ``ProcessPool``."""

    def __init__(self, workers: int, limits: JobLimits = _DEFAULT) -> None:
        expect_extra("ray", 'at_server.pool = "ray"', FleetError)
        import ray

        from emutune.fleet.server.worker import outcome_of

        if not ray.is_initialized():
            ray.init(address=os.environ.get("RAY_ADDRESS"), log_to_driver=False)
        self._ray, self._limits = ray, limits
        self._task = ray.remote(max_retries=ATTEMPTS)(outcome_of)
        self._turns = asyncio.Semaphore(workers)

    async def run(self, job: TrainJob | JudgeJob) -> dict[str, Any]:
        """See ``Pool.run``."""
        async with self._turns, _in_time(job, self._limits):
            answer = self._task.remote(job.model_dump_json(), memory_bytes(self._limits))
            try:
                outcome: dict[str, Any] = await answer
            except self._ray.exceptions.RayError as error:
                raise FleetError(f"{job.kind}: its Ray task failed: {error}") from error
            except asyncio.CancelledError:
                self._ray.cancel(answer, force=True)
                raise
        return checked(outcome)

    async def close(self) -> None:
        """See ``Pool.close``; the cluster goes on."""


@asynccontextmanager
async def _in_time(job: TrainJob | JudgeJob, limits: JobLimits) -> AsyncIterator[None]:
    """Cancel what takes a job longer than it may."""
    seconds = limits.train_s if job.kind == "train" else limits.judge_s
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError as error:
        raise FleetError(
            f"{job.kind}: was not done in {seconds:g} s, and was ended; raise jobs.{job.kind}_s in the fleet's file"
        ) from error


def memory_bytes(limits: JobLimits) -> int:
    """The most memory that a job may have; half of the machine's, or of the container's, where no limit is given.

    0 where the machine does not say how much it has.
    """
    if limits.memory_mb is not None:
        return int(limits.memory_mb * 1e6)
    with suppress(AttributeError, ValueError, OSError):  # Windows has no such question
        machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        with suppress(ValueError, OSError):
            machine = min(machine, int(_CONTAINER_LIMIT.read_text("ascii")))
        return machine // 2
    return 0


def open_pool(kind: str, workers: int, limits: JobLimits = _DEFAULT) -> Pool:
    """The pool that a fleet's file asks for.

    Raises:
        FleetError: Ray is not installed.
    """
    return RayPool(workers, limits) if kind == "ray" else ProcessPool(workers, limits)
