"""What an episode draws, what it shows to the agents, and that neither depends on what they do."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from emutune.scenario import Range, Scenario, load_scenario
from emutune.step import Situation, plan_of_wish, situation_of
from emutune.world import (
    Carried,
    Episode,
    Outcome,
    State,
    World,
    build_world,
    cached_retention,
    nothing_carried,
    observe,
    reset,
    serve,
    situation_at,
    ue_features,
)
from emutune.world.dynamics import during
from emutune.world.features import progress_feature
from worlds import alike, edited, reset_compiled, step_wish

PAPER = load_scenario("paper")

Wish = tuple[jax.Array, jax.Array]

observe_compiled = jax.jit(observe)


@pytest.fixture(scope="module")
def world() -> World:
    return build_world(PAPER)


def random_wish(key: jax.Array, ues: int) -> Wish:
    where, what = jax.random.split(key)
    return jax.random.bernoulli(where, 0.5, (ues,)), jax.random.uniform(what, (ues,))


def play(world: World, seed: int, wishes: list[Wish]) -> tuple[list[State], list[Outcome]]:
    """The states before each step and after the last one, and the outcomes."""
    states, outcomes = [reset_compiled(jax.random.key(seed), world)], []
    for wish in wishes:
        state, outcome = step_wish(world, states[-1], *wish)
        states.append(state)
        outcomes.append(outcome)
    return states, outcomes


def task_of(world: World, state: State) -> Situation:
    """What is asked of a fleet in a step, without what it carries."""
    true = during(state.episode, state.step, observe(world, state))
    return true._replace(**nothing_carried(world)._asdict())


def assert_trees_equal(left: object, right: object) -> None:
    jax.tree.map(np.testing.assert_array_equal, left, right)


# --- draws -------------------------------------------------------------------------------------------------


def test_an_episode_starts_at_step_0_with_empty_caches(world: World) -> None:
    state = reset_compiled(jax.random.key(0), world)
    assert state.step == 0
    assert not state.carried.held.any()
    assert_trees_equal(state.carried, nothing_carried(world))


@pytest.mark.parametrize(("ues", "tasks"), [(1, 1), (6, 50)])
def test_shapes_of_an_episode(ues: int, tasks: int) -> None:
    scenario = edited(PAPER, {"fleet.ues": ues, "fleet.tasks": tasks})
    episode = jax.eval_shape(lambda: reset(jax.random.key(0), build_world(scenario)).episode)
    shapes = jax.tree.map(lambda leaf: leaf.shape, episode)
    assert shapes == Episode((tasks + 1, ues), (tasks, ues), (tasks, ues), (ues,))


def test_same_key_same_episode_other_key_other_episode(world: World) -> None:
    first = reset_compiled(jax.random.key(1), world)
    assert_trees_equal(first, reset_compiled(jax.random.key(1), world))
    others = jax.tree.leaves(reset_compiled(jax.random.key(2), world).episode)
    for mine, other in zip(jax.tree.leaves(first.episode), others, strict=True):
        assert not jnp.any(mine == other)


def bounds(interval: Range, scale: float = 1.0) -> tuple[float, float]:
    return interval.min * scale, interval.max * scale


@pytest.mark.parametrize(
    ("name", "interval"),
    [
        ("complexity", bounds(PAPER.tasks.complexity)),
        ("data_bits", bounds(PAPER.tasks.data_mb, scale=8e6)),
        ("transmit_power_w", bounds(PAPER.fleet.transmit_power_w)),
    ],
)
def test_draws_are_uniform_over_their_ranges(name: str, interval: tuple[float, float]) -> None:
    many = build_world(edited(PAPER, {"fleet.ues": 3000, "fleet.tasks": 1}))
    values = np.asarray(getattr(reset_compiled(jax.random.key(4), many).episode, name), float).ravel()
    low, high = interval
    assert values.min() >= low * (1 - 1e-6)
    assert values.max() <= high * (1 + 1e-6)
    assert stats.kstest(values, stats.uniform(low, high - low).cdf).pvalue > 1e-3


def test_a_range_of_one_point_draws_that_point() -> None:
    fixed = edited(PAPER, {"tasks.complexity": {"min": 3.0, "max": 3.0}})
    assert (reset_compiled(jax.random.key(0), build_world(fixed)).episode.complexity == 3.0).all()


@pytest.mark.parametrize("farthest_m", [500.0, 50.0])
def test_draws_of_different_kinds_are_uncorrelated(farthest_m: float) -> None:
    # Gains show the distances where these differ, and the fading, at its strongest, where they do not.
    many = edited(
        PAPER,
        {
            "fleet.ues": 3000,
            "fleet.tasks": 1,
            "fleet.distance_m.max": farthest_m,
            "radio.fading_blocks": 2,
        },
    )
    episode = reset_compiled(jax.random.key(4), build_world(many)).episode
    for gain in episode.gain:
        columns = (gain, *episode.complexity, *episode.data_bits, episode.transmit_power_w)
        # Ranks do not mind the long tail of the gain.
        ranks = stats.spearmanr(np.stack([np.asarray(column) for column in columns], axis=1)).statistic
        assert np.abs(ranks[~np.eye(len(columns), dtype=bool)]).max() < 5 / np.sqrt(3000)


# --- common random numbers ---------------------------------------------------------------------------------


@settings(max_examples=15)
@given(st.integers(0, 2**31 - 1), st.integers(0, 2**31 - 1))
def test_what_happens_to_a_fleet_does_not_depend_on_its_actions(seed: int, action_seed: int) -> None:
    world = build_world(PAPER)
    keys = jax.random.split(jax.random.key(action_seed), 3)
    idle = [alike(world, False, 0.5)] * 3
    busy = [random_wish(key, 6) for key in keys]
    for mine, other in zip(play(world, seed, idle)[0], play(world, seed, busy)[0], strict=True):
        assert_trees_equal(mine.episode, other.episode)
        assert_trees_equal(mine.step, other.step)
        if mine.step < world.tasks:
            assert_trees_equal(task_of(world, mine), task_of(world, other))


def test_previous_gain_is_the_gain_of_the_step_before(world: World) -> None:
    states, _ = play(world, 0, [alike(world, True, 0.5)] * 4)
    for before, after in itertools.pairwise(states):
        assert_trees_equal(observe(world, after).gain, task_of(world, before).gain)


# --- many at once ------------------------------------------------------------------------------------------


def first_step(key: jax.Array, world: World, wish: Wish) -> tuple[State, State, Outcome, Situation]:
    """An episode's start, its first step, and what is seen after it."""
    start = reset(key, world)
    state, outcome = step_wish(world, start, *wish)
    return start, state, outcome, observe(world, state)


def test_vmap_equals_loop(world: World) -> None:
    keys = jax.random.split(jax.random.key(7), 4)
    wishes = [random_wish(key, 6) for key in keys]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *wishes)
    together = jax.jit(jax.vmap(first_step, (0, None, 0)))(keys, world, stacked)
    alone = jax.jit(first_step)
    for n, (key, wish) in enumerate(zip(keys, wishes, strict=True)):
        own = jax.tree.map(lambda leaf, n=n: leaf[n], together)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-6), own, alone(key, world, wish))


def test_features_of_a_batch_are_the_features_of_each(world: World) -> None:
    states, _ = play(world, 0, [random_wish(jax.random.key(1), 6)] * 3)
    observations = [observe_compiled(world, state) for state in states]
    batch = jax.tree.map(lambda *leaves: jnp.stack(leaves), *observations)
    for n, observation in enumerate(observations):
        # Features are centred on 0, where a relative tolerance has no meaning.
        own = ue_features(world, observation)
        np.testing.assert_allclose(ue_features(world, batch)[n], own, atol=2e-6)
        np.testing.assert_allclose(progress_feature(batch)[n], progress_feature(observation), atol=2e-6)


def test_worlds_can_be_stacked(paper: Scenario) -> None:
    scenarios = [edited(paper, {"reward.delay_weight_per_min": weight}) for weight in (-0.015, -0.3)]
    worlds = [build_world(scenario) for scenario in scenarios]
    state = reset_compiled(jax.random.key(0), worlds[0])
    wish = alike(worlds[0], True, 0.5)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *worlds)
    rewards = jax.jit(jax.vmap(lambda world: step_wish(world, state, *wish)[1].reward))(stacked)
    alone = [step_wish(world, state, *wish)[1].reward for world in worlds]
    np.testing.assert_allclose(rewards, alone, rtol=1e-6)


def test_scan_over_all_tasks_equals_steps(world: World) -> None:
    wishes = jax.vmap(random_wish, (0, None))(jax.random.split(jax.random.key(8), world.tasks), 6)
    start = reset_compiled(jax.random.key(9), world)

    def serve_next(carried: Carried, inputs: tuple) -> tuple[Carried, Outcome]:
        now, wish = inputs
        known = situation_at(world, start.episode, now, carried)
        return serve(world, during(start.episode, now, known), plan_of_wish(world.rules, known, *wish))

    carried, scanned = jax.lax.scan(serve_next, start.carried, (jnp.arange(world.tasks), wishes))
    states, outcomes = play(world, 9, list(zip(*wishes, strict=True)))
    assert_trees_equal(carried.held, states[-1].carried.held)
    stepped = jax.tree.map(lambda *leaves: jnp.stack(leaves), *outcomes)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-6), scanned, stepped)


# --- observations ------------------------------------------------------------------------------------------


def test_observation_shows_last_gain_the_waiting_task_and_the_cache(world: World) -> None:
    states, outcomes = play(world, 0, [alike(world, False, 0.5)] * 2)
    first, last = observe_compiled(world, states[0]), observe_compiled(world, states[-1])
    episode = states[0].episode
    assert_trees_equal(first.gain, episode.gain[0])
    assert_trees_equal(first.complexity, episode.complexity[0])
    assert_trees_equal(first.data_bits, episode.data_bits[0])
    assert_trees_equal(cached_retention(world, first), jnp.zeros(6))
    assert first.progress == 0
    assert_trees_equal(last.gain, episode.gain[2])
    assert_trees_equal(last.complexity, episode.complexity[2])
    assert_trees_equal(last.data_bits, episode.data_bits[2])
    assert_trees_equal(cached_retention(world, last), outcomes[-1].plan.layers / 32)
    assert last.progress == pytest.approx(2 / 50)


def test_the_gain_of_the_coming_task_stays_hidden(world: World) -> None:
    state = reset_compiled(jax.random.key(0), world)
    gain = state.episode.gain
    other_future = state._replace(episode=state.episode._replace(gain=gain.at[1:].mul(2)))
    assert_trees_equal(observe_compiled(world, state), observe_compiled(world, other_future))


@settings(max_examples=25)
@given(st.integers(0, 2**31 - 1), st.integers(0, 49), st.sampled_from([0, 7, 16, 25]))
def test_features_stay_within_their_range(seed: int, t: int, cached: int) -> None:
    world = build_world(PAPER)
    start = reset_compiled(jax.random.key(seed), world)
    carried = start.carried._replace(held=jnp.full((6, 1), cached, jnp.int32))
    state = start._replace(step=jnp.asarray(t, jnp.int32), carried=carried)
    observation = observe_compiled(world, state)
    gain, complexity, data, retention = np.moveaxis(ue_features(world, observation), -1, 0)
    for feature in (complexity, data, retention):
        assert np.abs(feature).max() <= 1 + 1e-5
    # Fading of 100 blocks adds at most some 3 dB to the path loss, and that range spans 20 dB.
    assert np.abs(gain).max() < 1.3
    assert -1 <= progress_feature(observation) <= 1


def fleet_of_two(near: float, far: float) -> Situation:
    """One UE at the low end of every range and one at the high end."""
    return situation_of(
        gain=jnp.array([far, near]),
        complexity=jnp.array([1.0, 10.0]),
        data_bits=jnp.array([2.4e9, 4e9]),
        held=jnp.array([[0], [80]]),
        age=jnp.zeros((2, 1), jnp.int32),
        progress=jnp.asarray(1.0),
        transmit_power_w=jnp.array([0.2, 1.0]),
    )


def test_features_map_the_ends_of_each_range_to_the_ends_of_the_scale() -> None:
    # 50 m and 500 m at path loss exponent 2, faded to normal scores of 3 and -3; an empty cache is 0, the
    # largest emulator allowed 1.
    deep, high = stats.gamma.ppf(stats.norm.cdf([-3, 3]), 100, scale=0.01)
    # Of 100 layers 80 are the largest retention exactly.
    world = build_world(edited(PAPER, {"model.layers": 100}))
    features = ue_features(world, fleet_of_two(near=50.0**-2 * high, far=500.0**-2 * deep))
    np.testing.assert_allclose(features, [[-1, -1, -1, 0], [1, 1, 1, 1]], atol=1e-5)
    assert progress_feature(fleet_of_two(1.0, 1.0)) == 1


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("tasks.data_mb", 400.0),
        ("tasks.complexity", 3.0),
        ("fleet.distance_m", 100.0),
    ],
)
def test_features_of_a_range_of_one_point_stay_small(paper: Scenario, path: str, value: float) -> None:
    world = build_world(edited(paper, {path: {"min": value, "max": value}}))
    features = ue_features(world, observe(world, reset_compiled(jax.random.key(0), world)))
    assert jnp.abs(features).max() < 1.5


def test_no_task_waits_after_the_last_step(world: World) -> None:
    state = reset_compiled(jax.random.key(0), world)
    final = state._replace(step=jnp.asarray(world.tasks, jnp.int32))
    observation = observe_compiled(world, final)
    assert observation.progress == 1
    # The observation after the end is still finite: environments return one with ``terminated``.
    assert jnp.isfinite(ue_features(world, observation)).all()
