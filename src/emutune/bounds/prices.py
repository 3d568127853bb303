"""The clairvoyant bound taken apart by prices, for fleets that are too large for one linear programme.

UEs are coupled only through the delay of each step, which is at least

- the sum of the downloads, each alone on the link (``programme``),
- the sum of the uploads, each at the ratio of the narrowest share,
- each upload alone, and each UE alone with what it fetches and trains, where training takes time.

Put a price on a second of each of these, such that the prices of a step sum to what a second of its delay
costs; and where joules beyond a budget cost more, let every joule of a UE cost a part of that, and its budget
be worth as much. Every schedule then pays at least these prices: whatever the fleet does, its cost is no less
than the sum over UEs of what each would pay at best on its own, which a dynamic programme over its tasks and
its cache finds exactly; where it caches several emulators, a programme per family does, and there is a rent on
the cache as well (``several``). *Any* such prices give a bound (weak duality); good ones give nearly that of the
linear programme, and since each UE's own decisions stay whole here, sometimes a better one.

Prices are looked for with a smooth stand-in for the programme (a soft minimum has a gradient), in single
precision. What they prove is then computed anew, in double precision.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float

from emutune.bounds.programme import Costs
from emutune.bounds.several import Charges, Families, before_task, list_families

_ROUNDS = 400
_STEP = 0.15
# Softness of minima, in mean costs of a task at the server: falls from the one to the other.
_SOFTNESS = (0.03, 0.0005)
# What the impossible costs there, in the same unit.
_NEVER = 1e6
# Of each limit of a cache at first, in the same unit.
_RENT = 0.02


class Prices(NamedTuple):
    """Shares of the cost of a second of delay: for each task they sum to 1 at most.

    Attributes:
        downlink: of a second of any download.
        uplink: of a second of any upload, at the ratio of the narrowest share.
        alone: of a second that each UE takes alone.
        joule: of what a joule beyond the budget costs, for each UE; where there is no budget it means nothing.
        rent: of each limit of a UE's cache through each task, in units of cost; None where it caches one
            emulator.
    """

    downlink: Float[np.ndarray, "tasks"]
    uplink: Float[np.ndarray, "tasks"]
    alone: Float[np.ndarray, "tasks ues"]
    joule: Float[np.ndarray, "ues"] | None = None
    rent: Float[np.ndarray, "tasks ues limits"] | None = None


# Arrays of NumPy or of JAX: what is found with the one is proved with the other.
_Values: TypeAlias = Any


class _Tasks(NamedTuple):
    """What a UE pays for, by task, UE and slot; axes of length 1 where a feature is off.

    Seconds are worth what they cost, and so are joules, but those of ``over_*``, worth what they cost beyond the
    budget on top.
    """

    server: _Values
    local: _Values
    usable: _Values
    active: _Values
    may_upload: _Values
    fetch_s: _Values
    fetch_alone_s: _Values
    shared_s: _Values
    alone_s: _Values
    training_s: _Values
    fetch_j: _Values
    over_upload_j: _Values
    over_local_j: _Values
    over_fetch_j: _Values


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
    downlink, uplink, alone = (np.maximum(np.asarray(part, np.float64), 0.0) for part in prices[:3])
    total = np.maximum(downlink + uplink + alone.sum(1), 1.0)
    tasks, ues, slots = costs.local_cost.shape
    joule = np.zeros(ues) if prices.joule is None else np.clip(np.asarray(prices.joule, np.float64), 0.0, 1.0)
    priced = _priced(costs)
    shares = np.concatenate([downlink[:, None], uplink[:, None], alone], axis=1) / total[:, None]
    families = list_families(costs)
    if families is not None:
        rent = (
            np.zeros((tasks, ues, len(families.limits)))
            if prices.rent is None
            else np.maximum(prices.rent, 0.0)
        )
        return _proved_of_several(costs, families, priced, shares, joule, np.asarray(rent, np.float64))
    after = np.zeros((ues, slots + 1))
    same = _same_family(costs)
    for t in range(tasks)[::-1]:
        task = _Tasks(*(part[t] for part in priced))
        after = _before_task(
            np, np.min, np.inf, costs.delta, same, task, _charges(task, shares[t], joule), after
        )
    return _less_rounding(after[:, 0].sum() - (joule * _budget_worth(costs)).sum())


def _proved_of_several(
    costs: Costs,
    families: Families,
    priced: _Tasks,
    shares: Float[np.ndarray, "tasks prices"],
    joule: Float[np.ndarray, "ues"],
    rent: Float[np.ndarray, "tasks ues limits"],
) -> float:
    """``bound_at_prices`` where a UE caches several emulators."""
    tasks, ues, slots = costs.local_cost.shape
    after = np.zeros((ues, families.number + slots))
    for t in range(tasks)[::-1]:
        task = _Tasks(*(part[t] for part in priced))
        charges = Charges(*_charges(task, shares[t], joule), rent[t] @ families.limits)
        due = families.due[t] & task.active[:, None]
        after = before_task(
            np, np.min, np.inf, costs.delta, families, charges, task.usable, task.may_upload, due, after
        )
    unpaid = (joule * _budget_worth(costs)).sum() + rent.sum()
    return _less_rounding(after[:, : families.number].sum() - unpaid)


def _less_rounding(bound: float) -> float:
    bound = float(bound)
    # Sums of thousands of rounded terms are off by far less than this.
    return bound - 1e-9 * abs(bound)


def find_prices(costs: Costs, rounds: int = _ROUNDS) -> Prices:
    """Prices at which the bound is high."""
    tasks, ues, _ = costs.local_cost.shape
    unit = float(np.abs(costs.server_cost).mean()) or 1.0
    same = _same_family(costs)
    priced = _Tasks(
        *(
            jnp.asarray(part, bool) if part.dtype == bool else jnp.asarray(part / unit, jnp.float32)
            for part in _priced(costs)
        )
    )
    logs = np.full((tasks, ues + 2), np.log(0.02 / ues))
    logs[:, :2] = np.log(0.49)
    # Joules at the price within the budget, and half of what those beyond it cost.
    start: tuple[Array, ...] = (jnp.asarray(logs, jnp.float32), jnp.zeros(ues))
    families = list_families(costs)
    if families is not None:
        start = (*start, jnp.full((tasks, ues, len(families.limits)), np.log(_RENT), jnp.float32))
        families = jax.tree.map(jnp.asarray, families)
    worth = jnp.asarray(_budget_worth(costs) / unit, jnp.float32)
    found = _improve(costs.delta, rounds, priced, jnp.asarray(same), worth, families, start)
    shares, joule, *rent = (np.asarray(part, np.float64) for part in found)
    return Prices(shares[:, 0], shares[:, 1], shares[:, 2:], joule, *(unit * part for part in rent))


@partial(jax.jit, static_argnums=(0, 1))
def _improve(
    delta: bool,
    rounds: int,
    priced: _Tasks,
    same: Bool[Array, "held slots"],
    worth: Float[Array, "#ues"],
    families: Families | None,
    start: tuple[Array, ...],
) -> tuple[Array, ...]:
    """Gradient ascent on the logarithms of prices, while minima harden.

    Shares by task and price, the price of a joule by UE, and where a cache holds several emulators its rents
    by task, UE and limit.
    """
    ascent = optax.adam(optax.cosine_decay_schedule(_STEP, rounds, 0.02))

    def prices_of(logs: tuple[Array, ...]) -> tuple[Array, ...]:
        return jax.nn.softmax(logs[0]), jax.nn.sigmoid(logs[1]), *map(jnp.exp, logs[2:])

    def lost(logs: tuple[Array, ...], softness: Array) -> Array:
        shares, joule, *rent = prices_of(logs)
        if families is not None:
            return -_soft_of_several(delta, priced, families, worth, shares, joule, rent[0], softness)
        return -_soft_bound(delta, priced, same, worth, shares, joule, softness)

    def climb(
        state: tuple[tuple[Array, ...], optax.OptState], part: Array
    ) -> tuple[tuple[tuple[Array, ...], optax.OptState], None]:
        logs, memory = state
        softness = _SOFTNESS[0] * (_SOFTNESS[1] / _SOFTNESS[0]) ** part
        step, memory = ascent.update(jax.grad(lost)(logs, softness), memory)
        return (optax.apply_updates(logs, step), memory), None

    (logs, _), _ = jax.lax.scan(climb, (start, ascent.init(start)), jnp.linspace(0.0, 1.0, rounds))
    return prices_of(logs)


def _soft_bound(
    delta: bool,
    priced: _Tasks,
    same: Bool[Array, "held slots"],
    worth: Float[Array, "#ues"],
    shares: Float[Array, "tasks prices"],
    joule: Float[Array, "ues"],
    softness: Float[Array, ""],
) -> Float[Array, ""]:
    """The bound with soft minima, which are never above the hard ones."""
    least = partial(_soft_min, softness)

    def before(after: Array, now: tuple[_Tasks, Array]) -> tuple[Array, None]:
        task, share = now
        charges = _charges(task, share, joule)
        return _before_task(jnp, least, _NEVER, delta, same, task, charges, after), None

    ues, slots = priced.local.shape[1:]
    last = jnp.zeros((ues, slots + 1))
    first, _ = jax.lax.scan(before, last, (priced, shares), reverse=True)
    return first[:, 0].sum() - (joule * worth).sum()


def _soft_of_several(
    delta: bool,
    priced: _Tasks,
    families: Families,
    worth: Float[Array, "#ues"],
    shares: Float[Array, "tasks prices"],
    joule: Float[Array, "ues"],
    rent: Float[Array, "tasks ues limits"],
    softness: Float[Array, ""],
) -> Float[Array, ""]:
    """``_soft_bound`` where a UE caches several emulators."""

    def before(after: Array, now: tuple[_Tasks, Array, Array, Array]) -> tuple[Array, None]:
        task, share, due, rent = now
        charges = Charges(*_charges(task, share, joule), rent @ families.limits)
        due = due & task.active[:, None]
        least = partial(_soft_min, softness)
        return before_task(
            jnp, least, _NEVER, delta, families, charges, task.usable, task.may_upload, due, after
        ), None

    ues, slots = priced.local.shape[1:]
    last = jnp.zeros((ues, families.number + slots))
    first, _ = jax.lax.scan(before, last, (priced, shares, families.due, rent), reverse=True)
    return first[:, : families.number].sum() - (joule * worth).sum() - rent.sum()


def _before_task(
    xp: Any,
    least: Callable[[_Values, int], _Values],
    never: float,
    delta: bool,
    same: _Values,
    task: _Tasks,
    charges: tuple[_Values, _Values, _Values],
    after: _Values,
) -> _Values:
    """What every state of a cache of one emulator costs from a task on; arguments as ``several.before_task``."""
    upload, use, fetch = charges
    renewed = xp.where(task.usable, use + after[:, 1:], never)
    fetched = least(renewed + fetch, 1)[:, None]
    held = xp.pad(renewed, [(0, 0), (1, 0)], constant_values=never)
    if delta:
        have = xp.pad(fetch, [(0, 0), (1, 0)])
        missing = xp.where(same, xp.maximum(fetch[:, None] - have[..., None], 0.0), never)
        held = least(renewed[:, None] + missing, 2)
    there = xp.where(task.may_upload, upload, never)[:, None] + after
    options = xp.stack([held, xp.broadcast_to(fetched, held.shape), there])
    return xp.where(task.active[:, None], least(options, 0), after)


def _same_family(costs: Costs) -> Bool[np.ndarray, "held slots"]:
    """Whether a state holds an emulator of a slot's family; the first state holds none."""
    same = costs.family[:, None] == costs.family
    return np.concatenate([np.zeros((1, len(same)), bool), same])


def _soft_min(softness: Float[Array, ""], values: Array, axis: int) -> Array:
    return -softness * jax.nn.logsumexp(-values / softness, axis=axis)


def _charges(task: _Tasks, shares: _Values, joule: _Values) -> tuple[_Values, _Values, _Values]:
    """What each UE pays at prices for an upload, for using a slot, and for fetching it."""
    downlink, uplink, alone, each = shares[0], shares[1], shares[2:], joule[:, None]
    upload = task.server + uplink * task.shared_s + alone * task.alone_s + joule * task.over_upload_j
    use = task.local + alone[:, None] * task.training_s + each * task.over_local_j
    fetch = downlink * task.fetch_s + alone[:, None] * task.fetch_alone_s
    return upload, use, fetch + task.fetch_j + each * task.over_fetch_j


def _priced(costs: Costs) -> _Tasks:
    """The coefficients of an episode as what is paid for, in units of cost."""
    tasks, ues, _ = costs.local_cost.shape
    each, every = np.zeros((tasks, 1)), np.zeros((tasks, 1, 1))
    always, per_s, energy = np.ones((tasks, ues), bool), costs.cost_per_s, costs.energy
    sent_s = _summed_by_family(costs, costs.sent_s)
    shared_s = sent_s
    if costs.training_s is not None and not costs.delta:
        # What is fetched is trained with, by as many as have a task at most (``programme``).
        loaders = ues if costs.active is None else np.maximum(costs.active.sum(1), 1)[:, None, None]
        shared_s = sent_s + costs.training_s / loaders
    priced = _Tasks(
        server=costs.server_cost,
        local=costs.local_cost,
        usable=costs.usable,
        active=always if costs.active is None else costs.active,
        may_upload=always if costs.may_upload is None else costs.may_upload,
        fetch_s=per_s * shared_s,
        fetch_alone_s=every if costs.training_s is None else per_s * sent_s,
        shared_s=per_s * costs.shared_upload_s,
        alone_s=per_s * costs.lone_upload_s,
        training_s=every if costs.training_s is None else per_s * costs.training_s,
        fetch_j=every,
        over_upload_j=each,
        over_local_j=every,
        over_fetch_j=every,
    )
    if energy is None:
        return priced
    sent_j = _summed_by_family(costs, energy.sent_j)
    return priced._replace(
        server=priced.server + energy.cost_per_j * energy.upload_j,
        local=priced.local + energy.cost_per_j * energy.local_j,
        fetch_j=energy.cost_per_j * sent_j,
        over_upload_j=energy.over_cost_per_j * energy.upload_j,
        over_local_j=energy.over_cost_per_j * energy.local_j,
        over_fetch_j=energy.over_cost_per_j * sent_j,
    )


def _budget_worth(costs: Costs) -> Float[np.ndarray, "#ues"]:
    """What a UE's budget of joules costs at the price of those beyond it."""
    return np.array([0.0 if costs.energy is None else costs.energy.over_cost_per_j * costs.energy.budget_j])


def _summed_by_family(
    costs: Costs, pieces: Float[np.ndarray, "tasks ues slots"]
) -> Float[np.ndarray, "tasks ues slots"]:
    """Of a slot's whole emulator; with delta download the pieces below it add up."""
    if not costs.delta:
        return pieces
    summed = np.zeros_like(pieces)
    for family in np.unique(costs.family):
        own = costs.family == family
        summed[..., own] = np.cumsum(pieces[..., own], axis=-1)
    return summed
