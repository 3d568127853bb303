"""The keys of an episode's draws, a number each, so that one that is added moves no other; and uniform draws."""

from __future__ import annotations

from enum import IntEnum, unique

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from emutune.scenario import Range, Span, Spread


@unique
class Draw(IntEnum):
    """What is drawn for an episode, and noise on its decisions; two draws of one number would be alike."""

    DISTANCE = 0
    FADING = 1
    COMPLEXITY = 2
    DATA = 3
    POWER = 4
    FAMILY = 5
    PATHS = 100
    PROPAGATION = 101
    DRIFT = 102
    WINDOWS = 103
    SPEED = 200
    ENERGY = 201
    MEMORY = 202
    PRIVACY = 203
    ACTIVITY = 204
    DECISIONS = 300


def key_of(key: Key[Array, ""], draw: Draw) -> Key[Array, ""]:
    """The key of one draw, from the episode's."""
    return jax.random.fold_in(key, int(draw))


def bounds_of(interval: Range | Span | Spread, scale: float = 1.0) -> Float[Array, "2"]:
    """The ends of an interval, in single precision."""
    return jnp.asarray([interval.min * scale, interval.max * scale], jnp.float32)


def uniform(key: Key[Array, ""], bounds: Float[Array, "2"], shape: tuple[int, ...]) -> Float[Array, "..."]:
    """Independent draws between bounds, of the given shape."""
    return jax.random.uniform(key, shape, minval=bounds[0], maxval=bounds[1])
