"""Train one seed or many, with metrics, checkpoints and exact resumption."""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax

from emutune.errors import CheckpointError
from emutune.files import replacing
from emutune.learning.checkpoint import CheckpointHeader, load_checkpoint, read_header, save_checkpoint
from emutune.learning.configuration import Settings
from emutune.learning.learner import Learner
from emutune.learning.learners import LEARNERS, find_learner
from emutune.policies import Policy
from emutune.scenario import Scenario

Progress = Callable[[int], None]


def learner_of(header: CheckpointHeader) -> Learner[Any]:
    """What learns in a scenario, as a configuration says, from a seed."""
    return find_learner(header.config.algorithm)(*header)


def train_seed(
    scenario: Scenario,
    config: Settings,
    seed: int,
    directory: str | Path,
    *,
    teacher: Policy | None = None,
    progress: Progress | None = None,
    device: jax.Device | None = None,
) -> Policy:
    """Train one seed, resuming from its checkpoint if there is one.

    Writes ``metrics.jsonl`` and ``checkpoint.safetensors`` into ``directory``. Killed at any point and
    started again, it ends with the same bits as if it had never been interrupted.

    Args:
        scenario: the world to learn in.
        config: hyperparameters.
        seed: seed of networks and episodes.
        directory: where this seed's files go.
        teacher: what the actors imitate before they learn on their own, or the lookahead that is corrected; as
            ``config.teacher`` names it.
        progress: called with the number of environment steps just finished.
        device: where to compute; JAX's default if not given.

    Raises:
        CheckpointError: the directory holds a checkpoint of something else, or cannot be written.
    """
    _make_room(scenario, config)
    with jax.default_device(device):
        header = CheckpointHeader(scenario, config, seed)
        return _train(header, Path(directory), teacher, progress or (lambda steps: None))


def train_seeds(
    scenario: Scenario,
    config: Settings,
    seeds: Sequence[int],
    directory: str | Path,
    *,
    teacher: Policy | None = None,
    progress: Progress | None = None,
) -> list[Policy]:
    """Train several seeds, one at a time on each of JAX's devices; see ``train_seed``.

    A seed's result does not depend on which other seeds run beside it. Interrupted, all of them stop
    after their next checkpoint.
    """
    interrupted = threading.Event()

    def advance(steps: int) -> None:
        if interrupted.is_set():
            raise CancelledError
        if progress:
            progress(steps)

    devices: queue.SimpleQueue[jax.Device] = queue.SimpleQueue()
    for device in jax.devices():
        devices.put(device)

    def run(seed: int) -> Policy:
        device = devices.get()
        try:
            return train_seed(
                scenario,
                config,
                seed,
                seed_directory(directory, seed),
                teacher=teacher,
                progress=advance,
                device=device,
            )
        finally:
            devices.put(device)

    workers = min(len(jax.devices()), len(seeds))
    executor = ThreadPoolExecutor(workers)
    try:
        return list(executor.map(run, seeds))
    except BaseException:
        interrupted.set()
        raise
    finally:
        executor.shutdown(cancel_futures=True)


def seed_directory(directory: str | Path, seed: int) -> Path:
    """Where the files of one seed of a run are."""
    return Path(directory) / f"seed-{seed:03d}"


def load_policy(checkpoint: str | Path) -> tuple[Policy, CheckpointHeader]:
    """The greedy policy of a checkpoint, and what it was trained for.

    Raises:
        CheckpointError: the file is missing, damaged or of another format version.
    """
    checkpoint = Path(checkpoint)
    header = read_header(checkpoint)
    learner = learner_of(header)
    return learner.policy(load_checkpoint(checkpoint, header, learner.template())), header


@lru_cache(maxsize=1)
def _make_room(scenario: Scenario, config: Settings) -> None:
    """Let go of the programs of the training before, if this is another one.

    Each training's are thousands of memory maps, of which a process on Linux has 65,530; a sweep that kept all of
    them would end after some twenty configurations in ``LLVM compilation error``.
    """
    for learner in (*LEARNERS.values(), find_learner(config.algorithm)):
        for program in learner.programs:
            program.clear_cache()


def _train(header: CheckpointHeader, directory: Path, teacher: Policy | None, progress: Progress) -> Policy:
    learner, checkpoint = learner_of(header), directory / "checkpoint.safetensors"
    _make_directory(directory)
    taken_up = checkpoint.exists()
    state = load_checkpoint(checkpoint, header, learner.template()) if taken_up else learner.start(teacher)
    metrics_file, done = directory / "metrics.jsonl", learner.done(state)
    _keep_lines(metrics_file, done)
    progress(done * learner.steps_each)
    while done < learner.length:
        state, records = learner.advance(state)
        _append(metrics_file, records)
        save_checkpoint(checkpoint, header, state)
        done += len(records)
        progress(len(records) * learner.steps_each)
    return learner.policy(state)


def _make_directory(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"--out {directory}: cannot be created ({error.strerror}); choose another directory"
        ) from error


def _append(path: Path, records: Iterable[dict[str, Any]]) -> None:
    with _writing(path), path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def _keep_lines(path: Path, count: int) -> None:
    """Drop metrics written after the checkpoint that training resumes from."""
    if not path.exists():
        return
    lines = path.read_text("utf-8").splitlines(keepends=True)
    if len(lines) > count:
        with _writing(path), replacing(path) as aside:
            aside.write_text("".join(lines[:count]), "utf-8")


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be written ({error.strerror}); free some space or choose another --out"
        ) from error
