"""What ``check`` says of a world: training by hand, shares of the reward, and whether learning pays."""

import numpy as np
import pytest

from emutune.policies import Random
from emutune.scenario import load_scenario
from emutune.study.evaluate import evaluate_policy, held_out_episodes
from emutune.study.link_budget import link_budget, reward_shares, trivial_policies


def test_training_by_hand(monkeypatch):
    monkeypatch.setattr("emutune.study.link_budget.reward_shares", lambda scenario: {})
    first, second, _ = link_budget(load_scenario("edge-compute", ["fleet.tasks=2"]))["models"]
    # 4 x 1.24e9 operations for each of 40e6 / 175 tokens: 1133.7 TFLOP; 0.49 and 1.24 billion parameters.
    tflop = 4 * 1.24e9 * 40e6 / 175 / 1e12
    assert first["fastest_smallest_s"] == pytest.approx(tflop * 0.25 / 20)
    assert first["slowest_largest_s"] == pytest.approx(tflop * 0.75 / 0.3)
    assert first["server_alone_s"] == pytest.approx(tflop / 50)
    assert first["server_all_s"] == pytest.approx(8 * tflop / 50)
    assert first["least_j"] == pytest.approx(tflop * 0.25 * 2)
    assert first["most_j"] == pytest.approx(tflop * 0.75 * 5)
    assert second["server_alone_s"] == pytest.approx(tflop / 50 * 0.49 / 1.24)


@pytest.mark.parametrize(
    ("cache_gb", "remark"),
    [
        (3.9, "holds no two emulators"),
        (4.1, None),
        (26.3, None),
        (26.4, "holds the largest emulator of every family"),
    ],
)
def test_a_cache_with_nothing_to_decide_is_remarked_on(monkeypatch, cache_gb, remark):
    # The smallest emulators have 3 of 16 layers of 10.8 GB, the largest 13.
    monkeypatch.setattr("emutune.study.link_budget.reward_shares", lambda scenario: {})
    scenario = load_scenario(
        "families", [f"families.cache_gb={cache_gb}", "fleet.tasks=2", "retention.min=0.1875"]
    )
    said = [text for text in link_budget(scenario)["remarks"] if "a cache of" in text]
    assert [remark in text for text in said] == ([True] if remark else [])


def test_shares_are_parts_of_the_return():
    scenario = load_scenario("edge-compute", ["fleet.tasks=20", "fleet.ues=3", "energy.budget_j=2e3"])
    shares = reward_shares(scenario)
    assert sum(shares.values()) == pytest.approx(100)
    figures = evaluate_policy(scenario, Random(), held_out_episodes(scenario, 4))
    cost = -figures.episode_return.mean()
    assert shares["delay"] == pytest.approx(100 * 0.5 * figures.delay_min.mean() / cost, rel=1e-4)
    assert shares["perplexity"] == pytest.approx(100 * 0.01 * 20 * figures.perplexity.mean() / cost, rel=1e-4)
    joules = 1e-4 * 1e3 * figures.energy_kj.mean()
    assert shares["energy"] == pytest.approx(100 * joules / cost, rel=1e-4)
    # What is spent beyond the budget is a term of its own.
    assert shares["budget"] > 0


@pytest.mark.slow
def test_there_is_nothing_to_learn_where_one_retention_is_near_the_bound():
    paper = trivial_policies(load_scenario("paper", ["fleet.ues=3"]), episodes=2)
    assert paper["verdict"].startswith("nothing to learn here: best_fixed costs at most 0.")
    busy = trivial_policies(load_scenario("private", ["fleet.ues=4", "fleet.tasks=15"]), episodes=2)
    assert busy["verdict"].startswith("no policy that always does the same")
    assert min(busy["over_bound_percent"].values()) > 2
    assert np.isfinite(list(busy["over_bound_percent"].values())).all()
