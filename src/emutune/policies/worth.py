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
from emutune.policies.prices import lone_downlink_bps
from emutune.world import Device, Observation, Shelf, World, possible_levels
from emutune.world.cache import put_on_shelf
from emutune.world.link import shared_rate_bps
from emutune.world.parameters import bits_of, layers_of
from emutune.world.quality import complexity_factor, curve_perplexity
from emutune.world.radio import downlink_gain_bounds, gain_bounds


class LaterPrices(NamedTuple):
    """What others' use of what is shared makes of one UE's, in later steps.

    Attributes:
        upload: share of an upload's lone seconds, and of those of training at the server, that it costs.
        download: the same of a download.
        background_s: how long a step takes anyway: only what training on the UE takes beyond it is felt.
        rent: share of what sending an emulator costs that keeping it through a step does, where a UE caches
            several; 0 if not given.
    """

    upload: Float[Array, ""]
    download: Float[Array, ""]
    background_s: Float[Array, ""] | None = None
    rent: Float[Array, ""] | None = None


def held_by(
    world: World, observation: Observation
) -> tuple[Int[Array, "ues"], Int[Array, "ues"], Int[Array, "ues"]]:
    """Family of each UE's task, and family and layers of what it holds; one family is number 0."""
    nothing = jnp.zeros(observation.complexity.shape, jnp.int32)
    family = nothing if observation.family is None else observation.family
    held_family = nothing if observation.held_family is None else observation.held_family
    held = observation.cached_retention if observation.held_retention is None else observation.held_retention
    whole = layers_of(world, None if observation.held_family is None else held_family)
    return family, held_family, jnp.round(held * whole).astype(jnp.int32)


def worth_of_kept(
    world: World, observation: Observation, own: Float[Array, "ues families levels"]
) -> Float[Array, "ues"]:
    """Worth of each UE's cache as it is, from its table of what is held after this step."""
    shelf = _shelf_of(world, observation)
    if shelf is not None:
        return _sum_of_held(own, shelf.layers)
    _, held_family, layers = held_by(world, observation)
    return own[jnp.arange(layers.shape[0]), held_family, layers]


def worth_of_renewed(
    world: World, observation: Observation, own: Float[Array, "ues families levels"]
) -> Float[Array, "ues levels"]:
    """The same once an emulator of each number of layers has served the task."""
    family, _, _ = held_by(world, observation)
    shelf = _shelf_of(world, observation)
    tables = world.families
    if shelf is None or tables is None:
        return own[jnp.arange(family.shape[0]), family]

    def renewed(layers: Array) -> Array:
        after = put_on_shelf(tables, shelf, family, jnp.broadcast_to(layers, family.shape))
        return _sum_of_held(own, after.layers)

    return jax.vmap(renewed, out_axes=1)(jnp.arange(own.shape[2]))


def _shelf_of(world: World, observation: Observation) -> Shelf | None:
    if observation.held_retentions is None or observation.held_ages is None:
        return None
    whole = layers_of(world, jnp.arange(observation.held_retentions.shape[-1]))
    return Shelf(jnp.round(observation.held_retentions * whole).astype(jnp.int32), observation.held_ages)


def _sum_of_held(
    own: Float[Array, "ues families levels"], layers: Int[Array, "ues families"]
) -> Float[Array, "ues"]:
    return jnp.take_along_axis(own, layers[..., None], axis=-1).sum((-2, -1))


def _downlink_gain(world: World, gain: Float[Array, ""]) -> Float[Array, ""]:
    """The downlink's gain that goes with one of the uplink: as far between its bounds, in decibels."""
    if world.trace is None:
        return gain
    ends = jnp.log(gain_bounds(world))
    return jnp.exp(jnp.interp(jnp.log(gain), ends, jnp.log(downlink_gain_bounds(world))))


class TaskCosts(NamedTuple):
    """What a later task costs one UE, on average over what tasks are like, by family.

    Attributes:
        local: of training on the UE with k layers.
        upload: of training at the server.
        layer: of each layer that is sent to the UE.
        allowed: which emulators the UE can have.
        rent: of keeping each layer through a step; None where a UE caches one emulator.
    """

    local: Float[Array, "families levels"]
    upload: Float[Array, "families"]
    layer: Float[Array, "families 1"]
    allowed: Bool[Array, "families levels"]
    rent: Float[Array, "families 1"] | None = None


def task_costs(world: World, most: int, kind: Kind, prices: LaterPrices) -> TaskCosts:
    """Costs of a task of a UE of a kind (no leading axes)."""
    count = 1 if world.families is None else world.families.model_bits.shape[0]
    family = jnp.arange(count)
    each = None if world.families is None else family
    layers = jnp.arange(most + 1)
    all_layers = jnp.broadcast_to(layers_of(world, each), (count,))[:, None]
    device = Device(
        memory_bits=None if kind.memory_bits is None else jnp.broadcast_to(kind.memory_bits, (count,))
    )
    low, high = (jnp.broadcast_to(bound, (count,))[:, None] for bound in possible_levels(world, each, device))
    allowed = (layers >= low) & (layers <= high)
    scale = -world.perplexity_weight / world.ues * _mean_complexity_factor(world)
    chance = world.devices.task_probability
    if chance is not None:
        # A task's share of the mean over tasks, on average over how many others have one.
        scale = scale * (1 - (1 - chance) ** world.ues) / chance
    of_levels = None if each is None else jnp.broadcast_to(family[:, None], (count, most + 1))
    local = scale * curve_perplexity(world, layers / all_layers, of_levels)
    server = scale * curve_perplexity(world, jnp.ones(count), each)
    lone_up_bps = shared_rate_bps(
        world.uplink_bandwidth_hz,
        world.transmit_power_w.mean(),
        kind.gain,
        world.noise_w_per_hz,
        jnp.asarray(1.0),
        world.ergodic_rate,
    )
    upload = server - world.delay_weight_per_s * prices.upload * world.data_bits.mean() / lone_up_bps
    layer_s = (
        jnp.broadcast_to(bits_of(world, each), (count,))[:, None]
        / all_layers
        / lone_downlink_bps(world, _downlink_gain(world, kind.gain))
    )
    layer_cost = -world.delay_weight_per_s * prices.download * layer_s
    local, upload = _with_training(world, kind, prices, layers / all_layers, local, upload)
    energy = world.devices.energy
    if energy is not None:
        send_j = world.transmit_power_w.mean() * world.data_bits.mean() / lone_up_bps
        upload = upload - energy.weight_per_j / world.ues * send_j
        layer_cost = layer_cost - energy.weight_per_j / world.ues * energy.receive_w * layer_s
    if kind.private is not None:
        upload = jnp.where(kind.private > 0, jnp.inf, upload)
    several = world.families is not None and world.families.cache_bits is not None
    rent = (0.0 if prices.rent is None else prices.rent) * layer_cost if several else None
    return TaskCosts(local, upload, layer_cost, allowed, rent)


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
    count, levels = costs.local.shape
    family, layers = jnp.arange(count), jnp.arange(levels)
    own = family[:, None] == family
    if costs.rent is not None:
        # What costs more to keep than it is worth makes room.
        after = jnp.minimum(after + costs.rent * layers, after[..., :1])
    renewed = jnp.where(costs.allowed, costs.local + after[family, family], jnp.inf)
    if world.delta_download:
        missing = jnp.maximum(layers - layers[:, None], 0)
        grown = jnp.min(renewed[:, None] + costs.layer[:, None] * missing, axis=-1)
    else:
        grown = jnp.broadcast_to(jnp.min(renewed + costs.layer * layers, -1)[:, None], renewed.shape)
    hold = jnp.where(own[..., None] & (layers > 0), renewed[:, None], jnp.inf)
    fetch = jnp.where(own[..., None], grown[:, None], grown[:, :1, None])
    now = jnp.minimum(jnp.minimum(hold, fetch), costs.upload[:, None, None] + after)
    if costs.rent is not None:
        # Tasks of other families are others' costs, and leave what is held of this one.
        now = jnp.where(own[..., None], now, after)
    chance = world.devices.task_probability
    if chance is not None:
        now = chance * now + (1 - chance) * after
    stays = jnp.asarray(1.0) if world.families is None else world.families.persistence
    return stays * now + (1 - stays) * now.mean(0)


def _with_training(
    world: World,
    kind: Kind,
    prices: LaterPrices,
    retention: Float[Array, "families levels"],
    local: Float[Array, "families levels"],
    upload: Float[Array, "families"],
) -> tuple[Float[Array, "families levels"], Float[Array, "families"]]:
    """Costs with what training takes: time and energy on the UE, shared time at the server."""
    table = world.devices.computation
    if table is None or kind.seconds is None:
        return local, upload
    larger = (table.tflop_per_bit / table.tflop_per_bit[0])[:, None]
    here_s = kind.seconds * larger * retention
    if prices.background_s is not None:
        here_s = jnp.maximum(here_s - prices.background_s, 0.0)
    local = local - world.delay_weight_per_s * here_s
    if kind.joules is not None:
        local = local + kind.joules * larger * retention
    there_s = mean_tflop(world) * larger[:, 0] / table.server_tflops
    return local, upload - world.delay_weight_per_s * prices.upload * there_s


def _mean_complexity_factor(world: World) -> Float[Array, ""]:
    """Mean of g(c) over the range of complexities, by the midpoint rule."""
    low, high = world.complexity
    return complexity_factor(world, low + (high - low) * (jnp.arange(64) + 0.5) / 64).mean()
