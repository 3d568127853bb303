"""Which UEs hold, upload or download, and what: the cheapest joint choice of one step, where UEs differ by radio only.

Links run in parallel and a step takes as long as its slowest UE, so the choices are coupled only
through the two counts of sharers and one maximum. A limit on the seconds that an emulator may take, alone,
settles every UE's level; what remains is to say who does what.
"""

from __future__ import annotations

import itertools
from functools import lru_cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from emutune.policies.choices import NEVER, Options, at_layers, priced
from emutune.step import Away, Plan, take_at_server, take_on_ue, usable_layers
from emutune.step.charges import delay_cost
from emutune.step.link import parts

# Limits, counts of uploaders, and prices of a lone download's second in costs of a second of the step's delay.
# Large fleets try fewer: one UE more or less matters little there, and a decision must not take long.
_LARGE = 64
_LIMITS = {False: 16, True: 8}
_COUNTS = 33
_SECOND_PRICES = {False: (0.0, 0.25, 0.5, 1.0, 2.0, 4.0), True: (0.0, 0.25, 0.5, 1.0)}


class Choices(NamedTuple):
    """What each UE's three choices cost, later steps included but the step's delay left out, for each limit."""

    hold: Float[Array, "ues"]
    upload: Float[Array, "ues"]
    download: Float[Array, "limits ues"]
    download_s: Float[Array, "limits ues"]
    layers: Int[Array, "limits ues"]


def list_choices(options: Options) -> Choices:
    """The three choices of every UE."""
    held = usable_layers(options.situation)
    every = jnp.arange(held.shape[0])
    exists = options.after < NEVER / 2
    here = jnp.where(exists, _alone(options) + options.after, jnp.inf)
    download_s = options.local.download_s
    shortest = jnp.min(jnp.where(exists & (download_s > 0), download_s, jnp.inf))
    longest = jnp.max(jnp.where(exists, download_s, 0.0))
    limits = jnp.linspace(
        jnp.minimum(shortest, longest), longest * (1 + 1e-6), _LIMITS[held.shape[0] > _LARGE]
    )
    fits = download_s <= limits[:, None, None]
    priced_in = jnp.where(fits, here, jnp.inf)
    layers = jnp.argmin(priced_in, axis=-2)
    # A UE that no level fits takes its smallest.
    layers = jnp.where(jnp.isfinite(priced_in.min(-2)), layers, jnp.argmax(exists, axis=0))
    own = priced(
        options, take_on_ue(options.rules, options.situation, at_layers(options, held), jnp.zeros(()))
    )
    lone = take_at_server(options.rules, options.situation, _of_count(options, 1))
    return Choices(
        hold=jnp.where(held > 0, own + options.kept, jnp.inf),
        upload=priced(options, lone) + options.left,
        download=here[layers, every],
        download_s=download_s[layers, every],
        layers=layers,
    )


def _alone(options: Options) -> Float[Array, "levels ues"]:
    """What training with each level costs beside its delay; joules of sharing are not counted here."""
    return priced(options, take_on_ue(options.rules, options.situation, options.local, jnp.zeros(())))


def _of_count(options: Options, count: int) -> Away:
    return jax.tree.map(lambda table: table[count], options.away)


def assign_exactly(options: Options, choices: Choices) -> Plan:
    """The cheapest of all joint choices, 3 to the power of N of them for each limit: for small fleets."""
    ues = choices.hold.shape[0]
    every = _every_assignment(ues)
    holds, uploads, downloads = (jnp.asarray(every == option, jnp.float32) for option in range(3))
    hold = jnp.where(jnp.isfinite(choices.hold), choices.hold, NEVER)
    apart = (holds @ hold + uploads @ choices.upload)[:, None] + downloads @ choices.download.T
    upload_s = options.away.upload_s
    up_s = jnp.max(jnp.where(every == 1, upload_s[(every == 1).sum(1)], 0.0), axis=1)
    down_s = jnp.max(jnp.where((every == 2)[:, None], choices.download_s, 0.0), axis=2)
    down_s = down_s * parts(options.rules.links, jnp.asarray((every == 2).sum(1)[:, None]))
    total = apart + delay_cost(options.rules, jnp.maximum(up_s[:, None], down_s))
    best, limit = jnp.unravel_index(jnp.argmin(total), total.shape)
    chosen = jnp.asarray(every)[best]
    held = usable_layers(options.situation)
    return Plan(chosen == 1, jnp.where(chosen == 2, choices.layers[limit], held))


def assign_by_rank(options: Options, choices: Choices) -> Plan:
    """The cheapest of the choices that rank UEs by what a second of their upload saves: for any fleet.

    For each limit and each price of a download's second, UEs that do not upload take the cheaper of
    holding and downloading. The order in which they would rather upload is then settled, and every
    count of uploaders is tried (33 of them in large fleets), at the exact cost of the step.
    """
    ues, upload_s = choices.hold.shape[0], options.away.upload_s
    price = delay_cost(options.rules, jnp.asarray(_SECOND_PRICES[ues > _LARGE])[:, None, None])
    fetch = choices.download + price * choices.download_s
    downloads = fetch < choices.hold
    stay = jnp.minimum(fetch, choices.hold)
    order = jnp.argsort((choices.upload - stay) / upload_s[1], axis=-1)

    def in_order(values: Array) -> Array:
        return jnp.take_along_axis(jnp.broadcast_to(values, order.shape), order, axis=-1)

    counts = np.unique(np.linspace(0, ues, min(ues + 1, _COUNTS)).round().astype(int))
    loads = in_order(downloads)
    local = in_order(jnp.where(downloads, choices.download, choices.hold))
    spared = _before(in_order(jnp.broadcast_to(choices.upload, order.shape)) - local)
    apart = (local.sum(-1, keepdims=True) + spared)[..., counts]
    loading = loads.sum(-1, keepdims=True) - _before(loads.astype(jnp.float32))
    slowest = _from(jnp.where(loads, in_order(choices.download_s), 0.0))
    down_s = (parts(options.rules.links, loading) * slowest)[..., counts]
    first = np.arange(ues) < counts[:, None]
    up_s = jnp.max(jnp.where(first, upload_s[counts[:, None], order[..., None, :]], 0.0), axis=-1)
    total = apart + delay_cost(options.rules, jnp.maximum(up_s, down_s))
    priced_at, limit, count = jnp.unravel_index(jnp.argmin(total), total.shape)
    rank = jnp.argsort(order[priced_at, limit])
    uploads = rank < jnp.asarray(counts)[count]
    fetched = downloads[priced_at, limit] & ~uploads
    return Plan(uploads, jnp.where(fetched, choices.layers[limit], usable_layers(options.situation)))


def _before(values: Float[Array, "*batch ues"]) -> Float[Array, "*batch counts"]:
    """Sums of the first 0, 1, ..., N values."""
    return jnp.pad(jnp.cumsum(values, axis=-1), [(0, 0)] * (values.ndim - 1) + [(1, 0)])


def _from(values: Float[Array, "*batch ues"]) -> Float[Array, "*batch counts"]:
    """Maxima of all values, of all but the first, ..., of none (0)."""
    falling = jnp.flip(jnp.maximum.accumulate(jnp.flip(values, -1), axis=-1), -1)
    return jnp.pad(falling, [(0, 0)] * (values.ndim - 1) + [(0, 1)])


@lru_cache(maxsize=8)
def _every_assignment(ues: int) -> Int[np.ndarray, "assignments ues"]:
    """All ways to let every UE hold (0), upload (1) or download (2)."""
    return np.array(list(itertools.product(range(3), repeat=ues)), np.int32)
