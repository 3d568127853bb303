"""Episodes as they are collected for learning, beside the same policy at play."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

import plain
from emutune.learning.agents import LearnedPolicy
from emutune.learning.configuration import TrainingConfig
from emutune.learning.ppo import initial_state
from emutune.learning.rollout import Noise, collect
from emutune.scenario import load_scenario
from emutune.study.evaluate import evaluate_policy, held_out_episodes
from emutune.world import build_world, summarise


def test_without_noise_episodes_are_those_of_the_policy_at_play() -> None:
    changes = plain.changes_for({"activity", "privacy"})
    scenario = load_scenario("families", ["fleet.ues=5", "fleet.tasks=6", *changes])
    world, drawn = build_world(scenario), held_out_episodes(scenario, 8)
    actors = initial_state(TrainingConfig(network="set"), world, 1).parameters.actors
    silence = jnp.zeros((6, 8, 5))
    noise = Noise(silence, silence)
    trajectory = jax.jit(lambda: collect(world, "set", actors, drawn, noise))()
    summary = summarise(trajectory.outcome, trajectory.situation.active)
    played = evaluate_policy(scenario, LearnedPolicy("set", actors), drawn)
    assert 0.1 < played.server_share.mean() < 0.9
    for figure, value in summary._asdict().items():
        np.testing.assert_allclose(value, getattr(played, figure), rtol=1e-4, err_msg=figure)
