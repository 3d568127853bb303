"""Price lookahead: the exact cost of the step at hand plus what each UE's cache is worth later.

The worth of a cache is a dynamic programme over one UE's own future, in which others exist only as
prices: an upload takes a share of its lone seconds off the fleet's time, a download another. The two shares
are found by search.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from emutune.policies.assignment import assign_by_rank, assign_exactly, list_choices
from emutune.policies.base import register_policy
from emutune.policies.prices import lone_downlink_bps, step_prices
from emutune.scenario import Scenario
from emutune.world import Action, Observation, World
from emutune.world.link import shared_rate_bps
from emutune.world.parameters import bits_of, layers_of, levels_of
from emutune.world.quality import complexity_factor, curve_perplexity
from emutune.world.radio import downlink_gain_bounds, gain_bounds

# Beyond so many UEs, 3 to the power of N joint choices take too long.
EXACT_UES = 7
_GAINS = 9


@register_policy
@dataclass(frozen=True)
class Lookahead:
    """Decides by ``worth``, a table that ``plan_lookahead`` makes.

    Attributes:
        most: layers of the largest emulator of any family.
        exact: try all joint choices, or rank UEs.
        log_gains: at which logarithms of the channel gain the table stands, rising.
        worth: expected cost of all steps after one, by step, gain, family of the step's task, and family and
            layers of the emulator held after it.
    """

    most: int = field(metadata={"static": True})
    exact: bool = field(metadata={"static": True})
    log_gains: Float[Array, "gains"]
    worth: Float[Array, "tasks gains families families levels"]

    def decide(self, world: World, observation: Observation, key: Key[Array, ""]) -> Action:
        """See ``Policy.decide``."""
        if observation.complexity.ndim > 1:
            return jax.vmap(lambda one: self.decide(world, one, key))(observation)
        prices = step_prices(world, observation, self.most)
        kept, renewed = self.later(world, observation)
        choices = list_choices(prices, kept, renewed)
        assign = assign_exactly if self.exact else assign_by_rank
        chosen = assign(world, observation, prices, choices)
        return Action(chosen.uploads, chosen.layers / layers_of(world, observation.family))

    def later(
        self, world: World, observation: Observation
    ) -> tuple[Float[Array, "ues"], Float[Array, "ues levels"]]:
        """Worth of the cache as it is, and of every emulator of the task's family."""
        nothing = jnp.zeros(observation.complexity.shape, jnp.int32)
        family = nothing if observation.family is None else observation.family
        held_family = nothing if observation.held_family is None else observation.held_family
        held = (
            observation.cached_retention if observation.held_retention is None else observation.held_retention
        )
        whole = layers_of(world, None if observation.held_family is None else held_family)
        layers = jnp.round(held * whole).astype(jnp.int32)
        step = jnp.clip(jnp.round(observation.progress * world.tasks).astype(jnp.int32), 0, world.tasks - 1)
        table = self.worth[jnp.minimum(step, self.worth.shape[0] - 1)]
        spot = jnp.interp(
            jnp.log(observation.previous_gain), self.log_gains, jnp.arange(self.log_gains.shape[0] * 1.0)
        )
        below = jnp.clip(spot.astype(jnp.int32), 0, self.log_gains.shape[0] - 2)
        part = (spot - below)[:, None, None]
        own = table[below, family] * (1 - part) + table[below + 1, family] * part
        every = jnp.arange(family.shape[0])
        return own[every, held_family, layers], own[every, family]


def plan_lookahead(
    scenario: Scenario,
    world: World,
    upload_price: Float[Array, ""],
    download_price: Float[Array, ""],
    *,
    exact: bool | None = None,
) -> Lookahead:
    """The lookahead of a world, by a dynamic programme from the last task to the first.

    Args:
        scenario: says how many levels there are.
        world: the same as arrays.
        upload_price: share of an upload's lone seconds that it costs the fleet, later.
        download_price: the same of a download.
        exact: try all joint choices; the default does for fleets of up to 7.
    """
    most = max(model.most for model in scenario.models)
    exact = scenario.fleet.ues <= EXACT_UES if exact is None else exact
    log_gains = _gain_grid(world)
    worth = jax.vmap(_worth, (None, None, 0, None, None))(
        world, most, jnp.exp(log_gains), upload_price, download_price
    )
    return Lookahead(most, exact, log_gains, jnp.moveaxis(worth, 0, 1))


def _gain_grid(world: World) -> Float[Array, "gains"]:
    """Logarithms of gains from the farthest UE in deep fading to the nearest at its best."""
    weakest, strongest = jnp.log(gain_bounds(world))
    return jnp.linspace(weakest, strongest + 1e-6, _GAINS)


def _downlink_gain(world: World, gain: Float[Array, ""]) -> Float[Array, ""]:
    """The downlink's gain that goes with one of the uplink: as far between its bounds, in decibels."""
    if world.trace is None:
        return gain
    ends = jnp.log(gain_bounds(world))
    return jnp.exp(jnp.interp(jnp.log(gain), ends, jnp.log(downlink_gain_bounds(world))))


def _worth(
    world: World,
    most: int,
    gain: Float[Array, ""],
    upload_price: Float[Array, ""],
    download_price: Float[Array, ""],
) -> Float[Array, "tasks families families levels"]:
    """Expected cost of all later steps of one UE at one gain; the first axis is the step just served."""
    count = 1 if world.families is None else world.families.model_bits.shape[0]
    family = jnp.arange(count)
    each = None if world.families is None else family
    layers = jnp.arange(most + 1)
    all_layers = jnp.broadcast_to(layers_of(world, each), (count,))[:, None]
    low, high = (jnp.broadcast_to(bound, (count,))[:, None] for bound in levels_of(world, each))
    allowed = (layers >= low) & (layers <= high)
    scale = -world.perplexity_weight / world.ues * _mean_complexity_factor(world)
    of_levels = None if each is None else jnp.broadcast_to(family[:, None], (count, most + 1))
    local = scale * curve_perplexity(world, layers / all_layers, of_levels)
    server = scale * curve_perplexity(world, jnp.ones(count), each)
    lone_up_bps = shared_rate_bps(
        world.uplink_bandwidth_hz,
        world.transmit_power_w.mean(),
        gain,
        world.noise_w_per_hz,
        jnp.asarray(1.0),
        world.ergodic_rate,
    )
    upload = server - world.delay_weight_per_s * upload_price * world.data_bits.mean() / lone_up_bps
    layer_s = (
        jnp.broadcast_to(bits_of(world, each), (count,))[:, None]
        / all_layers
        / lone_downlink_bps(world, _downlink_gain(world, gain))
    )
    layer_cost = -world.delay_weight_per_s * download_price * layer_s
    stays = jnp.asarray(1.0) if world.families is None else world.families.persistence
    own = family[:, None] == family

    def before(after: Array, _: None) -> tuple[Array, Array]:
        """Cost of a step and all later ones by task, held family and layers, from the worth after it."""
        renewed = jnp.where(allowed, local + after[family, family], jnp.inf)
        if world.delta_download:
            missing = jnp.maximum(layers - layers[:, None], 0)
            grown = jnp.min(renewed[:, None] + layer_cost[:, None] * missing, axis=-1)
        else:
            grown = jnp.broadcast_to(jnp.min(renewed + layer_cost * layers, -1)[:, None], renewed.shape)
        hold = jnp.where(own[..., None] & (layers > 0), renewed[:, None], jnp.inf)
        fetch = jnp.where(own[..., None], grown[:, None], grown[:, :1, None])
        now = jnp.minimum(jnp.minimum(hold, fetch), upload[:, None, None] + after)
        worth = stays * now + (1 - stays) * now.mean(0)
        return worth, after

    last = jnp.zeros((count, count, most + 1))
    _, worth = jax.lax.scan(before, last, None, length=world.tasks, reverse=True)
    return worth


def _mean_complexity_factor(world: World) -> Float[Array, ""]:
    """Mean of g(c) over the range of complexities, by the midpoint rule."""
    low, high = world.complexity
    return complexity_factor(world, low + (high - low) * (jnp.arange(64) + 0.5) / 64).mean()
