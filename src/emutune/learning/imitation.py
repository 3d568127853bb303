"""A warm start: actors learn what a teacher does, and critics what comes of it, before they learn on their own.

First the teacher acts and the actors learn its decisions; then the actors act, and the teacher says what it would
have done where they came (dataset aggregation: Ross, Gordon, Bagnell 2011). Last the critics learn the returns of
the actors as they explore, since advantages of critics that know nothing would undo what was learned.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from emutune.learning.agents import Actors, LearnedPolicy, case_logits, from_retention, retention_means
from emutune.learning.architectures import ARCHITECTURES, Inputs
from emutune.learning.configuration import TrainingConfig
from emutune.learning.descent import descend
from emutune.learning.hmppo import Critic, critic_plan
from emutune.learning.networks import Network, PerUe
from emutune.learning.rollout import one_axis
from emutune.learning.slices import SLICES, fixed_shares, slice_of
from emutune.learning.update import TrainingState, explore, mean_of, returns_to_go, standardise_values
from emutune.policies import Policy, Step, play
from emutune.step import retention_of
from emutune.world import World, draw_batch

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

        def learn(step: Step) -> Lessons:
            known = step.known
            told = teacher.decide(world, known, decisions)
            wanted = retention_of(world.rules.models, known.family, told.layers)
            inputs = ARCHITECTURES[config.network].inputs(world, known)
            return Lessons(inputs, told.at_server, _beyond(from_retention(world, wanted)))

        episodes, acting = draw_batch(draws, world, count), teacher if actor is None else actor
        lessons = jax.vmap(lambda episode: play(world, acting, episode, decisions, learn), out_axes=1)(
            episodes
        )
        return one_axis(lessons)

    if config.network != "sized":
        return attend(world, teacher, key)
    # A teacher for each slice, along its arrays' first axis.
    shares = fixed_shares(config, world)
    keys = jax.random.split(key, len(shares))
    return one_axis(
        jax.vmap(lambda share, *rest: attend(slice_of(world, share), *rest))(shares, teacher, keys)
    )


def _beyond(unclipped: PerUe) -> PerUe:
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
        chosen = ARCHITECTURES[config.network].decides_retention(inputs, at_server)
        return mean_of(surprise, inputs.chooses) + mean_of((means - batch.unclipped) ** 2, chosen)

    start = (actors.case, actors.emulator)
    case, emulator = descend(loss, start, lessons, _batches(key, lessons), _RATE)
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
        loss = partial(_value_loss, config, critic)
        critics.append(descend(loss, network, flat, _batches(fits, flat), _RATE))
    return state._replace(parameters=state.parameters._replace(actors=actors, critics=critics))


def _value_loss(config: TrainingConfig, critic: Critic, network: Network, batch: Any) -> Float[Array, ""]:
    inputs, at_server, target = batch
    return jnp.mean((critic.value(config, network, inputs, at_server) - target) ** 2)


def _batches(key: Key[Array, ""], samples: Any) -> Int[Array, "steps batch"]:
    count = jax.tree.leaves(samples)[0].shape[0]
    return jax.random.randint(key, (_FITS, min(_BATCH, count)), 0, count)


# What is compiled anew for every scenario and configuration.
PROGRAMS = (_attend, _fit_actors, _fit_critics)
