"""Hold what is usable; where nothing is, toss a coin between the server and one retention."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from emutune.policies.base import register_policy
from emutune.world import Action, Observation, World


@register_policy
@dataclass(frozen=True)
class Hold:
    """A UE that holds an emulator of its task's family uses it.

    Attributes:
        server_share: how likely a UE without one goes to the server; else it downloads.
        retention: what it downloads then.
    """

    server_share: Float[Array, ""]
    retention: Float[Array, ""]

    def decide(self, world: World, observation: Observation, key: Key[Array, ""]) -> Action:
        """See ``Policy.decide``."""
        held = observation.cached_retention
        usable = held > 0
        tossed = jax.random.bernoulli(key, self.server_share, held.shape)
        return Action(tossed & ~usable, jnp.where(usable, held, self.retention))
