"""Hold what is usable; where nothing is, toss a coin between the server and one retention."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from emutune.policies.base import register_policy
from emutune.policies.prices import whole_training_s
from emutune.world import Action, Observation, World


@register_policy
@dataclass(frozen=True)
class Hold:
    """A UE that holds an emulator of its task's family uses it.

    Attributes:
        server_share: how likely a UE without one goes to the server; else it downloads.
        retention: what it downloads then.
        patience_s: training that would take longer than this on the UE goes to the server; None where training
            takes no time.
    """

    server_share: Float[Array, ""]
    retention: Float[Array, ""]
    patience_s: Float[Array, ""] | None = None

    def decide(self, world: World, observation: Observation, key: Key[Array, ""]) -> Action:
        """See ``Policy.decide``."""
        held = observation.cached_retention
        usable = held > 0
        tossed = jax.random.bernoulli(key, self.server_share, held.shape)
        wanted = jnp.where(usable, held, self.retention)
        whole = whole_training_s(world, observation)
        if self.patience_s is None or whole is None:
            return Action(tossed & ~usable, wanted)
        return Action((tossed & ~usable) | (whole[0] * wanted > self.patience_s), wanted)
