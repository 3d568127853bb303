"""The clairvoyant linear relaxation of one realised episode, and its integer twin.

With every random draw known, relax the decisions to [0, 1]. What the optimum costs is a lower bound on
what any policy, clairvoyant ones included, costs on that episode:

- Power and bandwidth of the downlink are both split equally, so a download's SNR does not depend on how
  many share, the mean delay of the downloaders is the sum of their delays alone, and the largest delay
  is at least the mean.
- With several families the task's family says which emulators may be used or sent; the others stay held.
- With delta download the layers that level l has more than level l - 1 are sent on their own: they are held
  if any emulator of that level or above is.
- On the uplink the same holds with the SNR taken at the smallest share, which only shortens delays; and
  no upload is faster than alone at full bandwidth. Both hold for the ergodic rate too, which rises with the
  SNR and, at a given power, with the bandwidth (``emutune.world.ergodic``).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import optimize, sparse

from emutune.errors import BoundError
from emutune.scenario import Scenario
from emutune.world.ergodic import spectral_efficiency

Method = Literal["linear", "integer", "prices"]


class Costs(NamedTuple):
    """Coefficients of one episode's programme: UEs n, tasks t, slots s; delays in seconds.

    A slot is one level of one family. Of each group of slots, the last of a family's levels is the highest.

    Attributes:
        server_cost: of training a task at the server.
        local_cost: of training it on the UE with a slot's emulator.
        sent_s: of sending a slot's emulator, alone; with delta download, of the layers that it has more
            than the slot before.
        usable: whether a slot is of the task's family.
        family: of each slot.
        delta: whether only missing layers are sent.
    """

    server_cost: Float[np.ndarray, "tasks ues"]
    local_cost: Float[np.ndarray, "tasks ues slots"]
    sent_s: Float[np.ndarray, "tasks ues slots"]
    usable: Bool[np.ndarray, "tasks ues slots"]
    family: Int[np.ndarray, "slots"]
    delta: bool
    shared_upload_s: Float[np.ndarray, "tasks ues"]
    lone_upload_s: Float[np.ndarray, "tasks ues"]
    cost_per_s: float


def episode_costs(
    scenario: Scenario,
    gain: Float[np.ndarray, "tasks ues"],
    complexity: Float[np.ndarray, "tasks ues"],
    data_bits: Float[np.ndarray, "tasks ues"],
    transmit_power_w: Float[np.ndarray, "ues"],
    family: Int[np.ndarray, "tasks ues"] | None = None,
    downlink_gain: Float[np.ndarray, "tasks ues"] | None = None,
) -> Costs:
    """What each decision costs.

    Args:
        scenario: the world.
        gain: the gain during each task.
        complexity: of each task.
        data_bits: of each task.
        transmit_power_w: of each UE, in W.
        family: of each task, if there are several.
        downlink_gain: the downlink's gain during each task, if it has one of its own.
    """
    radio, quality, reward = scenario.radio, scenario.quality, scenario.reward
    ues = gain.shape[1]
    noise = 10 ** ((radio.noise_dbm_per_hz - 30) / 10)
    slots = [
        (number, model, layers)
        for number, model in enumerate(scenario.models)
        for layers in range(model.fewest, model.most + 1)
    ]
    weight = quality.complexity_weight
    divisor = complexity if quality.complexity_factor == "as_printed" else weight
    scale = -reward.perplexity_weight / ues * (complexity + weight) / divisor
    up_hz, down_hz = radio.uplink_bandwidth_hz, radio.downlink_bandwidth_hz
    ergodic = radio.rate == "ergodic"
    down_snr = radio.downlink_power_w * (gain if downlink_gain is None else downlink_gain) / (noise * down_hz)
    down_rate = down_hz * spectral_efficiency(down_snr, ergodic)
    up_snr = transmit_power_w * gain / (noise * up_hz)
    of_task = np.zeros(gain.shape, int) if family is None else family
    whole = np.array([model.curve(1.0) for model in scenario.models])
    curve = np.array([model.curve(layers / model.layers) for _, model, layers in slots])
    family_of_slot = np.array([number for number, _, _ in slots])
    delta = scenario.delta_download
    sent_bits = np.array(
        [
            8e9 * model.size_gb * ((1 if delta and layers > model.fewest else layers) / model.layers)
            for _, model, layers in slots
        ]
    )
    return Costs(
        server_cost=scale * whole[of_task],
        local_cost=scale[..., None] * curve,
        sent_s=sent_bits / down_rate[..., None],
        usable=family_of_slot == of_task[..., None],
        family=family_of_slot,
        delta=delta,
        shared_upload_s=data_bits / (up_hz * spectral_efficiency(up_snr * ues, ergodic)),
        lone_upload_s=data_bits / (up_hz * spectral_efficiency(up_snr, ergodic)),
        cost_per_s=-reward.delay_weight_per_min / 60,
    )


def cost_bound(costs: Costs, method: Method = "linear", time_limit_s: float = 60.0) -> float:
    """A lower bound on the cost of every policy on an episode.

    Args:
        costs: the episode's coefficients.
        method: ``"linear"`` for the relaxation, ``"integer"`` for the tighter dual bound of the integer
            programme.
        time_limit_s: when the integer programme stops with the dual bound it has.

    Raises:
        BoundError: the solver failed.
    """
    programme = _build(costs)
    limits = optimize.Bounds(0, programme.upper)
    integrality = programme.integer if method == "integer" else np.zeros_like(programme.integer)
    solved = optimize.milp(
        programme.objective,
        integrality=integrality,
        bounds=limits,
        constraints=programme.constraints,
        options={"time_limit": time_limit_s} if method == "integer" else None,
    )
    bound = solved.mip_dual_bound if method == "integer" else solved.fun
    if bound is None or not np.isfinite(bound):
        raise BoundError(f"the {method} programme was not solved: {solved.message}")
    # HiGHS keeps constraints to 1e-7 of values near one; this margin outweighs what that can move.
    return float(bound) - 1e-6 * abs(float(bound))


class _Programme(NamedTuple):
    objective: Float[np.ndarray, "variables"]
    upper: Float[np.ndarray, "variables"]
    integer: Float[np.ndarray, "variables"]
    constraints: list[optimize.LinearConstraint]


def _build(costs: Costs) -> _Programme:
    tasks, ues, levels = costs.local_cost.shape
    flat, full = tasks * ues, tasks * ues * levels
    server, local, cached, switch = 0, flat, flat + full, flat + 2 * full
    delay = flat + 3 * full
    variables = delay + tasks
    step_ue = np.arange(flat)
    cell = np.arange(full)
    cell_step_ue, cell_task = cell // levels, cell // (levels * ues)

    def matrix(rows: int, *blocks: tuple[np.ndarray, np.ndarray, np.ndarray | float]) -> sparse.csr_array:
        row = np.concatenate([block[0] for block in blocks])
        column = np.concatenate([block[1] for block in blocks])
        value = np.concatenate([np.broadcast_to(block[2], block[0].shape) for block in blocks])
        return sparse.csr_array((value, (row, column)), shape=(rows, variables))

    task_of = step_ue // ues
    every_task = np.arange(tasks)
    somewhere = matrix(flat, (step_ue, server + step_ue, 1.0), (cell_step_ue, local + cell, 1.0))
    holds_what_it_uses = matrix(full, (cell, local + cell, 1.0), (cell, cached + cell, -1.0))
    row, holding = _holdings(costs, cell)
    of_later = row >= ues * levels
    held_or_sent = matrix(
        full,
        (row, cached + holding, 1.0),
        (cell, switch + cell, -1.0),
        (row[of_later], cached + holding[of_later] - ues * levels, -1.0),
    )
    one_emulator = matrix(flat, (cell_step_ue, cached + cell, 1.0))
    downlink = matrix(
        tasks, (cell_task, switch + cell, costs.sent_s.ravel()), (every_task, delay + every_task, -1.0)
    )
    uplink = matrix(
        tasks,
        (task_of, server + step_ue, costs.shared_upload_s.ravel()),
        (every_task, delay + every_task, -1.0),
    )
    alone = matrix(
        flat, (step_ue, server + step_ue, costs.lone_upload_s.ravel()), (step_ue, delay + task_of, -1.0)
    )
    objective = np.zeros(variables)
    objective[:flat] = costs.server_cost.ravel()
    objective[local:cached] = costs.local_cost.ravel()
    objective[delay:] = costs.cost_per_s
    upper = np.ones(variables)
    upper[local:cached] = upper[switch:delay] = costs.usable.ravel()
    upper[delay:] = np.inf
    integer = np.ones(variables)
    integer[delay:] = 0
    at_most_zero = sparse.vstack([holds_what_it_uses, held_or_sent, downlink, uplink, alone])
    return _Programme(
        objective,
        upper,
        integer,
        [
            optimize.LinearConstraint(somewhere, 1, 1),
            optimize.LinearConstraint(one_emulator, -np.inf, 1),
            optimize.LinearConstraint(at_most_zero, -np.inf, 0),
        ],
    )


def _holdings(
    costs: Costs, cell: Int[np.ndarray, "cells"]
) -> tuple[Int[np.ndarray, "pairs"], Int[np.ndarray, "pairs"]]:
    """Pairs of a cell and the cells whose emulators hold what it stands for.

    An emulator holds itself; with delta download, what a slot stands for are the layers that it has more
    than the slot before, and the larger emulators of its family hold them too.
    """
    if not costs.delta:
        return cell, cell
    slots = len(costs.family)
    slot = np.arange(slots)
    inside = (costs.family == costs.family[:, None]) & (slot >= slot[:, None])
    small, large = np.nonzero(inside)
    base = np.arange(0, len(cell), slots)[:, None]
    return (base + small).ravel(), (base + large).ravel()
