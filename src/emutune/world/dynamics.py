"""The simulator: an episode's random draws, one pure ``reset`` and one pure ``step``.

What is random in an episode does not depend on what a policy does, so it is drawn first. Two policies
that meet the same key meet the same distances, gains, complexities and data sizes.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from emutune.step import (
    Charge,
    Plan,
    Situation,
    charge,
    empty_cache,
    possible_plan,
    put_in_cache,
    situation_of,
    usable_layers,
)
from emutune.world.channel import Channel
from emutune.world.devices import Devices, draw_devices
from emutune.world.draws import Draw, key_of, uniform
from emutune.world.parameters import World


class Episode(NamedTuple):
    """Everything random in one episode; None where a feature is off.

    ``gain``, ``downlink_gain`` and ``distance_m`` have one row more than there are tasks: row t is what is known
    before task t, row t + 1 holds during it.

    Attributes:
        downlink_gain: where the downlink has a gain of its own.
        distance_m: as the base station knows it, where UEs move.
    """

    gain: Float[Array, "rows ues"]
    complexity: Float[Array, "tasks ues"]
    data_bits: Float[Array, "tasks ues"]
    transmit_power_w: Float[Array, "ues"]
    family: Int[Array, "tasks ues"] | None = None
    devices: Devices = Devices()
    active: Bool[Array, "tasks ues"] | None = None
    downlink_gain: Float[Array, "rows ues"] | None = None
    distance_m: Float[Array, "rows ues"] | None = None


class Carried(NamedTuple):
    """What each UE carries from one step to the next; see ``Situation``."""

    held: Int[Array, "*batch ues families"]
    age: Int[Array, "*batch ues families"]
    spent_j: Float[Array, "*batch ues"]


class State(NamedTuple):
    """Where an episode stands: its draws, what each UE carries, and the step."""

    episode: Episode
    carried: Carried
    step: Int[Array, ""]


class Outcome(NamedTuple):
    """What a step did: the plan as far as it was possible, who changed emulators, and the charge."""

    plan: Plan
    switched: Bool[Array, "ues"]
    charge: Charge

    @property
    def reward(self) -> Float[Array, "*batch"]:
        """The reward of the step (Eq. 12)."""
        return -self.charge.total


def draw_episode(key: Key[Array, ""], world: World) -> Episode:
    """Draw everything random in one episode (sec. VI-A, D3, D8)."""
    shape = (world.tasks, world.ues)
    channel, transmit_power_w = draw_links(key, world)
    return Episode(
        gain=channel.gain,
        complexity=uniform(key_of(key, Draw.COMPLEXITY), world.complexity, shape),
        data_bits=uniform(key_of(key, Draw.DATA), world.data_bits, shape),
        transmit_power_w=transmit_power_w,
        family=world.families.draw(key_of(key, Draw.FAMILY), *shape),
        devices=draw_devices(key, world.devices, world.ues),
        active=world.devices.active.draw(key_of(key, Draw.ACTIVITY), shape),
        downlink_gain=channel.downlink_gain,
        distance_m=channel.way.get("timing_advance_m"),
    )


def draw_batch(key: Key[Array, ""], world: World, count: int) -> Episode:
    """A batch of episodes, leading axis: episodes."""
    return jax.vmap(draw_episode, (0, None))(jax.random.split(key, count), world)


def draw_links(key: Key[Array, ""], world: World) -> tuple[Channel, Float[Array, "ues"]]:
    """The channel of the episode of a key, and the transmit powers."""
    transmit_power_w = uniform(key_of(key, Draw.POWER), world.transmit_power_w, (world.ues,))
    return world.radio.draw(key, transmit_power_w, world.tasks + 1), transmit_power_w


def nothing_carried(world: World) -> Carried:
    """No UE holds an emulator (D10), and none has spent anything."""
    return Carried(*empty_cache(world.rules, world.ues), jnp.zeros(world.ues))


def reset(key: Key[Array, ""], world: World) -> State:
    """The start of an episode."""
    return State(draw_episode(key, world), nothing_carried(world), jnp.zeros((), jnp.int32))


def step(world: World, state: State, plan: Plan) -> tuple[State, Outcome]:
    """Serve the current task of every UE; the episode is over once ``state.step`` is ``world.tasks``."""
    episode, now = state.episode, state.step
    known = situation_at(world, episode, now, state.carried)
    carried, outcome = serve(world, during(episode, now, known), plan)
    return State(episode, carried, now + 1), outcome


def observe(world: World, state: State) -> Situation:
    """What is known before the state's step is decided."""
    return situation_at(world, state.episode, state.step, state.carried)


def situation_at(world: World, episode: Episode, now: Int[Array, ""], carried: Carried) -> Situation:
    """What is known before a step: the gains are those during the step before."""

    def row(rows: Array | None) -> Array | None:
        # What is off is an empty tree, and stays one.
        return jax.tree.map(lambda each: each[now], rows)

    def nearer(rows: Array) -> Array:
        return rows[jnp.maximum(now - 1, 0)] - rows[now]

    return situation_of(
        progress=now / world.tasks,
        family=row(episode.family),
        complexity=episode.complexity[now],
        data_bits=episode.data_bits[now],
        active=row(episode.active),
        transmit_power_w=episode.transmit_power_w,
        gain=episode.gain[now],
        downlink_gain=row(episode.downlink_gain),
        distance_m=row(episode.distance_m),
        approach_m=jax.tree.map(nearer, episode.distance_m),
        **episode.devices._asdict(),
        **carried._asdict(),
    )


def during(episode: Episode, now: Int[Array, ""], known: Situation) -> Situation:
    """The same situation at the gains that hold during the step."""
    gain = episode.gain[now + 1]
    down = episode.downlink_gain
    return known._replace(gain=gain, downlink_gain=gain if down is None else down[now + 1])


def serve(world: World, situation: Situation, plan: Plan) -> tuple[Carried, Outcome]:
    """One step at the true gains: what is carried on, and what was charged (Eq. 1 to 9, 12; D13 to D16)."""
    rules = world.rules
    plan = possible_plan(rules, situation, plan)
    charged = charge(rules, situation, plan)
    switched = (plan.layers > 0) & (plan.layers != usable_layers(situation))
    held, age = put_in_cache(rules, situation.held, situation.age, situation.family, plan.layers)
    spent_j = situation.spent_j + charged.taken.joules
    return Carried(held, age, spent_j), Outcome(plan, switched, charged)
