"""How many upload is read from a table; who uploads is ranked by how fast its upload is."""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from emutune.policies.base import register_policy
from emutune.policies.prices import step_prices, upload_s
from emutune.world import Action, Observation, World


@register_policy
@dataclass(frozen=True)
class CountTable:
    """UEs that hold a usable emulator use it. Of the others, those with the fastest uploads upload.

    The rest download the largest emulators that arrive before the uploads do.

    Attributes:
        most: layers of the largest emulator of any family.
        uploads: how many upload, by the number of UEs without a usable emulator.
        retention: smallest and largest retention that is downloaded.
    """

    most: int = field(metadata={"static": True})
    uploads: Int[Array, "counts"]
    retention: Float[Array, "2"]

    def decide(self, world: World, observation: Observation, key: Key[Array, ""]) -> Action:
        """See ``Policy.decide``."""
        if observation.complexity.ndim > 1:
            return jax.vmap(lambda one: self.decide(world, one, key))(observation)
        usable = observation.cached_retention > 0
        prices = step_prices(world, observation, self.most)
        waiting = jnp.sum(~usable)
        uploads = jnp.minimum(self.uploads[waiting], waiting)
        together_s = upload_s(world, observation, jnp.maximum(uploads, 1)[None].astype(jnp.float32))[0]
        rank = jnp.argsort(jnp.argsort(jnp.where(usable, jnp.inf, together_s)))
        at_server = ~usable & (rank < uploads)
        slowest_s = jnp.max(jnp.where(at_server, together_s, 0.0))
        arrives = prices.download_s * (waiting - uploads) <= jnp.where(uploads > 0, slowest_s, jnp.inf)
        retention = jnp.arange(self.most + 1) / _layers(world, observation)[:, None]
        low, high = self.retention
        wanted = jnp.where(arrives & prices.allowed & (retention <= high + 1e-6), retention, 0.0).max(-1)
        return Action(at_server, jnp.where(usable, observation.cached_retention, jnp.maximum(wanted, low)))


def _layers(world: World, observation: Observation) -> Int[Array, "ues"]:
    if world.families is None or observation.family is None:
        return jnp.broadcast_to(world.model_layers, observation.complexity.shape)
    return world.families.model_layers[observation.family]
