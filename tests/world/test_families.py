"""Several foundation models and delta downloads against a plain re-implementation and closed forms."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from emutune.policies import Fixed, Random
from emutune.scenario import Scenario, load_scenario
from emutune.step import Plan
from emutune.study.evaluate import evaluate_policy, held_out_episodes
from emutune.world import (
    build_world,
    cached_retention,
    draw_episode,
    features_of,
    observe,
    reset,
    serve,
    ue_features,
)
from emutune.world.environments import OrchestrationEnv, parallel_env
from emutune.world.fading import FreshFading
from emutune.world.features import other_retention
from emutune.world.mobility import Standing
from emutune.world.path_loss import PowerLaw
from worlds import alike, assert_same, play_both, step_wish

UNEQUAL = [
    "fleet.ues=5",
    "families.persistence=0.4",
    "families.others=[{size_gb = 3.5, layers = 12, curve = {quadratic = 0.0, linear = -10.0, constant = 30.0}},"
    " {size_gb = 20.0, layers = 40, curve = {quadratic = 0.0, linear = 0.0, constant = 1.0,"
    " knots = [[0.25, 40.0], [0.5, 25.0], [1.0, 11.0]]}}]",
]


GOLDEN = [-176.654495, -177.308777, -175.65506]


@pytest.mark.parametrize("delta", ["false", "true"])
@pytest.mark.parametrize("name", ["unequal", "families"])
def test_a_whole_episode_agrees_with_plain_numbers(name: str, delta: str) -> None:
    changes = [f"download.delta={delta}", *(UNEQUAL if name == "unequal" else [])]
    scenario = load_scenario("families", changes)
    families, lowered = set(), 0
    for told, theirs, ours in play_both(scenario, 3, scenario.fleet.tasks):
        assert_same(theirs, ours)
        families |= {task["family"] for task in told["tasks"]}
        held = [mine.of(task["family"]) for mine, task in zip(told["before"], told["tasks"], strict=True)]
        trains = [layers for _, layers in told["plan"]]
        switched = [0 < layers != before for layers, before in zip(trains, held, strict=True)]
        np.testing.assert_array_equal(ours[1].switched, switched)
        lowered += sum(0 < layers < before for layers, before in zip(trains, held, strict=True))
    assert families == {0, 1, 2}
    assert lowered > 5


@pytest.mark.parametrize("persistence", [0.0, 0.5, 0.8, 1.0])
def test_the_family_of_a_task_is_the_chain_it_says(persistence: float) -> None:
    world = build_world(
        load_scenario("families", [f"families.persistence={persistence}", "fleet.ues=2000", "fleet.tasks=6"])
    )
    family = np.asarray(draw_episode(jax.random.key(1), world).family)
    for row in family:
        assert stats.chisquare(np.bincount(row, minlength=3)).pvalue > 1e-4
    expected = persistence + (1 - persistence) / 3
    for stays in np.mean(family[1:] == family[:-1], axis=1):
        assert stays == pytest.approx(expected, abs=5 * math.sqrt(expected * (1 - expected) / 2e3) + 1e-12)
    # Where it does not stay, both other families are equally likely: it steps on by 1 or by 2.
    moves = (family[1:] - family[:-1])[family[1:] != family[:-1]] % 3
    assert persistence == 1.0 or np.mean(moves == 1) == pytest.approx(0.5, abs=0.05)


def test_a_chain_that_never_leaves_is_the_world_of_one_model() -> None:
    families = load_scenario("families", ["families.persistence=1"])
    one = families.model_copy(update={"families": None})
    drawn = held_out_episodes(families, 3)
    alone = held_out_episodes(one, 3)
    for field in ("gain", "complexity", "data_bits", "transmit_power_w"):
        np.testing.assert_array_equal(getattr(drawn, field), getattr(alone, field))
    for policy in (Fixed(jnp.float32(0.5)), Random()):
        mine, theirs = (
            evaluate_policy(scenario, policy, held_out_episodes(scenario, 3)) for scenario in (families, one)
        )
        np.testing.assert_allclose(mine, theirs, rtol=1e-6)


def test_the_paper_s_world_is_as_before_there_were_families(paper: Scenario) -> None:
    world = build_world(paper)
    assert world.families.families == 1
    assert world.rules.models.families == world.rules.models.missing_bits.shape[1] == 1
    assert world.rules.terms == ("perplexity",)
    state = reset(jax.random.key(0), world)
    assert state.episode.family is None
    assert state.carried.held.shape == (6, 1)
    assert len(features_of(world)) == 4
    # Measured before these features existed.
    returns = evaluate_policy(paper, Random(), held_out_episodes(paper, 3)).episode_return
    np.testing.assert_allclose(returns, GOLDEN, rtol=1e-6)
    assert [type(law) for law in (world.radio.place, world.radio.path_loss, world.radio.fading)] == [
        Standing,
        PowerLaw,
        FreshFading,
    ]
    assert not world.rules.links.ergodic
    assert len(jax.tree.leaves(state.episode)) == 4
    plan = Plan(jnp.ones(6, bool), jnp.zeros(6, jnp.int32))
    small, large = (
        jax.make_jaxpr(serve)(each, observe(each, reset(jax.random.key(0), each)), plan)
        for each in (world, build_world(load_scenario("families")))
    )
    assert len(small.eqns) < len(large.eqns)


def test_growing_an_emulator_by_delta_costs_as_much_as_sending_it_at_once() -> None:
    scenario = load_scenario(
        "delta", ["families.persistence=1", "fleet.ues=1", "radio.fading_blocks=1000000"]
    )
    world = build_world(scenario)

    def minutes(levels: list[int]) -> float:
        state, total = reset(jax.random.key(0), world), 0.0
        for level in levels:
            state, outcome = step_wish(world, state, *alike(world, False, level / 16))
            total += float(outcome.charge.delay_s) / 60
        return total

    whole = minutes([12])
    assert minutes([4, 7, 12]) == pytest.approx(whole, rel=5e-3)
    assert minutes([12, 5, 5]) == pytest.approx(whole, rel=5e-3)
    # What was dropped has to be sent again.
    assert minutes([12, 5, 12]) == pytest.approx(whole * (1 + 7 / 12), rel=5e-3)


def test_a_ue_that_only_lowers_takes_no_share_of_the_downlink() -> None:
    world = build_world(load_scenario("delta", ["families.persistence=1", "fleet.ues=2"]))
    state = reset(jax.random.key(0), world)
    state, _ = step_wish(world, state, jnp.array([False, True]), jnp.array([0.8, 0.8]))
    _, outcome = step_wish(world, state, *alike(world, False, 0.5))
    delay_s = outcome.charge.taken.delay_s
    assert delay_s[0] == 0
    assert outcome.switched.all()
    _, alone = step_wish(world, state, jnp.array([True, False]), jnp.array([0.5, 0.5]))
    np.testing.assert_allclose(delay_s[1], alone.charge.taken.delay_s[1], rtol=1e-6)


def test_what_is_held_of_another_family_is_seen_and_kept_through_uploads() -> None:
    world = build_world(load_scenario("families"))
    state = reset(jax.random.key(2), world)
    state, _ = step_wish(world, state, *alike(world, False, 0.5))
    first = np.asarray(state.episode.family)[0]
    state, _ = step_wish(world, state, *alike(world, True, 0.8))
    seen, family = observe(world, state), np.asarray(state.episode.family)[2]
    np.testing.assert_array_equal(seen.held, np.where(np.arange(3) == first[:, None], 8, 0))
    np.testing.assert_array_equal(cached_retention(world, seen), np.where(family == first, 0.5, 0))
    np.testing.assert_array_equal(other_retention(world, seen), np.where(family == first, 0, 0.5))
    features = ue_features(world, seen)
    assert features.shape == (6, len(features_of(world)))
    highest = 13 / 16
    np.testing.assert_allclose(features[:, 3], np.where(family == first, 0.5, 0) / highest, rtol=1e-6)
    np.testing.assert_allclose(features[:, 4], np.where(family == first, 0, 0.5) / highest, rtol=1e-6)


def test_environments_show_the_families() -> None:
    env = OrchestrationEnv("families", UNEQUAL)
    seen, _ = env.reset(seed=0)
    assert env.observation_space.contains(seen)
    assert seen.shape == (7 * 5 + 1,)
    seen, _, _, _, info = env.step(env.action_space.sample())
    assert env.observation_space.contains(seen)
    assert info["family"].dtype == np.int32
    both = parallel_env("families", UNEQUAL)
    observations, _ = both.reset(seed=0)
    assert observations["emulator"].shape == (5 * 5 + 1,)
    assert both.observation_space("emulator").contains(observations["emulator"])
