"""The paper's random baseline: both agents act at random (sec. VI-B)."""

from __future__ import annotations

from dataclasses import dataclass

import jax
from jaxtyping import Array, Key

from emutune.policies.base import policy_pytree
from emutune.step import Plan, Situation, plan_of_wish
from emutune.world import World


@policy_pytree
@dataclass(frozen=True)
class Random:
    """A fair coin for z, and E uniform over the retention bounds."""

    def decide(self, world: World, situation: Situation, key: Key[Array, ""]) -> Plan:
        """See ``Policy.decide``."""
        case_key, emulator_key = jax.random.split(key)
        shape = situation.complexity.shape
        low, high = world.rules.retention_bounds
        tossed = jax.random.bernoulli(case_key, 0.5, shape)
        retention = jax.random.uniform(emulator_key, shape, minval=low, maxval=high)
        return plan_of_wish(world.rules, situation, tossed, retention)
