"""Budget: joules beyond what a UE may spend in an episode cost more (D14)."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from emutune.scenario import Scenario
from emutune.step.rules import Rules
from emutune.step.situation import Situation
from emutune.step.taken import Taken

NAME = "budget"


def is_on(scenario: Scenario) -> bool:
    """Where energy has a budget."""
    return scenario.energy is not None and scenario.energy.budget_j is not None


def cost(rules: Rules, situation: Situation, taken: Taken) -> Float[Array, "*batch ues"]:
    """What a step adds to each UE's excess, so that an episode is charged its excess once."""
    left = jnp.maximum(rules.budget_j - situation.spent_j, 0.0)
    over = jnp.maximum(taken.joules - left, 0.0)
    return -rules.over_budget_weight_per_j / taken.joules.shape[-1] * over
