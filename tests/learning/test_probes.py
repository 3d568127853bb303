"""Probe problems with known best decisions: each isolates one thing the learner must do."""

import json

import numpy as np
import pytest

from emutune.learning.configuration import TrainingConfig
from emutune.learning.training import train_seed
from emutune.scenario import load_scenario
from emutune.study.evaluate import evaluate_policy, held_out_episodes

CONFIG = TrainingConfig(steps=15_000, environments=25)


def learned(tmp_path, *overrides, algorithm="hmppo", steps=15_000):
    scenario = load_scenario("paper", overrides)
    config = CONFIG.model_copy(update={"algorithm": algorithm, "steps": steps})
    policy = train_seed(scenario, config, 0, tmp_path)
    return evaluate_policy(scenario, policy, held_out_episodes(scenario, 32))


@pytest.mark.parametrize("algorithm", ["hmppo", "ippo"])
def test_a_bandit_whose_uploads_are_free_trains_at_the_server(tmp_path, algorithm):
    # Emulators of a huge model take days, uploads no time: z = 1 is best for every UE.
    figures = learned(
        tmp_path,
        *("fleet.ues=2", "fleet.tasks=1", "radio.uplink_bandwidth_hz=1e9", "model.size_gb=1000"),
        algorithm=algorithm,
    )
    assert (figures.server_share == 1).all()


def test_a_bandit_without_delay_costs_takes_the_best_retention(tmp_path):
    # f(25/32) is below f(1) and every smaller emulator, and nothing else counts.
    figures = learned(tmp_path, "fleet.ues=2", "fleet.tasks=1", "reward.delay_weight_per_min=0", steps=60_000)
    scenario = load_scenario("paper", ["fleet.ues=2", "fleet.tasks=1"])
    complexity = np.asarray(held_out_episodes(scenario, 32).complexity, np.float64)
    best = 25.2 * 0.78125**2 - 43.1 * 0.78125 + 31.9
    optimum = (best * (complexity + 10) / 10).mean()
    assert figures.perplexity.mean() == pytest.approx(optimum, rel=5e-3)
    assert (figures.server_share == 0).all()


def test_two_steps_in_which_holding_wins(tmp_path):
    # The first task must download; a second download would cost as much again for nothing.
    figures = learned(tmp_path, "fleet.ues=1", "fleet.tasks=2", "radio.uplink_bandwidth_hz=1e3", steps=60_000)
    np.testing.assert_array_equal(figures.changes_per_ue, 1)
    assert (figures.server_share == 0).all()


def test_the_curve_on_disk_shows_the_learning(tmp_path):
    learned(tmp_path, "fleet.ues=2", "fleet.tasks=1", "radio.uplink_bandwidth_hz=1e9", "model.size_gb=1000")
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["steps"] for row in rows] == list(range(0, 15_000, 25))
    assert rows[-1]["training"]["episode_return"] > rows[0]["training"]["episode_return"]
