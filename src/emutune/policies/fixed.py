"""Policies that decide the same at every step: all at the server, or all local at one retention."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from emutune.errors import UsageError
from emutune.policies.base import policy_pytree
from emutune.policies.measure import draw_episodes, run_episodes
from emutune.policies.search import SEARCH_STREAM, levels_of
from emutune.scenario import Scenario
from emutune.step import Plan, Situation, plan_of_wish
from emutune.world import World, build_world


@policy_pytree
@dataclass(frozen=True)
class AllServer:
    """Every UE uploads its data at every step; no emulator is ever sent where data may leave."""

    def decide(self, world: World, situation: Situation, key: Key[Array, ""]) -> Plan:
        """See ``Policy.decide``."""
        shape = situation.complexity.shape
        largest = jnp.broadcast_to(world.rules.retention_bounds[1], shape)
        return plan_of_wish(world.rules, situation, jnp.ones(shape, bool), largest)


@policy_pytree
@dataclass(frozen=True)
class Fixed:
    """Every UE trains locally with one retention: it downloads once and holds what it has."""

    retention: Float[Array, ""]

    def decide(self, world: World, situation: Situation, key: Key[Array, ""]) -> Plan:
        """See ``Policy.decide``."""
        shape = situation.complexity.shape
        wanted = jnp.broadcast_to(self.retention, shape)
        return plan_of_wish(world.rules, situation, jnp.zeros(shape, bool), wanted)


def fixed_at(scenario: Scenario, retention: float | None = None) -> Fixed:
    """The always-local policy at one retention; the largest allowed if it is not given.

    Raises:
        UsageError: the retention is outside the scenario's bounds.
    """
    bounds = scenario.retention
    wanted = bounds.max if retention is None else retention
    if not bounds.min <= wanted <= bounds.max:
        raise UsageError(f"retention: must be between {bounds.min:g} and {bounds.max:g}, got {wanted:g}")
    return Fixed(jnp.asarray(wanted, jnp.float32))


def search_best_fixed(scenario: Scenario, episodes: int = 32) -> Fixed:
    """The always-local policy whose one retention is best on episodes that are not held out."""
    world, levels = build_world(scenario), jnp.asarray(levels_of(scenario))
    drawn = draw_episodes(world, SEARCH_STREAM, episodes)
    returns = jax.vmap(lambda level: run_episodes(world, Fixed(level), drawn).episode_return.mean())(levels)
    return Fixed(levels[jnp.argmax(returns)])
