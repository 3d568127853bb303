"""A learned policy in another scenario than the one it was trained in: fleets grow, links change."""

from __future__ import annotations

from dataclasses import replace

import jax.numpy as jnp
from jaxtyping import Array

from emutune.errors import UsageError
from emutune.learning.agents import LearnedPolicy
from emutune.learning.guided import Guided
from emutune.policies import Lookahead, Policy
from emutune.policies.lookahead import search_lookahead
from emutune.scenario import Scenario
from emutune.world import build_world, features_of


def transferred(policy: Policy, trained_in: Scenario, scenario: Scenario) -> Policy:
    """The policy as it decides elsewhere, without being trained there.

    Networks are taken as they are; the lookahead that a guided one corrects is planned anew, and its corrections
    are as large beside what caches are worth as they were.

    Args:
        policy: what training yielded.
        trained_in: the scenario of its training.
        scenario: where it is to decide.

    Raises:
        UsageError: its networks are flat and the fleet has another size, or they see other features.
    """
    if scenario == trained_in:
        return policy
    here, there = scenario.fleet.ues, trained_in.fleet.ues
    if isinstance(policy, LearnedPolicy) and policy.kind == "flat" and here != there:
        raise UsageError(
            f"fleet.ues: flat networks decide for {there} UEs, not {here}; train with --network set"
        )
    if features_of(build_world(scenario)) != features_of(build_world(trained_in)):
        raise UsageError(
            f"the scenario's sections: networks trained in {trained_in.name} see other features of a UE; "
            "switch on what was on there and nothing else, or train anew"
        )
    if isinstance(policy, Guided):
        base = search_lookahead(scenario)
        return replace(policy, base=base, scale=policy.scale * _spread(base) / _spread(policy.base))
    return policy


def _spread(base: Lookahead) -> Array:
    """How much it matters what a UE holds: a UE of a large fleet pays a small share of its costs."""
    # What no UE can be in costs infinitely much.
    return jnp.nanmean(jnp.nanstd(jnp.where(jnp.isfinite(base.worth), base.worth, jnp.nan), axis=-1))
