"""The cheapest joint choice of a step where UEs differ in more than their radio.

Every choice has its exact cost: the slowest UE's transfer and training, shared links, the shared server,
joules. A good choice is found among many that come of a deadline for the step, then improved one UE
at a time until no single change helps.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from emutune.policies.assignment import Assignment
from emutune.policies.prices import Prices, upload_s
from emutune.world import Observation, World, possible_case
from emutune.world.spending import energy_cost

# Deadlines, counts of uploaders, prices of a lone download's second in costs of a second of the step's delay,
# how many choices are improved, of counts far apart and of the cheapest, and how long. Large fleets try fewer,
# as in ``assignment``.
_LARGE = 64
_DEADLINES = {False: 16, True: 8}
_COUNTS = 33
_SECOND_PRICES = (0.0, 1.0)
_FAR_APART = {False: 9, True: 0}
_CHEAPEST = {False: 2, True: 3}
_ROUNDS = 48
# A choice that does not exist costs more than any that does, and still adds up.
_NEVER = 1e6


class Options(NamedTuple):
    """Every UE's choices: to train with k layers, or to upload; ``_NEVER`` where one does not exist.

    Attributes:
        local: cost of training with k layers, later steps included, delay and energy left out.
        upload: the same of uploading.
        download_s: seconds that the layers take alone on the downlink; 0 where nothing has to be sent.
        training_s: of training with k layers.
        upload_s: seconds from the data's first bit to the end of training, by the number of uploaders.
        joules: price lists of energy; None where energy costs nothing.
        per_s: cost of a second of the step's delay.
    """

    local: Float[Array, "ues levels"]
    upload: Float[Array, "ues"]
    download_s: Float[Array, "ues levels"]
    training_s: Float[Array, "ues levels"]
    upload_s: Float[Array, "counts ues"]
    joules: Joules | None
    per_s: Float[Array, ""]


class Joules(NamedTuple):
    """What energy costs each UE: powers, what is left of its budget, and the price of what is left."""

    world: World
    upload_j: Float[Array, "counts ues"]
    receive_w: Float[Array, ""]
    compute_w: Float[Array, "ues"]
    spent_j: Float[Array, "ues"] | None
    shadow_per_j: Float[Array, "ues"] | None

    def cost(self, more_j: Float[Array, "*batch ues"]) -> Float[Array, "*batch ues"]:
        """Cost of joules spent now, what they are missed for later included."""
        energy = self.world.devices.energy
        assert energy is not None
        cost = energy_cost(energy, self.spent_j, more_j)
        if self.shadow_per_j is not None and self.spent_j is not None and energy.budget_j is not None:
            left = jnp.maximum(energy.budget_j - self.spent_j, 0.0)
            cost = cost + self.shadow_per_j * jnp.minimum(more_j, left)
        return cost / self.world.ues


def list_options(
    world: World,
    observation: Observation,
    prices: Prices,
    kept: Float[Array, "ues"],
    renewed: Float[Array, "ues levels"],
    shadow_per_j: Float[Array, "ues"] | None,
) -> Options:
    """Options of every UE.

    Args:
        world: the world.
        observation: of the step.
        prices: of the step.
        kept: expected cost of all later steps if the cache stays as it is.
        renewed: the same if the UE then holds k layers of its task's family.
        shadow_per_j: what a joule within the budget is worth later, times UEs.
    """
    ues, levels = prices.local.shape
    layer = jnp.arange(levels)
    held = layer == prices.held[:, None]
    local = jnp.where(prices.allowed | (held & (prices.held > 0)[:, None]), prices.local + renewed, _NEVER)
    download_s = jnp.where(held, 0.0, prices.download_s)
    training_s = jnp.zeros_like(local) if prices.training_s is None else prices.training_s
    everyone = jnp.ones(ues, bool)
    may = possible_case(world, observation.family, observation.device, observation.active, everyone)
    upload = jnp.where(may, prices.server + kept, _NEVER)
    if observation.active is not None:
        # Without a task there is one choice, which costs nothing: no layers.
        idle = ~observation.active[:, None]
        local = jnp.where(idle, jnp.where(layer == 0, kept[:, None], _NEVER), local)
        download_s, training_s = (jnp.where(idle, 0.0, part) for part in (download_s, training_s))
    counts = jnp.arange(ues + 1.0)
    sending_s = upload_s(world, observation, counts)
    whole_s = sending_s
    if prices.server_s is not None:
        whole_s = sending_s + jnp.maximum(counts, 1.0)[:, None] * prices.server_s
    joules = None
    energy = world.devices.energy
    if energy is not None:
        compute_w = observation.device.compute_w
        joules = Joules(
            world,
            upload_j=observation.transmit_power_w * sending_s,
            receive_w=energy.receive_w,
            compute_w=jnp.zeros(ues) if compute_w is None else compute_w,
            spent_j=observation.spent_j,
            shadow_per_j=shadow_per_j,
        )
    return Options(local, upload, download_s, training_s, whole_s, joules, prices.per_s)


def assign_jointly(options: Options) -> Assignment:
    """A joint choice that no change of a single UE's makes cheaper, up to the limit of rounds.

    From one beginning that would often be a choice that only several changes together make cheaper: a slow UE
    stays at home because others crowd the server. So there is one beginning for each of some counts of
    uploaders, besides the cheapest, and the cheapest end is taken.
    """
    ends, costs = jax.vmap(lambda start: improve(options, start))(_from_deadlines(options))
    best = jnp.argmin(costs)
    return Assignment(ends.uploads[best], ends.layers[best])


def joint_cost(
    options: Options, uploads: Bool[Array, "*batch ues"], layers: Int[Array, "*batch ues"]
) -> Float[Array, "*batch"]:
    """Exact cost of joint choices, later steps included."""
    every = np.arange(options.upload.shape[0])
    count = jnp.sum(uploads, axis=-1)
    download_s = jnp.where(uploads, 0.0, options.download_s[every, layers])
    training_s = jnp.where(uploads, 0.0, options.training_s[every, layers])
    loading = jnp.sum(download_s > 0, axis=-1, keepdims=True)
    receiving_s = loading * download_s
    there_s = jnp.where(uploads, options.upload_s[count], 0.0)
    slowest_s = jnp.max(jnp.maximum(there_s, receiving_s + training_s), axis=-1)
    apart = jnp.where(uploads, options.upload, options.local[every, layers])
    if options.joules is not None:
        own = options.joules
        here_j = own.receive_w * receiving_s + own.compute_w * training_s
        apart = apart + own.cost(jnp.where(uploads, own.upload_j[count], here_j))
    return jnp.sum(apart, axis=-1) + options.per_s * slowest_s


def _from_deadlines(options: Options) -> Assignment:
    """The cheapest choices that come of a deadline, the downlink's load and price, and a count of uploaders.

    With deadline, load and price settled, each UE has a best way to train at home in time. UEs are ranked by
    what a second of their upload saves, and every count of uploaders is tried at the exact cost.
    """
    ues, _ = options.local.shape
    large = ues > _LARGE
    guesses = itertools.product(sorted({1, -(-ues // 4), -(-ues // 2), ues}), _SECOND_PRICES)
    loads, prices = jnp.asarray(list(guesses), jnp.float32).T[..., None, None]
    takes_s = loads * options.download_s + options.training_s
    exists = options.local < _NEVER / 2
    lone = options.local + _lone_energy(options, loads) + prices * options.per_s * options.download_s
    longest = jnp.max(jnp.where(exists, takes_s, 0.0))
    shortest = jnp.max(jnp.min(jnp.where(exists, takes_s[:1], jnp.inf), axis=-1).clip(max=longest)) * 0.5
    shares = jnp.linspace(0.0, 1.0, _DEADLINES[large])
    deadlines = shortest * (jnp.maximum(longest, 1e-9) / jnp.maximum(shortest, 1e-9)) ** shares * (1 + 1e-6)
    fits = takes_s <= deadlines[:, None, None, None]
    priced = jnp.where(fits & exists, lone, _NEVER)
    # Where nothing is in time, what is soonest.
    soonest = jnp.argmin(jnp.where(exists, takes_s, jnp.inf), axis=-1)
    layers = jnp.where(priced.min(-1) < _NEVER / 2, jnp.argmin(priced, axis=-1), soonest)
    stay = priced.min(-1)
    upload = options.upload
    if options.joules is not None:
        upload = upload + options.joules.cost(options.joules.upload_j[1])
    order = jnp.argsort(jnp.argsort((upload - stay) / options.upload_s[1], axis=-1), axis=-1)
    counts = np.unique(np.linspace(0, ues, min(ues + 1, _COUNTS)).round().astype(int))
    uploads = (order[..., None, :] < counts[:, None]) & (options.upload < _NEVER / 2)
    # Where no emulator fits there is only the server.
    uploads = uploads | ~exists.any(-1)
    every = jnp.broadcast_to(layers[..., None, :], uploads.shape)
    # One axis of counts, one of everything else.
    by_count = [jnp.moveaxis(part, -2, 0).reshape(len(counts), -1, ues) for part in (uploads, every)]
    costs = joint_cost(options, *by_count)
    best = jnp.argmin(costs, axis=1)
    apart = np.linspace(0, len(counts) - 1, min(len(counts), _FAR_APART[large])).round().astype(int)
    kept = jnp.concatenate([np.unique(apart), jnp.argsort(costs.min(axis=1))[: _CHEAPEST[large]]])
    number = jnp.arange(len(counts))
    return Assignment(*(part[number, best][kept] for part in by_count))


def _lone_energy(options: Options, loads: Float[Array, "loads 1 1"]) -> Float[Array, "..."]:
    if options.joules is None:
        return jnp.zeros((1, 1, 1))
    own = options.joules
    spent = own.receive_w * loads * options.download_s + own.compute_w[:, None] * options.training_s
    return jnp.swapaxes(own.cost(jnp.swapaxes(spent, -1, -2)), -1, -2)


def improve(options: Options, start: Assignment) -> tuple[Assignment, Float[Array, ""]]:
    """Take the best change of one UE's choice for as long as one helps; the choice and its cost."""
    ues, levels = options.local.shape

    def step(carry: tuple[Assignment, Array, Array, Array]) -> tuple[Assignment, Array, Array, Array]:
        now, cost, _, number = carry
        costs = single_changes(options, now)
        who, what = jnp.unravel_index(jnp.argmin(costs), costs.shape)
        better = costs[who, what] < cost - 1e-6 * jnp.abs(cost)
        changed = (jnp.arange(ues) == who) & better
        pick = Assignment(
            jnp.where(changed, what == levels, now.uploads),
            jnp.where(changed, jnp.minimum(what, levels - 1), now.layers),
        )
        return pick, jnp.where(better, costs[who, what], cost), better, number + 1

    def goes_on(carry: tuple[Assignment, Array, Array, Array]) -> Array:
        return carry[2] & (carry[3] < _ROUNDS)

    begin = (start, joint_cost(options, *start), jnp.asarray(True), jnp.asarray(0))
    found, _, _, _ = jax.lax.while_loop(goes_on, step, begin)
    return found, joint_cost(options, *found)


def single_changes(options: Options, now: Assignment) -> Float[Array, "ues choices"]:
    """Exact cost of the joint choice with one UE's changed: to each number of layers, or (last) to uploading.

    One change moves the counts of uploads and downloads by at most one, so what the others take and cost
    is known for three counts of each, and the slowest of the others from the two slowest of all: the work
    grows with UEs times choices, not with the square of the UEs.
    """
    uploads, every = now.uploads, np.arange(options.upload.shape[0])
    download_s = jnp.where(uploads, 0.0, options.download_s[every, now.layers])
    training_s = jnp.where(uploads, 0.0, options.training_s[every, now.layers])
    loads = download_s > 0
    # Axis 0: one fewer, as many, one more.
    change = jnp.arange(-1, 2)[:, None]
    senders = jnp.clip(jnp.sum(uploads) + change[:, 0], 0, len(every))
    loaders = jnp.maximum(jnp.sum(loads) + change, 0)
    there_s = jnp.where(uploads, options.upload_s[senders], 0.0)
    here_s = loaders * download_s + training_s
    apart = jnp.where(uploads, options.upload, options.local[every, now.layers])
    own = jnp.concatenate([options.local, options.upload[:, None]], axis=1)
    may_load = jnp.pad(options.download_s > 0, ((0, 0), (0, 1)))
    to_upload = jnp.arange(own.shape[1]) == own.shape[1] - 1
    more_senders = 1 - uploads[:, None].astype(jnp.int32) + to_upload
    more_loaders = 1 - loads[:, None].astype(jnp.int32) + may_load
    own_s = jnp.concatenate(
        [
            loaders[more_loaders[:, :-1], 0] * options.download_s + options.training_s,
            options.upload_s[senders[more_senders[:, -1]], every][:, None],
        ],
        axis=1,
    )
    others_s = jnp.maximum(
        _of_others(largest_other, there_s, more_senders), _of_others(largest_other, here_s, more_loaders)
    )
    total = _sum_of_others(apart)[:, None] + own
    if options.joules is not None:
        joules = options.joules
        sends = jnp.where(uploads, joules.cost(joules.upload_j[senders]), 0.0)
        runs = jnp.where(
            uploads, 0.0, joules.cost(joules.receive_w * loaders * download_s + joules.compute_w * training_s)
        )
        total = total + _of_others(_sum_of_others, sends, more_senders)
        total = total + _of_others(_sum_of_others, runs, more_loaders)
        receiving_s = loaders[more_loaders[:, :-1], 0] * options.download_s
        here_j = joules.receive_w * receiving_s + joules.compute_w[:, None] * options.training_s
        there_j = joules.upload_j[senders[more_senders[:, -1]], every][:, None]
        total = total + joules.cost(jnp.concatenate([here_j, there_j], axis=1).T).T
    return total + options.per_s * jnp.maximum(others_s, own_s)


def _of_others(
    reduced: Callable[[Array], Array], values: Float[Array, "3 ues"], which: Int[Array, "ues choices"]
) -> Float[Array, "ues choices"]:
    """What the other UEs come to at the counts that a change leads to."""
    return jnp.take_along_axis(jax.vmap(reduced)(values).T, which, axis=1)


def _sum_of_others(values: Float[Array, "ues"]) -> Float[Array, "ues"]:
    return values.sum() - values


def largest_other(values: Float[Array, "ues"]) -> Float[Array, "ues"]:
    """The largest of the other values, for each; 0 if there are none."""
    first = jnp.argmax(values)
    second = jnp.max(jnp.where(jnp.arange(values.shape[0]) == first, 0.0, values))
    return jnp.where(jnp.arange(values.shape[0]) == first, second, values[first])
