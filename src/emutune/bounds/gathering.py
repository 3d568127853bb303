"""The least that a step's delay costs beyond what its UEs are paid for acting, over all that a fleet may do.

Every UE uploads, fetches a number of layers, or neither. A step with the uploaders U and the fetching UEs F, of whom
UE n fetches j_n layers, takes max(the slowest of U beside |U| sharers, the largest |F| b_n j_n). For given U and F
only the deadline is free: it is that of U, or one of the |F| b_n j, and whoever fetches takes the best paid number of
layers that meets it. All pairs of sets are tried, so the minimum is exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from emutune.bounds.states import Minimum

# What whoever must fetch and cannot is paid: far more than costs are, far less than makes them inexact.
_NEVER = 1e9


class Paid(NamedTuple):
    """What UEs are paid for acting, in units of cost: for an upload, and to fetch 1, 2, ... layers."""

    upload: Float[Array, "tasks ues"]
    fetch: Float[Array, "tasks ues levels"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Gatherings:
    """Who may act together in each step of an episode, and how long that takes; ready to be minimised over.

    Attributes:
        cost_per_s: of delay.
        sets: whether a UE is in a set, by number of the set.
        uploaders: the set that uploads, of each pair.
        fetchers: the set that fetches.
        upload_s: what the uploaders take.
        deadline_s: of each set and place of a deadline, should it fetch; rising.
        fetch: of each UE, how many layers meet the deadline of a place.
        met: of each pair, how many deadlines of its fetchers are met while its uploaders upload.
    """

    cost_per_s: float
    sets: Float[Array, "sets ues"]
    uploaders: Int[Array, "pairs"]
    fetchers: Int[Array, "pairs"]
    upload_s: Float[Array, "tasks pairs"]
    deadline_s: Float[Array, "tasks sets places"]
    fetch: Int[Array, "tasks ues places"]
    met: Int[Array, "tasks pairs"]


def list_gatherings(
    cost_per_s: float,
    upload_s: Float[np.ndarray, "tasks ues sharers"],
    layer_s: Float[np.ndarray, "tasks ues"],
    levels: int,
) -> Gatherings:
    """All gatherings of an episode.

    Args:
        cost_per_s: of delay.
        upload_s: what an upload takes beside 1, 2, ... sharers, itself among them.
        layer_s: what one layer takes alone.
        levels: the most layers that can be fetched.
    """
    tasks, ues = layer_s.shape
    sets = (np.arange(2**ues)[:, None] >> np.arange(ues)) & 1
    members = sets.sum(1)
    uploaders, fetchers = np.nonzero(sets @ sets.T == 0)
    beside = np.maximum(members - 1, 0)
    slowest_s = np.where(sets, upload_s[:, :, beside].transpose(0, 2, 1), 0.0).max(2)
    every_s = (layer_s[..., None] * np.arange(1, levels + 1)).reshape(tasks, -1)
    order = np.argsort(every_s, axis=1, kind="stable")
    alone_s = np.take_along_axis(every_s, order, 1)
    # Of each UE, its deadlines up to a place.
    mine = order[:, None] // levels == np.arange(ues)[:, None]
    met = np.stack(
        [
            [np.searchsorted(fetching * row, slow, "right") for fetching in range(ues + 1)]
            for row, slow in zip(alone_s, slowest_s, strict=True)
        ]
    )
    return Gatherings(
        cost_per_s,
        jnp.asarray(sets, jnp.float64),
        jnp.asarray(uploaders),
        jnp.asarray(fetchers),
        jnp.asarray(slowest_s[:, uploaders]),
        jnp.asarray(members[:, None] * alone_s[:, None]),
        jnp.asarray(mine.cumsum(2)),
        jnp.asarray(met[:, members[fetchers], uploaders]),
    )


def least_delay(minimum: Minimum, gatherings: Gatherings, paid: Paid) -> Float[Array, "tasks"]:
    """What each step's delay costs less what its UEs are paid, at the least.

    Args:
        minimum: hard or soft, of JAX.
        gatherings: of the episode.
        paid: for acting; doing neither is paid nothing.
    """
    best = jnp.concatenate(
        [jnp.full((*paid.upload.shape, 1), -_NEVER), jax.lax.cummax(paid.fetch, axis=2)], 2
    )
    each = jnp.take_along_axis(best, gatherings.fetch, axis=2)
    fetched = -jnp.einsum("fn,tnp->tfp", gatherings.sets, each)
    # A soft minimum over deadlines as well would only take time.
    later = jax.lax.cummin(gatherings.cost_per_s * gatherings.deadline_s + fetched, axis=2, reverse=True)
    tasks, sets, places = fetched.shape
    # Before the first place nothing is fetched in time, which is all right where nobody fetches.
    nobody = jnp.broadcast_to(jnp.arange(sets) == 0, (tasks, sets))[..., None]
    now = jnp.concatenate([jnp.where(nobody, 0.0, _NEVER), fetched], 2).at[:, 0].set(0.0)
    # The deadlines of no set are no deadlines.
    later = jnp.concatenate([later, jnp.full((tasks, sets, 1), _NEVER)], 2).at[:, 0].set(_NEVER)
    at = gatherings.fetchers * (places + 1) + gatherings.met
    meanwhile, afterwards = (
        jnp.take_along_axis(part.reshape(tasks, -1), at, axis=1) for part in (now, later)
    )
    uploads = (paid.upload @ gatherings.sets.T)[:, gatherings.uploaders]
    either = jnp.stack([gatherings.cost_per_s * gatherings.upload_s + meanwhile, afterwards])
    return minimum.least(minimum.least(either, 0) - uploads, 1)
