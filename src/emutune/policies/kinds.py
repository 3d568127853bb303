"""The kinds of UE that a table of worths distinguishes: a grid over what sets UEs apart.

Axes are the channel gain, and what the world has of: seconds and joules of training, memory, privacy.
Gains, seconds and joules are read between the grid's points; memory counts as the largest point it reaches.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from emutune.policies.base import register_policy
from emutune.world import Observation, World
from emutune.world.devices import spread_quantile
from emutune.world.radio import gain_bounds

# Points of each axis; fewer gains where there are other axes as well.
_GAINS, _FEWER_GAINS = 9, 4
_SECONDS, _JOULES, _MEMORIES = 9, 5, 6


@register_policy
@dataclass(frozen=True)
class Kinds:
    """Points of each axis, rising; None where the world has no such axis.

    Attributes:
        log_gains: logarithms of the channel gain.
        log_seconds: logarithms of the seconds that training with a whole model takes the UE, with the first
            family's parameters and data of mean size.
        joules: what that training costs in energy, in units of reward.
        memory_bits: what the UE can hold.
        private: whether privacy is an axis.
    """

    private: bool = field(metadata={"static": True})
    log_gains: Float[Array, "gains"]
    log_seconds: Float[Array, "seconds"] | None = None
    joules: Float[Array, "joules"] | None = None
    memory_bits: Float[Array, "memories"] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Points of every axis that there is."""
        parts = (self.log_gains, self.log_seconds, self.joules, self.memory_bits)
        return (*(part.shape[0] for part in parts if part is not None), *([2] if self.private else []))


@dataclass(frozen=True)
class Kind:
    """One point of the grid, or all of them with a leading axis; None where the world has no such axis."""

    gain: Float[Array, "..."]
    seconds: Float[Array, "..."] | None
    joules: Float[Array, "..."] | None
    memory_bits: Float[Array, "..."] | None
    private: Float[Array, "..."] | None


def make_kinds(world: World) -> Kinds:
    """The grid of a world."""
    devices, energy = world.devices, world.devices.energy
    computes, prices = devices.computation is not None, energy is not None
    private, memory = devices.private_ues is not None, devices.memory_bits
    plain = not computes and not private and memory is None
    seconds = None
    if devices.computation is not None:
        slowest, fastest = devices.computation.device_tflops.bounds
        longest, shortest = (jnp.log(mean_tflop(world) / speed) for speed in (slowest, fastest))
        seconds = jnp.linspace(shortest, longest + 1e-6, _SECONDS)
    joules = None
    if prices and energy is not None and energy.compute_j_per_tflop is not None:
        least, most = energy.compute_j_per_tflop.bounds * mean_tflop(world)
        dear = energy.weight_per_j
        if energy.over_budget_weight_per_j is not None:
            dear = dear + energy.over_budget_weight_per_j
        cheap = -energy.weight_per_j * least / world.ues
        joules = jnp.linspace(
            cheap, jnp.maximum(-dear * most / world.ues, cheap * (1 + 1e-6)) + 1e-12, _JOULES
        )
    return Kinds(
        private=private,
        log_gains=_gain_grid(world, _GAINS if plain else _FEWER_GAINS),
        log_seconds=seconds,
        joules=joules,
        memory_bits=None
        if memory is None
        else spread_quantile(memory, jnp.arange(_MEMORIES) / (_MEMORIES - 1)),
    )


def every_kind(kinds: Kinds) -> Kind:
    """All points of the grid, one axis, the last of ``Kinds`` fastest."""
    private = jnp.arange(2.0) if kinds.private else None
    parts = (jnp.exp(kinds.log_gains), kinds.log_seconds, kinds.joules, kinds.memory_bits, private)
    there = [part for part in parts if part is not None]
    grid = iter([axis.ravel() for axis in jnp.meshgrid(*there, indexing="ij")])
    gain, seconds, joules, memory, own = (None if part is None else next(grid) for part in parts)
    assert gain is not None
    return Kind(gain, None if seconds is None else jnp.exp(seconds), joules, memory, own)


def locate(
    kinds: Kinds,
    world: World,
    observation: Observation,
    shadow_per_j: Float[Array, "ues"] | None = None,
) -> list[tuple[Int[Array, "ues"], Float[Array, "ues"]]]:
    """Which points stand for each UE, and how much each of them weighs; all weights of a UE sum to 1.

    Args:
        kinds: the grid.
        world: its world.
        observation: of a state (no batch axes).
        shadow_per_j: what a joule within the budget is worth later, times UEs.
    """
    device = observation.device
    places = [_between(kinds.log_gains, jnp.log(observation.previous_gain))]
    if kinds.log_seconds is not None and device.tflops is not None:
        places.append(_between(kinds.log_seconds, jnp.log(mean_tflop(world) / device.tflops)))
    if kinds.joules is not None and device.compute_w is not None and device.tflops is not None:
        energy = world.devices.energy
        assert energy is not None
        price = -energy.weight_per_j if shadow_per_j is None else shadow_per_j - energy.weight_per_j
        cost = price / world.ues * device.compute_w / device.tflops * mean_tflop(world)
        places.append(_between(kinds.joules, cost))
    if kinds.memory_bits is not None and device.memory_bits is not None:
        reached = jnp.searchsorted(kinds.memory_bits, device.memory_bits * (1 + 1e-6), side="right") - 1
        places.append([(jnp.clip(reached, 0, kinds.memory_bits.shape[0] - 1), None)])
    if kinds.private and device.private is not None:
        places.append([(device.private.astype(jnp.int32), None)])
    corners = []
    for picked in itertools.product(*places):
        point, weight = jnp.zeros(observation.complexity.shape, jnp.int32), None
        for length, (index, part) in zip(kinds.shape, picked, strict=True):
            point = point * length + index
            if part is not None:
                weight = part if weight is None else weight * part
        assert weight is not None
        corners.append((point, weight))
    return corners


def mean_tflop(world: World) -> Float[Array, ""]:
    """Operations of training with the first family's whole model, of data of mean size."""
    table = world.devices.computation
    assert table is not None
    return table.tflop_per_bit[0] * world.data_bits.mean()


def _between(
    points: Float[Array, "points"], values: Float[Array, "ues"]
) -> list[tuple[Int[Array, "ues"], Float[Array, "ues"] | None]]:
    """The two points around each value, with their weights."""
    spot = jnp.interp(values, points, jnp.arange(points.shape[0] * 1.0))
    below = jnp.clip(spot.astype(jnp.int32), 0, points.shape[0] - 2)
    part = spot - below
    return [(below, 1 - part), (below + 1, part)]


def _gain_grid(world: World, count: int) -> Float[Array, "gains"]:
    """Logarithms of gains from the farthest UE in deep fading to the nearest at its best."""
    weakest, strongest = jnp.log(gain_bounds(world))
    return jnp.linspace(weakest, strongest + 1e-6, count)
