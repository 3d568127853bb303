"""The cheapest joint choice of a step where UEs differ in more than their radio.

Every choice has its exact cost: the slowest UE's transfer and training, shared links, the shared server,
joules. A good choice is found among many that come of a deadline for the step, then improved one UE
at a time until no single change helps.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from emutune.policies.assignment import assign_by_rank, assign_exactly, list_choices
from emutune.policies.choices import NEVER, Options, at_count, at_layers, cost_of, joint_cost, priced
from emutune.step import Plan, Taken, take_at_server, take_on_ue, usable_layers
from emutune.step.charges import delay_cost
from emutune.step.taken import take, transmission_of

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


def assign(options: Options, *, exact: bool, unlike: bool) -> Plan:
    """The cheapest joint choice of a step that is found.

    Args:
        options: of every UE.
        exact: try all joint choices where UEs differ by radio only, or rank UEs.
        unlike: whether UEs differ in more than their radio.
    """
    if unlike or options.rules.multicast:
        return assign_jointly(options)
    if exact:
        return assign_exactly(options, list_choices(options))
    found, _ = improve(options, assign_by_rank(options, list_choices(options)))
    return found


def assign_jointly(options: Options) -> Plan:
    """A joint choice that no change of a single UE's makes cheaper, up to the limit of rounds.

    From one beginning that would often be a choice that only several changes together make cheaper: a slow UE
    stays at home because others crowd the server. So there is one beginning for each of some counts of
    uploaders, besides the cheapest, and the cheapest end is taken.
    """
    ends, costs = jax.vmap(lambda start: improve(options, start))(_from_deadlines(options))
    best = jnp.argmin(costs)
    return Plan(*(part[best] for part in ends))


def _from_deadlines(options: Options) -> Plan:
    """The cheapest choices that come of a deadline, the downlink's load and price, and a count of uploaders.

    With deadline, load and price settled, each UE has a best way to train at home in time. UEs are ranked by
    what a second of their upload saves, and every count of uploaders is tried at the exact cost.
    """
    rules, situation, local = options.rules, options.situation, options.local
    ues = options.kept.shape[0]
    large = ues > _LARGE
    guesses = itertools.product(sorted({1, -(-ues // 4), -(-ues // 2), ues}), _SECOND_PRICES)
    loads, prices = jnp.asarray(list(guesses), jnp.float32).T[..., None, None]
    taken = take_on_ue(rules, situation, local, loads)
    takes_s = taken.delay_s
    exists = options.after < NEVER / 2
    lone = priced(options, taken) + options.after + prices * delay_cost(rules, local.download_s)
    longest = jnp.max(jnp.where(exists, takes_s, 0.0))
    shortest = jnp.max(jnp.min(jnp.where(exists, takes_s[:1], jnp.inf), axis=-2).clip(max=longest)) * 0.5
    shares = jnp.linspace(0.0, 1.0, _DEADLINES[large])
    deadlines = shortest * (jnp.maximum(longest, 1e-9) / jnp.maximum(shortest, 1e-9)) ** shares * (1 + 1e-6)
    fits = takes_s <= deadlines[:, None, None, None]
    in_time = jnp.where(fits & exists, lone, NEVER)
    # Where nothing is in time, what is soonest.
    soonest = jnp.argmin(jnp.where(exists, takes_s, jnp.inf), axis=-2)
    layers = jnp.where(in_time.min(-2) < NEVER / 2, jnp.argmin(in_time, axis=-2), soonest)
    stay = in_time.min(-2)
    if rules.multicast:
        layers, stay = _and_together(options, layers.reshape(-1, ues), stay.reshape(-1, ues))
    alone = take_at_server(rules, situation, jax.tree.map(lambda table: table[1], options.away))
    upload = priced(options, alone) + options.left
    order = jnp.argsort(jnp.argsort((upload - stay) / alone.delay_s, axis=-1), axis=-1)
    counts = np.unique(np.linspace(0, ues, min(ues + 1, _COUNTS)).round().astype(int))
    uploads = (order[..., None, :] < counts[:, None]) & (options.left < NEVER / 2)
    # Where no emulator fits there is only the server.
    uploads = uploads | ~exists.any(0)
    every = jnp.broadcast_to(layers[..., None, :], uploads.shape)
    # One axis of counts, one of everything else.
    by_count = Plan(*(jnp.moveaxis(part, -2, 0).reshape(len(counts), -1, ues) for part in (uploads, every)))
    costs = joint_cost(options, by_count)
    best = jnp.argmin(costs, axis=1)
    apart = np.linspace(0, len(counts) - 1, min(len(counts), _FAR_APART[large])).round().astype(int)
    kept = jnp.concatenate([np.unique(apart), jnp.argsort(costs.min(axis=1))[: _CHEAPEST[large]]])
    number = jnp.arange(len(counts))
    return Plan(*(part[number, best][kept] for part in by_count))


def _and_together(
    options: Options, layers: Int[Array, "guesses ues"], stay: Float[Array, "guesses ues"]
) -> tuple[Int[Array, "more ues"], Float[Array, "more ues"]]:
    """And that all who gain by it fetch the same layers at once, for each number of them."""
    every, held = np.arange(layers.shape[-1]), usable_layers(options.situation)
    taken = take_on_ue(options.rules, options.situation, options.local, 1.0)
    cost = priced(options, taken) + options.after
    hold = jnp.where(held > 0, cost[held, every], NEVER)
    own = jnp.where(hold < NEVER / 2, held, jnp.argmin(cost, axis=0))
    fetches = cost < jnp.minimum(hold, NEVER / 2)
    same = jnp.where(fetches, jnp.arange(len(cost))[:, None], own)
    return jnp.concatenate([layers, same]), jnp.concatenate([stay, cost[same, every]])


def improve(options: Options, start: Plan) -> tuple[Plan, Float[Array, ""]]:
    """Take the best change of one UE's choice for as long as one helps; the choice and its cost."""
    levels, ues = options.after.shape

    def step(carry: tuple[Plan, Array, Array, Array]) -> tuple[Plan, Array, Array, Array]:
        now, cost, _, number = carry
        costs = single_changes(options, now)
        what, who = jnp.unravel_index(jnp.argmin(costs), costs.shape)
        better = costs[what, who] < cost - 1e-6 * jnp.abs(cost)
        pick = _changed(now, (jnp.arange(ues) == who) & better, what, levels)
        return pick, jnp.where(better, costs[what, who], cost), better, number + 1

    def goes_on(carry: tuple[Plan, Array, Array, Array]) -> Array:
        return carry[2] & (carry[3] < _ROUNDS)

    begin = (start, joint_cost(options, start), jnp.asarray(True), jnp.asarray(0))
    found, _, _, _ = jax.lax.while_loop(goes_on, step, begin)
    return found, joint_cost(options, found)


def _changed(now: Plan, who: Bool[Array, "... ues"], what: Int[Array, "..."], levels: int) -> Plan:
    """A plan in which some UEs change to a number of layers, or (``levels``) to uploading."""
    return Plan(
        jnp.where(who, what == levels, now.at_server),
        jnp.where(who, jnp.minimum(what, levels - 1), now.layers),
    )


def single_changes(options: Options, now: Plan) -> Float[Array, "choices ues"]:
    """Exact cost of the joint choice with one UE's changed: to each number of layers, or (last) to uploading.

    One change moves the counts of uploads and downloads by at most one, so what the others take and cost
    is known for three counts of each, and the slowest of the others from the two slowest of all: the work
    grows with UEs times choices, not with the square of the UEs.
    """
    if options.rules.multicast:
        return _single_changes_together(options, now)
    rules, situation = options.rules, options.situation
    uploads, every = now.at_server, np.arange(options.kept.shape[0])
    local = at_layers(options, now.layers)
    loads = ~uploads & (local.download_s > 0)
    # Axis 0: one fewer, as many, one more.
    change = jnp.arange(-1, 2)[:, None]
    senders = jnp.clip(jnp.sum(uploads) + change[:, 0], 0, len(every))
    loaders = jnp.maximum(jnp.sum(loads, dtype=jnp.float32) + change, 0)
    sent = take_at_server(rules, situation, jax.tree.map(lambda table: table[senders], options.away))
    kept = take_on_ue(rules, situation, local, loaders)
    there_s, here_s = jnp.where(uploads, sent.delay_s, 0.0), jnp.where(uploads, 0.0, kept.delay_s)
    there = jnp.where(uploads, priced(options, sent) + options.left, 0.0)
    here = jnp.where(uploads, 0.0, priced(options, kept) + options.after[now.layers, every])
    levels = options.after.shape[0]
    to_upload = (jnp.arange(levels + 1) == levels)[:, None]
    more_senders = 1 - uploads.astype(jnp.int32) + to_upload
    more_loaders = 1 - loads.astype(jnp.int32) + jnp.pad(options.local.download_s > 0, ((0, 1), (0, 0)))
    own = _own_changes(options, senders, loaders, more_senders, more_loaders)
    others_s = jnp.maximum(
        _of_others(largest_other, there_s, more_senders), _of_others(largest_other, here_s, more_loaders)
    )
    others = _of_others(_sum_of_others, there, more_senders) + _of_others(_sum_of_others, here, more_loaders)
    later = jnp.concatenate([options.after, options.left[None]])
    return others + priced(options, own) + later + delay_cost(rules, jnp.maximum(others_s, own.delay_s))


def _single_changes_together(options: Options, now: Plan) -> Float[Array, "choices ues"]:
    """``single_changes`` where UEs share transmissions: what each change makes of all of them, UE by UE."""
    rules, situation, (levels, ues) = options.rules, options.situation, options.after.shape
    # Axes: the choice, the UE that changes to it, and every UE.
    choice, itself = jnp.arange(levels + 1)[:, None, None], jnp.eye(ues, dtype=bool)
    changed = _changed(now, itself, choice, levels)
    now_s = jnp.where(now.at_server, 0.0, at_layers(options, now.layers).download_s)
    then_s = jnp.pad(options.local.download_s, ((0, 1), (0, 0)))
    by_now = transmission_of(rules, situation, now.layers)
    by_then = transmission_of(rules, situation, choice[..., 0])
    together = jnp.where((by_now[:, None] == by_now) & (now_s[:, None] > 0), now_s, 0.0)
    first = (jnp.argmax(together > 0, axis=-1) == jnp.arange(ues)) & (now_s > 0)
    others = jnp.sum(first) - ((now_s > 0) & (jnp.sum(together > 0, axis=-1) == 1))
    without_s = jax.vmap(largest_other)(together).T
    joined = (by_then[..., None] == by_now) & ~itself & (now_s > 0) & (then_s[..., None] > 0)
    own_s = jnp.maximum(then_s, jnp.max(jnp.where(joined, now_s, 0.0), axis=-1))[..., None]
    download_s = jnp.where(itself, own_s, jnp.where(joined, jnp.maximum(without_s, own_s), without_s))
    local = at_layers(options, changed.layers)._replace(download_s=download_s)
    transmissions = others + ((then_s > 0) & ~joined.any(axis=-1))
    taken = take(
        rules, situation, changed.at_server, local, at_count(options, changed), transmissions[..., None] * 1.0
    )
    return cost_of(options, changed, taken)


def _own_changes(
    options: Options,
    senders: Int[Array, "3"],
    loaders: Float[Array, "3 1"],
    more_senders: Int[Array, "choices ues"],
    more_loaders: Int[Array, "choices ues"],
) -> Taken:
    """What each choice takes the UE that changes to it, at the counts that the change leads to."""
    rules, situation = options.rules, options.situation
    every = np.arange(options.kept.shape[0])
    at_home = take_on_ue(rules, situation, options.local, loaders[more_loaders[:-1], 0])
    count = senders[more_senders[-1]]
    away = take_at_server(rules, situation, jax.tree.map(lambda table: table[count, every], options.away))
    return jax.tree.map(lambda home, there: jnp.concatenate([home, there[None]]), at_home, away)


def _of_others(
    reduced: Callable[[Array], Array], values: Float[Array, "3 ues"], which: Int[Array, "choices ues"]
) -> Float[Array, "choices ues"]:
    """What the other UEs come to at the counts that a change leads to."""
    return jnp.take_along_axis(jax.vmap(reduced)(values), which, axis=0)


def _sum_of_others(values: Float[Array, "ues"]) -> Float[Array, "ues"]:
    return values.sum() - values


def largest_other(values: Float[Array, "ues"]) -> Float[Array, "ues"]:
    """The largest of the other values, for each; 0 if there are none."""
    first = jnp.argmax(values)
    second = jnp.max(jnp.where(jnp.arange(values.shape[0]) == first, 0.0, values))
    return jnp.where(jnp.arange(values.shape[0]) == first, second, values[first])
