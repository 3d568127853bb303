"""Probe problems with known best decisions: each isolates one thing the learner must do."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emutune.learning import rollout
from emutune.learning.agents import retention_means, to_retention
from emutune.learning.architectures import ARCHITECTURES
from emutune.learning.configuration import TrainingConfig
from emutune.learning.training import train_seed
from emutune.scenario import load_scenario
from emutune.step import retention_of
from emutune.study.evaluate import evaluate_policy, held_out_episodes
from emutune.world import build_world, observe, reset, serve

KEYS = jax.random.split(jax.random.key(0), 32)
CONFIG = TrainingConfig(steps=15_000, environments=25)


def learned(tmp_path, *overrides, algorithm="hmppo", steps=15_000):
    scenario = load_scenario("paper", overrides)
    config = CONFIG.model_copy(update={"algorithm": algorithm, "steps": steps})
    policy = train_seed(scenario, config, 0, tmp_path)
    return evaluate_policy(scenario, policy, held_out_episodes(scenario, 32))


# Emulators of a huge model take days, uploads no time: z = 1 is best for every UE.
BANDIT = ("fleet.ues=2", "fleet.tasks=1", "radio.uplink_bandwidth_hz=1e9", "model.size_gb=1000")


def test_a_bandit_whose_uploads_are_free_trains_at_the_server_and_its_curve_shows_the_learning(tmp_path):
    assert (learned(tmp_path, *BANDIT).server_share == 1).all()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["steps"] for row in rows] == list(range(0, 15_000, 25))
    assert rows[-1]["training"]["episode_return"] > rows[0]["training"]["episode_return"]


@pytest.mark.slow
def test_ippo_solves_that_bandit_too(tmp_path):
    assert (learned(tmp_path, *BANDIT, algorithm="ippo").server_share == 1).all()


@pytest.mark.slow
def test_a_bandit_without_delay_costs_takes_the_best_retention(tmp_path):
    # f(25/32) is below f(1) and every smaller emulator, and nothing else counts.
    figures = learned(tmp_path, "fleet.ues=2", "fleet.tasks=1", "reward.delay_weight_per_min=0", steps=60_000)
    scenario = load_scenario("paper", ["fleet.ues=2", "fleet.tasks=1"])
    complexity = np.asarray(held_out_episodes(scenario, 32).complexity, np.float64)
    best = 25.2 * 0.78125**2 - 43.1 * 0.78125 + 31.9
    optimum = (best * (complexity + 10) / 10).mean()
    assert figures.perplexity.mean() == pytest.approx(optimum, rel=5e-3)
    assert (figures.server_share == 0).all()


@pytest.mark.slow
def test_a_bandit_in_which_agent_2_must_depend_on_a1(tmp_path, monkeypatch):
    # Small data belongs to the server. Training on the UE wants retention 0.8 while the other UE is at the
    # server, else 0.2: agent 2 sees no data sizes, so all it can go by is what agent 1 decided.
    def pay(world, situation, plan):
        misplaced = plan.at_server != (situation.data_bits < world.data_bits.mean())
        wanted = jnp.where(plan.at_server[::-1], 0.8, 0.2)
        retention = retention_of(world.rules.models, situation.family, plan.layers)
        error = jnp.where(plan.at_server, 0.0, (retention - wanted) ** 2)
        carried, outcome = serve(world, situation, plan)
        total = (error + 0.2 * misplaced).mean()
        return carried, outcome._replace(charge=outcome.charge._replace(total=total))

    monkeypatch.setattr(rollout, "serve", pay)
    jax.clear_caches()
    scenario = load_scenario("paper", ["fleet.ues=2", "fleet.tasks=1"])
    config = CONFIG.model_copy(update={"steps": 60_000, "environments": 50, "entropy_weight": 1e-3})
    policy = train_seed(scenario, config, 0, tmp_path)
    jax.clear_caches()
    world = build_world(scenario)
    seen = jax.vmap(lambda key: observe(world, reset(key, world)))(KEYS)
    inputs = ARCHITECTURES[config.network].inputs(world, seen)
    for other_at_server, wanted in ((True, 0.8), (False, 0.2)):
        at_server = jnp.broadcast_to(jnp.array([False, other_at_server]), (len(KEYS), 2))
        means = retention_means(config.network, policy.actors, inputs, at_server)
        np.testing.assert_allclose(to_retention(world, means)[:, 0], wanted, atol=0.05)


def test_two_steps_in_which_holding_wins(tmp_path):
    # The first task must download; a second download would cost as much again for nothing.
    figures = learned(tmp_path, "fleet.ues=1", "fleet.tasks=2", "radio.uplink_bandwidth_hz=1e3", steps=60_000)
    np.testing.assert_array_equal(figures.changes_per_ue, 1)
    assert (figures.server_share == 0).all()
