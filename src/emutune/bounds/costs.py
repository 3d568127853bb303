"""What each decision of one realised episode costs at least, read from a step's own options in double precision."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from emutune.scenario import Scenario
from emutune.step import (
    Rules,
    Situation,
    Taken,
    at_server,
    build_rules,
    on_ue,
    possible_case,
    possible_levels,
    take_at_server,
    take_on_ue,
)
from emutune.step.charges import delay_cost, own_cost
from emutune.world import Episode, World, build_world, nothing_carried, situation_at
from emutune.world.dynamics import during

# The simulator adds up what is cached in single precision, and lets a little more than the whole cache pass.
_ROOM_GUARD = 1e-5
# Of so many emulators at most it is said that they do not fit together, by their sizes alone.
_COUNTED = 8


class Joules(NamedTuple):
    """Joules of each decision, at the least; neutral where energy or its budget is off.

    Attributes:
        upload: of an upload that has the link to itself.
        local: of training on the UE with a slot's emulator.
        sent: of receiving what ``Costs.sent_s`` is of.
        budget: of each UE; 0 where there is none.
        over_cost: of a joule beyond the budget, on top of what every joule costs.
    """

    upload: Float[np.ndarray, "tasks ues"]
    local: Float[np.ndarray, "tasks ues slots"]
    sent: Float[np.ndarray, "tasks ues slots"]
    budget: float
    over_cost: float


class Room(NamedTuple):
    """What a UE may hold together: of each group of slots one at most, and what fits.

    A cache of one emulator is one group without limits; a cache of several has a group for each family.

    Attributes:
        group: of each slot.
        task_group: of each task's slots.
        limits: what each slot's emulator takes of something that a UE has once; the first is the cache itself.
    """

    group: Int[np.ndarray, "slots"]
    task_group: Int[np.ndarray, "tasks ues"]
    limits: Float[np.ndarray, "limits slots"]


class Costs(NamedTuple):
    """Coefficients of one episode's programme: UEs n, tasks t, slots s; delays in seconds.

    A slot is one level of one family; those of a family are next to each other, its levels rising. What is off is
    neutral: everybody has a task and may upload it, and training takes no time.

    Attributes:
        server_cost: of a task at the server: all that a UE pays alone there, but for delay.
        local_cost: of a task on the UE with a slot's emulator, without the download.
        sent_cost: of sending a slot's emulator.
        sent_s: of that, alone; with delta download, of the layers that it has more than the slot before.
        lone_upload_s: from the first bit to the end of training, alone; ``shared_upload_s`` is what each task
            at the server adds for every one that is there.
        training_s: with a slot's emulator on the UE.
        active: whether there is a task.
        may_upload: whether the server may train it.
        usable: whether a slot may be used for the task.
        family: of each slot.
        joules: of each decision.
        room: of a cache.
        cost_per_s: of the step's delay.
        delta: whether only missing layers are sent.
        devices: whether UEs differ in more than their radio.
        rules: of the world, in double precision.
    """

    server_cost: Float[np.ndarray, "tasks ues"]
    local_cost: Float[np.ndarray, "tasks ues slots"]
    sent_cost: Float[np.ndarray, "tasks ues slots"]
    sent_s: Float[np.ndarray, "tasks ues slots"]
    lone_upload_s: Float[np.ndarray, "tasks ues"]
    shared_upload_s: Float[np.ndarray, "tasks ues"]
    training_s: Float[np.ndarray, "tasks ues slots"]
    active: Bool[np.ndarray, "tasks ues"]
    may_upload: Bool[np.ndarray, "tasks ues"]
    usable: Bool[np.ndarray, "tasks ues slots"]
    family: Int[np.ndarray, "slots"]
    joules: Joules
    room: Room
    cost_per_s: float
    delta: bool
    devices: bool
    rules: Rules


def episode_costs(scenario: Scenario, episodes: Episode) -> Iterator[Costs]:
    """What each decision costs at least in each of a batch of episodes, leading axis the episodes."""
    world, slots = build_world(scenario), _list_slots(scenario)
    with jax.enable_x64(True):
        rules = build_rules(scenario, jnp.float64)
        limits = _room_limits(rules, slots)
        cost_per_s = float(delay_cost(rules, jnp.ones(())))
    for index in range(len(episodes.gain)):
        with jax.enable_x64(True):
            episode = jax.tree.map(lambda part: part[index], episodes)  # noqa: B023 - called at once
            by_task, joules, family, over_cost = jax.device_get(_read_tasks(world, rules, slots, episode))
        over_cost = float(over_cost.flat[0])
        yield Costs(
            **by_task,
            family=slots.family,
            joules=Joules(**joules, budget=float(rules.budget_j) if over_cost else 0.0, over_cost=over_cost),
            room=Room(slots.family * rules.several, family * rules.several, limits),
            cost_per_s=cost_per_s,
            delta=scenario.delta_download,
            devices=world.has_devices,
            rules=rules,
        )


class _Slots(NamedTuple):
    """Family and layers of each slot, and of the slot before it in its family; 0 if it is the first."""

    family: Int[np.ndarray, "slots"]
    layers: Int[np.ndarray, "slots"]
    before: Int[np.ndarray, "slots"]


def _list_slots(scenario: Scenario) -> _Slots:
    every = [
        (family, layers, layers - 1 if layers > model.fewest else 0)
        for family, model in enumerate(scenario.models)
        for layers in range(model.fewest, model.most + 1)
    ]
    return _Slots(*np.array(every).T)


def _room_limits(rules: Rules, slots: _Slots) -> Float[np.ndarray, "limits slots"]:
    """Sizes that together are at most the cache's, and of those of more than a k-th of it less than k."""
    if not rules.several:
        return np.zeros((0, len(slots.family)))
    bits = np.asarray(rules.models.bits)[slots.family, slots.layers]
    share = bits / (float(rules.cache_bits) * (1 + _ROOM_GUARD))
    counted = [(share * k > 1) / (k - 1.0) for k in range(2, min(rules.models.families, _COUNTED) + 1)]
    return np.stack([share, *(row for row in counted if row.any())])


@jax.jit
def _read_tasks(world: World, rules: Rules, slots: _Slots, episode: Episode) -> tuple[Any, ...]:
    """Fields of ``Costs`` and of ``Joules``, each task's family, and what a joule beyond the budget costs, by task."""
    # An episode's excess over a budget is charged once, not step by step: here no joule is beyond it.
    within = replace(rules, budget_j=jnp.asarray(jnp.inf))

    def read(now: Array) -> tuple[Any, ...]:
        drawn = during(episode, now, situation_at(world, episode, now, nothing_carried(world)))
        exact = jax.tree.map(_double, drawn)
        # What is possible is asked as the simulator asks it, to the last bit.
        may_upload = possible_case(world.rules, drawn, jnp.ones_like(drawn.active))
        low, high = (part[:, None] for part in possible_levels(world.rules, drawn))
        fits = (low <= slots.layers) & (slots.layers <= high)
        sharers = jnp.maximum(jnp.sum(may_upload), 1).astype(exact.gain.dtype)
        alone, crowded = (
            take_at_server(rules, exact, at_server(rules, exact, number))
            for number in (jnp.ones_like(sharers), sharers)
        )
        local, local_cost, sent, sent_cost = _read_slots(within, exact, slots)
        fields = {
            "server_cost": _paid(within, exact, alone),
            "local_cost": local_cost,
            "sent_cost": sent_cost,
            "sent_s": sent.delay_s,
            "lone_upload_s": alone.delay_s,
            "shared_upload_s": crowded.delay_s / sharers,
            "training_s": local.delay_s,
            "active": drawn.active,
            "may_upload": may_upload,
            "usable": fits & (drawn.family[:, None] == slots.family),
        }
        joules = {"upload": alone.joules, "local": local.joules, "sent": sent.joules}
        return fields, joules, drawn.family, _cost_over_budget(rules, exact)

    return jax.vmap(read)(jnp.arange(world.tasks))


def _read_slots(rules: Rules, situation: Situation, slots: _Slots) -> tuple[Taken, Array, Taken, Array]:
    """Training on the UE with each slot and what it costs, and sending each slot; slots along the last axis."""
    lone = jnp.ones(())

    def read(slot: _Slots) -> tuple[Taken, Array, Taken, Array]:
        own = jnp.arange(rules.models.families) == slot.family
        # To a UE that holds the slot before, that is, if only what is missing is sent.
        asked = situation._replace(
            family=jnp.full_like(situation.family, slot.family),
            held=jnp.where(own, slot.before, jnp.zeros_like(situation.held)),
        )
        whole = on_ue(rules, asked, jnp.full_like(situation.family, slot.layers))
        nothing = jnp.zeros_like(whole.download_s)
        local = take_on_ue(rules, asked, whole._replace(download_s=nothing), lone)
        sent = take_on_ue(rules, asked, whole._replace(perplexity=nothing, training_s=nothing), lone)
        return local, _paid(rules, asked, local), sent, _paid(rules, asked, sent)

    return jax.vmap(read, out_axes=-1)(jax.tree.map(jnp.asarray, slots))


def _paid(rules: Rules, situation: Situation, taken: Taken) -> Float[Array, "ues"]:
    return jnp.where(situation.active, own_cost(rules, situation, taken), 0.0)


def _cost_over_budget(rules: Rules, situation: Situation) -> Float[Array, "ues"]:
    """What a joule costs more beyond the budget."""
    joule = jnp.ones_like(situation.gain)
    taken = Taken(*(jnp.zeros_like(joule),) * len(Taken._fields))._replace(joules=joule)
    within, beyond = (
        own_cost(replace(rules, budget_j=jnp.asarray(budget)), situation, taken) for budget in (jnp.inf, 0.0)
    )
    return beyond - within


def _double(part: Array) -> Array:
    return part.astype(jnp.float64) if jnp.issubdtype(part.dtype, jnp.floating) else part
