"""One UE's programme at prices where its cache holds several emulators.

What couples the families of one UE is that all it holds must fit (``Room.limits``). Put a rent on each limit for
each task, and let every emulator pay its share of it: each family then has a programme of its own, over its tasks
and whether its emulator is held, and the whole rents come off the sum. That is a bound for any rents
(weak duality), since what a UE holds never takes more than there is; with none it is the bound of a cache
without limit. What is held may be dropped at any time here, not only the least recently used.

States of a UE are first "nothing held" of each family, then every slot.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from emutune.bounds.programme import Costs

# Arrays of NumPy or of JAX, as in ``prices``.
_Values: TypeAlias = Any


class Charges(NamedTuple):
    """What each UE pays for one task at prices: for an upload, to use a slot, to fetch and then to hold it."""

    upload: _Values
    use: _Values
    fetch: _Values
    rent: _Values


class Families(NamedTuple):
    """Which states and slots are of one family.

    Attributes:
        limits: ``Room.limits``.
        of_slot: family of each slot.
        due: whether a state is of the family of the task, by task, UE and state.
        same: whether a state holds an emulator of a slot's family.
    """

    limits: _Values
    of_slot: _Values
    due: _Values
    same: _Values

    @property
    def number(self) -> int:
        """How many families there are."""
        return int(self.same.shape[0] - self.same.shape[1])


def list_families(costs: Costs) -> Families | None:
    """The families of an episode; None where a UE caches one emulator."""
    if costs.room is None:
        return None
    every = np.arange(costs.family.max() + 1)
    of_state = np.concatenate([every, costs.family])
    holds = np.arange(len(of_state)) >= len(every)
    return Families(
        limits=costs.room.limits,
        of_slot=costs.family,
        due=costs.room.task_family[..., None] == of_state,
        same=holds[:, None] & (of_state[:, None] == costs.family),
    )


def before_task(
    xp: Any,
    least: Callable[[_Values, int], _Values],
    never: float,
    delta: bool,
    families: Families,
    charges: Charges,
    usable: _Values,
    may_upload: _Values,
    due: _Values,
    after: _Values,
) -> _Values:
    """What every state costs from a task on, from what it costs after the task.

    Args:
        xp: ``numpy`` or ``jax.numpy``.
        least: minimum along an axis, hard or soft.
        never: cost of what is impossible.
        delta: whether only missing layers are sent.
        families: of the episode.
        charges: of the task.
        usable: whether a slot may be used for the task, by UE.
        may_upload: by UE.
        due: states of the task's family, by UE; nothing where there is no task.
        after: by UE and state.
    """
    nothing, held = after[:, : families.number], after[:, families.number :]
    carried = charges.rent + held
    dropped = nothing[:, families.of_slot]
    kept = xp.concatenate([nothing, least(xp.stack([carried, dropped]), 0)], axis=1)
    renewed = xp.where(usable, charges.use + carried, never)
    fetched = least(renewed + charges.fetch, 1)[:, None]
    none = xp.full(nothing.shape, never)
    holding = xp.concatenate([none, renewed], axis=1)
    if delta:
        have = xp.concatenate([xp.zeros(nothing.shape), charges.fetch], axis=1)
        missing = xp.maximum(charges.fetch[:, None] - have[..., None], 0.0)
        holding = least(xp.where(families.same, renewed[:, None] + missing, never), 2)
    there = xp.where(may_upload, charges.upload, never)[:, None] + kept
    options = xp.stack([holding, xp.broadcast_to(fetched, holding.shape), there])
    return xp.where(due, least(options, 0), kept)
