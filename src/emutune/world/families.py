"""Which foundation model each task is of."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key


def draw_families(
    key: Key[Array, ""], persistence: Float[Array, ""], families: int, tasks: int, ues: int
) -> Int[Array, "{tasks} {ues}"]:
    """The family of every task: a Markov chain for each UE, uniform at first."""
    anew_key, family_key = jax.random.split(key)
    drawn = jax.random.randint(family_key, (tasks, ues), 0, families)
    anew = ~jax.random.bernoulli(anew_key, persistence, (tasks, ues))
    rows = jnp.arange(tasks)[:, None]
    # The row of the latest fresh draw; the first row always is one.
    latest = jax.lax.cummax(jnp.where(anew, rows, 0), axis=0)
    return jnp.take_along_axis(drawn, latest, axis=0)
