"""Generalised advantage estimation over whole episodes (Eq. 17, 18)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def episode_advantages(
    rewards: Float[Array, "tasks *episodes"],
    values: Float[Array, "tasks *episodes"],
    discount: float,
    trace_decay: float,
) -> Float[Array, "tasks *episodes"]:
    """Advantages of every step of complete episodes, or of every UE in them.

    An episode's end is the end of the world's horizon and progress is observed, so the value after the
    last task is exactly zero: nothing is bootstrapped.
    """
    following = jnp.concatenate([values[1:], jnp.zeros_like(values[:1])])
    errors = rewards + discount * following - values

    def accumulate(
        later: Float[Array, "*episodes"], error: Float[Array, "*episodes"]
    ) -> tuple[Float[Array, "*episodes"], Float[Array, "*episodes"]]:
        advantage = error + discount * trace_decay * later
        return advantage, advantage

    _, advantages = jax.lax.scan(accumulate, jnp.zeros_like(values[0]), errors, reverse=True)
    return advantages
