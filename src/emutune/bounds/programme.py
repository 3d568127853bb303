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
  SNR and, at a given power, with the bandwidth (``emutune.step.ergodic``).

Where each UE has a link of its own (D18), a step takes at least as long as each UE alone, the mean delay of M downloads
is at least the sum of their delays over the most that there can be, and likewise that of uploads: in what follows a_i
and s_i are then what task i takes alone, over the most that can be there.

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
without a task (``emutune.step.options``, which the simulator asks as well).
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from jaxtyping import Float, Int
from scipy import optimize

from emutune.bounds.blocks import Blocks, numbers
from emutune.bounds.costs import Costs
from emutune.bounds.sharing import delay_rows, pair_rows, sharing_shapes
from emutune.errors import BoundError

Method = Literal["linear", "integer", "prices"]


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
    at = _lay_out(costs)
    # Excesses, delays and products of shares are as large as they must be; they are whole in no schedule.
    whole = at.vector(server=1, local=1, cached=1, switch=1)
    solved = optimize.milp(
        _objective(costs, at),
        integrality=whole if method == "integer" else np.zeros_like(whole),
        bounds=optimize.Bounds(0, _upper(costs, at)),
        constraints=[
            _trained_row(costs, at),
            *_room_rows(costs, at),
            *_holding_rows(costs, at),
            *delay_rows(costs, at),
            *pair_rows(costs, at),
            *_budget_rows(costs, at),
        ],
        options={"time_limit": time_limit_s} if method == "integer" else None,
    )
    bound = solved.mip_dual_bound if method == "integer" else solved.fun
    if bound is None or not np.isfinite(bound):
        raise BoundError(f"the {method} programme was not solved: {solved.message}")
    # HiGHS keeps constraints to 1e-7 of values near one; this margin outweighs what that can move.
    return float(bound) - 1e-6 * abs(float(bound))


def _lay_out(costs: Costs) -> Blocks:
    """The variables of an episode.

    ``server``, ``local``, ``cached`` and ``switch`` are shares of decisions; ``delay`` is a step's, ``excess``
    of joules over a UE's budget. For the others see ``sharing``.
    """
    tasks, ues, slots = costs.local_cost.shape
    return Blocks(
        server=(tasks, ues),
        local=(tasks, ues, slots),
        cached=(tasks, ues, slots),
        switch=(tasks, ues, slots),
        delay=(tasks,),
        excess=(ues if costs.joules.over_cost else 0,),
        **sharing_shapes(costs),
    )


def _objective(costs: Costs, at: Blocks) -> Float[np.ndarray, "variables"]:
    return at.vector(
        server=costs.server_cost,
        local=costs.local_cost,
        switch=costs.sent_cost,
        delay=costs.cost_per_s,
        excess=costs.joules.over_cost,
    )


def _upper(costs: Costs, at: Blocks) -> Float[np.ndarray, "variables"]:
    """The largest value of each variable; 0 of what is impossible."""
    possible = costs.usable & costs.active[..., None]
    return at.vector(
        server=costs.may_upload,
        local=possible,
        cached=1.0,
        switch=possible,
        others=np.inf,
    )


def _trained_row(costs: Costs, at: Blocks) -> optimize.LinearConstraint:
    """Every task is trained somewhere."""
    ue, trained = numbers(*costs.active.shape), costs.active.ravel().astype(float)
    return at.rows(
        ue.size, (ue, at["server"], 1.0), (ue[..., None], at["local"], 1.0), least=trained, most=trained
    )


def _room_rows(costs: Costs, at: Blocks) -> list[optimize.LinearConstraint]:
    """One emulator of each group is cached, and what fits together."""
    ue, room = numbers(*costs.active.shape), costs.room
    groups = room.group == np.arange(room.group.max() + 1)[:, None]
    return [
        at.rows(ue.size, (ue[..., None], at["cached"], taken), most=1.0) for taken in (*room.limits, *groups)
    ]


def _holding_rows(costs: Costs, at: Blocks) -> list[optimize.LinearConstraint]:
    """What is used is held, and what is held was held before or is sent."""
    cell = numbers(*costs.local_cost.shape)
    small, large = _holdings(costs)
    held = at["cached"][..., large]
    uses_what_it_holds = at.rows(cell.size, (cell, at["local"], 1.0), (cell, at["cached"], -1.0))
    held_or_sent = at.rows(
        cell.size,
        (cell[..., small], held, 1.0),
        (cell, at["switch"], -1.0),
        (cell[1:, :, small], held[:-1], -1.0),
    )
    if not costs.devices:
        return [uses_what_it_holds, held_or_sent]
    # A download is for training with what arrives. Worlds without devices keep the bound that was published.
    used = at.rows(cell.size, (cell, at["switch"], 1.0), (cell[..., small], at["local"][..., large], -1.0))
    return [uses_what_it_holds, held_or_sent, used]


def _holdings(costs: Costs) -> tuple[Int[np.ndarray, "pairs"], Int[np.ndarray, "pairs"]]:
    """Pairs of a slot and a slot whose emulator holds what it stands for.

    An emulator holds itself; with delta download, what a slot stands for are the layers that it has more
    than the slot before, and the larger emulators of its family hold them too.
    """
    slot = np.arange(len(costs.family))
    if not costs.delta:
        return slot, slot
    small, large = np.nonzero((costs.family == costs.family[:, None]) & (slot >= slot[:, None]))
    return small, large


def _budget_rows(costs: Costs, at: Blocks) -> list[optimize.LinearConstraint]:
    """What exceeds each UE's budget."""
    joules, every = costs.joules, np.arange(at["excess"].size)
    if every.size == 0:
        return []
    # In budgets, so that coefficients stay near one.
    return [
        at.rows(
            every.size,
            (every, at["server"], joules.upload / joules.budget),
            (every[:, None], at["local"], joules.local / joules.budget),
            (every[:, None], at["switch"], joules.sent / joules.budget),
            (every, at["excess"], -1.0 / joules.budget),
            most=1.0,
        )
    ]
