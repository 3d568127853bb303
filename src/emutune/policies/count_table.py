"""How many upload is read from a table; who uploads is ranked by how fast its upload is."""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from emutune.policies.base import register_policy
from emutune.policies.prices import step_prices, upload_s, whole_training_s
from emutune.world import Action, Observation, World, possible_case


@register_policy
@dataclass(frozen=True)
class CountTable:
    """UEs that hold a usable emulator use it. Of the others, those with the fastest uploads upload.

    The rest download the largest emulators that arrive before the uploads do. Where training takes time,
    UEs that would train too long even with the smallest retention always upload, those that would with what
    they hold count among the others, the fastest are those that an upload saves most seconds, and what
    arrives must also be trained with in time.

    Attributes:
        most: layers of the largest emulator of any family.
        uploads: how many upload, by the number of UEs without a usable emulator.
        retention: smallest and largest retention that is downloaded.
        patience_s: how long training with a held emulator may take; None where training takes no time.
    """

    most: int = field(metadata={"static": True})
    uploads: Int[Array, "counts"]
    retention: Float[Array, "2"]
    patience_s: Float[Array, ""] | None = None

    def decide(self, world: World, observation: Observation, key: Key[Array, ""]) -> Action:
        """See ``Policy.decide``."""
        if observation.complexity.ndim > 1:
            return jax.vmap(lambda one: self.decide(world, one, key))(observation)
        usable = observation.cached_retention > 0
        prices = step_prices(world, observation, self.most)
        whole = whole_training_s(world, observation)
        may = possible_case(
            world, observation.family, observation.device, observation.active, jnp.ones_like(usable)
        )
        hopeless = jnp.zeros_like(usable)
        if whole is not None and self.patience_s is not None:
            usable &= whole[0] * observation.cached_retention <= self.patience_s
            hopeless = may & (whole[0] * self.retention[0] > self.patience_s)
        waits = ~usable & ~hopeless
        waits = waits if observation.active is None else waits & observation.active
        waiting = jnp.sum(waits)
        uploads = jnp.minimum(self.uploads[waiting], waiting)
        sharers = jnp.maximum(uploads + jnp.sum(hopeless), 1)[None].astype(jnp.float32)
        together_s = upload_s(world, observation, sharers)[0]
        saved_s = together_s
        if whole is not None:
            together_s = together_s + sharers[0] * whole[1]
            saved_s = together_s - self.retention[0] * whole[0]
        rank = jnp.argsort(jnp.argsort(jnp.where(waits & may, saved_s, jnp.inf)))
        at_server = hopeless | (waits & may & (rank < uploads))
        slowest_s = jnp.max(jnp.where(at_server, together_s, 0.0))
        takes_s = prices.download_s * (waiting - uploads)
        limit_s = jnp.where(uploads > 0, slowest_s, jnp.inf)
        if prices.training_s is not None and self.patience_s is not None:
            takes_s = takes_s + prices.training_s
            limit_s = jnp.maximum(slowest_s, self.patience_s)
        arrives = takes_s <= limit_s
        retention = jnp.arange(self.most + 1) / _layers(world, observation)[:, None]
        low, high = self.retention
        wanted = jnp.where(arrives & prices.allowed & (retention <= high + 1e-6), retention, 0.0).max(-1)
        return Action(at_server, jnp.where(usable, observation.cached_retention, jnp.maximum(wanted, low)))


def _layers(world: World, observation: Observation) -> Int[Array, "ues"]:
    if world.families is None or observation.family is None:
        return jnp.broadcast_to(world.model_layers, observation.complexity.shape)
    return world.families.model_layers[observation.family]
