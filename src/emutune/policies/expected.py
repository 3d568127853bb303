"""The linear programme of expected futures: what the links are worth in each of the coming steps.

The fleet is a mass of UEs that moves between states: the family of the task, and what is held. Decisions say which
part of a state's mass uploads, holds or downloads, the chain of families moves it on, and each step takes at
least as long as what is expected on either link. The prices of both links in each step, as shares of the cost
of a second, are the programme's multipliers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

# Similar UEs move as one mass, and a few emulators of each family stand for all: prices hardly feel it.
_GROUPS, _LEVELS = 6, 4


class Expectation(NamedTuple):
    """What the programme knows: UEs n, families m, levels k; costs in units of reward.

    Attributes:
        local: of a task trained on the UE.
        upload: of one trained at the server, infinite where data may not leave.
        sent: of each layer that is sent, whatever the link's price.
        allowed: which emulators a UE can have.
        upload_delay: cost of an upload's lone seconds, training at the server included.
        layer_delay: the same of a layer's download.
        family: of each UE's present task.
        held_family: of the emulator that each UE holds.
        held: its layers; 0 for none.
        after: expected cost of all steps beyond the horizon, by family of the last task, family and layers held.
        stays: probability that the next task is of the same family for certain; else it is drawn from all.
        active: probability that there is a task.
        delta: 1 if only missing layers are sent.
        left: steps of the episode that are left, the present one included.
    """

    local: Float[np.ndarray, "ues families levels"]
    upload: Float[np.ndarray, "ues families"]
    sent: Float[np.ndarray, "ues families"]
    allowed: Bool[np.ndarray, "ues families levels"]
    upload_delay: Float[np.ndarray, "ues families"]
    layer_delay: Float[np.ndarray, "ues families"]
    family: Int[np.ndarray, "ues"]
    held_family: Int[np.ndarray, "ues"]
    held: Int[np.ndarray, "ues"]
    after: Float[np.ndarray, "ues families families levels"]
    stays: Float[np.ndarray, ""]
    active: Float[np.ndarray, ""]
    delta: Bool[np.ndarray, ""]
    left: Int[np.ndarray, ""]


def link_shares(known: Expectation, steps: int) -> Float[np.ndarray, "steps 2"] | None:
    """Prices of uplink and downlink in the coming steps, the present one first.

    Args:
        known: the fleet and its costs.
        steps: the horizon; steps beyond the episode have prices of 0.

    Returns:
        Shares of the cost of a second, which sum to at most 1 in each step; None if the solver fails.
    """
    from scipy import optimize

    count = int(np.clip(known.left, 1, steps))
    programme = _programme(known, count)
    solved = optimize.linprog(
        programme.cost,
        A_ub=programme.delays,
        b_ub=np.zeros(2 * count),
        A_eq=programme.balance,
        b_eq=programme.mass,
        method="highs",
    )
    if solved.status != 0:
        return None
    shares = np.zeros((steps, 2))
    shares[:count] = -np.asarray(solved.ineqlin.marginals).reshape(count, 2)
    return shares.clip(0.0, 1.0)


class _Programme(NamedTuple):
    cost: np.ndarray
    delays: Any
    balance: Any
    mass: np.ndarray


class _Choices(NamedTuple):
    """Every choice in every state of one group: what it costs, its delays, and what is held after it."""

    family: np.ndarray
    state: np.ndarray
    after: np.ndarray
    cost: np.ndarray
    delay: np.ndarray


def _programme(known: Expectation, count: int) -> _Programme:
    from scipy import sparse

    families = known.local.shape[1]
    groups = np.array_split(
        np.argsort(known.upload_delay.mean(1), kind="stable"), min(_GROUPS, len(known.family))
    )
    states = 1 + families * _LEVELS
    size = families * states
    costs, delays, flows, masses, sizes = [], [], [], [], []
    for members in groups:
        levels = _levels(known, members)
        choices = _choices(known, members, levels)
        width = len(choices.cost)
        leaves, enters = _moves(known, choices, states)
        # Rows: what is in a state leaves it by some choice; what entered it came from the step before.
        stay, come = sparse.eye(count), sparse.eye(count, k=-1)
        flows.append(sparse.kron(stay, leaves) - sparse.kron(come, enters))
        mass = np.zeros((count, size))
        np.add.at(mass[0], _places(known, members, levels, states), 1.0)
        masses.append(mass.ravel())
        cost = np.tile(known.active * choices.cost, (count, 1))
        cost[-1] += _beyond(known, members, levels, choices)
        costs.append(cost.ravel())
        delays.append(
            sparse.vstack(
                [
                    sparse.kron(row, known.active * choices.delay[None, :, link])
                    for row in sparse.eye(count).tocsr()
                    for link in range(2)
                ]
            )
        )
        sizes.append(width)
    seconds = sparse.csr_matrix((-np.ones(2 * count), (np.arange(2 * count), np.repeat(np.arange(count), 2))))
    balance = sparse.hstack(
        [sparse.block_diag(flows), sparse.csr_matrix((len(groups) * count * size, count))]
    )
    return _Programme(
        np.concatenate([*costs, np.ones(count)]),
        sparse.hstack([*delays, seconds]).tocsr(),
        balance.tocsr(),
        np.concatenate(masses),
    )


def _levels(known: Expectation, members: np.ndarray) -> Int[np.ndarray, "families levels"]:
    """A few emulators of each family, from the smallest to the largest that most of a group can have."""
    layers = np.arange(known.allowed.shape[2])
    can = known.allowed[members]
    low = np.median(np.where(can, layers, layers[-1]).min(-1), axis=0)
    high = np.median(np.where(can, layers, 0).max(-1), axis=0)
    return np.linspace(low, high, _LEVELS, axis=-1).round().astype(int)


def _places(known: Expectation, members: np.ndarray, levels: np.ndarray, states: int) -> np.ndarray:
    """The present state of each UE of a group: its task's family, and the emulator nearest to what it holds."""
    family, held = known.held_family[members], known.held[members]
    nearest = np.abs(levels[family] - held[:, None]).argmin(1)
    state = np.where(held > 0, 1 + family * _LEVELS + nearest, 0)
    return known.family[members] * states + state


def _choices(known: Expectation, members: np.ndarray, levels: np.ndarray) -> _Choices:
    local, upload, sent, upload_delay, layer_delay = (
        part[members].mean(0)
        for part in (known.local, known.upload, known.sent, known.upload_delay, known.layer_delay)
    )
    private = np.isinf(known.upload[members]).mean(0) > 0.5
    upload = np.where(np.isinf(upload), known.upload[np.isfinite(known.upload)].max(initial=0.0), upload)
    allowed = known.allowed[members].mean(0) >= 0.5
    rows = []
    for family in range(len(upload)):
        for state in range(1 + levels.size):
            holder, place = divmod(state - 1, _LEVELS)
            own = state > 0 and holder == family
            held = levels[holder, place] if own else 0
            if not private[family]:
                rows.append((family, state, state, upload[family], upload_delay[family], 0.0))
            if own:
                rows.append((family, state, state, local[family, held], 0.0, 0.0))
            for place, layers in enumerate(levels[family]):
                missing = max(layers - held, 0) if known.delta else layers
                if allowed[family, layers]:
                    entered = 1 + family * _LEVELS + place
                    cost = local[family, layers] + missing * sent[family]
                    rows.append((family, state, entered, cost, 0.0, missing * layer_delay[family]))
            if private[family] and not allowed[family].any():
                # Nothing can be done in this group's mean: time passes.
                rows.append((family, state, state, 0.0, 0.0, 0.0))
    table = np.array(rows)
    family, state, entered = table[:, :3].astype(int).T
    return _Choices(family, state, entered, table[:, 3], table[:, 4:])


def _moves(known: Expectation, choices: _Choices, states: int) -> tuple[Any, Any]:
    """Which state each choice leaves, and the parts of its mass that enter each state of the next step."""
    from scipy import sparse

    families, width = known.local.shape[1], len(choices.cost)
    number = np.arange(width)
    shape = (families * states, width)
    leaves = sparse.csr_matrix((np.ones(width), (choices.family * states + choices.state, number)), shape)
    enters = sparse.csr_matrix(shape)
    for family in range(families):
        chance = np.where(choices.family == family, known.stays, 0.0) + (1 - known.stays) / families
        for state, part in ((choices.after, known.active), (choices.state, 1 - known.active)):
            enters = enters + sparse.csr_matrix((part * chance, (family * states + state, number)), shape)
    return leaves, enters


def _beyond(
    known: Expectation, members: np.ndarray, levels: np.ndarray, choices: _Choices
) -> Float[np.ndarray, "choices"]:
    """Expected cost of what follows the last step, by choice."""
    table = known.after[members].mean(0)
    families = np.arange(len(levels))

    def of(states: np.ndarray) -> np.ndarray:
        holder, place = np.divmod(np.maximum(states - 1, 0), _LEVELS)
        layers = np.where(states > 0, levels[families[holder], place], 0)
        return np.asarray(table[choices.family, holder, layers])

    return known.active * of(choices.after) + (1 - known.active) * of(choices.state)
