"""Measure a policy on held-out episodes that every policy meets alike (common random numbers)."""

from __future__ import annotations

import time

import jax
import numpy as np
from jaxtyping import Array, Key

from emutune.policies import Policy
from emutune.policies.measure import draw_episodes, run_episodes
from emutune.policies.own import plain_failures
from emutune.scenario import Scenario
from emutune.world import Episode, Summary, build_world, observe, reset

# Held-out episodes share no key with training (seeds 0, 1, ...) nor with searches for policies' parameters.
_HELD_OUT_STREAM = 0x4E1D0007


def held_out_episodes(scenario: Scenario, count: int) -> Episode:
    """The first ``count`` held-out episodes of a scenario; more of them begin with the same ones."""
    return draw_episodes(build_world(scenario), _HELD_OUT_STREAM, count)


def held_out_key(index: int) -> Key[Array, ""]:
    """The key of one held-out episode."""
    return jax.random.fold_in(jax.random.key(_HELD_OUT_STREAM), index)


def evaluate_policy(scenario: Scenario, policy: Policy, episodes: Episode) -> Summary:
    """Run a policy through a batch of episodes; NumPy arrays in double precision.

    Raises:
        UsageError: a policy of one's own raised, or decided something that is no decision.
    """
    with plain_failures(policy):
        found = run_episodes(build_world(scenario), policy, episodes)
        summary: Summary = jax.tree.map(lambda part: np.asarray(part, np.float64), found)
    return summary


def decision_time_ms(scenario: Scenario, policy: Policy, repeats: int = 50) -> float:
    """Median wall-clock time of one compiled decision for the whole fleet, in ms."""
    world = build_world(scenario)
    key = jax.random.key(0)
    situation = observe(world, reset(key, world))
    decide = jax.jit(lambda world, policy, situation, key: policy.decide(world, situation, key))
    times = []
    with plain_failures(policy):
        jax.block_until_ready(decide(world, policy, situation, key))
        for _ in range(repeats):
            started = time.perf_counter()
            jax.block_until_ready(decide(world, policy, situation, key))
            times.append(time.perf_counter() - started)
    return float(np.median(times) * 1e3)
