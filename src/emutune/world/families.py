"""Which foundation model each task is of."""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FamilyChain:
    """A Markov chain for each UE, uniform at first; where there is one family, nothing is drawn.

    Attributes:
        stays: probability that the next task is of the same family for certain; else it is drawn from all.
    """

    families: int = field(metadata={"static": True})
    stays: Float[Array, ""]

    def draw(self, key: Key[Array, ""], tasks: int, ues: int) -> Int[Array, "{tasks} {ues}"] | None:
        """The family of every task; None where there is one."""
        if self.families == 1:
            return None
        anew_key, family_key = jax.random.split(key)
        drawn = jax.random.randint(family_key, (tasks, ues), 0, self.families)
        anew = ~jax.random.bernoulli(anew_key, self.stays, (tasks, ues))
        rows = jnp.arange(tasks)[:, None]
        # The row of the latest fresh draw; the first row always is one.
        latest = jax.lax.cummax(jnp.where(anew, rows, 0), axis=0)
        return jnp.take_along_axis(drawn, latest, axis=0)
