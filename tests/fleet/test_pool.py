"""Who does the server's jobs: processes of this machine, and Ray where it is installed."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from directories import generated_text
from whole_fleet import catalogue_at

from emutune.errors import FleetError
from emutune.fleet.protocol import Training
from emutune.fleet.server.pool import Pool, open_pool
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


def test_ray_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(FleetError, match=r"emutune\[ray\]"):
        open_pool("ray", 1)
