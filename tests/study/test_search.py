"""Searches find parameters that are better than where they begin, and never below a simpler policy's."""

import pytest

from emutune.scenario import load_scenario
from emutune.study.compare import baseline_policy
from emutune.study.evaluate import evaluate_policy, held_out_episodes


@pytest.mark.slow
@pytest.mark.parametrize(("persistence", "below_fixed", "below_hold"), [(0.5, 12.5, 7), (0.8, 2.0, 2.0)])
def test_the_planners_beat_every_fixed_retention(persistence, below_fixed, below_hold):
    scenario = load_scenario("families", [f"families.persistence={persistence}"])
    drawn = held_out_episodes(scenario, 128)
    cost = {
        name: -evaluate_policy(scenario, baseline_policy(name, scenario), drawn).episode_return.mean()
        for name in ("best_fixed", "hold", "count_table", "lookahead")
    }
    assert cost["lookahead"] < (1 - below_fixed / 100) * cost["best_fixed"]
    assert cost["lookahead"] < cost["count_table"] < (1 - below_hold / 100 + 0.005) * cost["hold"]
    assert cost["hold"] <= cost["best_fixed"]


def test_a_small_world_is_searched():
    scenario = load_scenario("families", ["fleet.ues=2", "fleet.tasks=10"])
    drawn = held_out_episodes(scenario, 32)
    returns = {
        name: evaluate_policy(scenario, baseline_policy(name, scenario), drawn).episode_return.mean()
        for name in ("random", "count_table", "lookahead")
    }
    assert returns["random"] < returns["count_table"]
    assert returns["count_table"] < returns["lookahead"] + 0.2
