"""The simulator: an episode's random draws, one pure ``reset`` and one pure ``step``.

What is random in an episode does not depend on what a policy does, so it is drawn first. Two policies
that meet the same key meet the same distances, gains, complexities and data sizes.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from emutune.world.channel import draw_fading, path_gain
from emutune.world.link import download_delay_s, upload_delay_s
from emutune.world.parameters import World
from emutune.world.quality import task_perplexity


class Episode(NamedTuple):
    """Everything random in one episode.

    ``gain`` has one row more than there are tasks: row t is the gain that is known before task t, row
    t + 1 the gain during it.
    """

    gain: Float[Array, "rows ues"]
    complexity: Float[Array, "tasks ues"]
    data_bits: Float[Array, "tasks ues"]
    transmit_power_w: Float[Array, "ues"]


class Task(NamedTuple):
    """The part of an episode that belongs to one step, one value per UE."""

    previous_gain: Float[Array, "ues"]
    gain: Float[Array, "ues"]
    complexity: Float[Array, "ues"]
    data_bits: Float[Array, "ues"]
    transmit_power_w: Float[Array, "ues"]


class State(NamedTuple):
    """Where an episode stands: its draws, the layers each UE caches (0: none, D10), and the step."""

    episode: Episode
    cached_layers: Int[Array, "ues"]
    step: Int[Array, ""]


class Action(NamedTuple):
    """Train at the server (z) or on the UE, and the retention (E) of the emulator for training there."""

    at_server: Bool[Array, "*batch ues"]
    retention: Float[Array, "*batch ues"]


class Outcome(NamedTuple):
    """What a step charged, per UE and in total.

    ``retention`` is the whole-layer level chosen for training on the UE.
    """

    retention: Float[Array, "ues"]
    switched: Bool[Array, "ues"]
    delay_s: Float[Array, "ues"]
    perplexity: Float[Array, "ues"]
    step_delay_s: Float[Array, ""]
    reward: Float[Array, ""]


def draw_episode(key: Key[Array, ""], world: World) -> Episode:
    """Draw everything random in one episode (sec. VI-A, D3, D8)."""
    keys = jax.random.split(key, 5)
    steps, ues = world.tasks, world.ues
    distance_m = _uniform(keys[0], world.distance_m, (ues,))
    fading = draw_fading(keys[1], world.fading_quantiles, (steps + 1, ues))
    return Episode(
        gain=path_gain(distance_m, world.path_loss_exponent) * fading,
        complexity=_uniform(keys[2], world.complexity, (steps, ues)),
        data_bits=_uniform(keys[3], world.data_bits, (steps, ues)),
        transmit_power_w=_uniform(keys[4], world.transmit_power_w, (ues,)),
    )


def empty_cache(world: World) -> Int[Array, "ues"]:
    """No UE holds an emulator (D10)."""
    return jnp.zeros(world.ues, jnp.int32)


def reset(key: Key[Array, ""], world: World) -> State:
    """The start of an episode."""
    return State(draw_episode(key, world), empty_cache(world), jnp.zeros((), jnp.int32))


def step(world: World, state: State, action: Action) -> tuple[State, Outcome]:
    """Serve the current task of every UE; the episode is over once ``state.step`` is ``world.tasks``."""
    cached, outcome = serve(world, state.cached_layers, current_task(state), action)
    return State(state.episode, cached, state.step + 1), outcome


def current_task(state: State) -> Task:
    """The tasks that wait at the state's step."""
    episode, now = state.episode, state.step
    return Task(
        previous_gain=episode.gain[now],
        gain=episode.gain[now + 1],
        complexity=episode.complexity[now],
        data_bits=episode.data_bits[now],
        transmit_power_w=episode.transmit_power_w,
    )


def all_tasks(episode: Episode) -> Task:
    """The tasks of all steps, with a leading time axis: what ``jax.lax.scan`` wants."""
    return Task(
        previous_gain=episode.gain[:-1],
        gain=episode.gain[1:],
        complexity=episode.complexity,
        data_bits=episode.data_bits,
        transmit_power_w=jnp.broadcast_to(episode.transmit_power_w, episode.complexity.shape),
    )


def serve(
    world: World, cached_layers: Int[Array, "ues"], task: Task, action: Action
) -> tuple[Int[Array, "ues"], Outcome]:
    """The physics of one step: new caches and what was charged (Eq. 1 to 9, 12)."""
    local = ~action.at_server
    layers = choose_layers(world, action.retention, cached_layers)
    retention = layers / world.model_layers
    switched = local & (layers != cached_layers)
    upload_s = upload_delay_s(world, task.data_bits, task.transmit_power_w, task.gain, action.at_server)
    download_s = download_delay_s(world, retention, task.gain, switched)
    delay_s = upload_s + download_s
    perplexity = task_perplexity(world, retention, task.complexity, action.at_server)
    step_delay_s = jnp.max(delay_s)
    reward = world.perplexity_weight * jnp.mean(perplexity) + world.delay_weight_per_s * step_delay_s
    outcome = Outcome(retention, switched, delay_s, perplexity, step_delay_s, reward)
    return jnp.where(local, layers, cached_layers), outcome


def choose_layers(
    world: World, retention: Float[Array, "*batch ues"], cached_layers: Int[Array, "*batch ues"]
) -> Int[Array, "*batch ues"]:
    """Whole layers for a wanted retention: the nearest level inside the bounds, or the held one (D9)."""
    low, high = world.level_bounds
    layers = jnp.clip(jnp.round(retention * world.model_layers).astype(jnp.int32), low, high)
    distance = jnp.abs(retention - cached_layers / world.model_layers)
    return jnp.where((cached_layers > 0) & (distance < world.hold_tolerance), cached_layers, layers)


def _uniform(key: Key[Array, ""], bounds: Float[Array, "2"], shape: tuple[int, ...]) -> Float[Array, "..."]:
    return jax.random.uniform(key, shape, minval=bounds[0], maxval=bounds[1])
