"""Bounds on what policies without foresight pay, for a batch of the simulator's episodes."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int

from emutune.bounds.chains import find_tariff, price_chains
from emutune.bounds.chances import read_chances, read_seconds, read_tasks, refuse_unsuited
from emutune.bounds.foresight import Foreseen, charge_path, foresee, penalised_bound
from emutune.scenario import Scenario
from emutune.world import Episode, build_world

# Nodes of complexity: few while prices are looked for; with 33, worths are within 2e-5 of those with 129.
_SEARCHED, _PROVED = 5, 33
# Sets of UEs that act together are listed for so many at most; beyond, chains alone are the bound.
LISTED_UES = 8
# Sums in double precision are off by less than the one, and draws in single precision from their law by less
# than the other.
_GUARD = 1e-9 + 1e-7


class Certificate(NamedTuple):
    """What policies without foresight pay at least, as the mean over episodes; an episode's own is no bound.

    Attributes:
        costs: of each episode.
        foreseen: of each episode, what is charged for foresight.
        slot: number of each family's emulator of each level (``Chances.slot``).
    """

    costs: Float[np.ndarray, "episodes"]
    foreseen: tuple[Foreseen, ...]
    slot: Int[np.ndarray, "families levels"]

    def charges(self, held: Int[np.ndarray, "episodes tasks ues families"]) -> Float[np.ndarray, "episodes"]:
        """What a policy is charged for foresight in each episode; in expectation nothing, if it has none.

        Added to a policy's own costs it takes most of the luck of an episode's tasks off them.

        Args:
            held: layers of the emulator of each family that each UE holds after each task.
        """
        families = len(self.slot)
        numbers = np.concatenate([np.zeros((families, 1), int), self.slot], axis=1)
        # Of one emulator at most, so that the sum is its number.
        number = numbers[np.arange(families), held].sum(-1)
        return np.array([charge_path(*each) for each in zip(self.foreseen, number, strict=True)])


def bound_without_foresight(
    scenario: Scenario, episodes: Episode, *, progress: Callable[[int], None] | None = None
) -> Certificate:
    """What any policy without foresight pays at least in expectation.

    Such a policy sees all gains of an episode at most, and a task's family, complexity and data when the task comes.

    Args:
        scenario: the world the episodes were drawn in.
        episodes: a batch of episodes, leading axis the episodes.
        progress: called with 1 after each episode.

    Raises:
        UsageError: the world has a section that this bound does not allow.
    """
    refuse_unsuited(scenario)
    world = build_world(scenario)
    costs, foreseen = [], []
    with jax.enable_x64(True):
        searched, proved = (read_chances(scenario, world, nodes) for nodes in (_SEARCHED, _PROVED))
        for index in range(len(episodes.gain)):
            episode = jax.tree.map(lambda part: part[index], episodes)  # noqa: B023 - called at once
            seconds = read_seconds(scenario, episode)
            worths = price_chains(proved, find_tariff(searched, seconds))
            charged = foresee(proved, worths, read_tasks(scenario, episode))
            cost = float(worths.start.sum())
            if scenario.fleet.ues <= LISTED_UES:
                cost = penalised_bound(proved, seconds, worths, charged)
            costs.append(cost - _GUARD * abs(cost))
            foreseen.append(jax.device_get(charged))
            if progress is not None:
                progress(1)
    return Certificate(np.array(costs), tuple(foreseen), np.asarray(proved.slot))
