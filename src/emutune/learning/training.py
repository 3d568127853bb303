"""Train one seed or many, with metrics, checkpoints and exact resumption."""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Int

from emutune.errors import CheckpointError, UsageError
from emutune.files import replacing
from emutune.learning import guided, imitation
from emutune.learning.agents import LearnedPolicy, create_actors, create_critic, input_count
from emutune.learning.checkpoint import CheckpointHeader, load_checkpoint, read_header, save_checkpoint
from emutune.learning.configuration import GuidedConfig, Settings, TrainingConfig, total_steps
from emutune.learning.guided import begin_learning, guided_template, next_round
from emutune.learning.hmppo import critic_plan
from emutune.learning.imitation import imitate
from emutune.learning.update import (
    Metrics,
    Parameters,
    TrainingState,
    empty_metrics,
    make_optimiser,
    networks_of,
    train_update,
)
from emutune.policies import Lookahead, Policy
from emutune.scenario import Scenario
from emutune.world import Episode, World, build_world, draw_batch

# Updates between two checkpoints: a fraction of a second of work.
CHUNK = 50
# Far from the seeds 0, 1, ... of training.
_VALIDATION_KEY = 0x7A11DA7E

Progress = Callable[[int], None]


def update_count(config: TrainingConfig, tasks: int) -> int:
    """Updates that make up at least the configured environment steps."""
    return total_steps(config, 1, tasks) // (config.environments * tasks)


def initial_state(config: TrainingConfig, world: World, seed: int) -> TrainingState:
    """Networks, optimisers and random state before training; a function of its arguments alone."""
    generator = np.random.default_rng(seed)
    plan = critic_plan(config)
    parameters = Parameters(
        create_actors(generator, config, world),
        [
            create_critic(
                generator,
                config,
                world.ues,
                input_count(config.network, world) + critic.more_features,
                marginal=critic.credit == "marginal",
            )
            for critic in plan.critics
        ],
    )
    optimiser = make_optimiser(config)
    return TrainingState(
        parameters=parameters,
        optimiser=[optimiser.init(ravel_pytree(network)[0]) for network in networks_of(parameters)],
        key=jax.random.key(seed),
        update=jnp.zeros((), jnp.int32),
        value_centre=jnp.zeros(len(plan.critics)),
        value_scale=jnp.ones(len(plan.critics)),
    )


@partial(jax.jit, static_argnums=0)
def run_updates(
    config: TrainingConfig,
    world: World,
    state: TrainingState,
    count: Int[Array, ""],
    updates: Int[Array, ""],
) -> tuple[TrainingState, Metrics]:
    """Run ``count`` of in all ``updates`` updates in one program; rows past ``count`` stay zero."""
    rows = empty_metrics(CHUNK)
    held_out = _validation_episodes(world, config.evaluation_episodes)

    def body(index: Array, carry: tuple[TrainingState, Metrics]) -> tuple[TrainingState, Metrics]:
        state, rows = carry
        state, metrics = train_update(config, world, held_out, state, updates)
        return state, jax.tree.map(lambda all_, one: all_.at[index].set(one), rows, metrics)

    # A traced trip count: the last, shorter chunk needs no second compilation.
    return jax.lax.fori_loop(0, count, body, (state, rows))


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
        where, told = Path(directory), progress or (lambda steps: None)
        if isinstance(config, GuidedConfig):
            return _train_guided(scenario, config, seed, where, teacher, told)
        return _train(scenario, config, seed, where, teacher, told)


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
    if isinstance(header.config, GuidedConfig):
        return load_checkpoint(
            checkpoint, header, guided_template(header.scenario, header.config)
        ).best, header
    template = initial_state(header.config, build_world(header.scenario), header.seed)
    state = load_checkpoint(checkpoint, header, template)
    return LearnedPolicy(header.config.network, state.parameters.actors), header


@lru_cache(maxsize=1)
def _make_room(scenario: Scenario, config: Settings) -> None:
    """Let go of the programs of the training before, if this is another one.

    Each training's are thousands of memory maps, of which a process on Linux has 65,530; a sweep that kept all of
    them would end after some twenty configurations in ``LLVM compilation error``.
    """
    programs: tuple[Any, ...] = (run_updates, *imitation.PROGRAMS, *guided.PROGRAMS)
    for program in programs:
        program.clear_cache()


def _train(
    scenario: Scenario,
    config: TrainingConfig,
    seed: int,
    directory: Path,
    teacher: Policy | None,
    progress: Progress,
) -> LearnedPolicy:
    world = build_world(scenario)
    updates, per_update = update_count(config, world.tasks), config.environments * world.tasks
    header, checkpoint = CheckpointHeader(scenario, config, seed), directory / "checkpoint.safetensors"
    state = initial_state(config, world, seed)
    _make_directory(directory)
    if checkpoint.exists():
        state = load_checkpoint(checkpoint, header, state)
    elif config.teacher != "none":
        state = imitate(config, world, state, _wanted(config, teacher))
    done = int(state.update)
    metrics_file = directory / "metrics.jsonl"
    _keep_lines(metrics_file, done)
    progress(done * per_update)
    while done < updates:
        started, count = time.perf_counter(), min(CHUNK, updates - done)
        state, rows = run_updates(config, world, state, jnp.asarray(count), jnp.asarray(updates))
        rows = jax.device_get(rows)
        speed = count * per_update / (time.perf_counter() - started)
        _append(
            metrics_file, (_record(rows, index, (done + index) * per_update, speed) for index in range(count))
        )
        save_checkpoint(checkpoint, header, state)
        done += count
        progress(count * per_update)
    return LearnedPolicy(config.network, jax.device_put(state.parameters.actors, jax.devices()[0]))


def _train_guided(
    scenario: Scenario,
    config: GuidedConfig,
    seed: int,
    directory: Path,
    teacher: Policy | None,
    progress: Progress,
) -> Policy:
    """As ``_train``; a checkpoint after every round, and no metrics but what it returned on validation episodes."""
    world, checkpoint = build_world(scenario), directory / "checkpoint.safetensors"
    header = CheckpointHeader(scenario, config, seed)
    per_round = total_steps(config, world.ues, world.tasks) // config.rounds
    _make_directory(directory)
    if checkpoint.exists():
        state = load_checkpoint(checkpoint, header, guided_template(scenario, config))
    else:
        base = _wanted(config, teacher)
        if not isinstance(base, Lookahead):
            raise UsageError(f"teacher: guided lookahead corrects a lookahead, got a {type(base).__name__}")
        state = begin_learning(base, world, config, seed)
    metrics_file = directory / "metrics.jsonl"
    done = int(state.round)
    _keep_lines(metrics_file, done)
    progress(done * per_round)
    while done < config.rounds:
        state = next_round(config, world, state, seed)
        done += 1
        record = {"steps": done * per_round, "validation_return": float(state.best_return)}
        _append(metrics_file, [{**record, "share": float(state.best.share)}])
        save_checkpoint(checkpoint, header, state)
        progress(per_round)
    return jax.device_put(state.best, jax.devices()[0])


def _wanted(config: Settings, teacher: Policy | None) -> Policy:
    if teacher is None:
        raise UsageError(
            f"teacher: the configuration names {config.teacher}; pass that policy, or use 'none'"
        )
    return teacher


def _validation_episodes(world: World, count: int) -> Episode:
    return draw_batch(jax.random.key(_VALIDATION_KEY), world, count)


def _record(rows: Metrics, index: int, steps: int, speed: float) -> dict[str, Any]:
    """One line of ``metrics.jsonl``: figures of the actors after ``steps`` environment steps."""

    def figures(part: Any) -> dict[str, float]:
        return {name: float(column[index]) for name, column in part._asdict().items()}

    return {
        "steps": steps,
        "training": figures(rows.training),
        "evaluation": figures(rows.evaluation),
        **figures(rows.diagnostics),
        "steps_per_s": speed,
    }


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
