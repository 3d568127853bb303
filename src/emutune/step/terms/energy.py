"""Energy: every joule of every UE has a price (D14)."""

from __future__ import annotations

from jaxtyping import Array, Float

from emutune.scenario import Scenario
from emutune.step.rules import Rules
from emutune.step.situation import Situation
from emutune.step.taken import Taken

NAME = "energy"


def is_on(scenario: Scenario) -> bool:
    """With the section energy."""
    return scenario.energy is not None


def cost(rules: Rules, situation: Situation, taken: Taken) -> Float[Array, "*batch ues"]:
    """Each UE's part of the mean over UEs."""
    return -rules.weight_per_j / taken.joules.shape[-1] * taken.joules
