"""The kinds of UE that a table of worths distinguishes: a grid over what sets UEs apart.

Axes are the channel gain, seconds and joules of training, memory, and privacy; one that the world does not have is
of one neutral point. Gains, seconds and joules are read between the grid's points; memory counts as the largest
point it reaches.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from emutune.policies.base import policy_pytree
from emutune.step import Situation
from emutune.world import World
from emutune.world.devices import Same, Some, SpreadLaw

# Points of each axis; fewer gains where there are other axes as well.
_GAINS, _FEWER_GAINS = 9, 4
_SECONDS, _JOULES, _MEMORIES = 9, 5, 6


@policy_pytree
@dataclass(frozen=True)
class Kinds:
    """Points of each axis, rising.

    Attributes:
        log_gains: logarithms of the channel gain.
        log_seconds: logarithms of the seconds that training with a whole model takes the UE, with the first
            family's parameters and data of mean size.
        joules: what that training costs in energy, in units of reward.
        memory_bits: what the UE can hold.
        private: whether data may not leave it.
    """

    log_gains: Float[Array, "gains"]
    log_seconds: Float[Array, "seconds"]
    joules: Float[Array, "joules"]
    memory_bits: Float[Array, "memories"]
    private: Float[Array, "privacies"]

    @property
    def axes(self) -> tuple[Float[Array, "points"], ...]:
        """Every axis, in order; the last varies fastest."""
        return (self.log_gains, self.log_seconds, self.joules, self.memory_bits, self.private)


class Kind(NamedTuple):
    """One point of the grid, or several with a leading axis; see ``Kinds``."""

    gain: Float[Array, "..."]
    seconds: Float[Array, "..."]
    joules: Float[Array, "..."]
    memory_bits: Float[Array, "..."]
    private: Float[Array, "..."]


def make_kinds(world: World) -> Kinds:
    """The grid of a world."""
    laws, rules, tflop = world.devices, world.rules, mean_tflop(world)
    longest, shortest = jnp.log(tflop / laws.tflops.bounds)
    least, most = laws.j_per_tflop.bounds * tflop
    cheap = -rules.weight_per_j * least / world.ues
    dear = -(rules.weight_per_j + rules.over_budget_weight_per_j) * most / world.ues
    dear = jnp.maximum(dear, cheap * (1 + 1e-6))
    log_seconds = jnp.linspace(shortest, longest + 1e-6, _points(laws.tflops, _SECONDS))
    joules = jnp.linspace(cheap, dear + 1e-12, _points(laws.j_per_tflop, _JOULES))
    memory_bits = laws.memory_bits.quantile(jnp.linspace(0.0, 1.0, _points(laws.memory_bits, _MEMORIES)))
    private = jnp.arange(_points(laws.private, 2) * 1.0)
    others = (log_seconds, memory_bits, private)
    gains = _GAINS if all(axis.shape[0] == 1 for axis in others) else _FEWER_GAINS
    return Kinds(_gain_grid(world, gains), log_seconds, joules, memory_bits, private)


def every_kind(kinds: Kinds) -> Kind:
    """All points of the grid, one axis, the last of ``Kinds`` fastest."""
    gain, seconds, *rest = (axis.ravel() for axis in jnp.meshgrid(*kinds.axes, indexing="ij"))
    return Kind(jnp.exp(gain), jnp.exp(seconds), *rest)


def kind_of(world: World, situation: Situation, shadow_per_j: Float[Array, "ues"]) -> Kind:
    """Every UE as a kind of its own.

    Args:
        world: the world.
        situation: no batch axes.
        shadow_per_j: what a joule within the budget is worth later, times UEs.
    """
    tflop = mean_tflop(world)
    price = (shadow_per_j - world.rules.weight_per_j) / world.ues
    return Kind(
        gain=situation.gain,
        seconds=tflop / situation.tflops,
        joules=price * situation.compute_w / situation.tflops * tflop,
        memory_bits=situation.memory_bits,
        private=situation.private.astype(jnp.float32),
    )


def locate(kinds: Kinds, own: Kind) -> list[tuple[Int[Array, "ues"], Float[Array, "ues"]]]:
    """Which points stand for each UE, and how much each of them weighs; all weights of a UE sum to 1."""
    reached = jnp.searchsorted(kinds.memory_bits, own.memory_bits * (1 + 1e-6), side="right") - 1
    one = jnp.ones(own.gain.shape)
    places = [
        _between(kinds.log_gains, jnp.log(own.gain)),
        _between(kinds.log_seconds, jnp.log(own.seconds)),
        _between(kinds.joules, own.joules),
        [(jnp.clip(reached, 0, kinds.memory_bits.shape[0] - 1), one)],
        [(jnp.minimum(own.private.astype(jnp.int32), kinds.private.shape[0] - 1), one)],
    ]
    corners = []
    for picked in itertools.product(*places):
        point, weight = jnp.zeros(own.gain.shape, jnp.int32), one
        for axis, (index, part) in zip(kinds.axes, picked, strict=True):
            point, weight = point * axis.shape[0] + index, weight * part
        corners.append((point, weight))
    return corners


def _points(law: SpreadLaw | Some | Same, count: int) -> int:
    """Where all are the same, one point stands for them."""
    return count if law.varies else 1


def mean_tflop(world: World) -> Float[Array, ""]:
    """Operations of training with the first family's whole model, of data of mean size."""
    return world.rules.models.whole_tflop_per_bit[0] * world.data_bits.mean()


def _between(
    points: Float[Array, "points"], values: Float[Array, "ues"]
) -> list[tuple[Int[Array, "ues"], Float[Array, "ues"]]]:
    """The two points around each value, with their weights; one point stands for every value."""
    if points.shape[0] == 1:
        return [(jnp.zeros(values.shape, jnp.int32), jnp.ones(values.shape))]
    spot = jnp.interp(values, points, jnp.arange(points.shape[0] * 1.0))
    below = jnp.clip(spot.astype(jnp.int32), 0, points.shape[0] - 2)
    part = spot - below
    return [(below, 1 - part), (below + 1, part)]


def _gain_grid(world: World, count: int) -> Float[Array, "gains"]:
    """Logarithms of gains from the farthest UE in deep fading to the nearest at its best."""
    weakest, strongest = jnp.log(world.radio.gain_bounds)
    return jnp.linspace(weakest, strongest + 1e-6, count)
