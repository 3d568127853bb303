"""What a UE's cache is worth in later steps: the expected costs of its tasks, and a step of the dynamic programme.

Where a UE caches several emulators, what is held of each family has a worth of its own, and they add up: all that
the families share is the cache's room, and a rent on it stands for what each keeps the others from having.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from emutune.policies.kinds import Kind, mean_tflop
from emutune.step import Situation, put_in_cache
from emutune.step.charges import delay_cost
from emutune.step.link import downlink_bps, uplink_bps
from emutune.step.rules import complexity_factor
from emutune.world import World


class LaterPrices(NamedTuple):
    """What others' use of what is shared makes of one UE's, in later steps.

    Attributes:
        upload: share of an upload's lone seconds, and of those of training at the server, that it costs.
        download: the same of a download.
        background_s: how long a step takes anyway: only what training on the UE takes beyond it is felt.
        rent: share of what sending an emulator costs that keeping it through a step does, where a UE caches
            several.
    """

    upload: Float[Array, ""]
    download: Float[Array, ""]
    background_s: Float[Array, ""] | float = 0.0
    rent: Float[Array, ""] | float = 0.0


# Worth of each UE's cache as it is, and once an emulator of each number of layers has served the task.
Later = tuple[Float[Array, "ues"], Float[Array, "levels ues"]]


def worth_after(world: World, situation: Situation, own: Float[Array, "ues families levels"]) -> Later:
    """Worth of caches after a step, from each UE's table of what is held then."""
    kept = _worth_of_held(world, own, situation.held)
    if not world.rules.several:
        return kept, own[jnp.arange(own.shape[0]), situation.family].T

    def renewed(layers: Int[Array, ""]) -> Array:
        taken = jnp.broadcast_to(layers, situation.family.shape)
        held, _ = put_in_cache(world.rules, situation.held, situation.age, situation.family, taken)
        return _worth_of_held(world, own, held)

    return kept, jax.vmap(renewed)(jnp.arange(own.shape[2]))


def _worth_of_held(
    world: World, own: Float[Array, "ues families levels"], held: Int[Array, "ues families"]
) -> Float[Array, "ues"]:
    """The sum of what is held of each family, or where a UE holds one emulator at most, the worth of that one."""
    each = jnp.take_along_axis(own, held[..., None], axis=-1)[..., 0]
    if world.rules.several:
        return each.sum(-1)
    return jnp.take_along_axis(each, jnp.argmax(held, axis=-1)[:, None], axis=-1)[:, 0]


class TaskCosts(NamedTuple):
    """What a later task costs one UE, on average over what tasks are like, by family.

    Attributes:
        local: of training on the UE with k layers.
        upload: of training at the server.
        per_bit: of each bit that is sent to the UE.
        allowed: which emulators the UE can have.
        rent_per_bit: of keeping each bit of an emulator through a step, where a UE caches several.
    """

    local: Float[Array, "families levels"]
    upload: Float[Array, "families"]
    per_bit: Float[Array, ""]
    allowed: Bool[Array, "families levels"]
    rent_per_bit: Float[Array, ""]


def task_costs(world: World, kind: Kind, prices: LaterPrices) -> TaskCosts:
    """Costs of a task of a UE of a kind (no leading axes)."""
    rules, models, ues = world.rules, world.rules.models, world.ues
    layers, data_bits = jnp.arange(models.most + 1), world.data_bits.mean()
    allowed = (layers >= models.low[:, None]) & (layers <= models.high[:, None])
    allowed = allowed & (models.memory_bits <= kind.memory_bits * (1 + 1e-6))
    chance = world.devices.active.mean
    # A task's share of the mean over tasks, on average over how many others have one.
    scale = (
        -rules.perplexity_weight / ues * _mean_complexity_factor(world) * (1 - (1 - chance) ** ues) / chance
    )
    upload_s = data_bits / uplink_bps(rules.links, world.transmit_power_w.mean(), kind.gain)
    download_s = 1 / downlink_bps(rules.links, world.radio.downlink_gain_at(kind.gain))
    larger = (models.whole_tflop_per_bit / jnp.maximum(models.whole_tflop_per_bit[0], 1e-30))[:, None]
    share = larger * (layers / models.layers[:, None])
    here_s = jnp.maximum(kind.seconds * share - prices.background_s, 0.0)
    there_s = mean_tflop(world) * larger[:, 0] / rules.server_tflops
    per_j = -rules.weight_per_j / ues
    local = scale * models.perplexity + delay_cost(rules, here_s) + kind.joules * share
    upload = scale * models.whole_perplexity + delay_cost(rules, prices.upload * (upload_s + there_s))
    upload = upload + per_j * world.transmit_power_w.mean() * upload_s
    per_bit = (delay_cost(rules, prices.download) + per_j * rules.receive_w) * download_s
    upload = jnp.where(kind.private > 0, jnp.inf, upload)
    return TaskCosts(local, upload, per_bit, allowed, prices.rent * per_bit)


def worth_before(
    world: World, costs: TaskCosts, after: Float[Array, "families families levels"]
) -> Float[Array, "families families levels"]:
    """Expected cost of a step and all that follow, from the worth after it.

    Args:
        world: the world.
        costs: of the step's task.
        after: cost of what follows the step, by family of its task, and family and layers held after it;
            where a UE caches several emulators, the part of it that tasks of the held family cost.

    Returns:
        The same for the step before.
    """
    models, several = world.rules.models, world.rules.several
    family, layers = jnp.arange(models.families), jnp.arange(models.most + 1)
    own = (family[:, None] == family)[..., None]
    if several:
        # What costs more to keep than it is worth makes room.
        after = jnp.minimum(after + costs.rent_per_bit * models.bits, after[..., :1])
    renewed = jnp.where(costs.allowed, costs.local + after[family, family], jnp.inf)
    grown = jnp.min(renewed[:, None] + costs.per_bit * models.missing_bits, axis=-1)
    grown = jnp.broadcast_to(grown, renewed.shape)
    hold = jnp.where(own & (layers > 0), renewed[:, None], jnp.inf)
    fetch = jnp.where(own, grown[:, None], grown[:, :1, None])
    now = jnp.minimum(jnp.minimum(hold, fetch), costs.upload[:, None, None] + after)
    if several:
        # Tasks of other families are others' costs, and leave what is held of this one.
        now = jnp.where(own, now, after)
    chance, stays = world.devices.active.mean, world.families.stays
    now = chance * now + (1 - chance) * after
    return stays * now + (1 - stays) * now.mean(0)


def _mean_complexity_factor(world: World) -> Float[Array, ""]:
    """Mean of g(c) over the range of complexities, by the midpoint rule."""
    low, high = world.complexity
    middles = low + (high - low) * (jnp.arange(64) + 0.5) / 64
    return complexity_factor(world.rules, middles).mean()
