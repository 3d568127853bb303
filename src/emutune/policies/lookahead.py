"""Price lookahead: the exact cost of the step at hand plus what each UE's cache is worth later.

The worth of a cache is a dynamic programme over one UE's own future, in which others exist only as
prices: an upload takes a share of its lone seconds off the fleet's time, a download another. The two shares
are found by search.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from emutune.policies.assignment import assign_by_rank, assign_exactly, list_choices
from emutune.policies.base import register_policy
from emutune.policies.joint import assign_jointly, improve, list_options
from emutune.policies.kinds import Kind, Kinds, every_kind, locate, make_kinds, mean_tflop
from emutune.policies.prices import lone_downlink_bps, step_prices
from emutune.scenario import Scenario
from emutune.world import Action, Device, Observation, World, possible_levels
from emutune.world.link import shared_rate_bps
from emutune.world.parameters import bits_of, layers_of
from emutune.world.quality import complexity_factor, curve_perplexity
from emutune.world.radio import downlink_gain_bounds, gain_bounds

# Beyond so many UEs, 3 to the power of N joint choices take too long.
EXACT_UES = 7
# Shares of the price beyond the budget that a joule within it may be worth.
_SHADOWS = (0.0, 0.1, 0.25, 0.5, 1.0)


@register_policy
@dataclass(frozen=True)
class Lookahead:
    """Decides by ``worth``, a table that ``plan_lookahead`` makes.

    Attributes:
        most: layers of the largest emulator of any family.
        exact: try all joint choices, or rank UEs; where UEs differ in more than their radio it is neither,
            but ``joint``.
        kinds: of UE, that the table distinguishes.
        worth: expected cost of all steps after one, by step, kind, family of the step's task, and family and
            layers of the emulator held after it.
    """

    most: int = field(metadata={"static": True})
    exact: bool = field(metadata={"static": True})
    kinds: Kinds
    worth: Float[Array, "tasks kinds families families levels"]

    @property
    def log_gains(self) -> Float[Array, "gains"]:
        """At which logarithms of the channel gain the table stands, rising."""
        return self.kinds.log_gains

    def decide(self, world: World, observation: Observation, key: Key[Array, ""]) -> Action:
        """See ``Policy.decide``."""
        if observation.complexity.ndim > 1:
            return jax.vmap(lambda one: self.decide(world, one, key))(observation)
        return self.choose(world, observation, *self.later(world, observation))

    def choose(
        self,
        world: World,
        observation: Observation,
        kept: Float[Array, "ues"],
        renewed: Float[Array, "ues levels"],
    ) -> Action:
        """The cheapest joint choice, given what each UE's cache is worth later."""
        prices = step_prices(world, observation, self.most)
        if jax.tree.leaves(world.devices):
            shadow = self.shadow_per_j(world, observation)
            chosen = assign_jointly(list_options(world, observation, prices, kept, renewed, shadow))
        elif self.exact:
            chosen = assign_exactly(world, observation, prices, list_choices(prices, kept, renewed))
        else:
            ranked = assign_by_rank(world, observation, prices, list_choices(prices, kept, renewed))
            options = list_options(world, observation, prices, kept, renewed, None)
            chosen, _ = improve(options, ranked)
        return Action(chosen.uploads, chosen.layers / layers_of(world, observation.family))

    def later(
        self, world: World, observation: Observation
    ) -> tuple[Float[Array, "ues"], Float[Array, "ues levels"]]:
        """Worth of the cache as it is, and of every emulator of the task's family."""
        own, held_family, layers = self._read(world, observation, self.shadow_per_j(world, observation))
        every = jnp.arange(layers.shape[0])
        family = jnp.zeros_like(layers) if observation.family is None else observation.family
        return own[every, held_family, layers], own[every, family]

    def shadow_per_j(self, world: World, observation: Observation) -> Float[Array, "ues"] | None:
        """What a joule of each UE's budget is worth later, times UEs; None where there is no budget.

        A budget with a price beyond it is as strict as the dearest joule that its UE would have to do without:
        among some prices it is the one at which later costs, less the budget's worth, are highest.
        """
        energy = world.devices.energy
        if energy is None or observation.spent_j is None or energy.over_budget_weight_per_j is None:
            return None
        assert energy.budget_j is not None
        left = jnp.maximum(energy.budget_j - observation.spent_j, 0.0)
        to_go = jnp.maximum(world.tasks * (1 - observation.progress), 1.0)
        values, every = [], jnp.arange(left.shape[0])
        prices = [-share * energy.over_budget_weight_per_j for share in _SHADOWS]
        for price in prices:
            shadow = jnp.broadcast_to(price, left.shape)
            own, held_family, layers = self._read(world, observation, shadow)
            # This step's part of what is left is not for later.
            values.append(own[every, held_family, layers] - price * left * (1 - 1 / to_go) / world.ues)
        return jnp.asarray(prices)[jnp.argmax(jnp.stack(values), axis=0)]

    def _read(
        self, world: World, observation: Observation, shadow_per_j: Float[Array, "ues"] | None
    ) -> tuple[Float[Array, "ues families levels"], Int[Array, "ues"], Int[Array, "ues"]]:
        """The table of each UE after this step, and family and layers of what it holds."""
        family, held_family, layers = held_by(world, observation)
        table = self.table_of(world, observation, present_step(world, observation), shadow_per_j)
        return table[jnp.arange(layers.shape[0]), family], held_family, layers

    def table_of(
        self,
        world: World,
        observation: Observation,
        step: Int[Array, ""],
        shadow_per_j: Float[Array, "ues"] | None,
    ) -> Float[Array, "ues families families levels"]:
        """The table of each UE after a step, by family of that step's task, and what is held after it."""
        table = self.worth[jnp.clip(step, 0, min(world.tasks, self.worth.shape[0]) - 1)]
        parts = [
            table[point] * weight[:, None, None, None]
            for point, weight in locate(self.kinds, world, observation, shadow_per_j)
        ]
        return reduce(jnp.add, parts)


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


def present_step(world: World, observation: Observation) -> Int[Array, ""]:
    """Which step of the episode is to be decided, from 0."""
    return jnp.round(observation.progress * world.tasks).astype(jnp.int32)


class LaterPrices(NamedTuple):
    """What others' use of what is shared makes of one UE's, in later steps.

    Attributes:
        upload: share of an upload's lone seconds, and of those of training at the server, that it costs.
        download: the same of a download.
        background_s: how long a step takes anyway: only what training on the UE takes beyond it is felt.
    """

    upload: Float[Array, ""]
    download: Float[Array, ""]
    background_s: Float[Array, ""] | None = None


def plan_lookahead(
    scenario: Scenario,
    world: World,
    upload_price: Float[Array, ""],
    download_price: Float[Array, ""],
    background_s: Float[Array, ""] | None = None,
    *,
    exact: bool | None = None,
) -> Lookahead:
    """The lookahead of a world, by a dynamic programme from the last task to the first.

    Args:
        scenario: says how many levels there are.
        world: the same as arrays.
        upload_price: share of an upload's lone seconds that it costs the fleet, later.
        download_price: the same of a download.
        background_s: seconds that a step takes anyway, where training takes time; 0 if not given.
        exact: try all joint choices; the default does for fleets of up to 7.
    """
    most = max(model.most for model in scenario.models)
    exact = scenario.fleet.ues <= EXACT_UES if exact is None else exact
    kinds = make_kinds(world)
    prices = LaterPrices(upload_price, download_price, background_s)
    worth = jax.vmap(lambda kind: _worth(world, most, Kind(**kind), prices))(vars(every_kind(kinds)))
    return Lookahead(most, exact, kinds, jnp.moveaxis(worth, 0, 1))


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
    """

    local: Float[Array, "families levels"]
    upload: Float[Array, "families"]
    layer: Float[Array, "families 1"]
    allowed: Bool[Array, "families levels"]


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
    return TaskCosts(local, upload, layer_cost, allowed)


def worth_before(
    world: World, costs: TaskCosts, after: Float[Array, "families families levels"]
) -> Float[Array, "families families levels"]:
    """Expected cost of a step and all that follow, from the worth after it.

    Args:
        world: the world.
        costs: of the step's task.
        after: cost of what follows the step, by family of its task, and family and layers held after it.

    Returns:
        The same for the step before.
    """
    count, levels = costs.local.shape
    family, layers = jnp.arange(count), jnp.arange(levels)
    own = family[:, None] == family
    renewed = jnp.where(costs.allowed, costs.local + after[family, family], jnp.inf)
    if world.delta_download:
        missing = jnp.maximum(layers - layers[:, None], 0)
        grown = jnp.min(renewed[:, None] + costs.layer[:, None] * missing, axis=-1)
    else:
        grown = jnp.broadcast_to(jnp.min(renewed + costs.layer * layers, -1)[:, None], renewed.shape)
    hold = jnp.where(own[..., None] & (layers > 0), renewed[:, None], jnp.inf)
    fetch = jnp.where(own[..., None], grown[:, None], grown[:, :1, None])
    now = jnp.minimum(jnp.minimum(hold, fetch), costs.upload[:, None, None] + after)
    chance = world.devices.task_probability
    if chance is not None:
        now = chance * now + (1 - chance) * after
    stays = jnp.asarray(1.0) if world.families is None else world.families.persistence
    return stays * now + (1 - stays) * now.mean(0)


def _worth(
    world: World, most: int, kind: Kind, prices: LaterPrices
) -> Float[Array, "tasks families families levels"]:
    """Expected cost of all later steps of one UE of a kind; the first axis is the step just served."""
    costs = task_costs(world, most, kind, prices)
    last = jnp.zeros((costs.local.shape[0], *costs.local.shape))
    _, worth = jax.lax.scan(
        lambda after, _: (worth_before(world, costs, after), after),
        last,
        None,
        length=world.tasks,
        reverse=True,
    )
    return worth


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
