"""What each UE adds to a step's cost: its own perplexity, and what the fleet would be spared without it."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from emutune.policies.joint import largest_other
from emutune.world import Cache, Outcome, Task, World, trains_locally
from emutune.world.link import shared_rate_bps
from emutune.world.possible import task_count
from emutune.world.spending import energy_cost, training_tflop


def marginal_costs(world: World, cache: Cache, task: Task, outcome: Outcome) -> Float[Array, "ues"]:
    """Cost of a step less its cost without each UE, positive numbers in units of reward.

    A UE that sends nothing and trains in no time adds no delay. One that sends makes all that share its link
    slower, one at the server makes training there slower, and any may be the one that everybody waits
    for. Its joules count, and those that others spend because it slows their transfers.

    Args:
        world: the world.
        cache: before the step.
        task: of the step.
        outcome: of the step.
    """
    at_server = outcome.at_server
    sent_s = outcome.delay_s if outcome.training_s is None else outcome.delay_s - outcome.training_s
    downloads = ~at_server & (sent_s > 0)
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
    there_s, up_s = (
        jnp.where(at_server, outcome.delay_s, 0.0),
        jnp.where(at_server, task.data_bits / rate, 0.0),
    )
    up_without_s = up_s + _fewer_at_server_s(world, task, at_server, fewer)
    local = trains_locally(task.active, at_server)
    here_s, down_s = jnp.where(local, outcome.delay_s, 0.0), jnp.where(downloads, sent_s, 0.0)
    down_without_s = here_s - down_s + down_s * shorter
    without_s = jnp.maximum(
        jnp.where(at_server, largest_other(up_without_s), there_s.max()),
        jnp.where(
            downloads,
            largest_other(down_without_s),
            here_s.max() if outcome.training_s is None else largest_other(here_s),
        ),
    )
    perplexity = -world.perplexity_weight / task_count(world.ues, task.active) * outcome.perplexity
    added = perplexity - world.delay_weight_per_s * (outcome.step_delay_s - without_s)
    if outcome.energy_j is None:
        return added
    uploading_s = jnp.where(at_server, sent_s, 0.0)
    return added + _energy(world, cache, task, outcome, uploading_s - up_s, down_s * (1 - shorter))


def _fewer_at_server_s(
    world: World, task: Task, at_server: Bool[Array, "ues"], fewer: Float[Array, ""]
) -> Float[Array, "ues"]:
    """Seconds of training at the server when so many are there."""
    table = world.devices.computation
    if table is None:
        return jnp.zeros(at_server.shape)
    tflop = training_tflop(table, task.data_bits, task.family)
    return jnp.where(at_server, tflop * fewer / table.server_tflops, 0.0)


def _energy(
    world: World,
    cache: Cache,
    task: Task,
    outcome: Outcome,
    spared_up_s: Float[Array, "ues"],
    spared_down_s: Float[Array, "ues"],
) -> Float[Array, "ues"]:
    """Cost of each UE's joules, and of those that the others would be spared without it."""
    table = world.devices.energy
    assert table is not None
    assert outcome.energy_j is not None
    own = energy_cost(table, cache.spent_j, outcome.energy_j)
    up, down = (
        own - energy_cost(table, cache.spent_j, outcome.energy_j - power_w * spared_s)
        for power_w, spared_s in ((task.transmit_power_w, spared_up_s), (table.receive_w, spared_down_s))
    )
    sending = (spared_up_s > 0, spared_down_s > 0)
    others = sum(
        (jnp.where(link, part.sum() - part, 0.0) for link, part in zip(sending, (up, down), strict=True)),
        start=jnp.zeros_like(own),
    )
    return (own + others) / world.ues
