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
from emutune.world import (
    Action,
    Cache,
    Episode,
    Observation,
    Outcome,
    State,
    World,
    all_tasks,
    build_world,
    current_task,
    empty_cache,
    observe,
    observe_task,
    progress_feature,
    reset,
    serve,
    step,
    ue_features,
)
from worlds import edited

PAPER = load_scenario("paper")

reset_compiled = jax.jit(reset)
step_compiled = jax.jit(step)
observe_compiled = jax.jit(observe)


@pytest.fixture(scope="module")
def world() -> World:
    return build_world(PAPER)


def random_action(key: jax.Array, ues: int) -> Action:
    where, what = jax.random.split(key)
    return Action(jax.random.bernoulli(where, 0.5, (ues,)), jax.random.uniform(what, (ues,)))


def play(world: World, seed: int, actions: list[Action]) -> tuple[list[State], list[Outcome]]:
    """The states before each action and after the last one, and the outcomes."""
    states, outcomes = [reset_compiled(jax.random.key(seed), world)], []
    for action in actions:
        state, outcome = step_compiled(world, states[-1], action)
        states.append(state)
        outcomes.append(outcome)
    return states, outcomes


def assert_trees_equal(left: object, right: object) -> None:
    jax.tree.map(np.testing.assert_array_equal, left, right)


# --- draws -------------------------------------------------------------------------------------------------


def test_an_episode_starts_at_step_0_with_empty_caches(world: World) -> None:
    state = reset_compiled(jax.random.key(0), world)
    assert state.step == 0
    assert not state.cache.layers.any()
    assert_trees_equal(state.cache, empty_cache(world))


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
    idle = [Action(jnp.zeros(6, bool), jnp.full(6, 0.5))] * 3
    busy = [random_action(key, 6) for key in keys]
    for mine, other in zip(play(world, seed, idle)[0], play(world, seed, busy)[0], strict=True):
        assert_trees_equal(mine.episode, other.episode)
        assert_trees_equal(mine.step, other.step)
        if mine.step < world.tasks:
            assert_trees_equal(current_task(mine), current_task(other))


def test_previous_gain_is_the_gain_of_the_step_before(world: World) -> None:
    states, _ = play(world, 0, [Action(jnp.ones(6, bool), jnp.full(6, 0.5))] * 4)
    for before, after in itertools.pairwise(states):
        assert_trees_equal(current_task(after).previous_gain, current_task(before).gain)


def test_tasks_of_all_steps_are_the_tasks_of_each_step(world: World) -> None:
    states, _ = play(world, 0, [Action(jnp.ones(6, bool), jnp.full(6, 0.5))] * (world.tasks - 1))
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(current_task(state) for state in states))
    assert_trees_equal(all_tasks(states[0].episode), stacked)


# --- many at once ------------------------------------------------------------------------------------------


def first_step(key: jax.Array, world: World, action: Action) -> tuple[State, State, Outcome, Observation]:
    """An episode's start, its first step, and what is seen after it."""
    start = reset(key, world)
    state, outcome = step(world, start, action)
    return start, state, outcome, observe(world, state)


def test_vmap_equals_loop(world: World) -> None:
    keys = jax.random.split(jax.random.key(7), 4)
    actions = [random_action(key, 6) for key in keys]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *actions)
    together = jax.jit(jax.vmap(first_step, (0, None, 0)))(keys, world, stacked)
    alone = jax.jit(first_step)
    for n, (key, action) in enumerate(zip(keys, actions, strict=True)):
        own = jax.tree.map(lambda leaf, n=n: leaf[n], together)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-6), own, alone(key, world, action))


def test_features_of_a_batch_are_the_features_of_each(world: World) -> None:
    states, _ = play(world, 0, [random_action(jax.random.key(1), 6)] * 3)
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
    action = Action(jnp.ones(6, bool), jnp.full(6, 0.5))
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *worlds)
    rewards = jax.jit(jax.vmap(lambda world: step(world, state, action)[1].reward))(stacked)
    alone = [step_compiled(world, state, action)[1].reward for world in worlds]
    np.testing.assert_allclose(rewards, alone, rtol=1e-6)


def test_scan_over_all_tasks_equals_steps(world: World) -> None:
    actions = jax.vmap(random_action, (0, None))(jax.random.split(jax.random.key(8), world.tasks), 6)
    start = reset_compiled(jax.random.key(9), world)

    def serve_next(cached: jax.Array, inputs: tuple) -> tuple[jax.Array, Outcome]:
        return serve(world, cached, *inputs)

    cached, scanned = jax.lax.scan(serve_next, start.cache, (all_tasks(start.episode), actions))
    states, outcomes = play(
        world, 9, [jax.tree.map(lambda x, t=t: x[t], actions) for t in range(world.tasks)]
    )
    assert_trees_equal(cached, states[-1].cache)
    stepped = jax.tree.map(lambda *leaves: jnp.stack(leaves), *outcomes)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-6), scanned, stepped)


# --- observations ------------------------------------------------------------------------------------------


def test_observation_shows_last_gain_the_waiting_task_and_the_cache(world: World) -> None:
    states, outcomes = play(world, 0, [Action(jnp.zeros(6, bool), jnp.full(6, 0.5))] * 2)
    first, last = observe_compiled(world, states[0]), observe_compiled(world, states[-1])
    episode = states[0].episode
    assert_trees_equal(first.previous_gain, episode.gain[0])
    assert_trees_equal(first.complexity, episode.complexity[0])
    assert_trees_equal(first.data_bits, episode.data_bits[0])
    assert_trees_equal(first.cached_retention, jnp.zeros(6))
    assert first.progress == 0
    assert_trees_equal(last.previous_gain, episode.gain[2])
    assert_trees_equal(last.complexity, episode.complexity[2])
    assert_trees_equal(last.data_bits, episode.data_bits[2])
    assert_trees_equal(last.cached_retention, outcomes[-1].retention)
    assert last.progress == pytest.approx(2 / 50)


def test_the_gain_of_the_coming_task_stays_hidden(world: World) -> None:
    state = reset_compiled(jax.random.key(0), world)
    gain = state.episode.gain
    other_future = state._replace(episode=state.episode._replace(gain=gain.at[1:].mul(2)))
    assert_trees_equal(observe_compiled(world, state), observe_compiled(world, other_future))


def test_observing_a_state_is_observing_its_task(world: World) -> None:
    state = reset_compiled(jax.random.key(0), world)
    parts = observe_task(world, state.cache, current_task(state), state.step)
    assert_trees_equal(observe(world, state), parts)


@settings(max_examples=25)
@given(st.integers(0, 2**31 - 1), st.integers(0, 49), st.sampled_from([0, 7, 16, 25]))
def test_features_stay_within_their_range(seed: int, t: int, cached: int) -> None:
    world = build_world(PAPER)
    start = reset_compiled(jax.random.key(seed), world)
    state = start._replace(step=jnp.asarray(t, jnp.int32), cache=Cache(jnp.full(6, cached, jnp.int32)))
    observation = observe_compiled(world, state)
    gain, complexity, data, retention = np.moveaxis(ue_features(world, observation), -1, 0)
    for feature in (complexity, data, retention):
        assert np.abs(feature).max() <= 1 + 1e-5
    # Fading of 100 blocks adds at most some 3 dB to the path loss, and that range spans 20 dB.
    assert np.abs(gain).max() < 1.3
    assert -1 <= progress_feature(observation) <= 1


def fleet_of_two(near: float, far: float) -> Observation:
    """One UE at the low end of every range and one at the high end."""
    return Observation(
        previous_gain=jnp.array([far, near]),
        complexity=jnp.array([1.0, 10.0]),
        data_bits=jnp.array([2.4e9, 4e9]),
        cached_retention=jnp.array([0.0, 0.8]),
        progress=jnp.asarray(1.0),
        transmit_power_w=jnp.array([0.2, 1.0]),
    )


def test_features_map_the_ends_of_each_range_to_the_ends_of_the_scale(world: World) -> None:
    # 50 m and 500 m at path loss exponent 2, faded to normal scores of 3 and -3; an empty cache is 0, the
    # largest emulator allowed 1.
    deep, high = stats.gamma.ppf(stats.norm.cdf([-3, 3]), 100, scale=0.01)
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
