"""A warm start: actors learn what a teacher does, and critics what comes of it, before they learn on their own.

First the teacher acts and the actors learn its decisions; then the actors act, and the teacher says what it would
have done where they came (dataset aggregation: Ross, Gordon, Bagnell 2011). Last the critics learn the returns of
the actors as they explore, since advantages of critics that know nothing would undo what was learned.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Key

from emutune.learning.agents import (
    Actors,
    Inputs,
    LearnedPolicy,
    case_logits,
    critic_value,
    decides_retention,
    from_retention,
    network_inputs,
    retention_means,
)
from emutune.learning.configuration import NetworkKind, TrainingConfig
from emutune.learning.hmppo import Critic, critic_plan
from emutune.learning.networks import Network
from emutune.learning.rollout import begin_together, one_axis
from emutune.learning.slices import SLICES, fixed_shares, slice_of
from emutune.learning.update import (
    TrainingState,
    explore,
    mean_of,
    returns_to_go,
    standardise_values,
)
from emutune.policies import Policy
from emutune.world import Action, Cache, Task, World, draw_batch, observe_task, serve

_ROUNDS = 3
# Decisions of single UEs in each round, in whole episodes.
_DECISIONS = 30_000
_FITS, _BATCH, _RATE = 1500, 256, 3e-3
_STREAM = 0x7EAC


class Lessons(NamedTuple):
    """States, and what the teacher does there."""

    inputs: Inputs
    at_server: Bool[Array, "states ues"]
    unclipped: Float[Array, "states ues"]


def imitate(config: TrainingConfig, world: World, state: TrainingState, teacher: Policy) -> TrainingState:
    """A training state whose actors do what the teacher does; a function of its arguments alone.

    Args:
        config: of the training that follows.
        world: where to learn.
        state: before training.
        teacher: what to imitate; for ``"sized"`` networks the arrays of one for each of ``fixed_shares``.
    """
    key = jax.random.fold_in(state.key, _STREAM)
    # As many in each slice, where there are any.
    episodes = max(1, _DECISIONS // (world.ues * world.tasks) // SLICES) * SLICES
    actors, lessons = state.parameters.actors, None
    for number in range(_ROUNDS):
        acts, fits = jax.random.split(jax.random.fold_in(key, number))
        actor = LearnedPolicy(config.network, actors)
        new = _attend(config, world, teacher, None if number == 0 else actor, acts, episodes)
        lessons = _added(lessons, new, number)
        actors = _fit_actors(config, actors, lessons, fits)
    return _fit_critics(config, world, state, actors, jax.random.fold_in(key, _ROUNDS), episodes)


def _added(lessons: Lessons | None, new: Lessons, number: int) -> Lessons:
    """All lessons so far; the first stand in for those to come, so that one program fits any round's."""
    if lessons is None:
        return jax.tree.map(lambda leaf: jnp.concatenate([leaf] * _ROUNDS), new)
    return jax.tree.map(
        lambda all_, part: all_.at[number * len(part) : (number + 1) * len(part)].set(part), lessons, new
    )


@partial(jax.jit, static_argnums=(0, 5))
def _attend(
    config: TrainingConfig,
    world: World,
    teacher: Policy,
    actor: Policy | None,
    key: Key[Array, ""],
    count: int,
) -> Lessons:
    """Episodes in which the teacher acts, or one who learns, and what the teacher would do."""

    def attend(world: World, teacher: Policy, key: Key[Array, ""]) -> Lessons:
        draws, decisions = jax.random.split(key)
        tasks, empty = begin_together(world, draw_batch(draws, world, count))

        def step(cached: Cache, now: tuple[Task, Array, Array]) -> tuple[Cache, Lessons]:
            task, number, key = now
            observation = jax.vmap(observe_task, (None, 0, 0, None))(world, cached, task, number)
            told = teacher.decide(world, observation, key)
            done = told if actor is None else actor.decide(world, observation, key)
            after, _ = jax.vmap(serve, (None, 0, 0, 0))(world, cached, task, Action(*done))
            inputs = network_inputs(config.network, world, observation)
            return after, Lessons(inputs, told.at_server, _beyond(from_retention(world, told.retention)))

        every = (tasks, jnp.arange(world.tasks), jax.random.split(decisions, world.tasks))
        _, lessons = jax.lax.scan(step, empty, every)
        return one_axis(lessons)

    if config.network != "sized":
        return attend(world, teacher, key)
    # A teacher for each slice, along its arrays' first axis.
    shares = fixed_shares(config, world)
    keys = jax.random.split(key, len(shares))
    return one_axis(
        jax.vmap(lambda share, *rest: attend(slice_of(world, share), *rest))(shares, teacher, keys)
    )


def _beyond(unclipped: Float[Array, "*batch ues"]) -> Float[Array, "*batch ues"]:
    """The same retentions, the extreme ones so far beyond the bounds that exploring does not leave them."""
    return jnp.where(jnp.abs(unclipped) >= 1 - 1e-4, 1.3 * unclipped, unclipped)


@partial(jax.jit, static_argnums=0)
def _fit_actors(config: TrainingConfig, actors: Actors, lessons: Lessons, key: Key[Array, ""]) -> Actors:
    def loss(networks: tuple[Network, Network], batch: Lessons) -> Float[Array, ""]:
        pupil = Actors(*networks, actors.log_std)
        inputs, at_server = batch.inputs, batch.at_server
        logits = case_logits(config.network, pupil, inputs)
        surprise = jax.nn.softplus(jnp.where(at_server, -logits, logits))
        means = retention_means(config.network, pupil, inputs, at_server)
        chosen = decides_retention(config.network, inputs, at_server)
        wrong = surprise.mean() if inputs.chooses is None else mean_of(surprise, inputs.chooses)
        return wrong + mean_of((means - batch.unclipped) ** 2, chosen)

    case, emulator = _descend(loss, (actors.case, actors.emulator), lessons, key)
    return Actors(case, emulator, actors.log_std)


@partial(jax.jit, static_argnums=(0, 5))
def _fit_critics(
    config: TrainingConfig,
    world: World,
    state: TrainingState,
    actors: Actors,
    key: Key[Array, ""],
    count: int,
) -> TrainingState:
    """The state with these actors, and critics that know what they reach as they explore."""
    draws, noise, fits = jax.random.split(key, 3)
    episodes = draw_batch(draws, world, count)
    trajectory, rewards = explore(config, world, episodes, noise, actors)
    state = standardise_values(config, state, rewards)
    critics = []
    for critic, network, reward, centre, scale in zip(
        critic_plan(config).critics,
        state.parameters.critics,
        rewards,
        state.value_centre,
        state.value_scale,
        strict=True,
    ):
        target = (returns_to_go(config, reward) - centre) / scale
        flat = one_axis((trajectory.inputs, trajectory.at_server, target))
        loss = partial(_value_loss, config.network, critic)
        critics.append(_descend(loss, network, flat, fits))
    return state._replace(parameters=state.parameters._replace(actors=actors, critics=critics))


def _value_loss(kind: NetworkKind, critic: Critic, network: Network, batch: Any) -> Float[Array, ""]:
    inputs, at_server, target = batch
    view, marginal = critic.view(inputs, at_server), critic.credit == "marginal"
    return jnp.mean((critic_value(kind, network, view, inputs, marginal=marginal) - target) ** 2)


def _descend(loss: Callable[..., Array], start: Any, samples: Any, key: Key[Array, ""]) -> Any:
    """Adam on random batches; the step falls to zero."""
    optimiser = optax.adam(optax.linear_schedule(_RATE, 0.0, _FITS))
    count = jax.tree.leaves(samples)[0].shape[0]

    def step(carry: Any, chosen: Int[Array, "batch"]) -> Any:
        networks, memory = carry
        slope = jax.grad(loss)(networks, jax.tree.map(lambda leaf: leaf[chosen], samples))
        change, memory = optimiser.update(slope, memory)
        return (optax.apply_updates(networks, change), memory), None

    batches = jax.random.randint(key, (_FITS, min(_BATCH, count)), 0, count)
    (networks, _), _ = jax.lax.scan(step, (start, optimiser.init(start)), batches)
    return networks


# What is compiled anew for every scenario and configuration.
PROGRAMS = (_attend, _fit_actors, _fit_critics)
