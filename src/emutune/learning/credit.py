"""What each UE adds to a step's cost: its own perplexity, and the delay the fleet would be spared without it."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from emutune.world import Outcome, Task, World
from emutune.world.link import shared_rate_bps


def marginal_costs(
    world: World, task: Task, at_server: Bool[Array, "ues"], outcome: Outcome
) -> Float[Array, "ues"]:
    """Cost of a step less its cost without each UE, positive numbers in units of reward.

    A UE that sends nothing adds no delay. One that does makes all that share its link slower, and may be the
    one that everybody waits for.
    """
    downloads = ~at_server & (outcome.delay_s > 0)
    sharers = jnp.sum(at_server, dtype=jnp.float32)
    fewer = jnp.maximum(sharers - 1, 1.0)
    rate = shared_rate_bps(
        world.uplink_bandwidth_hz,
        task.transmit_power_w,
        task.gain,
        world.noise_w_per_hz,
        fewer,
        world.ergodic_rate,
    )
    # Band and power of the downlink are both shared, so one sharer fewer shortens all alike.
    loaders = jnp.sum(downloads, dtype=jnp.float32)
    shorter = (loaders - 1) / jnp.maximum(loaders, 1.0)
    up_s, down_s = (jnp.where(link, outcome.delay_s, 0.0) for link in (at_server, downloads))
    up_without = _largest_other(jnp.where(at_server, task.data_bits / rate, 0.0))
    down_without = _largest_other(down_s * shorter)
    without_s = jnp.maximum(
        jnp.where(at_server, up_without, up_s.max()), jnp.where(downloads, down_without, down_s.max())
    )
    perplexity = -world.perplexity_weight / world.ues * outcome.perplexity
    return perplexity - world.delay_weight_per_s * (outcome.step_delay_s - without_s)


def _largest_other(values: Float[Array, "ues"]) -> Float[Array, "ues"]:
    """The largest of the other values, for each; 0 if there are none."""
    first = jnp.argmax(values)
    second = jnp.max(jnp.where(jnp.arange(values.shape[0]) == first, 0.0, values))
    return jnp.where(jnp.arange(values.shape[0]) == first, second, values[first])
