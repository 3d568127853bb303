"""How long a step takes: rows of the programme on what UEs share, and on what each takes alone (``programme``)."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int
from scipy import optimize

from emutune.bounds.blocks import Blocks, numbers
from emutune.bounds.costs import Costs

# Up to so many UEs, pairs of them have variables of their own; their number grows with the square.
_PAIRED_UES = 12


def sharing_shapes(costs: Costs) -> dict[str, tuple[int, ...]]:
    """Blocks of variables of what UEs share.

    ``both`` is the product of two UEs' shares at the server, and ``waits`` what a UE's download takes longer because
    another UE downloads too, for each ordered pair; ``sending`` the seconds of each slot's multicast.
    """
    tasks, ues, slots = costs.sent_s.shape
    multicast = costs.rules.multicast
    pairs = ues * (ues - 1) // 2 if costs.devices and ues <= _PAIRED_UES else 0
    return {
        "both": (tasks, pairs),
        # Where only missing layers are sent, one download is of several pieces; a shared one waits for nobody, nor
        # does one over a link of its own.
        "waits": (tasks, 2 * pairs if costs.rules.links.shared and not (costs.delta or multicast) else 0),
        "sending": (tasks, slots if multicast else 0),
    }


def shared_download_s(costs: Costs) -> Float[np.ndarray, "tasks ues slots"]:
    """Seconds that a step takes longer for each download, by the mean over all that download."""
    if costs.rules.multicast:
        # What many fetch together is counted once (``_multicast_rows``).
        return np.zeros_like(costs.sent_s)
    # What is fetched is trained with, by as many as have a task at most.
    loaders = np.maximum(costs.active.sum(1), 1)[:, None, None]
    sent_s = costs.sent_s / (1 if costs.rules.links.shared else loaders)
    return sent_s if costs.delta else sent_s + costs.training_s / loaders


def lone_download_s(costs: Costs) -> Float[np.ndarray, "tasks ues slots"]:
    """Seconds of a download that has the link to itself, in the row of each UE alone."""
    # Worlds in which training takes no time keep the bound that was published.
    return costs.sent_s * (
        costs.rules.trains_in_time or costs.rules.multicast or not costs.rules.links.shared
    )


def delay_rows(costs: Costs, at: Blocks) -> list[optimize.LinearConstraint]:
    """A step takes at least the mean of those that share, and what each takes alone."""
    tasks, ues = costs.server_cost.shape
    step, ue = numbers(tasks), numbers(tasks, ues)
    less_delay = (step, at["delay"], -1.0)
    downlink = at.rows(tasks, (step[:, None, None], at["switch"], shared_download_s(costs)), less_delay)
    uplink = at.rows(tasks, (step[:, None], at["server"], costs.shared_upload_s), less_delay)
    alone = at.rows(
        ue.size,
        (ue, at["server"], costs.lone_upload_s),
        (ue[..., None], at["local"], costs.training_s),
        (ue[..., None], at["switch"], lone_download_s(costs)),
        (ue, at["delay"][:, None], -1.0),
    )
    return [downlink, uplink, alone, *_multicast_rows(costs, at)]


def _multicast_rows(costs: Costs, at: Blocks) -> list[optimize.LinearConstraint]:
    """Transmissions split the link, so that each takes as long as all do one after the other, or longer.

    The transmission of a slot takes as long as for the weakest of those that it is sent to. With delta download a
    transmission is of several slots' layers; each counts once, for its weakest, which is in one of the transmissions.
    """
    if at["sending"].size == 0:
        return []
    tasks, ues, slots = costs.sent_s.shape
    cell, step = numbers(tasks, ues, slots), numbers(tasks)
    weakest = at.rows(cell.size, (cell, at["switch"], costs.sent_s), (cell, at["sending"][:, None], -1.0))
    together = at.rows(tasks, (step[:, None], at["sending"], 1.0), (step, at["delay"], -1.0))
    return [weakest, together]


def pair_rows(costs: Costs, at: Blocks) -> list[optimize.LinearConstraint]:
    """What each UE takes together with every other, pair by pair.

    The mean over those that share is far below the slowest where tasks differ much. For every UE there is a
    row that counts its own seconds once for each that shares with it.
    """
    if at["both"].size == 0:
        return []
    tasks, ues = costs.server_cost.shape
    ue = numbers(tasks, ues)
    one, other = np.triu_indices(ues, 1)
    number = np.zeros((ues, ues), int)
    number[one, other] = number[other, one] = np.arange(len(one))
    # Ordered pairs: a UE, then another one.
    mine, theirs = np.nonzero(~np.eye(ues, dtype=bool))
    shared, share_s = at["both"][:, number[mine, theirs]], costs.shared_upload_s
    less_delay = (ue, at["delay"][:, None], -1.0)
    pair = numbers(*at["both"].shape)
    at_once = at.rows(
        pair.size,
        (pair, at["server"][:, one], 1.0),
        (pair, at["server"][:, other], 1.0),
        (pair, at["both"], -1.0),
        most=1.0,
    )
    slowest_there = at.rows(
        ue.size,
        (ue[..., None], at["server"][:, None], share_s[:, None]),
        (ue[:, mine], shared, np.maximum(share_s[:, mine] - share_s[:, theirs], 0.0)),
        less_delay,
    )
    together = at.rows(
        ue.size,
        (ue, at["server"], share_s),
        (ue[:, mine], shared, share_s[:, mine]),
        (ue[..., None], at["switch"], costs.sent_s),
        (ue[..., None], at["local"], costs.training_s),
        *([(ue[:, mine], at["waits"], 1.0)] if at["waits"].size else []),
        less_delay,
    )
    waiting = [_waiting_rows(costs, at, mine, theirs)] if at["waits"].size else []
    return [at_once, *waiting, slowest_there, together]


def _waiting_rows(
    costs: Costs, at: Blocks, mine: Int[np.ndarray, "ordered"], theirs: Int[np.ndarray, "ordered"]
) -> optimize.LinearConstraint:
    """Where another UE downloads too, a UE's own download takes as long again as alone, and at least 0."""
    longest_s: Float[np.ndarray, "tasks ues"] = np.where(costs.usable, costs.sent_s, 0.0).max(2)
    wait = numbers(*at["waits"].shape)
    # own_s - longest_s * (1 - theirs) <= waits
    return at.rows(
        wait.size,
        (wait[..., None], at["switch"][:, mine], costs.sent_s[:, mine]),
        (wait[..., None], at["switch"][:, theirs], longest_s[:, mine, None]),
        (wait, at["waits"], -1.0),
        most=longest_s[:, mine].ravel(),
    )
