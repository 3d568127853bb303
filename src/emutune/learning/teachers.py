"""The policies that trainings begin with: what actors imitate, or what guided lookahead corrects."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from emutune.learning.configuration import Settings, TrainingConfig
from emutune.learning.slices import fixed_shares, slice_of
from emutune.policies import Policy
from emutune.policies.lookahead import search_lookaheads
from emutune.policies.registry import baseline_policy
from emutune.scenario import Scenario
from emutune.world import build_world

# A teacher of a slice need only be about as good as it can be.
_EPISODES = 8


def teacher_of(config: Settings, scenario: Scenario) -> Policy | None:
    """The policy that a training begins with, if it does with one.

    Networks of any size of fleet have one for each of ``fixed_shares``, stacked along a first axis of its arrays.
    """
    if config.teacher == "none":
        return None
    if not isinstance(config, TrainingConfig) or config.network != "sized":
        return baseline_policy(config.teacher, scenario)
    world = build_world(scenario)
    slices = [slice_of(world, share) for share in fixed_shares(config, world)]
    each = search_lookaheads(scenario, slices, _EPISODES)
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
