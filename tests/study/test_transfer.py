"""Policies in another scenario than their own: what a guided one takes along."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emutune.learning.guided import begin_guided
from emutune.policies.lookahead import search_lookahead
from emutune.scenario import load_scenario
from emutune.study.transfer import transferred
from emutune.world import build_world, observe, reset


def test_corrections_are_as_large_beside_worths_as_they_were() -> None:
    # Where a task, a second and whatever else costs twice as much, the same is best.
    small = ["fleet.ues=3", "fleet.tasks=5", "model.layers=8"]
    weights = {"perplexity_weight": -0.092, "delay_weight_per_min": -0.017}
    here, there = (
        load_scenario(
            "families", [*small, *(f"reward.{name}={by * value}" for name, value in weights.items())]
        )
        for by in (1, 2)
    )
    world = build_world(here)
    plain = begin_guided(search_lookahead(here), world, 8, 0)
    network = jax.tree.map(lambda leaf: leaf + 0.3, plain.network)
    policy = replace(plain, network=network, share=jnp.asarray(1.0), scale=jnp.asarray(0.05))
    elsewhere = transferred(policy, here, there)
    assert float(elsewhere.scale) == pytest.approx(0.1, rel=1e-3)
    assert transferred(policy, here, here) is policy
    # The features of a UE do not know what it costs.
    state = reset(jax.random.key(1), world)
    decided, same = (
        one.decide(of, observe(of, state), jax.random.key(0))
        for one, of in ((policy, world), (elsewhere, build_world(there)))
    )
    np.testing.assert_array_equal(decided.at_server, same.at_server)
    np.testing.assert_array_equal(decided.layers, same.layers)
