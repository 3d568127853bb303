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
the cache as well (``states``). *Any* such prices give a bound (weak duality); good ones give nearly that of the
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
from jaxtyping import Array, Float

from emutune.bounds.costs import Costs
from emutune.bounds.sharing import lone_download_s, shared_download_s
from emutune.bounds.states import Charges, Minimum, States, Values, before_task, due_states, list_states

_ROUNDS = 400
_STEP = 0.15
# Softness of minima, in mean costs of a task at the server: falls from the one to the other.
_SOFTNESS = (0.03, 0.0005)
# What the impossible costs there, in the same unit.
_NEVER = 1e6
# Of each limit of a cache at first, in the same unit.
_RENT = 0.02
_HARD = Minimum(np, np.min, np.inf)


class Prices(NamedTuple):
    """Shares of the cost of a second of delay: for each task they sum to 1 at most.

    Attributes:
        downlink: of a second of any download.
        uplink: of a second of any upload, at the ratio of the narrowest share.
        alone: of a second that each UE takes alone.
        joule: of what a joule beyond the budget costs, for each UE; where there is no budget it means nothing.
        rent: of each limit of a UE's cache through each task, in units of cost; a cache of one emulator has none.
    """

    downlink: Float[np.ndarray, "tasks"]
    uplink: Float[np.ndarray, "tasks"]
    alone: Float[np.ndarray, "tasks ues"]
    joule: Float[np.ndarray, "ues"] | float = 0.0
    rent: Float[np.ndarray, "tasks ues limits"] | float = 0.0


class _Priced(NamedTuple):
    """What a UE pays for, by task, UE and slot.

    Seconds are worth what they cost, and joules of ``over_*`` what they cost beyond the budget on top.
    """

    server: Values
    local: Values
    fetch: Values
    usable: Values
    may_upload: Values
    due: Values
    fetch_s: Values
    fetch_alone_s: Values
    shared_s: Values
    alone_s: Values
    training_s: Values
    over_upload: Values
    over_local: Values
    over_fetch: Values


class _Paid(NamedTuple):
    """Prices as they are used: shares of the links and of each UE by task, of joules by UE, and rents."""

    shares: Values
    joule: Values
    rent: Values


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
    tasks, ues = costs.server_cost.shape
    states = list_states(costs)
    downlink, uplink, alone, joule, rent = (np.maximum(np.asarray(part, np.float64), 0.0) for part in prices)
    shares = np.concatenate([downlink[:, None], uplink[:, None], alone], axis=1)
    paid = _Paid(
        shares / np.maximum(shares.sum(1, keepdims=True), 1.0),
        np.broadcast_to(np.minimum(joule, 1.0), ues),
        np.broadcast_to(rent, (tasks, ues, len(states.limits))),
    )
    priced, after = _price(costs), np.zeros((ues, states.number))
    for t in range(tasks)[::-1]:
        task = _Priced(*(part[t] for part in priced))
        charges = _charges(_HARD, states, task, _Paid(paid.shares[t], paid.joule, paid.rent[t]))
        after = before_task(_HARD, states, charges, task.due, after)
    bound = float(_unrefunded(states, after, paid, _budget_worth(costs)))
    # Sums of thousands of rounded terms are off by far less than this.
    return bound - 1e-9 * abs(bound)


def find_prices(costs: Costs, rounds: int = _ROUNDS) -> Prices:
    """Prices at which the bound is high."""
    tasks, ues = costs.server_cost.shape
    unit = float(np.abs(costs.server_cost).mean()) or 1.0
    states = list_states(costs)
    priced = _Priced(
        *(
            jnp.asarray(part, bool) if part.dtype == bool else jnp.asarray(part / unit, jnp.float32)
            for part in _price(costs)
        )
    )
    logs = np.full((tasks, ues + 2), np.log(0.02 / ues))
    logs[:, :2] = np.log(0.49)
    # Joules at the price within the budget, and half of what those beyond it cost.
    start = _Paid(
        jnp.asarray(logs, jnp.float32),
        jnp.zeros(ues),
        jnp.full((tasks, ues, len(states.limits)), np.log(_RENT), jnp.float32),
    )
    worth = jnp.asarray(_budget_worth(costs) / unit, jnp.float32)
    found = _improve(rounds, jax.tree.map(jnp.asarray, states), priced, worth, start)
    shares, joule, rent = (np.asarray(part, np.float64) for part in found)
    return Prices(shares[:, 0], shares[:, 1], shares[:, 2:], joule, unit * rent)


@partial(jax.jit, static_argnums=0)
def _improve(rounds: int, states: States, priced: _Priced, worth: Float[Array, ""], start: _Paid) -> _Paid:
    """Gradient ascent on the logarithms of prices, while minima harden."""
    ascent = optax.adam(optax.cosine_decay_schedule(_STEP, rounds, 0.02))

    def prices_of(logs: _Paid) -> _Paid:
        return _Paid(jax.nn.softmax(logs.shares), jax.nn.sigmoid(logs.joule), jnp.exp(logs.rent))

    def lost(logs: _Paid, softness: Array) -> Array:
        return -_soft_bound(softness, states, priced, worth, prices_of(logs))

    def climb(state: tuple[_Paid, optax.OptState], part: Array) -> tuple[tuple[_Paid, optax.OptState], None]:
        logs, memory = state
        softness = _SOFTNESS[0] * (_SOFTNESS[1] / _SOFTNESS[0]) ** part
        step, memory = ascent.update(jax.grad(lost)(logs, softness), memory)
        return (optax.apply_updates(logs, step), memory), None

    (logs, _), _ = jax.lax.scan(climb, (start, ascent.init(start)), jnp.linspace(0.0, 1.0, rounds))
    return prices_of(logs)


def _soft_bound(
    softness: Float[Array, ""], states: States, priced: _Priced, worth: Float[Array, ""], paid: _Paid
) -> Float[Array, ""]:
    """The bound with soft minima, which are never above the hard ones."""
    soft = Minimum(jnp, partial(_soft_min, softness), _NEVER)

    def before(after: Array, now: tuple[_Priced, Array, Array]) -> tuple[Array, None]:
        task, shares, rent = now
        charges = _charges(soft, states, task, _Paid(shares, paid.joule, rent))
        return before_task(soft, states, charges, task.due, after), None

    last = jnp.zeros((len(paid.joule), states.number))
    first, _ = jax.lax.scan(before, last, (priced, paid.shares, paid.rent), reverse=True)
    return _unrefunded(states, first, paid, worth)


def _soft_min(softness: Float[Array, ""], values: Array, axis: int) -> Array:
    return -softness * jax.nn.logsumexp(-values / softness, axis=axis)


def _unrefunded(states: States, first: Values, paid: _Paid, worth: Values) -> Values:
    """What all UEs pay that hold nothing at first, less what their budgets and caches are worth."""
    return first[:, : states.groups].sum() - (paid.joule * worth).sum() - paid.rent.sum()


def _charges(minimum: Minimum, states: States, task: _Priced, paid: _Paid) -> Charges:
    """What each UE pays for one task at its prices."""
    xp, _, never = minimum
    downlink, uplink, alone = paid.shares[0], paid.shares[1], paid.shares[2:]
    each, joule = alone[:, None], paid.joule[:, None]
    upload = task.server + uplink * task.shared_s + alone * task.alone_s + paid.joule * task.over_upload
    use = task.local + each * task.training_s + joule * task.over_local
    fetch_s = downlink * task.fetch_s + each * task.fetch_alone_s
    return Charges(
        upload=xp.where(task.may_upload, upload, never),
        use=xp.where(task.usable, use, never),
        fetch=fetch_s + task.fetch + joule * task.over_fetch,
        rent=paid.rent @ states.limits,
    )


def _price(costs: Costs) -> _Priced:
    """The coefficients of an episode as what is paid for, in units of cost."""
    per_s, over, joules = costs.cost_per_s, costs.joules.over_cost, costs.joules
    return _Priced(
        server=costs.server_cost,
        local=costs.local_cost,
        fetch=_slim(_summed_by_family(costs, costs.sent_cost)),
        usable=costs.usable,
        may_upload=costs.may_upload,
        due=due_states(costs),
        fetch_s=per_s * _summed_by_family(costs, shared_download_s(costs)),
        fetch_alone_s=_slim(per_s * _summed_by_family(costs, lone_download_s(costs))),
        shared_s=per_s * costs.shared_upload_s,
        alone_s=per_s * costs.lone_upload_s,
        training_s=_slim(per_s * costs.training_s),
        over_upload=over * joules.upload,
        over_local=_slim(over * joules.local),
        over_fetch=_slim(over * _summed_by_family(costs, joules.sent)),
    )


def _slim(part: Float[np.ndarray, "tasks ues slots"]) -> Float[np.ndarray, "tasks #ues #slots"]:
    """One zero for each task where there is nothing else: what is off takes no time in hundreds of rounds."""
    return part if part.any() else part[:, :1, :1]


def _budget_worth(costs: Costs) -> float:
    """What a UE's budget of joules costs at the price of those beyond it."""
    return costs.joules.over_cost * costs.joules.budget


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
