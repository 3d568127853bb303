"""The paper's random baseline: both agents act at random (sec. VI-B)."""

from __future__ import annotations

from dataclasses import dataclass

import jax
from jaxtyping import Array, Key

from emutune.policies.base import register_policy
from emutune.world import Action, Observation, World


@register_policy
@dataclass(frozen=True)
class Random:
    """A fair coin for z, and E uniform over the retention bounds."""

    def decide(self, world: World, observation: Observation, key: Key[Array, ""]) -> Action:
        """See ``Policy.decide``."""
        case_key, emulator_key = jax.random.split(key)
        shape = observation.complexity.shape
        low, high = world.retention_bounds
        return Action(
            at_server=jax.random.bernoulli(case_key, 0.5, shape),
            retention=jax.random.uniform(emulator_key, shape, minval=low, maxval=high),
        )
