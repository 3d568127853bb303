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
  no upload is faster than alone at full bandwidth.

Where training takes time:

- *Server.* Of n tasks there each trains for n c_i seconds, where c_i is what task i takes alone, and has
  uploaded for at least n a_i, with a_i the seconds per uploader at the SNR of the smallest share that can
  occur. So each is there for at least n (a_i + c_i); the mean over the n of them is the sum of a_i + c_i,
  and the slowest is no faster than the mean. Nor is any faster than alone.
- *UE.* Of m downloads, the i-th takes m s_i seconds and its training g_i, so that the slowest takes at least
  the mean, sum(s_i) + sum(g_i) / m, and m is at most the number M of UEs that could train on their own:
  sum(s_i + g_i / M). (Not with delta download, where one download is of several pieces.)
- *Each UE alone* is at the server, on its own, or idle, so the step takes at least what it does with the
  links and the server to itself: one row with all of its choices, of which a policy takes one.

Where energy counts, each joule is charged where it is spent, with transfers as short as alone on their link:
they take no less time when shared, at the same power. What an episode's joules exceed a UE's budget by is
at least their sum less the budget, and at least 0.

What is impossible has no variable: uploads of private data, levels beyond a UE's memory, any training
without a task (``emutune.world.possible``, which the simulator asks as well).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import optimize, sparse

from emutune.errors import BoundError
from emutune.scenario import Scenario

Method = Literal["linear", "integer"]


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
        lone_upload_s: from the first bit to the end of training, alone; ``shared_upload_s`` is what each task
            at the server adds for every one that is there.
        cost_per_s: of the step's delay.
        active: whether there is a task; None where there always is.
        may_upload: whether the server may train it; None where it always may.
        training_s: of a slot's emulator on the UE; None where training takes no time.
        energy: None where it costs nothing.
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
    active: Bool[np.ndarray, "tasks ues"] | None = None
    may_upload: Bool[np.ndarray, "tasks ues"] | None = None
    training_s: Float[np.ndarray, "tasks ues slots"] | None = None
    energy: EnergyCosts | None = None


class EnergyCosts(NamedTuple):
    """Joules of each decision, at the least, and what a joule costs; without a budget the last two are 0."""

    upload_j: Float[np.ndarray, "tasks ues"]
    local_j: Float[np.ndarray, "tasks ues slots"]
    sent_j: Float[np.ndarray, "tasks ues slots"]
    cost_per_j: float
    budget_j: float
    over_cost_per_j: float


class Draws(NamedTuple):
    """What more an episode draws, on the host; None where a feature is off.

    Attributes:
        active: who has a task.
        tflops: speed of each UE's training.
        compute_w: what that takes.
        private: who may not upload.
        most_layers: of the largest emulator of each family that a UE can hold.
    """

    active: Bool[np.ndarray, "tasks ues"] | None = None
    tflops: Float[np.ndarray, "ues"] | None = None
    compute_w: Float[np.ndarray, "ues"] | None = None
    private: Bool[np.ndarray, "ues"] | None = None
    most_layers: Int[np.ndarray, "ues families"] | None = None


def episode_costs(
    scenario: Scenario,
    gain: Float[np.ndarray, "tasks ues"],
    complexity: Float[np.ndarray, "tasks ues"],
    data_bits: Float[np.ndarray, "tasks ues"],
    transmit_power_w: Float[np.ndarray, "ues"],
    family: Int[np.ndarray, "tasks ues"] | None = None,
    draws: Draws = Draws(),  # noqa: B008 - an immutable tuple
) -> Costs:
    """What each decision costs.

    Args:
        scenario: the world.
        gain: the gain during each task.
        complexity: of each task.
        data_bits: of each task.
        transmit_power_w: of each UE, in W.
        family: of each task, if there are several.
        draws: what more the world has.
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
    down_rate = down_hz * np.log2(1 + radio.downlink_power_w * gain / (noise * down_hz))
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
    if draws.active is not None:
        scale = np.where(draws.active, scale * ues / np.maximum(draws.active.sum(1, keepdims=True), 1), 0.0)
    usable = family_of_slot == of_task[..., None]
    layers_of_slot = np.array([layers for _, _, layers in slots])
    if draws.most_layers is not None:
        usable = usable & (layers_of_slot <= draws.most_layers[:, family_of_slot])
    may_upload = _may_upload(draws, gain.shape)
    sharers = ues if may_upload is None else np.maximum(may_upload.sum(1, keepdims=True), 1)
    lone_upload_s = data_bits / (up_hz * np.log2(1 + up_snr))
    costs = Costs(
        server_cost=scale * whole[of_task],
        local_cost=scale[..., None] * curve,
        sent_s=sent_bits / down_rate[..., None],
        usable=usable,
        family=family_of_slot,
        delta=delta,
        shared_upload_s=data_bits / (up_hz * np.log2(1 + up_snr * sharers)),
        lone_upload_s=lone_upload_s,
        cost_per_s=-reward.delay_weight_per_min / 60,
        active=draws.active,
        may_upload=may_upload,
    )
    retention = np.array([layers / model.layers for _, model, layers in slots])
    costs = _with_training(scenario, costs, data_bits, of_task, retention, draws)
    return _with_energy(scenario, costs, transmit_power_w * lone_upload_s, draws)


def _may_upload(draws: Draws, shape: tuple[int, ...]) -> Bool[np.ndarray, "tasks ues"] | None:
    if draws.active is None and draws.private is None:
        return None
    may = np.ones(shape, bool) if draws.active is None else draws.active
    return may if draws.private is None else may & ~draws.private


def _with_training(
    scenario: Scenario,
    costs: Costs,
    data_bits: Float[np.ndarray, "tasks ues"],
    family: Int[np.ndarray, "tasks ues"],
    retention: Float[np.ndarray, "slots"],
    draws: Draws,
) -> Costs:
    """Costs with the seconds of training."""
    wanted = scenario.computation
    if wanted is None or draws.tflops is None:
        return costs
    parameters = np.array([model.parameters_billion or 0.0 for model in scenario.models])
    tokens = data_bits / 8 / wanted.bytes_per_token
    tflop = 4e-3 * parameters[family] * tokens * wanted.epochs
    there_s = tflop / wanted.server_tflops
    return costs._replace(
        shared_upload_s=costs.shared_upload_s + there_s,
        lone_upload_s=costs.lone_upload_s + there_s,
        training_s=(tflop / draws.tflops)[..., None] * retention,
    )


def _with_energy(
    scenario: Scenario, costs: Costs, upload_j: Float[np.ndarray, "tasks ues"], draws: Draws
) -> Costs:
    """Costs with the joules of every decision."""
    wanted = scenario.energy
    if wanted is None:
        return costs
    ues = upload_j.shape[1]
    local_j = np.zeros_like(costs.local_cost)
    if costs.training_s is not None and draws.compute_w is not None:
        local_j = draws.compute_w[:, None] * costs.training_s
    over = wanted.over_budget_weight_per_j
    return costs._replace(
        energy=EnergyCosts(
            upload_j=upload_j,
            local_j=local_j,
            sent_j=wanted.receive_w * costs.sent_s,
            cost_per_j=-wanted.weight_per_j / ues,
            budget_j=wanted.budget_j or 0.0,
            over_cost_per_j=0.0 if over is None else -over / ues,
        )
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
    energy = costs.energy
    excess = delay + tasks
    variables = excess + (ues if energy is not None and energy.over_cost_per_j > 0 else 0)
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
    more = []
    if costs.training_s is not None:
        seconds = [
            (step_ue, server + step_ue, costs.lone_upload_s.ravel()),
            (cell_step_ue, local + cell, costs.training_s.ravel()),
            (cell_step_ue, switch + cell, costs.sent_s.ravel()),
        ]
        alone = matrix(flat, *seconds, (step_ue, delay + task_of, -1.0))
        if not costs.delta:
            loaders = np.full(tasks, ues) if costs.active is None else np.maximum(costs.active.sum(1), 1)
            shared_s = costs.sent_s + costs.training_s / loaders[:, None, None]
            downlink = matrix(
                tasks, (cell_task, switch + cell, shared_s.ravel()), (every_task, delay + every_task, -1.0)
            )
    if _has_devices(costs):
        # A download is for training with what arrives; in worlds without devices results stay as published.
        sent, large = _holdings(costs, cell)
        more.append(matrix(full, (cell, switch + cell, 1.0), (sent, local + large, -1.0)))
    objective = np.zeros(variables)
    objective[:flat] = costs.server_cost.ravel()
    objective[local:cached] = costs.local_cost.ravel()
    objective[delay:excess] = costs.cost_per_s
    upper = np.ones(variables)
    upper[local:cached] = upper[switch:delay] = costs.usable.ravel()
    if costs.may_upload is not None:
        upper[:flat] = costs.may_upload.ravel()
    upper[delay:] = np.inf
    limits = []
    if energy is not None:
        objective[:flat] += energy.cost_per_j * energy.upload_j.ravel()
        objective[local:cached] += energy.cost_per_j * energy.local_j.ravel()
        objective[switch:delay] += energy.cost_per_j * energy.sent_j.ravel()
        if variables > excess:
            objective[excess:] = energy.over_cost_per_j
            # In budgets, so that coefficients stay near one.
            joules = matrix(
                ues,
                (step_ue % ues, server + step_ue, energy.upload_j.ravel() / energy.budget_j),
                (cell_step_ue % ues, local + cell, energy.local_j.ravel() / energy.budget_j),
                (cell_step_ue % ues, switch + cell, energy.sent_j.ravel() / energy.budget_j),
                (np.arange(ues), excess + np.arange(ues), -1.0 / energy.budget_j),
            )
            limits.append(optimize.LinearConstraint(joules, -np.inf, 1))
    trained = np.ones(flat)
    if costs.active is not None:
        trained = costs.active.ravel() * 1.0
        upper[local:cached] = upper[local:cached] * trained[cell_step_ue]
        upper[switch:delay] = upper[switch:delay] * trained[cell_step_ue]
    integer = np.ones(variables)
    integer[delay:] = 0
    at_most_zero = sparse.vstack([holds_what_it_uses, held_or_sent, downlink, uplink, alone, *more])
    return _Programme(
        objective,
        upper,
        integer,
        [
            optimize.LinearConstraint(somewhere, trained, trained),
            optimize.LinearConstraint(one_emulator, -np.inf, 1),
            optimize.LinearConstraint(at_most_zero, -np.inf, 0),
            *limits,
        ],
    )


def _has_devices(costs: Costs) -> bool:
    """Whether UEs differ in more than their radio."""
    return not (costs.may_upload is None and costs.training_s is None and costs.energy is None)


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
