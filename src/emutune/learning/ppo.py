"""HMPPO and IPPO as a learner: updates by the chunk, each chunk one compiled program."""

from __future__ import annotations

import time
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Int

from emutune.learning import imitation
from emutune.learning.agents import LearnedPolicy, create_actors
from emutune.learning.configuration import Settings, TrainingConfig
from emutune.learning.hmppo import critic_plan
from emutune.learning.imitation import imitate
from emutune.learning.learner import Record, wanted_teacher
from emutune.learning.update import (
    Metrics,
    Parameters,
    TrainingState,
    empty_metrics,
    make_optimiser,
    networks_of,
    train_update,
)
from emutune.policies import Policy
from emutune.scenario import Scenario
from emutune.world import World, build_world, draw_batch

# Updates between two checkpoints: a fraction of a second of work.
CHUNK = 50
# Far from the seeds 0, 1, ... of training.
_VALIDATION_KEY = 0x7A11DA7E


def initial_state(config: TrainingConfig, world: World, seed: int) -> TrainingState:
    """Networks, optimisers and random state before training; a function of its arguments alone."""
    generator = np.random.default_rng(seed)
    plan = critic_plan(config)
    parameters = Parameters(
        create_actors(generator, config, world),
        [critic.create(generator, config, world) for critic in plan.critics],
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
    config: TrainingConfig, world: World, state: TrainingState, count: Int[Array, ""], updates: Int[Array, ""]
) -> tuple[TrainingState, Metrics]:
    """Run ``count`` of in all ``updates`` updates in one program; rows past ``count`` stay zero."""
    rows = empty_metrics(CHUNK)
    held_out = draw_batch(jax.random.key(_VALIDATION_KEY), world, config.evaluation_episodes)

    def body(index: Array, carry: tuple[TrainingState, Metrics]) -> tuple[TrainingState, Metrics]:
        state, rows = carry
        state, metrics = train_update(config, world, held_out, state, updates)
        return state, jax.tree.map(lambda all_, one: all_.at[index].set(one), rows, metrics)

    # A traced trip count: the last, shorter chunk needs no second compilation.
    return jax.lax.fori_loop(0, count, body, (state, rows))


class PolicyLearner:
    """``Learner`` of both agents' networks."""

    settings: ClassVar[type[Settings]] = TrainingConfig
    programs: ClassVar[tuple[Any, ...]] = (run_updates, *imitation.PROGRAMS)

    def __init__(self, scenario: Scenario, config: TrainingConfig, seed: int) -> None:
        self._config, self._seed, self._world = config, seed, build_world(scenario)
        self.length = config.updates(self._world.tasks)
        self.steps_each = config.environments * self._world.tasks

    def template(self) -> TrainingState:
        """See ``Learner``."""
        return initial_state(self._config, self._world, self._seed)

    def start(self, teacher: Policy | None) -> TrainingState:
        """See ``Learner``."""
        state = self.template()
        if self._config.teacher == "none":
            return state
        return imitate(self._config, self._world, state, wanted_teacher(self._config, teacher))

    def done(self, state: TrainingState) -> int:
        """See ``Learner``."""
        return int(state.update)

    def advance(self, state: TrainingState) -> tuple[TrainingState, list[Record]]:
        """See ``Learner``; figures are of the actors before each update."""
        started, done = time.perf_counter(), self.done(state)
        count = min(CHUNK, self.length - done)
        state, rows = run_updates(
            self._config, self._world, state, jnp.asarray(count), jnp.asarray(self.length)
        )
        rows = jax.device_get(rows)
        speed = count * self.steps_each / (time.perf_counter() - started)
        return state, [
            _record(rows, index, (done + index) * self.steps_each, speed) for index in range(count)
        ]

    def policy(self, state: TrainingState) -> LearnedPolicy:
        """See ``Learner``."""
        actors = jax.device_put(state.parameters.actors, jax.devices()[0])
        return LearnedPolicy(self._config.network, actors)


def _record(rows: Metrics, index: int, steps: int, speed: float) -> Record:
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
