"""Penalised foresight: a bound on what policies without foresight pay, from what a clairvoyant one does.

Charge every UE, beside what it pays, for what it could know too early: after each task what its chain
expects to pay from then on, less what it does pay from the next task on, now that this is known
(``chains.Worths``). Whoever cannot see what comes is charged nothing in expectation, whatever he does; so the mean
over episodes of the least that cost and charge can be is a lower bound on what he pays (Brown, Smith and Sun 2010).

The least is bounded from below in turn: pay UEs for acting (``gathering.Paid``), let each find its best path
on its own, charged what it was paid, and add the least that each step's delay costs beyond what is paid. Any payments
are valid, and good ones are looked for in every episode. At the prices of the chains themselves the bound is
what the chains expect, in every episode.

The bound is the mean over episodes. That of a single episode is no bound on what a policy pays there.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from emutune.bounds.chains import Tariff, Worths, pay_for_task
from emutune.bounds.chances import Came, Chances, Seconds
from emutune.bounds.gathering import Gatherings, Paid, least_delay, list_gatherings
from emutune.bounds.states import Minimum

_ROUNDS = 150
_STEP = 0.02
# Softness of minima, in mean costs of a task at the server: falls from the one to the other.
_SOFTNESS = (0.02, 0.0005)
_HARD = Minimum(jnp, jnp.min, np.inf)


class Foreseen(NamedTuple):
    """One episode's tasks and what is charged for foreseeing them.

    Attributes:
        came: the tasks.
        charge: after each task, by the emulator then held.
        start: of each UE, before its first task.
    """

    came: Came
    charge: Float[Array, "tasks ues held"]
    start: Float[Array, "ues"]


@jax.jit
def foresee(chances: Chances, worths: Worths, came: Came) -> Foreseen:
    """What is charged in an episode for foreseeing it.

    Args:
        chances: with which the worths were computed.
        worths: of chains at any tariff that is known at the start.
        came: the episode's tasks.
    """
    ues = jnp.arange(came.family.shape[1])[:, None]

    def pays(tariff: Tariff, factor: Array, data_bits: Array, after: Array, family: Array) -> Array:
        paid = pay_for_task(chances, tariff, factor, data_bits, after)
        return paid[ues, chances.view[family]]

    pay = jax.vmap(pays)(worths.tariff, came.factor, came.data_bits, worths.after, came.family)
    expected = jnp.take_along_axis(worths.after, chances.view[came.family], axis=2)
    charge = jnp.concatenate([expected[:-1] - pay[1:], jnp.zeros_like(pay[:1])])
    return Foreseen(came, charge, worths.start - pay[0, :, 0])


def charge_path(foreseen: Foreseen, held: Int[np.ndarray, "tasks ues"]) -> float:
    """What is charged for foresight along a path; in expectation nothing, of a policy without any.

    Args:
        foreseen: of the episode.
        held: number of the emulator held after each task, as in ``Chances.held_family``.
    """
    paid = np.take_along_axis(np.asarray(foreseen.charge), held[..., None], axis=2)
    return float(paid.sum() + np.asarray(foreseen.start).sum())


def penalised_bound(
    chances: Chances, seconds: Seconds, worths: Worths, foreseen: Foreseen, rounds: int = _ROUNDS
) -> float:
    """The least that cost and charge can be in an episode, from below, at the best payments found.

    Args:
        chances: of the world.
        seconds: of the episode.
        worths: where the search for payments begins.
        foreseen: the episode's tasks and charges.
        rounds: how often payments are improved.
    """
    data_bits = foreseen.came.data_bits
    kind = chances.kind[foreseen.came.family]
    layer_bits = chances.layer_bits[kind]
    gatherings = list_gatherings(
        chances.cost_per_s,
        np.asarray(seconds.upload * data_bits[..., None]),
        np.asarray(seconds.download * layer_bits),
        chances.levels,
    )
    layers = jnp.arange(1.0, chances.levels + 1)
    start = Paid(worths.tariff.upload * data_bits, (worths.tariff.download * layer_bits)[..., None] * layers)
    paid = _improve(rounds, chances, gatherings, foreseen, start)
    return float(bound_at_payments(_HARD, chances, gatherings, foreseen, paid))


@partial(jax.jit, static_argnums=0)
def _improve(rounds: int, chances: Chances, gatherings: Gatherings, foreseen: Foreseen, start: Paid) -> Paid:
    """Gradient ascent on payments, while minima harden."""
    unit = jnp.mean(chances.server_cost) * jnp.mean(chances.factor)
    ascent = optax.adam(optax.cosine_decay_schedule(_STEP * unit, max(rounds, 1), 0.02))

    def lost(paid: Paid, softness: Array) -> Array:
        def least(values: Array, axis: int) -> Array:
            return -softness * jax.nn.logsumexp(-values / softness, axis=axis)

        return -bound_at_payments(Minimum(jnp, least, np.inf), chances, gatherings, foreseen, paid)

    def climb(state: tuple[Paid, optax.OptState], part: Array) -> tuple[tuple[Paid, optax.OptState], None]:
        paid, memory = state
        softness = unit * _SOFTNESS[0] * (_SOFTNESS[1] / _SOFTNESS[0]) ** part
        step, memory = ascent.update(jax.grad(lost)(paid, softness), memory)
        return (optax.apply_updates(paid, step), memory), None

    (paid, _), _ = jax.lax.scan(climb, (start, ascent.init(start)), jnp.linspace(0.0, 1.0, rounds))
    return paid


@partial(jax.jit, static_argnums=0)
def bound_at_payments(
    minimum: Minimum, chances: Chances, gatherings: Gatherings, foreseen: Foreseen, paid: Paid
) -> Float[Array, ""]:
    """The least that cost and charge can be at any payments, from below."""
    paths = _best_paths(minimum, chances, foreseen, paid)
    return paths.sum() + foreseen.start.sum() + least_delay(minimum, gatherings, paid).sum()


def _best_paths(minimum: Minimum, chances: Chances, foreseen: Foreseen, paid: Paid) -> Float[Array, "ues"]:
    """What each UE's best path costs it: what it pays on its own, its charges, and what it was paid for acting."""

    def before(after: Array, now: tuple[Came, Array, Paid]) -> tuple[Array, None]:
        came, charge, pay = now
        return _before_task(minimum, chances, came, pay, after + charge), None

    last = jnp.zeros(foreseen.charge.shape[1:])
    first, _ = jax.lax.scan(before, last, (foreseen.came, foreseen.charge, paid), reverse=True)
    return first[:, 0]


def _before_task(
    minimum: Minimum, chances: Chances, came: Came, paid: Paid, after: Float[Array, "ues held"]
) -> Float[Array, "ues held"]:
    """What each UE pays from a task on, by what it holds before."""
    kind = chances.kind[came.family]
    there = chances.server_cost[kind] * came.factor + paid.upload
    kept = chances.local_cost[kind] * came.factor[:, None]
    kept += jnp.take_along_axis(after, chances.slot[came.family], axis=1)
    fresh = minimum.least(kept + paid.fetch, 1)[:, None]
    if chances.delta:
        level = np.arange(chances.levels)
        more = level - level[:, None]
        sent = jnp.where(more > 0, paid.fetch[:, np.maximum(more - 1, 0)], 0.0)
        held = minimum.least(kept[:, None] + sent, 2)
    else:
        held = minimum.least(jnp.stack([kept, jnp.broadcast_to(fresh, kept.shape)]), 0)
    local = jnp.concatenate([fresh, held], axis=1)
    usable = chances.usable(came.family)
    return minimum.least(jnp.stack([there[:, None] + after, jnp.take_along_axis(local, usable, axis=1)]), 0)
