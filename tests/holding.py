"""UEs that hold an emulator each, as they may in the middle of an episode."""

from __future__ import annotations

import jax.numpy as jnp
from numpy.typing import ArrayLike

from emutune.step import Situation, empty_cache, put_in_cache
from emutune.world import Carried, State, World, observe
from emutune.world.dynamics import during


def holding(world: World, family: ArrayLike, layers: ArrayLike, spent_j: ArrayLike = 0.0) -> Carried:
    """One emulator each, none where the layers are 0, and the joules spent so far."""
    taken = (jnp.asarray(part, jnp.int32) for part in (family, layers))
    held, age = put_in_cache(world.rules, *empty_cache(world.rules, world.ues), *taken)
    return Carried(held, age, jnp.broadcast_to(jnp.asarray(spent_j, jnp.float32), (world.ues,)))


def charged_at(world: World, state: State) -> Situation:
    """The situation that the state's step is charged at."""
    return during(state.episode, state.step, observe(world, state))
