"""Policies that decide the same at every step: all at the server, or all local at one retention."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from emutune.policies.base import register_policy
from emutune.world import Action, Observation, World


@register_policy
@dataclass(frozen=True)
class AllServer:
    """Every UE uploads its data at every step; no emulator is ever sent."""

    def decide(self, world: World, observation: Observation, key: Key[Array, ""]) -> Action:
        """See ``Policy.decide``."""
        shape = observation.complexity.shape
        return Action(jnp.ones(shape, bool), jnp.broadcast_to(world.retention_bounds[1], shape))


@register_policy
@dataclass(frozen=True)
class Fixed:
    """Every UE trains locally with one retention: it downloads once and holds what it has."""

    retention: Float[Array, ""]

    def decide(self, world: World, observation: Observation, key: Key[Array, ""]) -> Action:
        """See ``Policy.decide``."""
        shape = observation.complexity.shape
        return Action(jnp.zeros(shape, bool), jnp.broadcast_to(self.retention, shape))
