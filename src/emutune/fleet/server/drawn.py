"""What is drawn for the devices of a shaped fleet: the world's own episodes, of each device by its name."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from emutune.world import Episode, World
from emutune.world.dynamics import draw_episode


class Draws:
    """Episodes of a fleet; a device's draws depend on the seed, the episode and its name, whoever else takes part.

    Args:
        world: from whose laws they are, with as many tasks as an episode has steps.
        seed: of all draws.
    """

    def __init__(self, world: World, seed: int) -> None:
        self._alone = replace(world, ues=1)
        self._key = jax.random.key(seed)
        self._kept = lru_cache(maxsize=2)(self._drawn)

    def episode(self, number: int, devices: Sequence[str]) -> Episode:
        """All that is random in an episode of the devices, in their order."""
        return self._kept(number, tuple(devices))

    def _drawn(self, number: int, devices: tuple[str, ...]) -> Episode:
        key = jax.random.fold_in(self._key, number)
        return _of_each(
            self._alone, jnp.stack([jax.random.fold_in(key, _number_of(name)) for name in devices])
        )


@jax.jit
def _of_each(alone: World, keys: Key[Array, "ues"]) -> Episode:
    def one(key: Key[Array, ""]) -> Episode:
        return jax.tree.map(lambda part: part[..., 0], draw_episode(key, alone))

    return jax.vmap(one, out_axes=-1)(keys)


def _number_of(device: str) -> np.uint32:
    return np.frombuffer(hashlib.sha256(device.encode()).digest(), np.uint32, 1)[0]
