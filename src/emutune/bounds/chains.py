"""Priced chains: what a policy without foresight pays at least, taken apart by prices of the links.

UEs are coupled only through the delay of each step, which is at least

    uplink x (seconds of all uploads, at the ratio of the narrowest share)
        + downlink x (seconds of all downloads, each alone) + sum over UEs of alone_n x (seconds of n alone)

for any shares of a step that sum to 1. At such prices every UE is a decision process of its own, which a dynamic
programme over its views solves, and what all of them expect to pay is a lower bound on what any policy pays in
expectation (the Lagrangian relaxation of a weakly coupled decision process: Hawkins 2003; Adelman and Mersereau
2008). Prices may depend on the step and on what every policy may know at the start, never on tasks to come.

A task's data are uniform, and what a UE pays is the smaller of a constant and a line in them, so that its
expectation has a closed form; over complexity it is concave in the factor of perplexity, so that chords between
nodes give no more than the expectation (``Chances.weight``).
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from emutune.bounds.chances import Chances, Seconds

_ROUNDS = 80
_STEP = 0.2


class Tariff(NamedTuple):
    """What each UE pays in a step, in units of cost.

    Attributes:
        upload: for a bit sent up.
        download: for a bit sent down.
    """

    upload: Float[Array, "*tasks ues"]
    download: Float[Array, "*tasks ues"]


class Worths(NamedTuple):
    """What chains expect at a tariff.

    Attributes:
        tariff: of every step.
        after: what a UE expects to pay after each task, by its view of that task once it is done.
        start: what each UE expects to pay from the start.
    """

    tariff: Tariff
    after: Float[Array, "tasks ues views"]
    start: Float[Array, "ues"]


def find_tariff(chances: Chances, seconds: Seconds, rounds: int = _ROUNDS) -> Tariff:
    """Prices at which chains expect to pay much, by gradient ascent; what they pay is concave in them."""
    tasks, ues = seconds.download.shape
    logs = jnp.full((tasks, ues + 2), jnp.log(0.02 / ues)).at[:, :2].set(jnp.log(0.49))
    return _tariff(chances, seconds, _improve(rounds, chances, seconds, logs))


@jax.jit
def price_chains(chances: Chances, tariff: Tariff) -> Worths:
    """What every UE expects to pay at a tariff."""

    def before(after: Array, now: Tariff) -> tuple[Array, Array]:
        return _expect_before(chances, now, after), after

    last = jnp.zeros((tariff.upload.shape[1], len(chances.first)))
    _, after = jax.lax.scan(before, last, tariff, reverse=True)
    # A first task is drawn without one before it.
    return Worths(tariff, after, _expect_first(chances, tariff, after))


def pay_for_task(
    chances: Chances, tariff: Tariff, factor: Float[Array, "ues"], data_bits: Array, after: Array
) -> Float[Array, "ues views"]:
    """What every UE pays from one task on that came, by its view of it.

    Args:
        chances: of the world.
        tariff: of the step.
        factor: of the task's perplexity.
        data_bits: of the task.
        after: ``Worths.after`` of the step, by UE and view.
    """
    there, local = _ways(chances, tariff, factor[:, None], after)
    upload = (tariff.upload * data_bits)[:, None]
    return jnp.minimum(there[..., 0] + upload, local[..., 0])


def _expect(chances: Chances, tariff: Tariff, after: Array) -> Float[Array, "ues views"]:
    """The expectation of ``pay_for_task`` over the task, from below."""
    there, local = _ways(chances, tariff, chances.factor[None], after)
    low, high = chances.data_bits
    span = (tariff.upload * (high - low))[:, None, None]
    spare = local - there - (tariff.upload * low)[:, None, None]
    # The share of tasks that are sent up; at the best one the derivative by it is 0.
    share = jax.lax.stop_gradient(jnp.clip(spare / jnp.maximum(span, 1e-300), 0.0, 1.0))
    return (local - share * (spare - span * share / 2)) @ chances.weight


def _expect_before(chances: Chances, tariff: Tariff, after: Array) -> Float[Array, "ues views"]:
    """What every UE expects before a task is known, by its view of the task before."""
    return _expect(chances, tariff, after) @ chances.moves.T


def _expect_first(chances: Chances, tariff: Tariff, after: Array) -> Float[Array, "ues"]:
    now = jax.tree.map(lambda part: part[0], tariff)
    return _expect(chances, now, after[0]) @ chances.first


def _ways(
    chances: Chances, tariff: Tariff, factor: Float[Array, "#ues nodes"], after: Array
) -> tuple[Float[Array, "ues views nodes"], Float[Array, "ues views nodes"]]:
    """What training there, without its upload, and the best training on the UE cost from a task on."""
    held = _train_on_ue(chances, tariff, factor, after)
    there = chances.server_cost[chances.view_kind][:, None] * factor[:, None] + after[..., None]
    return there, held[:, chances.view_kind, chances.view_layers]


def _train_on_ue(
    chances: Chances, tariff: Tariff, factor: Float[Array, "#ues nodes"], after: Array
) -> Float[Array, "ues kinds held nodes"]:
    """The best training on the UE with what it holds: none, or 1, 2, ... layers of the task's kind."""
    kept = chances.local_cost[..., None] * factor[:, None, None] + after[:, chances.fetched, None]
    layer = (tariff.download[:, None] * chances.layer_bits)[..., None, None]
    layers = jnp.arange(1, chances.levels + 1)[:, None]
    sent = kept + layer * layers
    # The gradient of ``min`` compares with a result that may be rounded in another way, and divides by what is equal.
    cheapest = jax.lax.stop_gradient(jnp.argmin(sent, axis=2, keepdims=True))
    fresh = jnp.take_along_axis(sent, cheapest, axis=2)
    if not chances.delta:
        return jnp.concatenate([fresh, jnp.minimum(kept, fresh)], axis=2)
    fewer = jax.lax.cummin(kept, axis=2)
    # With more layers than are held, those that are held are not sent again.
    more = jax.lax.cummin(sent, axis=2, reverse=True) - layer * layers
    return jnp.concatenate([fresh, jnp.minimum(fewer, more)], axis=2)


def _tariff(chances: Chances, seconds: Seconds, logs: Float[Array, "tasks prices"]) -> Tariff:
    """The tariff of shares of each step, which sum to 1: of the uplink, the downlink, and each UE alone."""
    shares = chances.cost_per_s * jax.nn.softmax(logs)
    uplink, downlink, alone = shares[:, :1], shares[:, 1:2], shares[:, 2:]
    # The narrowest share is that of all UEs; a bit takes its whole link a UE's part of the time.
    together = seconds.upload[..., -1] / seconds.upload.shape[-1]
    return Tariff(
        uplink * together + alone * seconds.upload[..., 0],
        (downlink + alone) * seconds.download,
    )


@partial(jax.jit, static_argnums=0)
def _improve(rounds: int, chances: Chances, seconds: Seconds, logs: Array) -> Array:
    ascent = optax.adam(optax.cosine_decay_schedule(_STEP, rounds, 0.05))

    def lost(logs: Array) -> Array:
        return -price_chains(chances, _tariff(chances, seconds, logs)).start.sum()

    def climb(state: tuple[Array, optax.OptState], _: None) -> tuple[tuple[Array, optax.OptState], None]:
        logs, memory = state
        step, memory = ascent.update(jax.grad(lost)(logs), memory)
        return (optax.apply_updates(logs, step), memory), None

    (logs, _), _ = jax.lax.scan(climb, (logs, ascent.init(logs)), None, length=rounds)
    return logs
