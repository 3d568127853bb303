"""Which UEs hold, upload or download, and what: the cheapest joint choice of one step.

Links run in parallel and a step takes as long as its slowest UE, so the choices are coupled only
through the two counts of sharers and one maximum. A limit on the seconds that an emulator may take, alone,
settles every UE's level; what remains is to say who does what.
"""

from __future__ import annotations

import itertools
from functools import lru_cache
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from emutune.policies.prices import Prices, upload_s
from emutune.world import Observation, World

# Limits, counts of uploaders, and prices of a lone download's second in costs of a second of the step's delay.
# Large fleets try fewer: one UE more or less matters little there, and a decision must not take long.
_LARGE = 64
_LIMITS = {False: 16, True: 8}
_COUNTS = 33
_SECOND_PRICES = {False: (0.0, 0.25, 0.5, 1.0, 2.0, 4.0), True: (0.0, 0.25, 0.5, 1.0)}


class Choices(NamedTuple):
    """What each UE's options cost, later steps included but the step's delay left out, for each limit."""

    hold: Float[Array, "ues"]
    upload: Float[Array, "ues"]
    download: Float[Array, "limits ues"]
    download_s: Float[Array, "limits ues"]
    layers: Int[Array, "limits ues"]


class Assignment(NamedTuple):
    """A joint choice: who uploads, and with how many layers the others train."""

    uploads: Bool[Array, "ues"]
    layers: Int[Array, "ues"]


def list_choices(prices: Prices, kept: Float[Array, "ues"], renewed: Float[Array, "ues levels"]) -> Choices:
    """Options of every UE.

    Args:
        prices: of the step.
        kept: expected cost of all later steps if the cache stays as it is.
        renewed: the same if the UE then holds k layers of its task's family.
    """
    here = jnp.where(prices.allowed, prices.local + renewed, jnp.inf)
    shortest = jnp.min(jnp.where(prices.allowed & (prices.download_s > 0), prices.download_s, jnp.inf))
    longest = jnp.max(jnp.where(prices.allowed, prices.download_s, 0.0))
    limits = jnp.linspace(
        jnp.minimum(shortest, longest), longest * (1 + 1e-6), _LIMITS[here.shape[0] > _LARGE]
    )
    fits = prices.download_s <= limits[:, None, None]
    priced = jnp.where(fits, here, jnp.inf)
    layers = jnp.argmin(priced, axis=-1)
    # A UE that no level fits takes its smallest.
    layers = jnp.where(jnp.isfinite(priced.min(-1)), layers, jnp.argmax(prices.allowed, axis=-1))
    every = jnp.arange(here.shape[0])
    held = jnp.take_along_axis(prices.local, prices.held[:, None], axis=1)[:, 0]
    return Choices(
        hold=jnp.where(prices.held > 0, held + kept, jnp.inf),
        upload=prices.server + kept,
        download=here[every, layers],
        download_s=prices.download_s[every, layers],
        layers=layers,
    )


def assign_exactly(world: World, observation: Observation, prices: Prices, choices: Choices) -> Assignment:
    """The cheapest of all joint choices, 3 to the power of N of them for each limit: for small fleets."""
    ues = choices.hold.shape[0]
    options = _every_assignment(ues)
    holds, uploads, downloads = (jnp.asarray(options == option, jnp.float32) for option in range(3))
    # A choice that does not exist costs more than any that does, and still adds up.
    hold = jnp.where(jnp.isfinite(choices.hold), choices.hold, 1e6)
    apart = (holds @ hold + uploads @ choices.upload)[:, None] + downloads @ choices.download.T
    every_s = upload_s(world, observation, jnp.arange(ues + 1.0))
    up_s = jnp.max(jnp.where(options == 1, every_s[(options == 1).sum(1)], 0.0), axis=1)
    down_s = jnp.max(jnp.where((options == 2)[:, None], choices.download_s, 0.0), axis=2)
    down_s = down_s * (options == 2).sum(1)[:, None]
    total = apart + prices.per_s * jnp.maximum(up_s[:, None], down_s)
    best, limit = jnp.unravel_index(jnp.argmin(total), total.shape)
    chosen = jnp.asarray(options)[best]
    return Assignment(chosen == 1, jnp.where(chosen == 2, choices.layers[limit], prices.held))


def assign_by_rank(world: World, observation: Observation, prices: Prices, choices: Choices) -> Assignment:
    """The cheapest of the choices that rank UEs by what a second of their upload saves: for any fleet.

    For each limit and each price of a download's second, UEs that do not upload take the cheaper of
    holding and downloading. The order in which they would rather upload is then settled, and every
    count of uploaders is tried (33 of them in large fleets), at the exact cost of the step.
    """
    ues = choices.hold.shape[0]
    price = jnp.asarray(_SECOND_PRICES[ues > _LARGE])[:, None, None] * prices.per_s
    fetch = choices.download + price * choices.download_s
    downloads = fetch < choices.hold
    stay = jnp.minimum(fetch, choices.hold)
    lone_s = upload_s(world, observation, jnp.ones(1))[0]
    order = jnp.argsort((choices.upload - stay) / lone_s, axis=-1)

    def in_order(values: Array) -> Array:
        return jnp.take_along_axis(jnp.broadcast_to(values, order.shape), order, axis=-1)

    counts = np.unique(np.linspace(0, ues, min(ues + 1, _COUNTS)).round().astype(int))
    loads = in_order(downloads)
    local = in_order(jnp.where(downloads, choices.download, choices.hold))
    spared = _before(in_order(jnp.broadcast_to(choices.upload, order.shape)) - local)
    apart = (local.sum(-1, keepdims=True) + spared)[..., counts]
    loading = loads.sum(-1, keepdims=True) - _before(loads.astype(jnp.float32))
    slowest = _from(jnp.where(loads, in_order(choices.download_s), 0.0))
    down_s = (loading * slowest)[..., counts]
    every_s = upload_s(world, observation, jnp.asarray(counts, jnp.float32))
    first = np.arange(ues) < counts[:, None]
    up_s = jnp.max(
        jnp.where(first, every_s[np.arange(len(counts))[:, None], order[..., None, :]], 0.0), axis=-1
    )
    total = apart + prices.per_s * jnp.maximum(up_s, down_s)
    priced, limit, count = jnp.unravel_index(jnp.argmin(total), total.shape)
    rank = jnp.argsort(order[priced, limit])
    uploads = rank < jnp.asarray(counts)[count]
    fetched = downloads[priced, limit] & ~uploads
    return Assignment(uploads, jnp.where(fetched, choices.layers[limit], prices.held))


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
