"""Slices of a cell stand for larger fleets: the same costs and inputs; and policies that learn on them go elsewhere."""

from __future__ import annotations

import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emutune.errors import UsageError
from emutune.learning.agents import LearnedPolicy
from emutune.learning.architectures import ARCHITECTURES
from emutune.learning.configuration import GuidedConfig, TrainingConfig
from emutune.learning.guided import begin_guided
from emutune.learning.imitation import imitate
from emutune.learning.ppo import initial_state
from emutune.learning.slices import draw_shares, fixed_shares, slice_of
from emutune.learning.teachers import teacher_of
from emutune.learning.training import train_seed
from emutune.learning.update import explore
from emutune.policies import LaterPrices, plan_lookahead
from emutune.policies.measure import draw_episodes, run_episodes
from emutune.scenario import load_scenario
from emutune.step import plan_of_wish
from emutune.study.evaluate import evaluate_policy, held_out_episodes
from emutune.study.transfer import transferred
from emutune.world import build_world, draw_batch, draw_episode, nothing_carried, serve, situation_at

SMALL = ("fleet.ues=4", "fleet.tasks=6")
CONFIG = TrainingConfig(
    network="sized", credit="mixed", width=8, steps=400, environments=8, minibatches=2, fleets=(4, 16)
)


@pytest.mark.parametrize("name", ["families", "edge-compute", "city"])
def test_copies_of_a_fleet_on_the_whole_cell_are_the_fleet_on_a_slice(name: str) -> None:
    few, many = (load_scenario(name, [f"fleet.ues={ues}", "fleet.tasks=3"]) for ues in (4, 12))
    world = build_world(few)
    part = slice_of(world, jnp.float32(1 / 3))
    situation = situation_at(
        world, draw_episode(jax.random.key(5), world), jnp.asarray(1), nothing_carried(world)
    )
    plan = plan_of_wish(
        world.rules, situation, jnp.array([True, False, True, False]), jnp.array([0.4, 0.5, 0.6, 0.7])
    )

    def copies(tree):
        return jax.tree.map(lambda leaf: jnp.concatenate([leaf] * 3) if leaf.ndim else leaf, tree)

    _, alone = serve(part, situation, plan)
    whole = build_world(many)
    _, together = serve(whole, copies(situation), copies(plan))
    np.testing.assert_allclose(together.charge.delay_s, alone.charge.delay_s, rtol=1e-5)
    np.testing.assert_allclose(together.reward, alone.reward, rtol=1e-5)

    seen, apart = (
        ARCHITECTURES["sized"].inputs(at, each)
        for at, each in ((whole, copies(situation)), (part, situation))
    )
    np.testing.assert_allclose(seen.context, apart.context, rtol=1e-5)
    for mine, other in zip(seen.times, apart.times, strict=True):
        np.testing.assert_allclose(mine, copies(other), rtol=1e-5)
    # All but ranks: of twelve there are three at each of four places, in the middle of which the four stand.
    rank = seen.features.shape[-1] - (3 if world.rules.trains_in_time else 2) - 1
    others = np.delete(np.arange(seen.features.shape[-1]), rank)
    np.testing.assert_allclose(
        seen.features[:, others], copies(apart.features)[:, others], rtol=1e-4, atol=1e-6
    )


def test_slices_are_those_of_the_fleets_asked_for() -> None:
    world = build_world(load_scenario("families", SMALL))
    np.testing.assert_allclose(4 / fixed_shares(CONFIG, world)[jnp.array([0, -1])], [4, 16], rtol=1e-5)
    sizes = 4 / draw_shares(CONFIG, world, 8, jax.random.key(0))
    assert np.all((sizes >= 4) & (sizes <= 16))
    assert np.all(np.diff(sizes) > 0)


def test_one_slice_of_the_whole_is_the_fleet_itself() -> None:
    world = build_world(load_scenario("families", SMALL))
    config = CONFIG.model_copy(update={"fleets": (4, 4)})
    actors = initial_state(config, world, 0).parameters.actors
    episodes = draw_batch(jax.random.key(1), world, 8)
    found, rewards = explore(config, world, episodes, jax.random.key(2), actors)
    np.testing.assert_allclose(rewards[0], found.outcome.reward, rtol=1e-5)
    np.testing.assert_array_equal(found.situation.complexity, jnp.swapaxes(episodes.complexity, 0, 1))
    # Credit of retentions: what each UE adds, so its own perplexity at the least.
    perplexity = 0.092 / 4 * found.outcome.charge.taken.perplexity
    assert np.all(-rewards[1] >= perplexity * (1 - 1e-5))


@pytest.mark.slow
def test_a_stopped_run_goes_on_to_the_same_bits_and_decides_in_larger_fleets(tmp_path) -> None:
    scenario = load_scenario("families", SMALL)
    config = CONFIG.model_copy(update={"steps": 60 * 48})
    whole = train_seed(scenario, config, 1, tmp_path / "whole")

    def stop(steps: int) -> None:
        if steps:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_seed(scenario, config, 1, tmp_path / "cut", progress=stop)
    again = train_seed(scenario, config, 1, tmp_path / "cut")
    jax.tree.map(np.testing.assert_array_equal, whole.actors, again.actors)

    larger = load_scenario("families", ["fleet.ues=20", "fleet.tasks=6"])
    drawn = held_out_episodes(larger, 2)
    assert np.isfinite(evaluate_policy(larger, transferred(whole, scenario, larger), drawn).delay_min).all()


@pytest.mark.slow
def test_every_slice_has_a_teacher_who_is_imitated() -> None:
    scenario = load_scenario("families", SMALL)
    world = build_world(scenario)
    config = CONFIG.model_copy(update={"teacher": "lookahead", "width": 32})
    teacher = teacher_of(config, scenario)
    pupil = LearnedPolicy(
        "sized", imitate(config, world, initial_state(config, world, 0), teacher).parameters.actors
    )
    for place, share in enumerate(fixed_shares(config, world)):
        part = slice_of(world, share)
        own = jax.tree.map(operator.itemgetter(place), teacher)
        theirs, mine = (
            float(run_episodes(part, each, draw_episodes(part, 9, 32))[0].mean()) for each in (own, pupil)
        )
        assert mine > 1.1 * theirs


def test_what_does_not_fit_is_refused_and_guided_lookahead_plans_anew() -> None:
    scenario, larger = (load_scenario("families", [f"fleet.ues={ues}", "fleet.tasks=6"]) for ues in (3, 5))
    world = build_world(scenario)
    flat = TrainingConfig(network="flat", width=8)
    policy = LearnedPolicy("flat", initial_state(flat, world, 0).parameters.actors)
    with pytest.raises(UsageError, match="flat networks decide for 3 UEs, not 5; train with --network set"):
        transferred(policy, scenario, larger)
    assert transferred(policy, scenario, scenario) is policy
    busy = load_scenario("families", ["fleet.ues=3", "fleet.tasks=6", "activity.task_probability=0.5"])
    pooled = LearnedPolicy("set", initial_state(TrainingConfig(width=8), world, 0).parameters.actors)
    with pytest.raises(UsageError, match="see other features of a UE"):
        transferred(pooled, scenario, busy)
    base = plan_lookahead(world, LaterPrices(jnp.float32(0.5), jnp.float32(0.5)))
    guided = transferred(begin_guided(base, world, GuidedConfig().width, 0), scenario, larger)
    assert not np.array_equal(guided.base.worth, base.worth)
