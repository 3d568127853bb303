"""Who does the server's jobs: processes of this machine, and Ray where it is installed."""

from __future__ import annotations

import ast
import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from directories import generated_text
from faulty_fleet import alive
from whole_fleet import catalogue_at

from emutune.errors import FleetError
from emutune.fleet.config import JobLimits
from emutune.fleet.protocol import Training
from emutune.fleet.server import pool as pool_module
from emutune.fleet.server.pool import Pool, ProcessPool, open_pool
from emutune.fleet.server.worker import JudgeJob, TrainJob, run_job
from emutune.tuning.catalogue import BASE


def jobs(folder: Path) -> tuple[TrainJob, JudgeJob]:
    catalogue, text = catalogue_at(folder), folder / "text.txt"
    text.write_text(generated_text(800, seed=4))
    out = folder / "work" / "adapter.safetensors"
    training = TrainJob(
        catalogue=catalogue.directory,
        emulator=BASE,
        text=text,
        start=None,
        out=out,
        work=out.parent,
        training=Training(steps=2, batch=2, block=16, width=2),
    )
    return training, JudgeJob(catalogue=catalogue.directory, text=text, block=16, adapters=(None, out))


async def outcomes(pool: Pool, folder: Path) -> list[float]:
    training, judging = jobs(folder)
    try:
        await pool.run(training)
        with pytest.raises(FleetError, match="no-such"):
            await pool.run(judging.model_copy(update={"text": folder / "no-such.txt"}))
        return (await pool.run(judging))["perplexity"]
    finally:
        await pool.close()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["processes", "ray"])
def test_jobs_come_to_what_they_come_to_here(tmp_path: Path, kind: str) -> None:
    if kind == "ray":
        pytest.importorskip("ray")
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    training, judging = jobs(tmp_path / "here")
    run_job(training)
    expected = run_job(judging)["perplexity"]
    assert asyncio.run(outcomes(open_pool(kind, 1), tmp_path / "there")) == pytest.approx(expected)


def doing(what: str) -> JudgeJob:
    return JudgeJob(catalogue=Path(what), text=None, block=16, adapters=())


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers without torch, which do as they are told."""
    monkeypatch.setattr(pool_module, "_WORKER", "answering")
    before = os.environ.get("PYTHONPATH")
    paths = [str(Path(__file__).parent), *([before] if before else [])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))


@pytest.mark.parametrize("stopped", [False, True])
def test_a_job_that_hangs_is_ended_and_the_next_one_is_done(answering: None, stopped: bool) -> None:
    async def steps() -> None:
        pool = ProcessPool(1)
        try:
            await pool.run(doing("say"))
            (first,) = pool.processes
            # Not before the worker has started, which takes long on a busy machine.
            pool._limits = JobLimits(judge_s=0.5)
            if stopped:
                os.kill(first, signal.SIGSTOP)
            with pytest.raises(FleetError, match=r"judge: was not done in 0.5 s.*jobs\.judge_s"):
                await pool.run(doing("say" if stopped else "hang"))
            assert not alive(first)
            pool._limits = JobLimits()
            assert (await pool.run(doing("say")))["by"] != first
        finally:
            await pool.close()

    asyncio.run(asyncio.wait_for(steps(), 60))


@pytest.mark.parametrize("what", ["look up", "leave", "allocate", "fail", "die"])
def test_whatever_a_worker_meets_is_its_jobs_failure(answering: None, what: str) -> None:
    async def steps() -> None:
        pool = ProcessPool(1)
        try:
            with pytest.raises(FleetError):
                await pool.run(doing(what))
            assert "by" in await pool.run(doing("say"))
        finally:
            await pool.close()

    asyncio.run(asyncio.wait_for(steps(), 60))


def test_limits_that_a_fleets_file_gives_or_the_machine_has() -> None:
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < pool_module.memory_bytes(JobLimits()) <= machine // 2
    assert pool_module.memory_bytes(JobLimits(memory_mb=1.5)) == 1_500_000


GREEDY = """
import sys
from emutune.fleet.server import worker
worker.run_job = lambda job: {"bytes": len(bytearray(400_000_000))}
job = worker.JudgeJob(catalogue="c", text=None, block=16, adapters=()).model_dump_json()
for most in (300_000_000, 0, 600_000_000):
    print(worker.outcome_of(job, most))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not keep the limit")
def test_a_job_that_wants_more_memory_than_it_may_have_fails_and_says_so() -> None:
    done = subprocess.run([sys.executable, "-c", GREEDY], capture_output=True, text=True, check=True)
    failed, *others = map(ast.literal_eval, done.stdout.splitlines())
    assert "MemoryError" in failed["error"]
    assert "may have 300 MB; raise jobs.memory_mb" in failed["error"]
    assert others == [{"bytes": 400_000_000}] * 2


def test_ray_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(FleetError, match=r"emutune\[ray\]"):
        open_pool("ray", 1)
