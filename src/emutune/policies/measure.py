"""What a policy comes to in a batch of episodes, the same draws for every policy (common random numbers)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from emutune.policies.base import Policy
from emutune.policies.playing import Step, play
from emutune.world import Episode, Summary, World, draw_episode
from emutune.world.summary import add_up, sum_step

Watched = TypeVar("Watched")

# Of policies' own randomness, in every call; no stream of episodes.
POLICY_STREAM = 0x4E1D0008


def episode_keys(stream: int | Array, count: int) -> Key[Array, "episodes"]:
    """The keys of the first ``count`` episodes of a stream."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(stream), jnp.arange(count))


@partial(jax.jit, static_argnums=2)
def draw_episodes(world: World, stream: int | Array, count: int) -> Episode:
    """The first ``count`` episodes of a stream; more of them begin with the same ones."""
    return jax.vmap(draw_episode, (0, None))(episode_keys(stream, count), world)


def watch_episodes(
    world: World, policy: Policy, episodes: Episode, watch: Callable[[Step], Watched]
) -> Watched:
    """What is watched of every step, of a policy whose own randomness is the same in every call.

    Its leading axes are episodes and steps; see ``play``.
    """
    keys = episode_keys(POLICY_STREAM, episodes.complexity.shape[0])
    return jax.vmap(lambda episode, key: play(world, policy, episode, key, watch))(episodes, keys)


@jax.jit
def run_episodes(world: World, policy: Policy, episodes: Episode) -> Summary:
    """The summary of each episode."""
    steps = watch_episodes(world, policy, episodes, lambda step: sum_step(step.outcome, step.known.active))
    return jax.vmap(add_up)(steps)
