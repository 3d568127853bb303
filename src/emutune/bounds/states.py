"""One UE's programme at prices: what it pays from a task on, by what it holds.

Of each group of slots a UE holds one emulator at most (``Room.group``), and each group has a programme of its own,
over the UE's tasks and which of its emulators is held. A cache of one emulator is one group of all slots, and this is
exact. A cache of several has a group for each family, and what couples them is that all a UE holds must fit
(``Room.limits``): put a rent on each limit for each task, let every emulator pay its share of it, and the whole rents
come off the sum. That is a bound for any rents (weak duality), since what a UE holds never takes more than there is;
with none it is the bound of a cache without limit. What is held may be dropped at any time here, not only the least
recently used.

States of a UE are first "nothing held" of each group, then every slot.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
from jaxtyping import Bool

from emutune.bounds.costs import Costs

# Arrays of NumPy or of JAX: what is found with the one is proved with the other.
Values: TypeAlias = Any


class Minimum(NamedTuple):
    """Hard or soft minima: ``numpy`` or ``jax.numpy``, a minimum along an axis, and the cost of the impossible."""

    xp: Any
    least: Callable[[Values, int], Values]
    never: float


class Charges(NamedTuple):
    """What each UE pays for one task at prices: for an upload, to use a slot, to fetch and then to hold it."""

    upload: Values
    use: Values
    fetch: Values
    rent: Values


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class States:
    """States of a UE.

    Attributes:
        delta: whether only missing layers are sent.
        limits: ``Room.limits``.
        group: of each slot.
        same: whether a state holds an emulator of a slot's family, by state and slot.
    """

    delta: bool = field(metadata={"static": True})
    limits: Values
    group: Values
    same: Values

    @property
    def groups(self) -> int:
        """How many groups there are; as many states hold nothing."""
        return int(self.same.shape[0] - self.same.shape[1])

    @property
    def number(self) -> int:
        """How many states there are."""
        return int(self.same.shape[0])


def list_states(costs: Costs) -> States:
    """The states of an episode's UEs."""
    room = costs.room
    none = np.zeros((room.group.max() + 1, len(room.group)), bool)
    same = np.concatenate([none, costs.family[:, None] == costs.family])
    return States(delta=costs.delta, limits=room.limits, group=room.group, same=same)


def due_states(costs: Costs) -> Bool[np.ndarray, "tasks ues states"]:
    """Whether a state is of the group of a task; none is where there is no task."""
    room = costs.room
    of_state = np.concatenate([np.arange(room.group.max() + 1), room.group])
    return (room.task_group[..., None] == of_state) & costs.active[..., None]


def before_task(minimum: Minimum, states: States, charges: Charges, due: Values, after: Values) -> Values:
    """What every state costs from a task on, from what it costs after the task.

    Args:
        minimum: hard or soft.
        states: of the episode.
        charges: of the task.
        due: states of the task's group, by UE.
        after: by UE and state.
    """
    xp, least, never = minimum
    nothing, held = after[:, : states.groups], after[:, states.groups :]
    carried = charges.rent + held
    kept = after
    if len(states.limits):
        # Where nothing is paid for room, nothing is dropped: it may be of use, and does no harm.
        dropped = nothing[:, states.group]
        kept = xp.concatenate([nothing, least(xp.stack([carried, dropped]), 0)], axis=1)
    renewed = charges.use + carried
    fetched = least(renewed + charges.fetch, 1)[:, None]
    if states.delta:
        have = xp.concatenate([xp.zeros_like(nothing), charges.fetch], axis=1)
        missing = xp.maximum(charges.fetch[:, None] - have[..., None], 0.0)
        holding = least(xp.where(states.same, renewed[:, None] + missing, never), 2)
    else:
        holding = xp.concatenate([xp.full_like(nothing, never), renewed], axis=1)
    there = charges.upload[:, None] + kept
    return xp.where(due, least(xp.stack([holding, xp.broadcast_to(fetched, holding.shape), there]), 0), kept)
