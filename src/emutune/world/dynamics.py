"""The simulator: an episode's random draws, one pure ``reset`` and one pure ``step``.

What is random in an episode does not depend on what a policy does, so it is drawn first. Two policies
that meet the same key meet the same distances, gains, complexities and data sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from emutune.world.families import draw_families
from emutune.world.link import download_delay_s, upload_delay_s
from emutune.world.parameters import World, bits_of, layers_of, levels_of
from emutune.world.quality import task_perplexity
from emutune.world.radio import Channel, draw_channel, timing_advance_m


class Episode(NamedTuple):
    """Everything random in one episode.

    ``gain`` has one row more than there are tasks: row t is the gain that is known before task t, row
    t + 1 the gain during it. ``family`` is None in a world of one foundation model, ``downlink_gain`` where
    both links have one gain, and ``distance_m``, as the base station knows it, where UEs do not move.
    """

    gain: Float[Array, "rows ues"]
    complexity: Float[Array, "tasks ues"]
    data_bits: Float[Array, "tasks ues"]
    transmit_power_w: Float[Array, "ues"]
    family: Int[Array, "tasks ues"] | None = None
    downlink_gain: Float[Array, "rows ues"] | None = None
    distance_m: Float[Array, "rows ues"] | None = None


class Task(NamedTuple):
    """The part of an episode that belongs to one step, one value per UE.

    Attributes:
        approach_m: by how much a UE came nearer since the task before, as the base station knows it.
    """

    previous_gain: Float[Array, "ues"]
    gain: Float[Array, "ues"]
    complexity: Float[Array, "ues"]
    data_bits: Float[Array, "ues"]
    transmit_power_w: Float[Array, "ues"]
    family: Int[Array, "ues"] | None = None
    previous_downlink_gain: Float[Array, "ues"] | None = None
    downlink_gain: Float[Array, "ues"] | None = None
    distance_m: Float[Array, "ues"] | None = None
    approach_m: Float[Array, "ues"] | None = None


class Cache(NamedTuple):
    """The one emulator that each UE holds: its layers (0: none, D10), and its family if there are several."""

    layers: Int[Array, "*batch ues"]
    family: Int[Array, "*batch ues"] | None = None


class State(NamedTuple):
    """Where an episode stands: its draws, what each UE caches, and the step."""

    episode: Episode
    cache: Cache
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
    channel, transmit_power_w = draw_links(key, world)
    return Episode(
        gain=channel.gain,
        complexity=_uniform(keys[2], world.complexity, (steps, ues)),
        data_bits=_uniform(keys[3], world.data_bits, (steps, ues)),
        transmit_power_w=transmit_power_w,
        family=world.families and draw_families(jax.random.fold_in(key, 5), world.families, steps, ues),
        downlink_gain=channel.downlink_gain,
        distance_m=timing_advance_m(world, channel.path),
    )


def draw_links(key: Key[Array, ""], world: World) -> tuple[Channel, Float[Array, "ues"]]:
    """The channel of the episode of a key, and the transmit powers."""
    keys = jax.random.split(key, 5)
    transmit_power_w = _uniform(keys[4], world.transmit_power_w, (world.ues,))
    return draw_channel(key, keys[0], keys[1], world, transmit_power_w), transmit_power_w


def empty_cache(world: World) -> Cache:
    """No UE holds an emulator (D10)."""
    nothing = jnp.zeros(world.ues, jnp.int32)
    return Cache(nothing, None if world.families is None else nothing)


def usable_layers(cache: Cache, family: Int[Array, "*batch ues"] | None) -> Int[Array, "*batch ues"]:
    """Layers of the emulator that each UE holds for its task's family; 0 if it holds none of that family."""
    if cache.family is None or family is None:
        return cache.layers
    return jnp.where(cache.family == family, cache.layers, 0)


def reset(key: Key[Array, ""], world: World) -> State:
    """The start of an episode."""
    return State(draw_episode(key, world), empty_cache(world), jnp.zeros((), jnp.int32))


def step(world: World, state: State, action: Action) -> tuple[State, Outcome]:
    """Serve the current task of every UE; the episode is over once ``state.step`` is ``world.tasks``."""
    cache, outcome = serve(world, state.cache, current_task(state), action)
    return State(state.episode, cache, state.step + 1), outcome


def current_task(state: State) -> Task:
    """The tasks that wait at the state's step."""
    episode, now = state.episode, state.step
    return Task(
        previous_gain=episode.gain[now],
        gain=episode.gain[now + 1],
        complexity=episode.complexity[now],
        data_bits=episode.data_bits[now],
        transmit_power_w=episode.transmit_power_w,
        family=None if episode.family is None else episode.family[now],
        **_radio(episode, lambda rows, later: rows[now + later]),
    )


def all_tasks(episode: Episode) -> Task:
    """The tasks of all steps, with a leading time axis: what ``jax.lax.scan`` wants."""
    return Task(
        previous_gain=episode.gain[:-1],
        gain=episode.gain[1:],
        complexity=episode.complexity,
        data_bits=episode.data_bits,
        transmit_power_w=jnp.broadcast_to(episode.transmit_power_w, episode.complexity.shape),
        family=episode.family,
        **_radio(episode, lambda rows, later: rows[later : rows.shape[0] - 1 + later]),
    )


def serve(world: World, cache: Cache, task: Task, action: Action) -> tuple[Cache, Outcome]:
    """The physics of one step: new caches and what was charged (Eq. 1 to 9, 12)."""
    local = ~action.at_server
    held = usable_layers(cache, task.family)
    layers = choose_layers(world, action.retention, held, task.family)
    retention = layers / layers_of(world, task.family)
    switched = local & (layers != held)
    downloads, bits = _sent(world, task.family, layers, held, switched)
    upload_s = upload_delay_s(world, task.data_bits, task.transmit_power_w, task.gain, action.at_server)
    downlink_gain = task.gain if task.downlink_gain is None else task.downlink_gain
    download_s = download_delay_s(world, bits, downlink_gain, downloads)
    delay_s = upload_s + download_s
    perplexity = task_perplexity(world, retention, task.complexity, action.at_server, task.family)
    step_delay_s = jnp.max(delay_s)
    reward = world.perplexity_weight * jnp.mean(perplexity) + world.delay_weight_per_s * step_delay_s
    outcome = Outcome(retention, switched, delay_s, perplexity, step_delay_s, reward)
    return updated_cache(cache, task.family, layers, action.at_server), outcome


def choose_layers(
    world: World,
    retention: Float[Array, "*batch ues"],
    held: Int[Array, "*batch ues"],
    family: Int[Array, "*batch ues"] | None = None,
) -> Int[Array, "*batch ues"]:
    """Whole layers for a wanted retention: the nearest level inside the bounds, or the held one (D9).

    Args:
        world: the world.
        retention: what is wanted.
        held: layers of the usable emulator of each UE, 0 for none.
        family: the family of each task, if there are several.
    """
    low, high = levels_of(world, family)
    all_layers = layers_of(world, family)
    layers = jnp.clip(jnp.round(retention * all_layers).astype(jnp.int32), low, high)
    distance = jnp.abs(retention - held / all_layers)
    return jnp.where((held > 0) & (distance < world.hold_tolerance), held, layers)


def updated_cache(
    cache: Cache,
    family: Int[Array, "*batch ues"] | None,
    layers: Int[Array, "*batch ues"],
    at_server: Bool[Array, "*batch ues"],
) -> Cache:
    """Training on a UE leaves its emulator in the cache, training at the server changes nothing."""
    after = jnp.where(at_server, cache.layers, layers)
    if cache.family is None or family is None:
        return Cache(after)
    return Cache(after, jnp.where(at_server, cache.family, family))


def _radio(episode: Episode, rows_of: Callable[[Array, int], Array]) -> dict[str, Array]:
    """The fields of a task that only some radios have; ``rows_of`` takes rows and how many tasks later."""
    found = {}
    if episode.downlink_gain is not None:
        found["previous_downlink_gain"] = rows_of(episode.downlink_gain, 0)
        found["downlink_gain"] = rows_of(episode.downlink_gain, 1)
    if episode.distance_m is not None:
        before = jnp.concatenate([episode.distance_m[:1], episode.distance_m[:-1]])
        found["distance_m"] = rows_of(episode.distance_m, 0)
        found["approach_m"] = rows_of(before - episode.distance_m, 0)
    return found


def _sent(
    world: World,
    family: Int[Array, "ues"] | None,
    layers: Int[Array, "ues"],
    held: Int[Array, "ues"],
    switched: Bool[Array, "ues"],
) -> tuple[Bool[Array, "ues"], Float[Array, "ues"]]:
    """Which UEs are sent layers, and how many bits those are."""
    missing = layers
    if world.delta_download:
        missing = jnp.maximum(layers - held, 0)
        switched = switched & (missing > 0)
    return switched, missing / layers_of(world, family) * bits_of(world, family)


def _uniform(key: Key[Array, ""], bounds: Float[Array, "2"], shape: tuple[int, ...]) -> Float[Array, "..."]:
    return jax.random.uniform(key, shape, minval=bounds[0], maxval=bounds[1])
