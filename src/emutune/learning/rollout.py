"""Collect whole episodes with the current actors, for learning and for measuring them."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from emutune.learning.agents import (
    Actors,
    Inputs,
    case_logits,
    fleet_context,
    network_inputs,
    possible_cases,
    retention_means,
    wanted_retention,
)
from emutune.learning.configuration import NetworkKind
from emutune.world import (
    Action,
    Cache,
    Episode,
    Outcome,
    Task,
    World,
    all_tasks,
    cache_features,
    choose_layers,
    empty_cache,
    join_features,
    observe_task,
    serve,
    task_features,
    trains_locally,
    updated_cache,
    usable_layers,
)

Steps = TypeVar("Steps")


class Noise(NamedTuple):
    """What makes actions random: logistic for the cases, normal for the retentions; zero is greedy."""

    case: Float[Array, "tasks episodes ues"]
    emulator: Float[Array, "tasks episodes ues"]


class Trajectory(NamedTuple):
    """Steps of complete episodes, time first."""

    inputs: Inputs
    at_server: Bool[Array, "tasks episodes ues"]
    unclipped: Float[Array, "tasks episodes ues"]
    outcome: Outcome
    task: Task
    cache: Cache


def draw_noise(key: Key[Array, ""], shape: tuple[int, int, int]) -> Noise:
    """Noise for exploring episodes."""
    case_key, emulator_key = jax.random.split(key)
    return Noise(jax.random.logistic(case_key, shape), jax.random.normal(emulator_key, shape))


def begin_together(world: World, episodes: Episode) -> tuple[Task, Cache]:
    """A batch of episodes for ``jax.lax.scan``: all their tasks, time first, and the caches before the first."""
    count = episodes.complexity.shape[0]
    tasks = jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), jax.vmap(all_tasks)(episodes))
    empty = empty_cache(world)
    return tasks, jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (count, *leaf.shape)), empty)


def one_axis(steps: Steps) -> Steps:
    """Steps of a batch of episodes one after another: two leading axes made one."""
    flat: Steps = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), steps)
    return flat


def collect(world: World, kind: NetworkKind, actors: Actors, episodes: Episode, noise: Noise) -> Trajectory:
    """Act through a batch of episodes (leading axis: episodes).

    Only what depends on earlier actions runs step by step: the caches and the decisions. The features
    of the tasks before, and what every step charged after, are computed for all steps at once.
    """
    tasks, empty = begin_together(world, episodes)
    steps, count = jnp.arange(world.tasks), episodes.complexity.shape[0]
    observations = jax.vmap(observe_task, (None, None, 0, 0))(world, empty, tasks, steps)
    known = task_features(world, observations)
    context = fleet_context(kind, world, observations)[:, None]
    context = jnp.broadcast_to(context, (world.tasks, count, context.shape[-1]))
    std = jnp.exp(actors.log_std)

    def decide(cached: Cache, now: tuple[Array, Array, Noise, Task, Array]) -> tuple[Cache, tuple[Any, ...]]:
        known, context, noise, task, step = now
        observation = observe_task(world, cached, task, step)
        features = join_features(known, cache_features(world, observation))
        inputs = network_inputs(kind, world, observation, features, context)
        at_server = possible_cases(world, observation, case_logits(kind, actors, inputs) > noise.case)
        unclipped = retention_means(kind, actors, inputs, at_server) + std * noise.emulator
        usable = usable_layers(cached, task.family)
        wanted = wanted_retention(kind, world, unclipped, observation.cached_retention)
        if cached.spent_j is None:
            layers = choose_layers(world, wanted, usable, task.family, task.device)
            keeps = ~trains_locally(task.active, at_server)
            after = updated_cache(world, cached, task.family, layers, keeps)
        else:
            # What is spent depends on what all others do.
            after, _ = jax.vmap(serve, (None, 0, 0, 0))(world, cached, task, Action(at_server, wanted))
        return after, (cached, inputs, at_server, unclipped, wanted)

    every = (known, context, noise, tasks, steps)
    _, (cached, inputs, at_server, unclipped, wanted) = jax.lax.scan(decide, empty, every)
    action = Action(at_server, wanted)
    every_step = jax.vmap(jax.vmap(serve, (None, 0, 0, 0)), (None, 0, 0, 0))
    _, outcome = every_step(world, cached, tasks, action)
    return Trajectory(inputs, at_server, unclipped, outcome, tasks, cached)


class Summary(NamedTuple):
    """Means over a batch of complete episodes, in the units of the paper's figures."""

    episode_return: Float[Array, ""]
    delay_min: Float[Array, ""]
    perplexity: Float[Array, ""]
    changes_per_ue: Float[Array, ""]
    server_share: Float[Array, ""]


def summarise(trajectory: Trajectory) -> Summary:
    """Episodic return, total delay, mean perplexity, emulator changes and share at the server."""
    outcome, active = trajectory.outcome, trajectory.task.active
    # Over the tasks that there are.
    share = 1.0 if active is None else jnp.maximum(active.mean(), 1e-9)
    return Summary(
        episode_return=outcome.reward.sum(0).mean(),
        delay_min=outcome.step_delay_s.sum(0).mean() / 60,
        perplexity=outcome.perplexity.mean() / share,
        changes_per_ue=outcome.switched.sum(0).mean(),
        server_share=outcome.at_server.mean() / share,
    )
