"""Policies as pytrees: a compiled program must never answer for another policy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emutune.learning.agents import LearnedPolicy
from emutune.learning.configuration import TrainingConfig
from emutune.learning.ppo import initial_state
from emutune.policies import AllServer, CountTable, Fixed, Hold, LaterPrices, Policy, Random, plan_lookahead
from emutune.world import build_world, observe, reset


def every_policy(scenario) -> list[Policy]:
    learned = [
        LearnedPolicy(
            kind, initial_state(TrainingConfig(network=kind), build_world(scenario), 0).parameters.actors
        )
        for kind in ("set", "flat")
    ]
    hold = Hold(jnp.asarray(0.5), jnp.asarray(0.5))
    lookahead = plan_lookahead(build_world(scenario), LaterPrices(jnp.float32(0.5), jnp.float32(0.5)))
    table = CountTable(jnp.zeros(7, int), jnp.array([0.2, 0.8]))
    return [Random(), AllServer(), Fixed(jnp.asarray(0.5)), hold, lookahead, table, *learned]


def test_no_two_policies_have_the_same_structure(paper):
    structures = [jax.tree.structure(policy) for policy in every_policy(paper)]
    for one, other in itertools.combinations(structures, 2):
        assert one != other


@pytest.mark.parametrize("index", range(8))
def test_a_policy_survives_flattening(paper, index):
    policy = every_policy(paper)[index]
    leaves, structure = jax.tree.flatten(policy)
    again = jax.tree.unflatten(structure, leaves)
    assert type(again) is type(policy)
    world = build_world(paper)
    seen = observe(world, reset(jax.random.key(0), world))
    decided = [one.decide(world, seen, jax.random.key(1)) for one in (policy, again)]
    np.testing.assert_array_equal(decided[0].at_server, decided[1].at_server)
    np.testing.assert_array_equal(decided[0].layers, decided[1].layers)


def test_fixed_policies_decide_what_they_say(paper):
    world = build_world(paper)
    seen = observe(world, reset(jax.random.key(0), world))
    assert AllServer().decide(world, seen, jax.random.key(1)).at_server.all()
    fixed = Fixed(jnp.asarray(0.5)).decide(world, seen, jax.random.key(1))
    assert not fixed.at_server.any()
    assert (fixed.layers == 16).all()
