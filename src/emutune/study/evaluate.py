"""Measure a policy on held-out episodes that every policy meets alike (common random numbers)."""

from __future__ import annotations

import time
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from emutune.policies import Fixed, Policy
from emutune.scenario import Scenario
from emutune.world import (
    Cache,
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
SEARCH_KEY = 0x5EA2C400
_POLICY_KEY = _HELD_OUT_KEY + 1


class EpisodeFigures(NamedTuple):
    """One value per episode, in the units of the paper's figures.

    Perplexity and the share at the server are means over tasks. ``energy_kj`` is what a UE spends in an
    episode, as the mean over UEs; 0 where energy is off.
    """

    episode_return: Float[np.ndarray, "episodes"]
    delay_min: Float[np.ndarray, "episodes"]
    perplexity: Float[np.ndarray, "episodes"]
    changes_per_ue: Float[np.ndarray, "episodes"]
    server_share: Float[np.ndarray, "episodes"]
    energy_kj: Float[np.ndarray, "episodes"]


def held_out_episodes(scenario: Scenario, count: int) -> Episode:
    """The first ``count`` held-out episodes of a scenario; more of them begin with the same ones."""
    return draw_episodes(build_world(scenario), _HELD_OUT_KEY, count)


def held_out_key(index: int) -> Key[Array, ""]:
    """The key of one held-out episode."""
    return jax.random.fold_in(jax.random.key(_HELD_OUT_KEY), index)


def evaluate_policy(scenario: Scenario, policy: Policy, episodes: Episode) -> EpisodeFigures:
    """Run a policy through a batch of episodes."""
    figures = run_episodes(build_world(scenario), policy, episodes)
    return EpisodeFigures(*(np.asarray(part, np.float64) for part in figures))


def search_best_fixed(scenario: Scenario, episodes: int = 32) -> Fixed:
    """The always-local policy whose one retention is best on episodes that are not held out."""
    world = build_world(scenario)
    levels = jnp.asarray(
        sorted({layers / one.layers for one in scenario.models for layers in range(one.fewest, one.most + 1)})
    )
    drawn = draw_episodes(world, SEARCH_KEY, episodes)
    returns = jax.vmap(lambda level: run_episodes(world, Fixed(level), drawn)[0].mean())(levels)
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


@partial(jax.jit, static_argnums=2)
def draw_episodes(world: World, stream: int | Array, count: int) -> Episode:
    """The first ``count`` episodes of a stream; more of them begin with the same ones."""
    return jax.vmap(draw_episode, (0, None))(_episode_keys(stream, count), world)


@jax.jit
def run_episodes(world: World, policy: Policy, episodes: Episode) -> tuple[Array, ...]:
    """The fields of ``EpisodeFigures``, of a policy whose own randomness is the same in every call."""
    keys = _episode_keys(_POLICY_KEY, episodes.complexity.shape[0])
    return jax.vmap(_run_episode, (None, None, 0, 0))(world, policy, episodes, keys)


def _episode_keys(stream: int | Array, count: int) -> Key[Array, "episodes"]:
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(stream), jnp.arange(count))


def _run_episode(world: World, policy: Policy, episode: Episode, key: Key[Array, ""]) -> tuple[Array, ...]:
    def act(cached: Cache, now: tuple[Array, Task]) -> tuple[Cache, tuple[Array, ...]]:
        step, task = now
        observation = observe_task(world, cached, task, step)
        action = policy.decide(world, observation, jax.random.fold_in(key, step))
        cached, outcome = serve(world, cached, task, action)
        return cached, (
            outcome.reward,
            outcome.step_delay_s / 60,
            outcome.perplexity.mean(),
            outcome.switched.mean(),
            outcome.at_server.mean(),
            jnp.zeros(()) if outcome.energy_j is None else outcome.energy_j.mean() / 1e3,
        )

    _, steps = jax.lax.scan(act, empty_cache(world), (jnp.arange(world.tasks), all_tasks(episode)))
    rewards, delays, perplexities, switches, servers, energy_kj = steps
    # Over the tasks that there are.
    active = episode.active
    share = 1.0 if active is None else jnp.maximum(active.mean(), 1e-9)
    return (
        rewards.sum(),
        delays.sum(),
        perplexities.mean() / share,
        switches.sum(),
        servers.mean() / share,
        energy_kj.sum(),
    )
