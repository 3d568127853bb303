"""Collect whole episodes with the current actors, for learning and for measuring them."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from emutune.learning.agents import Actors, case_logits, retention_means, wish_of
from emutune.learning.architectures import ARCHITECTURES, Inputs
from emutune.learning.configuration import NetworkKind
from emutune.step import Plan, Situation, possible_case, possible_plan, put_in_cache
from emutune.world import Carried, Episode, Outcome, World, nothing_carried, serve, situation_at
from emutune.world.dynamics import during
from emutune.world.features import task_features, with_carried

Steps = TypeVar("Steps")


class Noise(NamedTuple):
    """What makes actions random: logistic for the cases, normal for the retentions; zero is greedy."""

    case: Float[Array, "tasks episodes ues"]
    emulator: Float[Array, "tasks episodes ues"]


class Trajectory(NamedTuple):
    """Steps of complete episodes, time first; ``situation`` is at the gains that were charged."""

    inputs: Inputs
    at_server: Bool[Array, "tasks episodes ues"]
    unclipped: Float[Array, "tasks episodes ues"]
    outcome: Outcome
    situation: Situation


def draw_noise(key: Key[Array, ""], shape: tuple[int, int, int]) -> Noise:
    """Noise for exploring episodes."""
    case_key, emulator_key = jax.random.split(key)
    return Noise(jax.random.logistic(case_key, shape), jax.random.normal(emulator_key, shape))


def one_axis(steps: Steps) -> Steps:
    """Steps of a batch of episodes one after another: two leading axes made one."""
    flat: Steps = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), steps)
    return flat


def collect(world: World, kind: NetworkKind, actors: Actors, episodes: Episode, noise: Noise) -> Trajectory:
    """Act through a batch of episodes (leading axis: episodes).

    Only what depends on earlier actions runs step by step: what is carried, and the decisions. The features
    of the tasks before, and what every step charged after, are computed for all steps at once.
    """
    architecture, count = ARCHITECTURES[kind], episodes.complexity.shape[0]
    start = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (count, *leaf.shape)), nothing_carried(world))
    seen = jax.vmap(situation_at, (None, 0, None, 0))
    every = jnp.arange(world.tasks)
    situations = jax.vmap(lambda now: seen(world, episodes, now, start))(every)
    known, context = task_features(world, situations), architecture.context(world, situations)
    std = jnp.exp(actors.log_std)

    def decide(carried: Carried, now: tuple[Int[Array, ""], Array, Array, Noise]) -> tuple[Carried, Any]:
        step, known, context, noise = now
        situation = seen(world, episodes, step, carried)
        inputs = architecture.inputs(world, situation, with_carried(world, situation, known), context)
        wanted = case_logits(kind, actors, inputs) > noise.case
        at_server = possible_case(world.rules, situation, wanted)
        unclipped = retention_means(kind, actors, inputs, at_server) + std * noise.emulator
        plan = possible_plan(world.rules, situation, wish_of(kind, world, situation, at_server, unclipped))
        return _carried_on(world, episodes, step, situation, plan), (carried, inputs, unclipped, plan)

    _, (carried, inputs, unclipped, plan) = jax.lax.scan(decide, start, (every, known, context, noise))
    true = jax.vmap(lambda now, carried: _true(world, episodes, now, carried))(every, carried)
    _, outcome = jax.vmap(jax.vmap(serve, (None, 0, 0)), (None, 0, 0))(world, true, plan)
    return Trajectory(inputs, plan.at_server, unclipped, outcome, true)


def _carried_on(
    world: World, episodes: Episode, now: Int[Array, ""], situation: Situation, plan: Plan
) -> Carried:
    """What a step leaves; only where joules are missed for later must the step be served to know it."""
    if "budget" in world.rules.terms:
        true = jax.vmap(during, (0, None, 0))(episodes, now, situation)
        carried, _ = jax.vmap(serve, (None, 0, 0))(world, true, plan)
        return carried
    held, age = put_in_cache(world.rules, situation.held, situation.age, situation.family, plan.layers)
    return Carried(held, age, situation.spent_j)


def _true(world: World, episodes: Episode, now: Int[Array, ""], carried: Carried) -> Situation:
    known = jax.vmap(situation_at, (None, 0, None, 0))(world, episodes, now, carried)
    return jax.vmap(during, (0, None, 0))(episodes, now, known)
