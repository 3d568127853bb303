"""What networks see of each UE (sec. IV-A): one table of named features, in the order in which they are stacked."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from emutune.step import Situation, possible_levels, retention_of, usable_layers
from emutune.step.cache import cache_share, other_layers
from emutune.step.models import look_up
from emutune.world.mobility import TIMING_ADVANCE_M
from emutune.world.parameters import World


class Feature(NamedTuple):
    """One number of each UE, about -1 to 1.

    Attributes:
        name: by which it is found.
        unit: of what it is made from.
        low: its lowest value up to rounding; fading leaves gains without any.
        high: its highest.
        column: its values.
        is_on: whether a world has it.
        carried: whether actions change it.
    """

    name: str
    unit: str
    low: float
    high: float
    column: Callable[[World, Situation], Float[Array, "*batch ues"]]
    is_on: Callable[[World], bool] = lambda world: True
    carried: bool = False


def features_of(world: World) -> tuple[Feature, ...]:
    """The features of a world."""
    return tuple(feature for feature in FEATURES if feature.is_on(world))


def feature_index(name: str) -> int:
    """Where a feature of s1, which every world has, is among its features."""
    return [feature.name for feature in FEATURES[: len(S1)]].index(name)


def ue_features(world: World, situation: Situation) -> Float[Array, "*batch ues features"]:
    """The features of each UE."""
    return jnp.stack([feature.column(world, situation) for feature in features_of(world)], axis=-1)


def task_features(world: World, situation: Situation) -> Float[Array, "*batch ues features"]:
    """The features that no action changes; 0 in place of the others."""
    nothing = jnp.zeros(situation.complexity.shape)
    columns = [
        nothing if feature.carried else feature.column(world, situation) for feature in features_of(world)
    ]
    return jnp.stack(columns, axis=-1)


def with_carried(
    world: World, situation: Situation, known: Float[Array, "*batch ues features"]
) -> Float[Array, "*batch ues features"]:
    """``task_features`` with the features that actions change filled in: those of ``ue_features``."""
    for index, feature in enumerate(features_of(world)):
        if feature.carried:
            known = known.at[..., index].set(feature.column(world, situation))
    return known


def progress_feature(situation: Situation) -> Float[Array, "*batch"]:
    """Progress through the episode, from -1 to 1."""
    return 2 * situation.progress - 1


def cached_retention(world: World, situation: Situation) -> Float[Array, "*batch ues"]:
    """Retention of the emulator that each UE holds for its task's family; 0 for none."""
    return retention_of(world.rules.models, situation.family, usable_layers(situation))


def other_retention(world: World, situation: Situation) -> Float[Array, "*batch ues"]:
    """The retention held of another family than the task's, the largest where there are several; 0 for none."""
    return jnp.max(other_layers(situation) / world.rules.models.layers, axis=-1)


def _gain(world: World, situation: Situation) -> Array:
    # Gains vary over decades, so they enter as logarithms, scaled by the path loss at the fleet's nearest
    # and farthest distance and by fading up to three standard normal scores either way.
    return _centred(jnp.log(situation.gain), jnp.log(world.radio.gain_bounds))


def _downlink_gain(world: World, situation: Situation) -> Array:
    return _centred(jnp.log(situation.downlink_gain), jnp.log(world.radio.downlink_gain_bounds))


def _of_tasks(situation: Situation, values: Array) -> Array:
    """What is no task has no complexity and no data."""
    return jnp.where(situation.active, values, 0.0)


def _distance(world: World, situation: Situation) -> Array:
    return _centred(situation.distance_m, world.radio.place.distance_m)


def _approach(world: World, situation: Situation) -> Array:
    return situation.approach_m / (world.radio.place.stride_m + TIMING_ADVANCE_M)


def _cached_retention(world: World, situation: Situation) -> Array:
    return _scaled(world, cached_retention(world, situation))


def _other_retention(world: World, situation: Situation) -> Array:
    return _scaled(world, other_retention(world, situation))


def _cache_share(world: World, situation: Situation) -> Array:
    return cache_share(world.rules, situation.held)


def _budget_left(world: World, situation: Situation) -> Array:
    # Below 0: what is spent beyond it.
    return jnp.maximum(1 - situation.spent_j / world.rules.budget_j, -1.0)


def _model_size(world: World, situation: Situation) -> Array:
    whole_bits = world.rules.models.whole_bits
    return look_up(whole_bits / whole_bits.max(), situation.family)


def _model_quality(world: World, situation: Situation) -> Array:
    whole = world.rules.models.whole_perplexity
    return look_up(whole / whole.max(), situation.family)


def _speed(world: World, situation: Situation) -> Array:
    return _centred(jnp.log(situation.tflops), jnp.log(world.devices.tflops.bounds))


def _whole_training(world: World, situation: Situation) -> Array:
    """Seconds of this task with the whole model, as a logarithm over their range."""
    per_bit = world.rules.models.whole_tflop_per_bit
    seconds = look_up(per_bit, situation.family) * situation.data_bits / situation.tflops
    slowest, fastest = world.devices.tflops.bounds
    quickest = jnp.log(per_bit.min() * world.data_bits[0] / fastest)
    longest = jnp.log(per_bit.max() * world.data_bits[1] / slowest)
    return _centred(jnp.log(seconds), jnp.stack([quickest, longest]))


def _joules(world: World, situation: Situation) -> Array:
    ends = world.devices.j_per_tflop.quantile(jnp.asarray([0.0, 1.0]))
    return _centred(situation.compute_w / situation.tflops, ends)


def _largest_emulator(world: World, situation: Situation) -> Array:
    low, high = possible_levels(world.rules, situation)
    largest = jnp.where(high < low, 0, high)
    return _scaled(world, retention_of(world.rules.models, situation.family, largest))


def _scaled(world: World, retention: Array) -> Array:
    return retention / world.rules.retention_bounds[1]


def _signed(which: Array) -> Array:
    return jnp.where(which, 1.0, -1.0)


def _centred(values: Float[Array, "*batch"], bounds: Float[Array, "2"]) -> Float[Array, "*batch"]:
    """Map the bounds to -1 and 1; an interval of one point maps to 0."""
    half_width = (bounds[1] - bounds[0]) / 2
    return (values - (bounds[0] + half_width)) / jnp.maximum(half_width, 1e-6 * jnp.abs(bounds[1]) + 1e-12)


def _several_families(world: World) -> bool:
    return world.rules.models.families > 1


_FREE = (-math.inf, math.inf)
_SIGNED = (-1.0, 1.0)
_SHARE = (0.0, 1.0)

# The state s1 of the paper, which every world has.
S1 = (
    Feature("gain", "dB", *_FREE, _gain),
    Feature("complexity", "1", *_SIGNED, lambda w, s: _of_tasks(s, _centred(s.complexity, w.complexity))),
    Feature("data", "bit", *_SIGNED, lambda w, s: _of_tasks(s, _centred(s.data_bits, w.data_bits))),
    Feature("cached_retention", "1", *_SHARE, _cached_retention, carried=True),
)
FEATURES = (
    *S1,
    Feature("other_retention", "1", *_SHARE, _other_retention, _several_families, carried=True),
    Feature("cache_share", "1", *_SHARE, _cache_share, lambda w: w.rules.several, carried=True),
    Feature("budget_left", "1", *_SIGNED, _budget_left, lambda w: "budget" in w.rules.terms, carried=True),
    Feature("model_size", "bit", *_SHARE, _model_size, _several_families),
    Feature("model_quality", "1", *_SHARE, _model_quality, _several_families),
    Feature("downlink_gain", "dB", *_FREE, _downlink_gain, lambda w: not w.radio.reciprocal),
    Feature("distance", "m", *_SIGNED, _distance, lambda w: w.radio.place.moves),
    Feature("approach", "m", *_SIGNED, _approach, lambda w: w.radio.place.moves),
    Feature("speed", "TFLOP/s", *_SIGNED, _speed, lambda w: w.rules.trains_in_time),
    Feature("whole_training", "s", *_SIGNED, _whole_training, lambda w: w.rules.trains_in_time),
    Feature("operation_energy", "J/TFLOP", *_SIGNED, _joules, lambda w: w.devices.j_per_tflop.varies),
    Feature("largest_emulator", "1", *_SHARE, _largest_emulator, lambda w: w.devices.memory_bits.varies),
    Feature(
        "may_upload", "1", *_SIGNED, lambda w, s: _signed(~s.private), lambda w: w.devices.private.varies
    ),
    Feature("active", "1", *_SIGNED, lambda w, s: _signed(s.active), lambda w: w.devices.active.varies),
)
