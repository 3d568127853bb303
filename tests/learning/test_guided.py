"""Guided lookahead: begins as lookahead, never ends below it, and survives being kept; and ranked networks."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emutune.errors import CheckpointError, UsageError
from emutune.learning.agents import to_retention
from emutune.learning.architectures import ARCHITECTURES
from emutune.learning.configuration import GuidedConfig, TrainingConfig
from emutune.learning.guided import begin_guided, correction, validate
from emutune.learning.training import load_policy, train_seed
from emutune.policies import AllServer, LaterPrices, Random, plan_lookahead
from emutune.scenario import load_scenario
from emutune.study.evaluate import evaluate_policy, held_out_episodes
from emutune.world import build_world, observe, reset
from holding import holding

SCENARIO = load_scenario("families", ["fleet.ues=3", "fleet.tasks=10"])
WORLD = build_world(SCENARIO)
CONFIG = GuidedConfig(rounds=2, decisions=2000, fits=100, width=8, validation=16)


@pytest.fixture(scope="module")
def base():
    prices = LaterPrices(jnp.float32(0.2), jnp.float32(0.2))
    return jax.jit(lambda world: plan_lookahead(world, prices))(WORLD)


@pytest.mark.slow
def test_it_begins_as_its_base_and_never_ends_below_it(base, tmp_path):
    start = begin_guided(base, WORLD, 8, 0)
    drawn = held_out_episodes(SCENARIO, 4)
    once = evaluate_policy(SCENARIO, base, drawn).episode_return
    np.testing.assert_array_equal(once, evaluate_policy(SCENARIO, start, drawn).episode_return)

    policy = train_seed(SCENARIO, CONFIG, 0, tmp_path, teacher=base)
    lines = (tmp_path / "metrics.jsonl").read_text("utf-8").splitlines()
    one, two = (json.loads(line)["validation_return"] for line in lines)
    before, after = (float(validate(WORLD, each, 16)) for each in (start, policy))
    assert before <= one <= two == pytest.approx(after, rel=1e-6)
    # Prices of 0.2 make emulators look too cheap, and there is something to learn.
    assert after > before


@pytest.mark.slow
def test_a_stopped_run_goes_on_to_the_same_bits(base, tmp_path):
    whole = train_seed(SCENARIO, CONFIG, 3, tmp_path / "whole", teacher=base)

    def stop(steps: int) -> None:
        if steps:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_seed(SCENARIO, CONFIG, 3, tmp_path / "cut", teacher=base, progress=stop)
    with pytest.raises(CheckpointError, match="belongs to seed 3, not 4"):
        train_seed(SCENARIO, CONFIG, 4, tmp_path / "cut")
    # What was begun knows its lookahead.
    resumed = train_seed(SCENARIO, CONFIG, 3, tmp_path / "cut")
    loaded, header = load_policy(tmp_path / "cut" / "checkpoint.safetensors")
    assert header == (SCENARIO, CONFIG, 3)
    for mine, other, third in zip(*map(jax.tree.leaves, (whole, resumed, loaded)), strict=True):
        np.testing.assert_array_equal(mine, other)
        np.testing.assert_array_equal(mine, third)


def test_what_it_cannot_begin_with_is_named(tmp_path):
    with pytest.raises(UsageError, match="the configuration names lookahead; pass that policy"):
        train_seed(SCENARIO, CONFIG, 0, tmp_path / "a")
    with pytest.raises(UsageError, match="guided lookahead corrects a lookahead, got a AllServer"):
        train_seed(SCENARIO, CONFIG, 0, tmp_path / "b", teacher=AllServer())


def test_a_correction_by_hand():
    coefficients = jnp.array([1.0, 2.0, 4.0, 10.0, 20.0, 40.0, 7.0])
    assert correction(coefficients, jnp.asarray(0.5), jnp.asarray(0.0)) == 1 + 2 * 0.5 + 4 * 0.25
    assert correction(coefficients, jnp.asarray(0.0), jnp.asarray(0.5)) == 10 + 20 * 0.5 + 40 * 0.25
    assert correction(coefficients, jnp.asarray(0.0), jnp.asarray(0.0)) == 7


FOUR = build_world(load_scenario("families", ["fleet.ues=4"]))


@pytest.fixture(scope="module")
def ranked_inputs():
    """UE 0 holds what it needs, UE 2 something else; data alone decides how fast uploads are."""
    state = jax.jit(reset)(jax.random.key(1), FOUR)
    family = state.episode.family[0]
    carried = holding(FOUR, family.at[2].add(1) % 3, [9, 0, 9, 0])
    data = jnp.array([1.0, 4.0, 3.0, 2.0]) * 1e9
    episode = state.episode._replace(
        data_bits=state.episode.data_bits.at[0].set(data),
        gain=jnp.full_like(state.episode.gain, 1e-4),
        transmit_power_w=jnp.full(4, 0.5),
    )
    seen = observe(FOUR, state._replace(episode=episode, carried=carried))
    return jax.jit(lambda seen: ARCHITECTURES["ranked"].inputs(FOUR, seen))(seen)


def test_ranks_by_hand(ranked_inputs):
    more = ranked_inputs.features[:, 7:]
    np.testing.assert_allclose(more[:, 0], [-1, 1, 1, 1])  # who waits
    np.testing.assert_allclose(more[:, 1], np.full(4, 2 * 3 / 4 - 1))  # how many
    np.testing.assert_allclose(more[:, 2], 2 * np.array([4, 2, 1, 0]) / 4 - 1)  # the fastest is first
    np.testing.assert_allclose(more[:, 3] / more[0, 3], [1, 4, 3, 2], rtol=1e-6)


def test_the_share_that_fits_into_the_uploads_by_hand(ranked_inputs):
    view_s2 = ARCHITECTURES["ranked"].view_s2
    # UE 3 uploads, UEs 1 and 2 download, UE 0 uses what it holds.
    at_server = jnp.array([False, False, False, True])
    up, down, _ = map(np.asarray, ranked_inputs.times)
    expected = up[3] / (2 * down)
    np.testing.assert_allclose(view_s2(ranked_inputs, at_server)[:, -1], expected, rtol=1e-5)
    nobody = view_s2(ranked_inputs, jnp.zeros(4, bool))
    np.testing.assert_array_equal(nobody[:, -1], 2)


def test_ranked_networks_keep_what_is_usable():
    usable = jnp.array([9 / 16, 0.0, 0.0, 0.0])
    drawn = to_retention(FOUR, jnp.array([1.0, 1.0, -1.0, 0.0]))
    wanted = ARCHITECTURES["ranked"].wanted_retention(drawn, usable)
    np.testing.assert_allclose(wanted, [9 / 16, 0.8125, 0.1875, 0.5])
    np.testing.assert_allclose(ARCHITECTURES["set"].wanted_retention(drawn, usable)[0], 0.8125)


@pytest.mark.slow
def test_a_ranked_fleet_learns_to_coordinate(tmp_path):
    scenario = load_scenario("families", ["fleet.ues=3", "fleet.tasks=20"])
    config = TrainingConfig(
        network="ranked", credit="marginal", steps=16_000, environments=20, entropy_weight=1e-3
    )
    policy = train_seed(scenario, config, 0, tmp_path)
    drawn = held_out_episodes(scenario, 32)
    figures = evaluate_policy(scenario, policy, drawn)
    everyone = evaluate_policy(scenario, AllServer(), drawn).episode_return.mean()
    assert figures.episode_return.mean() > 0.9 * everyone
    assert 0.05 < figures.server_share.mean() < 0.9


@pytest.mark.slow
@pytest.mark.parametrize("name", ["edge-compute", "private"])
def test_it_learns_where_devices_differ(tmp_path, name):
    scenario = load_scenario(name, ["fleet.ues=3", "fleet.tasks=10"])
    world = build_world(scenario)
    limits = [jnp.float32(60.0)] if scenario.computation else []
    prices = LaterPrices(jnp.float32(0.2), jnp.float32(0.2), *limits)
    base = jax.jit(lambda world: plan_lookahead(world, prices))
    short = CONFIG.model_copy(update={"rounds": 1})
    policy = train_seed(scenario, short, 0, tmp_path, teacher=base(world))
    start = begin_guided(base(world), world, short.width, 0)
    assert float(validate(world, policy, 16)) >= float(validate(world, start, 16))
    figures = evaluate_policy(scenario, policy, held_out_episodes(scenario, 4))
    assert np.isfinite(figures.episode_return).all()


@pytest.mark.slow
@pytest.mark.parametrize(("network", "credit"), [("ranked", "marginal"), ("set", "fleet"), ("flat", "fleet")])
def test_training_runs_where_devices_differ(tmp_path, network, credit):
    changes = [
        "fleet.ues=3",
        "fleet.tasks=10",
        "memory={device_gb={min=0.8,max=2.4}}",
        "privacy={share=0.34}",
    ]
    scenario = load_scenario("edge-compute", [*changes, "activity={task_probability=0.7}"])
    config = TrainingConfig(
        network=network, credit=credit, steps=4000, environments=20, evaluation_episodes=2
    )
    policy = train_seed(scenario, config, 0, tmp_path)
    figures = evaluate_policy(scenario, policy, held_out_episodes(scenario, 8))
    worst = evaluate_policy(scenario, Random(), held_out_episodes(scenario, 8))
    assert figures.episode_return.mean() > worst.episode_return.mean()
