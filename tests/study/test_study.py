"""Statistics against closed forms, common random numbers, and a report that holds what it claims."""

import re
from pathlib import Path

import numpy as np
import pytest

from emutune.policies import AllServer, Random
from emutune.scenario import load_scenario
from emutune.study.comparison import Effort, compare, expand_policy_names
from emutune.study.evaluate import evaluate_policy, held_out_episodes
from emutune.study.figures import draw_fig2, read_curves
from emutune.study.paper_table import paper_ratio
from emutune.study.reproduction import render_report
from emutune.study.statistics import bootstrap_interval, interquartile_mean


def test_interquartile_mean_ignores_the_outer_quarters():
    assert interquartile_mean(np.array([[-1e9, 1.0, 2.0, 1e9]])) == 1.5


def test_bootstrap_interval_matches_the_normal_one():
    values = np.random.default_rng(1).normal(3.0, 2.0, (1, 4000))
    low, high = bootstrap_interval(values)
    half = 1.96 * values.std() / np.sqrt(4000)
    np.testing.assert_allclose([low, high], [values.mean() - half, values.mean() + half], atol=0.1 * half)


def test_seeds_that_agree_on_common_episodes_say_no_more_than_one():
    one = np.random.default_rng(2).normal(0.0, 1.0, (1, 64))
    assert bootstrap_interval(np.repeat(one, 10, axis=0)) == pytest.approx(bootstrap_interval(one), rel=0.1)


def test_all_policies_are_those_that_the_scenario_is_a_matter_for(paper):
    simple = ["random", "all_server", "fixed", "best_fixed", "ippo", "hmppo"]
    assert expand_policy_names("all", paper) == simple
    assert expand_policy_names("random, all,random", paper) == simple
    several = set(expand_policy_names("all", load_scenario("families")))
    assert several - set(simple) == {"hold", "count_table", "lookahead", "hmppo_ranked", "guided"}


def test_every_policy_meets_the_same_episodes(paper):
    many, few = held_out_episodes(paper, 5), held_out_episodes(paper, 2)
    np.testing.assert_array_equal(many.gain[:2], few.gain)
    once, again = (evaluate_policy(paper, Random(), few).episode_return for _ in range(2))
    np.testing.assert_array_equal(once, again)
    assert (evaluate_policy(paper, AllServer(), few).server_share == 1).all()


def test_paper_ratios():
    assert paper_ratio(6, "hmppo", "delay_min") == pytest.approx(23.25 / 775.97)
    assert paper_ratio(7, "hmppo", "delay_min") is None


@pytest.mark.slow
def test_the_report_holds_its_tables_and_panels(tmp_path):
    scenario = load_scenario("paper", ["fleet.tasks=5"])
    effort = Effort(seeds=2, episodes=3, steps=500)
    figures = compare(scenario, ["random", "ippo", "hmppo"], effort, directory=tmp_path)
    curves = {name: read_curves(Path(figures["policies"][name]["run"])) for name in ("hmppo", "ippo")}
    assert curves["hmppo"]["episode_return"].shape == (2, 10)
    page = render_report(draw_fig2(curves, [figures]), [figures], steps=500, command="emutune reproduce")
    assert "<svg" in page
    assert not re.search(r'(src|href)="https?:', page.replace("xlink:href", "").split("</svg>")[-1])
    for name, row in figures["policies"].items():
        assert f"<td>{name}</td><td>{row['return_mean']:.2f}</td>" in page
    for decision in ("D1", "D2", "D3", "D4", "D5", "D6", "D7"):
        assert f"<li>{decision}:" in page
    ratio = figures["policies"]["hmppo"]["delay_min"] / figures["policies"]["random"]["delay_min"]
    assert f"<td>0.030</td><td>{ratio:.3f}</td>" in page
