"""Policies by name; searches find parameters that are better than where they begin, and never below a simpler one's."""

import pytest

from emutune.errors import UsageError
from emutune.policies import Policy
from emutune.policies.fixed import search_best_fixed
from emutune.policies.registry import RULES, baseline_policy
from emutune.scenario import load_scenario
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


def test_the_best_fixed_retention_of_the_paper_is_the_largest(paper):
    assert float(search_best_fixed(paper, episodes=4).retention) == 25 / 32


def test_every_name_has_one_policy_and_no_other_has_any(paper):
    assert len({rule.name for rule in RULES}) == len(RULES)
    for rule in RULES:
        if not rule.plans and rule.name != "best_fixed":
            assert isinstance(baseline_policy(rule.name, paper), Policy)
    assert float(baseline_policy("fixed", paper).retention) == pytest.approx(0.8)
    assert float(baseline_policy("fixed", paper, 0.5).retention) == 0.5
    with pytest.raises(UsageError, match=r"retention: must be between 0.2 and 0.8, got 0.9"):
        baseline_policy("fixed", paper, 0.9)
    with pytest.raises(
        UsageError, match="no policy 'best' that needs no training; choose from random, all_server"
    ):
        baseline_policy("best", paper)
