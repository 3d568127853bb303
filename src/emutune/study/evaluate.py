"""Measure a policy on held-out episodes that every policy meets alike (common random numbers)."""

from __future__ import annotations

import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from emutune.policies import Fixed, Policy
from emutune.scenario import Scenario
from emutune.world import (
    Episode,
    Task,
    World,
    all_tasks,
    build_world,
    draw_episode,
    empty_cache,
    observe,
    observe_task,
    reset,
    serve,
)

# Held-out episodes share no key with training (seeds 0, 1, ...) nor with the search for a fixed policy.
_HELD_OUT_KEY = 0x4E1D0007
_SEARCH_KEY = 0x5EA2C400


class EpisodeFigures(NamedTuple):
    """One value per episode, in the units of the paper's figures."""

    episode_return: Float[np.ndarray, "episodes"]
    delay_min: Float[np.ndarray, "episodes"]
    perplexity: Float[np.ndarray, "episodes"]
    changes_per_ue: Float[np.ndarray, "episodes"]
    server_share: Float[np.ndarray, "episodes"]


def held_out_episodes(scenario: Scenario, count: int) -> Episode:
    """The first ``count`` held-out episodes of a scenario; more of them begin with the same ones."""
    return _draw(build_world(scenario), _episode_keys(_HELD_OUT_KEY, count))


def evaluate_policy(scenario: Scenario, policy: Policy, episodes: Episode) -> EpisodeFigures:
    """Run a policy through a batch of episodes."""
    count = episodes.complexity.shape[0]
    figures = _run_batch(build_world(scenario), policy, episodes, _episode_keys(_HELD_OUT_KEY + 1, count))
    return EpisodeFigures(*(np.asarray(part, np.float64) for part in figures))


def search_best_fixed(scenario: Scenario, episodes: int = 32) -> Fixed:
    """The always-local policy whose one retention is best on episodes that are not held out."""
    world = build_world(scenario)
    low, high = scenario.level_bounds
    levels = jnp.arange(low, high + 1) / scenario.model.layers
    keys = _episode_keys(_SEARCH_KEY, episodes)
    drawn = _draw(world, keys)
    returns = jax.vmap(lambda level: _run_batch(world, Fixed(level), drawn, keys)[0].mean())(levels)
    return Fixed(levels[jnp.argmax(returns)])


def decision_time_ms(scenario: Scenario, policy: Policy, repeats: int = 50) -> float:
    """Median wall-clock time of one compiled decision for the whole fleet, in ms."""
    world = build_world(scenario)
    key = jax.random.key(0)
    observation = observe(world, reset(key, world))
    decide = jax.jit(lambda world, policy, observation, key: policy.decide(world, observation, key))
    jax.block_until_ready(decide(world, policy, observation, key))
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(decide(world, policy, observation, key))
        times.append(time.perf_counter() - started)
    return float(np.median(times) * 1e3)


def _episode_keys(stream: int, count: int) -> Key[Array, "episodes"]:
    return jax.vmap(lambda index: jax.random.fold_in(jax.random.key(stream), index))(jnp.arange(count))


@jax.jit
def _draw(world: World, keys: Key[Array, "episodes"]) -> Episode:
    return jax.vmap(draw_episode, (0, None))(keys, world)


@jax.jit
def _run_batch(
    world: World, policy: Policy, episodes: Episode, keys: Key[Array, "episodes"]
) -> tuple[Array, ...]:
    return jax.vmap(_run_episode, (None, None, 0, 0))(world, policy, episodes, keys)


def _run_episode(world: World, policy: Policy, episode: Episode, key: Key[Array, ""]) -> tuple[Array, ...]:
    def act(cached: Array, now: tuple[Array, Task]) -> tuple[Array, tuple[Array, ...]]:
        step, task = now
        observation = observe_task(world, cached, task, step)
        action = policy.decide(world, observation, jax.random.fold_in(key, step))
        cached, outcome = serve(world, cached, task, action)
        return cached, (
            outcome.reward,
            outcome.step_delay_s / 60,
            outcome.perplexity.mean(),
            outcome.switched.mean(),
            action.at_server.mean(),
        )

    _, steps = jax.lax.scan(act, empty_cache(world), (jnp.arange(world.tasks), all_tasks(episode)))
    rewards, delays, perplexities, switches, servers = steps
    return rewards.sum(), delays.sum(), perplexities.mean(), switches.sum(), servers.mean()
