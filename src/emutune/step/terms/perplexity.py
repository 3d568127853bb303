"""Perplexity: the mean over those that have a task (Eq. 12, D16)."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from emutune.scenario import Scenario
from emutune.step.rules import Rules
from emutune.step.situation import Situation
from emutune.step.taken import Taken

NAME = "perplexity"


def is_on(scenario: Scenario) -> bool:
    """Always."""
    return True


def cost(rules: Rules, situation: Situation, taken: Taken) -> Float[Array, "*batch ues"]:
    """Each task's part of the mean."""
    tasks = jnp.maximum(jnp.sum(situation.active, axis=-1, keepdims=True), 1)
    return -rules.perplexity_weight / tasks * taken.perplexity
