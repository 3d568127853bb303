"""A small fleet on a slice of the cell stands for a large one on all of it.

Of N UEs that share links and a server, each 8 have 8 / N of them, and costs are means over UEs and one
maximum. So 8 UEs on that slice decide as they would among N: a policy that meets slices of many sizes in training, and
sees their prices, serves fleets of as many sizes.
"""

from __future__ import annotations

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from emutune.learning.configuration import TrainingConfig
from emutune.world import World

# In which an update's episodes are played, and for which teachers are found.
SLICES, _TAUGHT = 8, 6


def slice_of(world: World, share: Float[Array, ""]) -> World:
    """A world with a share of the server and of links that are shared, at the same signal-to-noise ratios.

    Args:
        world: the whole.
        share: above 0; more than 1 is that much more of everything.
    """
    rules, links = world.rules, world.rules.links
    if links.shared:
        links = replace(
            links,
            uplink_bandwidth_hz=links.uplink_bandwidth_hz * share,
            downlink_bandwidth_hz=links.downlink_bandwidth_hz * share,
            downlink_power_w=links.downlink_power_w * share,
        )
    return replace(world, rules=replace(rules, links=links, server_tflops=rules.server_tflops * share))


def draw_shares(
    config: TrainingConfig, world: World, count: int, key: Key[Array, ""]
) -> Float[Array, "slices"]:
    """The slices of an update: as of fleets whose sizes are spread over ``config.fleets``, by their logarithms."""
    return _shares_at(config, world, (jnp.arange(count) + jax.random.uniform(key, (count,))) / count)


def fixed_shares(config: TrainingConfig, world: World) -> Float[Array, "slices"]:
    """Slices for the smallest and the largest fleet and some between, for each of which a teacher is found."""
    return _shares_at(config, world, jnp.linspace(0.0, 1.0, _TAUGHT))


def _shares_at(
    config: TrainingConfig, world: World, places: Float[Array, "slices"]
) -> Float[Array, "slices"]:
    low, high = (math.log(size / world.ues) for size in config.fleets)
    return jnp.exp(-(low + (high - low) * places))
