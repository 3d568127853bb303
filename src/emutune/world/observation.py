"""What the agents see before they decide (sec. IV-A)."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from emutune.world.channel import fading_at_scores
from emutune.world.dynamics import State, Task, current_task
from emutune.world.parameters import World


class Observation(NamedTuple):
    """The state s1 in physical units, and how far the episode is; any leading batch axes.

    The gain is that of the previous task: the gain during the coming one is not known yet.
    """

    previous_gain: Float[Array, "*batch ues"]
    complexity: Float[Array, "*batch ues"]
    data_bits: Float[Array, "*batch ues"]
    cached_retention: Float[Array, "*batch ues"]
    progress: Float[Array, "*batch"]


def observe(world: World, state: State) -> Observation:
    """The observation of a state."""
    return observe_task(world, state.cached_layers, current_task(state), state.step)


def observe_task(
    world: World, cached_layers: Int[Array, "*batch ues"], task: Task, step: Int[Array, ""]
) -> Observation:
    """The observation of caches and a waiting task; ``progress`` is step / tasks, from 0 to 1."""
    return Observation(
        previous_gain=task.previous_gain,
        complexity=task.complexity,
        data_bits=task.data_bits,
        cached_retention=cached_layers / world.model_layers,
        progress=step / world.tasks,
    )


def ue_features(world: World, observation: Observation) -> Float[Array, "*batch ues 4"]:
    """Features of each UE in the order of s1 (gain, complexity, data, cached retention), about -1 to 1."""
    return jnp.concatenate(
        [
            task_features(world, observation),
            cache_feature(world, observation.cached_retention)[..., None],
        ],
        axis=-1,
    )


def task_features(world: World, observation: Observation) -> Float[Array, "*batch ues 3"]:
    """The features that no action changes: gain, complexity, data.

    Gains vary over decades, so they enter as logarithms, scaled by the path loss at the fleet's nearest
    and farthest distance and by fading up to three standard normal scores either way.
    """
    strongest, weakest = world.distance_m**-world.path_loss_exponent
    faded = fading_at_scores(world.fading_quantiles, jnp.asarray([-3.0, 3.0]))
    gain_bounds = jnp.log(jnp.stack([weakest, strongest]) * faded)
    return jnp.stack(
        [
            _centred(jnp.log(observation.previous_gain), gain_bounds),
            _centred(observation.complexity, world.complexity),
            _centred(observation.data_bits, world.data_bits),
        ],
        axis=-1,
    )


def cache_feature(world: World, cached_retention: Float[Array, "*batch ues"]) -> Float[Array, "*batch ues"]:
    """The cached retention, from 0 to 1."""
    return cached_retention / world.retention_bounds[1]


def progress_feature(observation: Observation) -> Float[Array, "*batch"]:
    """Progress through the episode, from -1 to 1."""
    return 2 * observation.progress - 1


def _centred(values: Float[Array, "*batch"], bounds: Float[Array, "2"]) -> Float[Array, "*batch"]:
    """Map the bounds to -1 and 1; an interval of one point maps to 0."""
    half_width = (bounds[1] - bounds[0]) / 2
    return (values - (bounds[0] + half_width)) / jnp.maximum(half_width, 1e-6 * jnp.abs(bounds[1]) + 1e-12)
