"""The clairvoyant bound taken apart by prices, for fleets that are too large for one linear programme.

UEs are coupled only through the delay of each step, which is at least

- the sum of the downloads, each alone on the link (``programme``),
- the sum of the uploads, each at the ratio of the narrowest share,
- each upload alone.

Put a price on a second of each of these, such that the prices of a step sum to what a second of its delay
costs. Every schedule then pays at least the prices of what it sends: whatever the fleet does, its cost is no less
than the sum over UEs of what each would pay at best on its own, which a dynamic programme over its tasks and
its cache finds exactly. *Any* such prices give a bound (weak duality); good ones give nearly that of the
linear programme, and since each UE's own decisions stay whole here, sometimes a better one.

Prices are looked for with a smooth stand-in for the programme (a soft minimum has a gradient), in single
precision. What they prove is then computed anew, in double precision.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float

from emutune.bounds.programme import Costs

_ROUNDS = 400
_STEP = 0.15
# Softness of minima, in mean costs of a task at the server: falls from the one to the other.
_SOFTNESS = (0.03, 0.0005)


class Prices(NamedTuple):
    """Shares of the cost of a second of delay: for each task they sum to 1 at most.

    Attributes:
        downlink: of a second of any download.
        uplink: of a second of any upload, at the ratio of the narrowest share.
        alone: of a second of each UE's own upload, alone.
    """

    downlink: Float[np.ndarray, "tasks"]
    uplink: Float[np.ndarray, "tasks"]
    alone: Float[np.ndarray, "tasks ues"]


class _Programme(NamedTuple):
    """One episode for dynamic programmes over its tasks; slot 0 of the cache is the empty one."""

    server: Array
    local: Array
    usable: Array
    whole_s: Array
    shared_s: Array
    alone_s: Array


def price_bound(costs: Costs, rounds: int = _ROUNDS) -> float:
    """A lower bound on the cost of every policy on an episode, at the best prices found.

    Args:
        costs: the episode's coefficients.
        rounds: how often prices are improved.
    """
    return bound_at_prices(costs, find_prices(costs, rounds))


def bound_at_prices(costs: Costs, prices: Prices) -> float:
    """What every policy costs at least, by any prices: each UE's best schedule at them, summed.

    Args:
        costs: the episode's coefficients.
        prices: not negative; a task's that sum to more than 1 are scaled to that.
    """
    downlink, uplink, alone = (np.maximum(np.asarray(part, np.float64), 0.0) for part in prices)
    total = np.maximum(downlink + uplink + alone.sum(1), 1.0)
    per_s = costs.cost_per_s / total
    upload = per_s[:, None] * (uplink[:, None] * costs.shared_upload_s + alone * costs.lone_upload_s)
    whole_s = _whole_emulators(costs)
    tasks, ues, slots = costs.local_cost.shape
    after = np.zeros((ues, slots + 1))
    same = costs.family[:, None] == costs.family
    for t in range(tasks)[::-1]:
        renewed = np.where(costs.usable[t], costs.local_cost[t] + after[:, 1:], np.inf)
        sent = per_s[t] * downlink[t] * whole_s[t]
        fetched = (renewed + sent).min(1)
        held = renewed
        if costs.delta:
            missing = np.where(same, np.maximum(sent[:, None] - sent[..., None], 0.0), np.inf)
            held = (renewed[:, None] + missing).min(2)
        local = np.minimum(np.concatenate([np.full((ues, 1), np.inf), held], axis=1), fetched[:, None])
        after = np.minimum(local, (costs.server_cost[t] + upload[t])[:, None] + after)
    bound = float(after[:, 0].sum())
    # Sums of thousands of rounded terms are off by far less than this.
    return bound - 1e-9 * abs(bound)


def find_prices(costs: Costs, rounds: int = _ROUNDS) -> Prices:
    """Prices at which the bound is high."""
    tasks, ues, slots = costs.local_cost.shape
    unit = float(np.abs(costs.server_cost).mean()) or 1.0
    per_s = costs.cost_per_s / unit
    same = np.zeros((slots + 1, slots), bool)
    same[1:] = costs.family[:, None] == costs.family
    programme = _Programme(
        *(
            jnp.asarray(part, bool if part.dtype == bool else jnp.float32)
            for part in (
                costs.server_cost / unit,
                costs.local_cost / unit,
                costs.usable,
                per_s * _whole_emulators(costs),
                per_s * costs.shared_upload_s,
                per_s * costs.lone_upload_s,
            )
        )
    )
    start = np.full((tasks, ues + 2), np.log(0.02 / ues))
    start[:, :2] = np.log(0.49)
    shares = np.asarray(
        _improve(costs.delta, rounds, programme, jnp.asarray(same), jnp.asarray(start, jnp.float32)),
        np.float64,
    )
    return Prices(shares[:, 0], shares[:, 1], shares[:, 2:])


@partial(jax.jit, static_argnums=(0, 1))
def _improve(
    delta: bool,
    rounds: int,
    programme: _Programme,
    same: Bool[Array, "held slots"],
    start: Float[Array, "tasks prices"],
) -> Float[Array, "tasks prices"]:
    """Gradient ascent on the logarithms of prices, while minima harden."""
    ascent = optax.adam(optax.cosine_decay_schedule(_STEP, rounds, 0.02))

    def climb(state: tuple[Array, optax.OptState], part: Array) -> tuple[tuple[Array, optax.OptState], None]:
        logs, memory = state
        softness = _SOFTNESS[0] * (_SOFTNESS[1] / _SOFTNESS[0]) ** part
        slope = jax.grad(lambda x: -_soft_bound(delta, programme, same, jax.nn.softmax(x), softness))(logs)
        step, memory = ascent.update(slope, memory)
        return (logs + step, memory), None

    (logs, _), _ = jax.lax.scan(climb, (start, ascent.init(start)), jnp.linspace(0.0, 1.0, rounds))
    return jax.nn.softmax(logs)


def _soft_bound(
    delta: bool,
    programme: _Programme,
    same: Bool[Array, "held slots"],
    shares: Float[Array, "tasks prices"],
    softness: Float[Array, ""],
) -> Float[Array, ""]:
    """The bound with soft minima, which are never above the hard ones."""

    def soft_min(values: Array, axis: int) -> Array:
        return -softness * jax.nn.logsumexp(-values / softness, axis=axis)

    def before(after: Array, now: tuple[_Programme, Array]) -> tuple[Array, None]:
        task, share = now
        upload = task.server + share[1] * task.shared_s + share[2:] * task.alone_s
        renewed = jnp.where(task.usable, task.local + after[:, 1:], 1e6)
        sent = share[0] * task.whole_s
        fetched = soft_min(renewed + sent, 1)[:, None]
        held = jnp.pad(renewed, [(0, 0), (1, 0)], constant_values=1e6)
        if delta:
            have = jnp.pad(sent, [(0, 0), (1, 0)])
            missing = jnp.where(same, jnp.maximum(sent[:, None] - have[..., None], 0.0), 1e6)
            held = soft_min(renewed[:, None] + missing, 2)
        options = (held, jnp.broadcast_to(fetched, held.shape), upload[:, None] + after)
        return soft_min(jnp.stack(options), 0), None

    ues, slots = programme.local.shape[1:]
    last = jnp.zeros((ues, slots + 1))
    first, _ = jax.lax.scan(before, last, (programme, shares), reverse=True)
    return first[:, 0].sum()


def _whole_emulators(costs: Costs) -> Float[np.ndarray, "tasks ues slots"]:
    """Seconds of sending a slot's whole emulator, alone; with delta download the parts below it add up."""
    if not costs.delta:
        return costs.sent_s
    summed = np.zeros_like(costs.sent_s)
    for family in np.unique(costs.family):
        own = costs.family == family
        summed[..., own] = np.cumsum(costs.sent_s[..., own], axis=-1)
    return summed
