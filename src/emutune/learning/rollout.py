"""Collect whole episodes with the current actors, for learning and for measuring them."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from emutune.learning.agents import (
    Actors,
    Inputs,
    case_logits,
    network_inputs,
    retention_means,
    to_retention,
)
from emutune.learning.configuration import NetworkKind
from emutune.world import (
    Action,
    Episode,
    Outcome,
    Task,
    World,
    all_tasks,
    empty_cache,
    observe_task,
    serve,
)


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


def draw_noise(key: Key[Array, ""], shape: tuple[int, int, int]) -> Noise:
    """Noise for exploring episodes."""
    case_key, emulator_key = jax.random.split(key)
    return Noise(jax.random.logistic(case_key, shape), jax.random.normal(emulator_key, shape))


def collect(world: World, kind: NetworkKind, actors: Actors, episodes: Episode, noise: Noise) -> Trajectory:
    """Act through a batch of episodes (leading axis: episodes)."""
    tasks = jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), jax.vmap(all_tasks)(episodes))
    std = jnp.exp(actors.log_std)
    count = episodes.complexity.shape[0]
    cached = jnp.broadcast_to(empty_cache(world), (count, world.ues))

    def act(cached: Array, now: tuple[Array, Task, Noise]) -> tuple[Array, Trajectory]:
        step, task, noise = now
        observation = jax.vmap(observe_task, (None, 0, 0, None))(world, cached, task, step)
        inputs = network_inputs(world, observation)
        at_server = case_logits(kind, actors, inputs) > noise.case
        unclipped = retention_means(kind, actors, inputs, at_server) + std * noise.emulator
        action = Action(at_server, to_retention(world, unclipped))
        cached, outcome = jax.vmap(serve, (None, 0, 0, 0))(world, cached, task, action)
        return cached, Trajectory(inputs, at_server, unclipped, outcome)

    _, trajectory = jax.lax.scan(act, cached, (jnp.arange(world.tasks), tasks, noise))
    return trajectory


class Summary(NamedTuple):
    """Means over a batch of complete episodes, in the units of the paper's figures."""

    episode_return: Float[Array, ""]
    delay_min: Float[Array, ""]
    perplexity: Float[Array, ""]
    changes_per_ue: Float[Array, ""]
    server_share: Float[Array, ""]


def summarise(outcome: Outcome, at_server: Bool[Array, "tasks episodes ues"]) -> Summary:
    """Episodic return, total delay, mean perplexity, emulator changes and share at the server."""
    return Summary(
        episode_return=outcome.reward.sum(0).mean(),
        delay_min=outcome.step_delay_s.sum(0).mean() / 60,
        perplexity=outcome.perplexity.mean(),
        changes_per_ue=outcome.switched.sum(0).mean(),
        server_share=at_server.mean(),
    )
