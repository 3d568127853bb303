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

from emutune.world.cache import Cache, empty_cache, updated_cache, usable_layers
from emutune.world.devices import Device, draw_activity, draw_devices, for_every_step
from emutune.world.families import draw_families
from emutune.world.link import download_delay_s, upload_delay_s
from emutune.world.parameters import World, bits_of, layers_of
from emutune.world.possible import mean_over_tasks, possible_case, possible_levels, trains_locally
from emutune.world.quality import task_perplexity
from emutune.world.radio import Channel, draw_channel, timing_advance_m
from emutune.world.spending import energy_cost, energy_j, training_s


class Episode(NamedTuple):
    """Everything random in one episode.

    ``gain`` has one row more than there are tasks: row t is the gain that is known before task t, row
    t + 1 the gain during it. ``family`` is None in a world of one foundation model, ``active`` (who has a
    task) where everybody always has one, ``downlink_gain`` where both links have one gain, and
    ``distance_m``, as the base station knows it, where UEs do not move.
    """

    gain: Float[Array, "rows ues"]
    complexity: Float[Array, "tasks ues"]
    data_bits: Float[Array, "tasks ues"]
    transmit_power_w: Float[Array, "ues"]
    family: Int[Array, "tasks ues"] | None = None
    device: Device = Device()
    active: Bool[Array, "tasks ues"] | None = None
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
    device: Device = Device()
    active: Bool[Array, "ues"] | None = None
    previous_downlink_gain: Float[Array, "ues"] | None = None
    downlink_gain: Float[Array, "ues"] | None = None
    distance_m: Float[Array, "ues"] | None = None
    approach_m: Float[Array, "ues"] | None = None


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

    ``retention`` is the whole-layer level chosen for training on the UE. ``at_server`` says who trained there,
    which is not what was wished where that is impossible. ``training_s`` is the part of the delay that is no
    transfer; it is None where computation is off, as ``energy_j`` is where energy is.
    """

    retention: Float[Array, "ues"]
    switched: Bool[Array, "ues"]
    delay_s: Float[Array, "ues"]
    perplexity: Float[Array, "ues"]
    step_delay_s: Float[Array, ""]
    reward: Float[Array, ""]
    at_server: Bool[Array, "ues"]
    training_s: Float[Array, "ues"] | None = None
    energy_j: Float[Array, "ues"] | None = None


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
        device=draw_devices(key, world.devices, ues),
        active=draw_activity(key, world.devices, steps, ues),
        downlink_gain=channel.downlink_gain,
        distance_m=timing_advance_m(world, channel.path),
    )


def draw_batch(key: Key[Array, ""], world: World, count: int) -> Episode:
    """A batch of episodes, leading axis: episodes."""
    return jax.vmap(draw_episode, (0, None))(jax.random.split(key, count), world)


def draw_links(key: Key[Array, ""], world: World) -> tuple[Channel, Float[Array, "ues"]]:
    """The channel of the episode of a key, and the transmit powers."""
    keys = jax.random.split(key, 5)
    transmit_power_w = _uniform(keys[4], world.transmit_power_w, (world.ues,))
    return draw_channel(key, keys[0], keys[1], world, transmit_power_w), transmit_power_w


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
        device=episode.device,
        active=None if episode.active is None else episode.active[now],
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
        device=for_every_step(episode.device, episode.complexity.shape[0]),
        active=episode.active,
        **_radio(episode, lambda rows, later: rows[later : rows.shape[0] - 1 + later]),
    )


def serve(world: World, cache: Cache, task: Task, action: Action) -> tuple[Cache, Outcome]:
    """The physics of one step: new caches and what was charged (Eq. 1 to 9, 12; D13 to D16)."""
    family, device, active = task.family, task.device, task.active
    at_server = possible_case(world, family, device, active, action.at_server)
    local = trains_locally(active, at_server)
    held = usable_layers(cache, family)
    layers = choose_layers(world, action.retention, held, family, device)
    retention = layers / layers_of(world, family)
    switched = local & (layers != held)
    downloads, bits = _sent(world, family, layers, held, switched)
    upload_s = upload_delay_s(world, task.data_bits, task.transmit_power_w, task.gain, at_server)
    downlink_gain = task.gain if task.downlink_gain is None else task.downlink_gain
    download_s = download_delay_s(world, bits, downlink_gain, downloads)
    delay_s = upload_s + download_s
    trained_s = training_s(world, task.data_bits, family, device, retention, at_server, local)
    delay_s = delay_s if trained_s is None else delay_s + trained_s
    perplexity = task_perplexity(world, retention, task.complexity, at_server, family)
    perplexity = perplexity if active is None else jnp.where(active, perplexity, 0.0)
    step_delay_s = jnp.max(delay_s)
    reward = world.perplexity_weight * mean_over_tasks(active, perplexity)
    reward = reward + world.delay_weight_per_s * step_delay_s
    spent_j, used_j = cache.spent_j, None
    if world.devices.energy is not None:
        on_ue_s = None if trained_s is None else jnp.where(local, trained_s, 0.0)
        used_j = energy_j(world.devices.energy, device, task.transmit_power_w, upload_s, download_s, on_ue_s)
        reward = reward - jnp.mean(energy_cost(world.devices.energy, spent_j, used_j))
        spent_j = None if spent_j is None else spent_j + used_j
    outcome = Outcome(
        retention, switched, delay_s, perplexity, step_delay_s, reward, at_server, trained_s, used_j
    )
    after = updated_cache(world, cache, family, layers, at_server if active is None else ~local)
    return after._replace(spent_j=spent_j), outcome


def choose_layers(
    world: World,
    retention: Float[Array, "*batch ues"],
    held: Int[Array, "*batch ues"],
    family: Int[Array, "*batch ues"] | None = None,
    device: Device = Device(),  # noqa: B008 - an immutable tuple
) -> Int[Array, "*batch ues"]:
    """Whole layers for a wanted retention: the nearest level that is possible, or the held one (D9, D15).

    Args:
        world: the world.
        retention: what is wanted.
        held: layers of the usable emulator of each UE, 0 for none.
        family: the family of each task, if there are several.
        device: of each UE; its memory limits the layers.
    """
    low, high = possible_levels(world, family, device)
    all_layers = layers_of(world, family)
    layers = jnp.clip(jnp.round(retention * all_layers).astype(jnp.int32), low, high)
    distance = jnp.abs(retention - held / all_layers)
    return jnp.where((held > 0) & (distance < world.hold_tolerance), held, layers)


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
