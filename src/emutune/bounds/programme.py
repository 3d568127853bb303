"""The clairvoyant linear relaxation of one realised episode, and its integer twin.

With every random draw known, relax the decisions to [0, 1]. What the optimum costs is a lower bound on
what any policy, clairvoyant ones included, costs on that episode:

- Power and bandwidth of the downlink are both split equally, so a download's SNR does not depend on how
  many share, the mean delay of the downloaders is the sum of their delays alone, and the largest delay
  is at least the mean.
- With several families the task's family says which emulators may be used or sent; the others stay held.
- Where a UE caches several, any that fit together may be held: which of them were used least recently does not
  count, so that a policy's caches are among those that are possible here. Of emulators that take more than a
  k-th of the cache, fewer than k fit; fractions of emulators would fit without these rows.
- With delta download the layers that level l has more than level l - 1 are sent on their own: they are held
  if any emulator of that level or above is.
- On the uplink the same holds with the SNR taken at the smallest share, which only shortens delays; and
  no upload is faster than alone at full bandwidth. Both hold for the ergodic rate too, which rises with the
  SNR and, at a given power, with the bandwidth (``emutune.world.ergodic``).

Where training takes time:

- *Server.* Of n tasks there each trains for n c_i seconds, where c_i is what task i takes alone, and has
  uploaded for at least n a_i, with a_i the seconds per uploader at the SNR of the smallest share that can
  occur. So each is there for at least n (a_i + c_i); the mean over the n of them is the sum of a_i + c_i,
  and the slowest is no faster than the mean. Nor is any faster than alone.
- *UE.* Of m downloads, the i-th takes m s_i seconds and its training g_i, so that the slowest takes at least
  the mean, sum(s_i) + sum(g_i) / m, and m is at most the number M of UEs that could train on their own:
  sum(s_i + g_i / M). (Not with delta download, where one download is of several pieces.)
- *Pairs.* Where tasks differ much, the mean is far below the slowest. With y_ij = 1 if both i and j are at the
  server (y_ij >= z_i + z_j - 1) and w = a + c, every j gives two more rows. If j is there, the step takes at
  least n w_j = w_j z_j + w_j sum(y_ij), and also the sum of max(w_i, w_j) over those there, which is
  sum(w_i z_i) + sum(max(w_j - w_i, 0) y_ij) and at most n times the largest w. If j is not there, the first
  is 0 and the second the mean again. In the same way a download of j takes its s_j once more for
  every other UE that downloads as well.
- *Each UE alone* is at the server, on its own, or idle, so the step takes at least what it does with the
  links and the server to itself: one row with all of its choices, of which a policy takes one.

Where energy counts, each joule is charged where it is spent, with transfers as short as alone on their link:
they take no less time when shared, at the same power. What an episode's joules exceed a UE's budget by is
at least their sum less the budget, and at least 0.

What is impossible has no variable: uploads of private data, levels beyond a UE's memory, any training
without a task (``emutune.world.possible``, which the simulator asks as well).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import optimize, sparse

from emutune.errors import BoundError
from emutune.scenario import Model, Scenario
from emutune.world.devices import tflop_per_bit
from emutune.world.ergodic import spectral_efficiency

Method = Literal["linear", "integer", "prices"]

# The simulator adds up what is cached in single precision, and lets a little more than the whole cache pass.
_ROOM_GUARD = 1e-5
# Of so many emulators at most it is said that they do not fit together, by their sizes alone.
_COUNTED = 8
# Up to so many UEs, pairs of them have variables of their own; their number grows with the square.
_PAIRED_UES = 12


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
        room: None where a UE caches one emulator.
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
    room: Room | None = None


class Room(NamedTuple):
    """A cache of several emulators.

    Attributes:
        limits: what each slot's emulator takes of something that a UE has once; the first is the cache itself.
        task_family: of each task.
    """

    limits: Float[np.ndarray, "limits slots"]
    task_family: Int[np.ndarray, "tasks ues"]


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
        downlink_gain: during each task, where the downlink has a gain of its own.
    """

    active: Bool[np.ndarray, "tasks ues"] | None = None
    tflops: Float[np.ndarray, "ues"] | None = None
    compute_w: Float[np.ndarray, "ues"] | None = None
    private: Bool[np.ndarray, "ues"] | None = None
    most_layers: Int[np.ndarray, "ues families"] | None = None
    downlink_gain: Float[np.ndarray, "tasks ues"] | None = None


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
    ergodic = radio.rate == "ergodic"
    down_gain = gain if draws.downlink_gain is None else draws.downlink_gain
    down_snr = radio.downlink_power_w * down_gain / (noise * down_hz)
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
    if draws.active is not None:
        scale = np.where(draws.active, scale * ues / np.maximum(draws.active.sum(1, keepdims=True), 1), 0.0)
    usable = family_of_slot == of_task[..., None]
    layers_of_slot = np.array([layers for _, _, layers in slots])
    if draws.most_layers is not None:
        usable = usable & (layers_of_slot <= draws.most_layers[:, family_of_slot])
    may_upload = _may_upload(draws, gain.shape)
    sharers = ues if may_upload is None else np.maximum(may_upload.sum(1, keepdims=True), 1)
    lone_upload_s = data_bits / (up_hz * spectral_efficiency(up_snr, ergodic))
    costs = Costs(
        server_cost=scale * whole[of_task],
        local_cost=scale[..., None] * curve,
        sent_s=sent_bits / down_rate[..., None],
        usable=usable,
        family=family_of_slot,
        delta=delta,
        shared_upload_s=data_bits / (up_hz * spectral_efficiency(up_snr * sharers, ergodic)),
        lone_upload_s=lone_upload_s,
        cost_per_s=-reward.delay_weight_per_min / 60,
        active=draws.active,
        may_upload=may_upload,
        room=_room(scenario, slots, of_task),
    )
    retention = np.array([layers / model.layers for _, model, layers in slots])
    costs = _with_training(scenario, costs, data_bits, of_task, retention, draws)
    return _with_energy(scenario, costs, transmit_power_w * lone_upload_s, draws)


def _room(
    scenario: Scenario, slots: list[tuple[int, Model, int]], of_task: Int[np.ndarray, "tasks ues"]
) -> Room | None:
    """Sizes that together are at most the cache's, and of those of more than a k-th of it less than k."""
    cache_gb = scenario.families.cache_gb if scenario.families else None
    if cache_gb is None:
        return None
    sizes_gb = np.array([model.emulator_gb(layers) for _, model, layers in slots])
    share = sizes_gb / (cache_gb * (1 + _ROOM_GUARD))
    counted = [(share * k > 1) / (k - 1.0) for k in range(2, min(len(scenario.models), _COUNTED) + 1)]
    return Room(np.stack([share, *(row for row in counted if row.any())]), of_task)


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
    tflop = np.array(tflop_per_bit(scenario, wanted))[family] * data_bits
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


@dataclass(frozen=True)
class _Layout:
    """Where each kind of variable begins: tasks t, UEs n, slots s, in this order.

    ``server``, ``local``, ``cached`` and ``switch`` are shares of decisions; ``delay`` is a step's, ``excess``
    of joules over a UE's budget. ``both`` is the product of two UEs' shares at the server, and ``waits`` what a
    UE's download takes longer because another UE downloads too, for each ordered pair.
    """

    costs: Costs

    @property
    def tasks(self) -> int:
        return self.costs.local_cost.shape[0]

    @property
    def ues(self) -> int:
        return self.costs.local_cost.shape[1]

    @property
    def levels(self) -> int:
        return self.costs.local_cost.shape[2]

    @property
    def flat(self) -> int:
        return self.tasks * self.ues

    @property
    def full(self) -> int:
        return self.flat * self.levels

    @property
    def local(self) -> int:
        return self.flat

    @property
    def cached(self) -> int:
        return self.local + self.full

    @property
    def switch(self) -> int:
        return self.cached + self.full

    @property
    def delay(self) -> int:
        return self.switch + self.full

    @property
    def excess(self) -> int:
        return self.delay + self.tasks

    @property
    def both(self) -> int:
        energy = self.costs.energy
        return self.excess + (self.ues if energy is not None and energy.over_cost_per_j > 0 else 0)

    @property
    def pairs(self) -> int:
        """How many unordered pairs of UEs have variables of their own, at each step."""
        wanted = _has_devices(self.costs) and self.ues <= _PAIRED_UES
        return self.ues * (self.ues - 1) // 2 if wanted else 0

    @property
    def waits(self) -> int:
        return self.both + self.tasks * self.pairs

    @property
    def variables(self) -> int:
        # Where only missing layers are sent, one download is of several pieces.
        return self.waits + (0 if self.costs.delta else 2 * self.tasks * self.pairs)

    @property
    def cell(self) -> Int[np.ndarray, "cells"]:
        return np.arange(self.full)

    @property
    def step_ue(self) -> Int[np.ndarray, "steps_and_ues"]:
        return np.arange(self.flat)

    def matrix(
        self, rows: int, *blocks: tuple[np.ndarray, np.ndarray, np.ndarray | float]
    ) -> sparse.csr_array:
        """Rows of constraints, from blocks of row numbers, columns and coefficients."""
        row = np.concatenate([block[0] for block in blocks])
        column = np.concatenate([block[1] for block in blocks])
        value = np.concatenate([np.broadcast_to(block[2], block[0].shape) for block in blocks])
        return sparse.csr_array((value, (row, column)), shape=(rows, self.variables))


def _build(costs: Costs) -> _Programme:
    at = _Layout(costs)
    cell, step_ue = at.cell, at.step_ue
    cell_step_ue = cell // at.levels
    trained = np.ones(at.flat) if costs.active is None else costs.active.ravel() * 1.0
    somewhere = at.matrix(at.flat, (step_ue, step_ue, 1.0), (cell_step_ue, at.local + cell, 1.0))
    at_most_zero = [*_holding_rows(at), *_delay_rows(at)]
    objective, upper = np.zeros(at.variables), np.ones(at.variables)
    objective[: at.flat] = costs.server_cost.ravel()
    objective[at.local : at.cached] = costs.local_cost.ravel()
    objective[at.delay : at.excess] = costs.cost_per_s
    possible = costs.usable.ravel() * trained[cell_step_ue]
    upper[at.local : at.cached] = upper[at.switch : at.delay] = possible
    if costs.may_upload is not None:
        upper[: at.flat] = costs.may_upload.ravel()
    upper[at.delay :] = np.inf
    integer = np.ones(at.variables)
    integer[at.delay :] = 0
    limits = [*_pair_limits(at), *_charge_energy(at, objective)]
    return _Programme(
        objective,
        upper,
        integer,
        [
            optimize.LinearConstraint(somewhere, trained, trained),
            optimize.LinearConstraint(_cached_rows(at), -np.inf, 1),
            optimize.LinearConstraint(sparse.vstack(at_most_zero), -np.inf, 0),
            *limits,
        ],
    )


def _cached_rows(at: _Layout) -> sparse.csr_array:
    """One emulator is cached; or one of each family, and what fits together: at most 1."""
    cell, room = at.cell, at.costs.room
    cell_step_ue, slot = cell // at.levels, cell % at.levels
    if room is None:
        return at.matrix(at.flat, (cell_step_ue, at.cached + cell, 1.0))
    every = np.arange(at.costs.family.max() + 1)
    rows = [*room.limits, *np.equal(at.costs.family, every[:, None]).astype(float)]
    return sparse.vstack(
        [at.matrix(at.flat, (cell_step_ue, at.cached + cell, row[slot])) for row in rows], format="csr"
    )


def _holding_rows(at: _Layout) -> list[sparse.csr_array]:
    """What is used is held, and what is held was held before or is sent; at most 0."""
    cell, width = at.cell, at.ues * at.levels
    holds_what_it_uses = at.matrix(at.full, (cell, at.local + cell, 1.0), (cell, at.cached + cell, -1.0))
    row, holding = _holdings(at.costs, cell)
    of_later = row >= width
    held_or_sent = at.matrix(
        at.full,
        (row, at.cached + holding, 1.0),
        (cell, at.switch + cell, -1.0),
        (row[of_later], at.cached + holding[of_later] - width, -1.0),
    )
    if not _has_devices(at.costs):
        return [holds_what_it_uses, held_or_sent]
    # A download is for training with what arrives. Worlds without devices keep the bound that was published.
    used = at.matrix(at.full, (cell, at.switch + cell, 1.0), (row, at.local + holding, -1.0))
    return [holds_what_it_uses, held_or_sent, used]


def _delay_rows(at: _Layout) -> list[sparse.csr_array]:
    """A step takes at least the mean of those that share, and what each takes alone; at most 0."""
    costs, cell, step_ue = at.costs, at.cell, at.step_ue
    task_of, every_task = step_ue // at.ues, np.arange(at.tasks)
    less_delay = (every_task, at.delay + every_task, -1.0)
    download_s = costs.sent_s
    lone = [(step_ue, step_ue, costs.lone_upload_s.ravel())]
    if costs.training_s is not None:
        cell_step_ue = cell // at.levels
        lone.append((cell_step_ue, at.local + cell, costs.training_s.ravel()))
        lone.append((cell_step_ue, at.switch + cell, costs.sent_s.ravel()))
        if not costs.delta:
            loaders = at.ues if costs.active is None else np.maximum(costs.active.sum(1), 1)[:, None, None]
            download_s = costs.sent_s + costs.training_s / loaders
    downlink = at.matrix(
        at.tasks, (cell // (at.levels * at.ues), at.switch + cell, download_s.ravel()), less_delay
    )
    uplink = at.matrix(at.tasks, (task_of, step_ue, costs.shared_upload_s.ravel()), less_delay)
    alone = at.matrix(at.flat, *lone, (step_ue, at.delay + task_of, -1.0))
    return [downlink, uplink, alone]


def _pair_limits(at: _Layout) -> list[optimize.LinearConstraint]:
    """What each UE takes together with every other, pair by pair.

    The mean over those that share is far below the slowest where tasks differ much. For every UE there is a
    row that counts its own seconds once for each that shares with it.
    """
    if at.pairs == 0:
        return []
    costs, ues, tasks = at.costs, at.ues, at.tasks
    one, other = np.triu_indices(ues, 1)
    number = np.zeros((ues, ues), int)
    number[one, other] = number[other, one] = np.arange(at.pairs)
    pair = np.arange(tasks * at.pairs)
    base = np.repeat(np.arange(tasks) * ues, at.pairs)
    left, right = base + np.tile(one, tasks), base + np.tile(other, tasks)
    # both >= left + right - 1
    at_once = at.matrix(len(pair), (pair, left, 1.0), (pair, right, 1.0), (pair, at.both + pair, -1.0))
    # Ordered pairs: a UE, then another one.
    mine, theirs = np.nonzero(~np.eye(ues, dtype=bool))
    own = (np.arange(tasks)[:, None] * ues + mine).ravel()
    their = (np.arange(tasks)[:, None] * ues + theirs).ravel()
    shared = (at.both + np.arange(tasks)[:, None] * at.pairs + number[mine, theirs]).ravel()
    share_s, task_of = costs.shared_upload_s.ravel(), at.step_ue // ues
    less_delay = (at.step_ue, at.delay + task_of, -1.0)
    everyone = np.repeat(at.step_ue, ues), (task_of[:, None] * ues + np.arange(ues)).ravel()
    slowest_there = at.matrix(
        at.flat,
        (*everyone, share_s[everyone[1]]),
        (own, shared, np.maximum(share_s[own] - share_s[their], 0.0)),
        less_delay,
    )
    cell_step_ue = at.cell // at.levels
    blocks = [
        (at.step_ue, at.step_ue, share_s),
        (own, shared, share_s[own]),
        (cell_step_ue, at.switch + at.cell, costs.sent_s.ravel()),
    ]
    if costs.training_s is not None:
        blocks.append((cell_step_ue, at.local + at.cell, costs.training_s.ravel()))
    limits = [optimize.LinearConstraint(at_once, -np.inf, 1)]
    if not costs.delta:
        ordered = np.arange(len(own))
        blocks.append((own, at.waits + ordered, 1.0))
        limits.append(_waiting(at, own, their, ordered))
    together = at.matrix(at.flat, *blocks, less_delay)
    limits.append(optimize.LinearConstraint(sparse.vstack([slowest_there, together]), -np.inf, 0))
    return limits


def _waiting(
    at: _Layout,
    own: Int[np.ndarray, "ordered"],
    their: Int[np.ndarray, "ordered"],
    ordered: Int[np.ndarray, "ordered"],
) -> optimize.LinearConstraint:
    """Where another UE downloads too, a UE's own download takes as long again as alone, and at least 0."""
    sent_s = at.costs.sent_s.reshape(at.flat, at.levels)
    longest_s = np.where(at.costs.usable.reshape(at.flat, at.levels), sent_s, 0.0).max(1)
    row = np.repeat(ordered, at.levels)
    slots = np.arange(at.levels)
    mine, theirs = ((ue[:, None] * at.levels + slots).ravel() for ue in (own, their))
    # own_s - longest_s * (1 - theirs) <= waits
    rows = at.matrix(
        len(ordered),
        (row, at.switch + mine, sent_s[own].ravel()),
        (row, at.switch + theirs, np.repeat(longest_s[own], at.levels)),
        (ordered, at.waits + ordered, -1.0),
    )
    return optimize.LinearConstraint(rows, -np.inf, longest_s[own])


def _charge_energy(at: _Layout, objective: Float[np.ndarray, "variables"]) -> list[optimize.LinearConstraint]:
    """Add what joules cost to the objective; the limit of what exceeds each UE's budget."""
    energy = at.costs.energy
    if energy is None:
        return []
    objective[: at.flat] += energy.cost_per_j * energy.upload_j.ravel()
    objective[at.local : at.cached] += energy.cost_per_j * energy.local_j.ravel()
    objective[at.switch : at.delay] += energy.cost_per_j * energy.sent_j.ravel()
    if at.both == at.excess:
        return []
    objective[at.excess : at.both] = energy.over_cost_per_j
    ue, every = at.cell // at.levels % at.ues, np.arange(at.ues)
    # In budgets, so that coefficients stay near one.
    joules = at.matrix(
        at.ues,
        (at.step_ue % at.ues, at.step_ue, energy.upload_j.ravel() / energy.budget_j),
        (ue, at.local + at.cell, energy.local_j.ravel() / energy.budget_j),
        (ue, at.switch + at.cell, energy.sent_j.ravel() / energy.budget_j),
        (every, at.excess + every, -1.0 / energy.budget_j),
    )
    return [optimize.LinearConstraint(joules, -np.inf, 1)]


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
