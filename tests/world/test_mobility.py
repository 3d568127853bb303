"""Random waypoint mobility: it begins stationary, walks straight, and decides nothing else."""

from __future__ import annotations

import math

import jax
import numpy as np
import pytest
from scipy import stats

from emutune.scenario import Scenario, load_scenario, parse_scenario
from emutune.scenario.load import dump_scenario
from emutune.world import build_world, features_of, observe, reset, ue_features
from emutune.world.dynamics import draw_links
from emutune.world.environments import OrchestrationEnv
from emutune.world.mobility import TIMING_ADVANCE_M, Path, Waypoints, mean_way_m
from worlds import alike, step_wish

WALK = "mobility={speed_mps={min=0.5, max=2.0}, pause_s={min=0, max=60}, interval_s=30}"
UES = 6000

# Programs take long to compile: tests share them, and the fleets that they are compiled for.
draw = jax.jit(Waypoints.draw, static_argnums=(2, 3))
links = jax.jit(draw_links)
reset_compiled = jax.jit(reset)


def walking(*changes: str) -> Scenario:
    """The paper's fleet on its feet, among the streets."""
    text = dump_scenario(load_scenario("paper")).replace("path_loss_exponent = 2.0\n", "")
    radio = ["radio.path_loss.model=umi", "radio.carrier_ghz=3.5"]
    return parse_scenario(text, overrides=[*radio, WALK, *changes])


def paths(scenario: Scenario) -> Path:
    """The ways of a large fleet over eleven intervals."""
    drawn = draw(build_world(scenario).radio.place, jax.random.key(0), 12, UES)
    return jax.tree.map(lambda part: np.asarray(part, float), drawn)


def test_mean_way_of_a_disk_is_the_closed_form() -> None:
    assert mean_way_m(1e-6, 300.0) == pytest.approx(300 * 128 / (45 * math.pi), rel=2e-4)


def test_mean_way_of_a_ring_agrees_with_draws() -> None:
    generator = np.random.default_rng(0)
    ends = []
    for _ in range(2):
        radius = np.sqrt(generator.uniform(200**2, 500**2, 400_000))
        turn = generator.uniform(0, 2 * math.pi, 400_000)
        ends.append(radius * np.exp(1j * turn))
    drawn = np.abs(ends[0] - ends[1])
    assert mean_way_m(200.0, 500.0) == pytest.approx(drawn.mean(), abs=5 * drawn.std() / math.sqrt(400_000))


@pytest.mark.parametrize("pause", ["{min=0, max=0}", "{min=0, max=900}"])
def test_it_begins_in_the_stationary_state(pause: str) -> None:
    # Random waypoint drawn like any other way drifts to the middle and slows down as an episode goes on.
    scenario = walking("fleet.distance_m.min=10", f"mobility.pause_s={pause}", "mobility.interval_s=200")
    walked = paths(scenario)
    assert stats.ks_2samp(walked.distance_m[0], walked.distance_m[-1]).pvalue > 1e-3
    still = [(walked.moved_m[row] == 0).mean() for row in (1, -1)]
    assert still[0] == pytest.approx(still[1], abs=5 * math.sqrt(0.5 / UES))
    assert stats.ks_2samp(walked.speed_mps[1], walked.speed_mps[-1]).pvalue > 1e-3


def test_who_pauses_and_how_fast_others_walk_at_the_start() -> None:
    scenario = walking("mobility.pause_s={min=100, max=900}")
    speed = paths(scenario).speed_mps[0]
    distance = scenario.fleet.distance_m
    assert distance is not None
    way_s = mean_way_m(distance.min, distance.max) * math.log(4) / 1.5
    share = 500 / (500 + way_s)
    assert (speed == 0).mean() == pytest.approx(share, abs=5 * math.sqrt(0.25 / UES))
    # At a moment, slow ways are seen more often: density 1 / v.
    law = stats.reciprocal(0.5, 2.0)
    assert stats.kstest(speed[speed > 0], law.cdf).pvalue > 1e-3


def test_ways_are_straight_and_within_the_speeds() -> None:
    scenario = walking("mobility.interval_s=2")
    walked = paths(scenario)
    assert (walked.moved_m <= walked.speed_mps * 2 * (1 + 1e-4) + 1e-3).all()
    assert walked.speed_mps.max() <= 2.0 * (1 + 1e-5)
    # Most intervals of 2 s lie inside one way: there a UE gets as far as it walks.
    straight = walked.moved_m[1:] >= walked.speed_mps[1:] * 2 * (1 - 1e-3) - 1e-3
    assert straight.mean() > 0.95
    distance = scenario.fleet.distance_m
    assert distance is not None
    assert walked.distance_m.min() >= distance.min
    assert walked.distance_m.max() <= distance.max * (1 + 1e-5)


def test_who_turns_walks_further_than_it_gets() -> None:
    walk = "mobility={speed_mps={min=0.5, max=20}, pause_s={min=0, max=0}, interval_s=30}"
    walked = paths(walking(walk))
    turned = walked.moved_m[1:] < walked.speed_mps[1:] * 30 * (1 - 1e-3)
    assert 0.2 < turned.mean() < 0.9
    assert (walked.moved_m[1:] <= walked.speed_mps[1:] * 30 * (1 + 1e-4) + 1e-2).all()


def test_pauses_last_as_long_as_they_say() -> None:
    # Ways of a second at most, pauses of a hundred: one look a second sees who is on the way.
    ring = "fleet.distance_m={min=10, max=11}"
    scenario = walking(
        ring, "mobility={speed_mps={min=22, max=22}, pause_s={min=100, max=100}, interval_s=1}"
    )
    moved = paths(scenario).moved_m[1:] > 0
    starts = (moved[1:] & ~moved[:-1]).sum()
    expected = UES * (len(moved) - 1) / (100 + mean_way_m(10.0, 11.0) / 22)
    assert starts == pytest.approx(expected, abs=5 * math.sqrt(expected))


def test_a_ue_s_draws_are_its_own_and_its_episode_s() -> None:
    scenario = walking()
    one, other = (links(jax.random.key(seed), build_world(scenario))[0] for seed in (0, 1))
    again = links(jax.random.key(0), build_world(scenario))[0]
    np.testing.assert_array_equal(one.gain, again.gain)
    assert not np.any(np.asarray(one.way["distance_m"]) == np.asarray(other.way["distance_m"]))


def test_gains_follow_the_way() -> None:
    scenario = walking(
        "fleet.ues=800", "fleet.tasks=10", "radio.path_loss.shadowing=false", "radio.rate=ergodic"
    )
    channel, _ = links(jax.random.key(1), build_world(scenario))
    clear, distance = np.asarray(channel.way["line_of_sight"]), np.asarray(channel.way["distance_m"], float)
    slant = np.hypot(distance, 8.5)
    hidden_db = 22.4 + 35.3 * np.log10(slant) + 21.3 * math.log10(3.5)
    np.testing.assert_allclose(-10 * np.log10(channel.gain)[~clear], hidden_db[~clear], atol=1e-3)
    assert (clear[1:] != clear[:-1]).any()
    # Over 30 m or so, correlation distance 50 m, the line of sight often stays.
    assert (clear[1:] == clear[:-1]).mean() > 0.85


def test_fading_follows_each_ue_s_own_speed() -> None:
    # The interval of fading is so short that only who stands still keeps its fading.
    scenario = walking(
        "radio.fading={interval_s=0.05}", "mobility.pause_s={min=300, max=900}",
        "radio.path_loss.shadowing=false", "radio.fading_blocks=2",
    )  # fmt: skip
    channel, _ = links(jax.random.key(2), build_world(scenario))
    speed = np.asarray(channel.way["speed_mps"])[1:]
    ratio = np.asarray(channel.gain)[1:] / np.asarray(channel.gain)[:-1]
    assert (np.abs(ratio[speed == 0] - 1) < 1e-4).all()
    assert (np.abs(ratio[speed > 0.5] - 1) > 1e-4).mean() > 0.99


def test_the_base_station_knows_the_timing_advance_and_no_more() -> None:
    world = build_world(walking())
    state = reset_compiled(jax.random.key(3), world)
    exact = np.asarray(links(jax.random.key(3), world)[0].way["distance_m"])
    seen = np.asarray(state.episode.distance_m)
    assert np.abs(seen - exact).max() <= TIMING_ADVANCE_M / 2 + 1e-3
    inside = (seen > 50) & (seen < 500)
    np.testing.assert_allclose(seen[inside] / TIMING_ADVANCE_M % 1, 0, atol=1e-4)
    observation = observe(world, state)
    np.testing.assert_array_equal(observation.distance_m, seen[0])
    assert not np.asarray(observation.approach_m).any()
    for _ in range(2):
        state, _ = step_wish(world, state, *alike(world, False, 0.5))
    observation = observe(world, state)
    np.testing.assert_array_equal(observation.distance_m, seen[2])
    np.testing.assert_allclose(observation.approach_m, seen[1] - seen[2], atol=1e-3)
    features = ue_features(world, observation)
    assert features.shape == (6, len(features_of(world))) == (6, 6)
    assert np.abs(features).max() < 1.5


def test_what_comes_is_not_seen() -> None:
    world = build_world(walking())
    state = reset_compiled(jax.random.key(4), world)
    episode = state.episode
    assert episode.distance_m is not None
    other = episode._replace(distance_m=episode.distance_m.at[1:].set(99.0), gain=episode.gain.at[1:].mul(2))
    for mine, theirs in zip(
        jax.tree.leaves(observe(world, state)), jax.tree.leaves(observe(world, state._replace(episode=other))),
        strict=True,
    ):  # fmt: skip
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.slow
def test_environments_show_distance_and_approach() -> None:
    env = OrchestrationEnv(walking())
    seen, _ = env.reset(seed=0)
    assert seen.shape == (6 * 6 + 1,)
    for _ in range(5):
        assert env.observation_space.contains(seen)
        seen, *_ = env.step(env.action_space.sample())


def test_mobility_leaves_other_draws_alone() -> None:
    plain, moving = (
        reset_compiled(jax.random.key(6), build_world(load_scenario("paper", changes))).episode
        for changes in ([], [WALK])
    )
    for field in ("complexity", "data_bits", "transmit_power_w"):
        np.testing.assert_array_equal(getattr(plain, field), getattr(moving, field))
