"""Computation, energy, memory, privacy and idle UEs, alone and together, against plain numbers."""

from __future__ import annotations

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium.utils.env_checker import data_equivalence
from hypothesis import given, settings
from scipy import stats

import plain
from emutune.policies import AllServer, Fixed, Random, play
from emutune.policies.measure import POLICY_STREAM, episode_keys
from emutune.scenario import load_scenario
from emutune.study.evaluate import evaluate_policy, held_out_episodes
from emutune.world import build_world, draw_episode, features_of, observe, reset, ue_features
from emutune.world.devices import Devices
from emutune.world.environments import OrchestrationEnv, OrchestrationVectorEnv, parallel_env
from worlds import EVERYTHING, OTHER, alike, assert_same, play_both, reset_compiled, step_wish, world_with

ALONE = ("computation", "energy", "budget", "memory", "privacy", "activity")
COMBINATIONS = [
    *(pytest.param({feature}, marks=pytest.mark.slow) for feature in ALONE),
    pytest.param({"computation", "energy"}, marks=pytest.mark.slow),
    pytest.param(EVERYTHING, marks=pytest.mark.slow),
    EVERYTHING | {"delta", "trace", "cache"},
    pytest.param(EVERYTHING | {"ergodic", "mobility"}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("features", COMBINATIONS)
def test_a_whole_episode_agrees_with_plain_numbers(features: set[str]) -> None:
    scenario = world_with(features, "fleet.ues=5")
    kinds = set()
    for told, theirs, ours in play_both(scenario, 3, scenario.fleet.tasks):
        assert_same(theirs, ours)
        kinds |= {kind for kind, _ in told["plan"]}
        np.testing.assert_array_equal(ours[1].plan.at_server, [kind == "server" for kind, _ in told["plan"]])
    assert kinds == {"server", "local", *(["idle"] if "activity" in features else [])}


@pytest.mark.slow
@settings(max_examples=40)
@given(plain.feature_sets())
def test_any_combination_agrees_with_plain_numbers(features: set[str]) -> None:
    for _, theirs, ours in play_both(world_with(features, "fleet.ues=4"), 1, 12):
        assert_same(theirs, ours)


# --- what is off costs nothing -----------------------------------------------------------------------------


# Returns of three held-out episodes before these features existed.
BEFORE = {
    "paper": [-176.6545, -177.30878, -175.65506],
    "families": [-187.3582, -188.22531, -185.90851],
}


@pytest.mark.parametrize("name", BEFORE)
def test_what_is_off_changes_nothing(name: str) -> None:
    scenario = load_scenario(name)
    world, drawn = build_world(scenario), held_out_episodes(scenario, 3)
    assert not any(law.varies for law in world.devices)
    assert jax.tree.leaves(world.devices) == []
    assert drawn.devices == Devices()
    assert drawn.active is None
    assert not world.has_devices
    assert world.rules.terms == ("perplexity",)
    returns = evaluate_policy(scenario, Random(), drawn).episode_return
    # Compilers may put the same operations together in another way, so the last bit may differ.
    np.testing.assert_allclose(returns, BEFORE[name], rtol=3e-7)


def test_the_draws_of_before_stay() -> None:
    changes = plain.changes_for({"privacy", "activity"})
    before, after = (
        held_out_episodes(load_scenario("families", ["fleet.tasks=5", *more]), 2) for more in ([], changes)
    )
    for field in ("gain", "complexity", "data_bits", "transmit_power_w", "family"):
        np.testing.assert_array_equal(getattr(before, field), getattr(after, field))


@pytest.mark.slow
def test_one_program_serves_all_numbers() -> None:
    traces = []

    @jax.jit
    def begin_and_step(world):
        traces.append(None)
        state = reset(jax.random.key(0), world)
        return step_wish(world, state, *alike(world, True, 0.5))[1]

    base = world_with(EVERYTHING, "fleet.ues=4")
    begin_and_step(build_world(base))
    for change in (
        "computation.server_tflops=7.0",
        "computation.device_tflops={min=1.0,max=2.0}",
        "energy.budget_j=1.0",
        "energy.receive_w=0.0",
        "memory.device_gb.max=20.0",
        "privacy.share=0.9",
        "activity.task_probability=1.0",
    ):
        begin_and_step(build_world(world_with(EVERYTHING, "fleet.ues=4", change)))
    assert len(traces) == 1


# --- draws -------------------------------------------------------------------------------------------------


def test_devices_follow_their_laws() -> None:
    scenario = world_with(EVERYTHING, "fleet.ues=4000", "fleet.tasks=2")
    episode = draw_episode(jax.random.key(2), build_world(scenario))
    device = episode.devices
    logs = np.log(np.asarray(device.tflops, float))
    assert stats.kstest(logs, stats.uniform(math.log(0.3), math.log(20 / 0.3)).cdf).pvalue > 1e-3
    each = np.asarray(device.compute_w / device.tflops, float)
    assert stats.kstest(each, stats.uniform(2, 3).cdf).pvalue > 1e-3
    memory = np.asarray(device.memory_bits, float) / 8e9
    assert stats.kstest(memory, stats.uniform(2.4, 6.6).cdf).pvalue > 1e-3
    assert device.private.sum() == 1600
    assert episode.active.mean() == pytest.approx(0.6, abs=5 * math.sqrt(0.24 / 8000))
    columns = [device.tflops, each, memory, device.private, *episode.active, episode.transmit_power_w]
    ranks = stats.spearmanr(np.stack([np.asarray(one, float) for one in columns], axis=1)).statistic
    assert np.abs(ranks[~np.eye(len(columns), dtype=bool)]).max() < 5 / math.sqrt(4000)


@pytest.mark.slow
def test_who_may_not_upload_changes_from_episode_to_episode() -> None:
    world = build_world(world_with({"privacy"}, "fleet.ues=5"))
    drawn = jax.vmap(draw_episode, (0, None))(jax.random.split(jax.random.key(0), 200), world)
    private = np.asarray(drawn.devices.private)
    assert (private.sum(1) == 2).all()
    assert np.abs(private.mean(0) - 0.4).max() < 0.15


# --- closed forms ------------------------------------------------------------------------------------------


def one_step(scenario, at_server, retention):
    world = build_world(scenario)
    state, outcome = step_wish(
        world, reset_compiled(jax.random.key(0), world), *alike(world, at_server, retention)
    )
    return state, outcome.charge


def test_training_time_by_hand() -> None:
    # 4 x 2.7e9 x (400e6 / 2000) x 2 = 4.32e15 operations: 2160 s at 2 TFLOP/s, half that at E = 0.5;
    # 6 UEs share 5 TFLOP/s: 4320 / 5 x 6 = 5184 s.
    scenario = world_with(
        {"computation"},
        "computation.device_tflops={min=2.0,max=2.0}",
        "tasks.data_mb={min=400.0,max=400.0}",
        name="paper",
    )
    _, charged = one_step(scenario, False, 0.5)
    np.testing.assert_allclose(charged.taken.training_s, 1080, rtol=1e-5)
    _, charged = one_step(scenario, True, 0.5)
    np.testing.assert_allclose(charged.taken.training_s, 5184, rtol=1e-5)


def test_energy_and_its_excess_by_hand() -> None:
    scenario = world_with(
        {"computation", "budget"},
        "computation.device_tflops={min=2.0,max=2.0}",
        "energy.compute_j_per_tflop={min=3.0,max=3.0}",
        "tasks.data_mb={min=400.0,max=400.0}",
        name="paper",
    )
    # 4320 TFLOP at E = 0.5 and 3 J each are 6480 J; the budget is 2500 J, and receiving takes 1.5 W.
    after, charged = one_step(scenario, False, 0.5)
    taken = charged.taken
    spent = 6480 + 1.5 * taken.download_s
    np.testing.assert_allclose(taken.joules, spent, rtol=1e-5)
    np.testing.assert_allclose(after.carried.spent_j, spent, rtol=1e-5)
    expected = {
        "perplexity": 0.092 * taken.perplexity.mean(),
        "delay": 0.015 / 60 * charged.delay_s,
        "energy": 1e-5 * spent.mean(),
        "budget": 1e-3 * (spent - 2500).mean(),
    }
    assert set(charged.terms) == set(expected)
    for name, cost in expected.items():
        np.testing.assert_allclose(charged.terms[name], cost, rtol=1e-5)
    np.testing.assert_allclose(charged.total, sum(expected.values()), rtol=1e-5)


@pytest.mark.slow
def test_an_episode_is_charged_its_excess_once() -> None:
    scenario = world_with({"computation", "budget"}, "energy.budget_j=60000.0")
    free = world_with({"computation", "energy"})
    drawn = held_out_episodes(scenario, 4)
    for policy in (Random(), Fixed(jnp.float32(0.5))):
        dear = evaluate_policy(scenario, policy, drawn)
        cheap = evaluate_policy(free, policy, drawn)
        np.testing.assert_allclose(dear.energy_kj, cheap.energy_kj, rtol=1e-6)
        first = jax.tree.map(lambda leaf: leaf[0], drawn)
        total = np.asarray(joules_of(build_world(scenario), policy, first), float).sum(axis=0)
        excess = np.maximum(total - 60000, 0).mean()
        assert 0 < (total > 60000).mean() < 1 or excess > 0
        np.testing.assert_allclose(cheap.episode_return[0] - dear.episode_return[0], 1e-3 * excess, rtol=1e-3)


@jax.jit
def joules_of(world, policy, episode):
    """What each UE spends in each step of the first held-out episode."""
    key = episode_keys(POLICY_STREAM, 1)[0]
    return play(world, policy, episode, key, lambda step: step.outcome.charge.taken.joules)


def test_nobody_with_a_task_costs_nothing_and_changes_nothing() -> None:
    scenario = world_with(EVERYTHING)
    world = build_world(scenario)
    state = reset(jax.random.key(0), world)
    state, _ = step_wish(world, state, *alike(world, False, 0.5))
    quiet = state._replace(episode=state.episode._replace(active=jnp.zeros_like(state.episode.active)))
    for at_server in (True, False):
        after, outcome = step_wish(world, quiet, *alike(world, at_server, 0.25))
        assert outcome.reward == 0
        assert outcome.charge.delay_s == 0
        assert not outcome.switched.any()
        for mine, other in zip(after.carried, quiet.carried, strict=True):
            np.testing.assert_array_equal(mine, other)


# --- observations and environments -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("features", "more"),
    [
        ({"computation"}, 2),
        ({"energy"}, 0),
        ({"budget"}, 1),
        ({"computation", "energy"}, 3),
        ({"memory"}, 1),
        ({"privacy"}, 1),
        ({"activity"}, 1),
        (EVERYTHING, 7),
    ],
)
def test_each_feature_is_seen_where_it_is_on(features: set[str], more: int) -> None:
    for name, usual in (("paper", 4), ("families", 7)):
        world = build_world(world_with(features, name=name))
        assert len(features_of(world)) == usual + more
        seen = jax.eval_shape(lambda world: ue_features(world, observe(world, start(world))), world)
        assert seen.shape == (6, usual + more)


def start(world):
    return reset(jax.random.key(0), world)


@pytest.mark.slow
def test_features_by_hand() -> None:
    scenario = world_with(EVERYTHING, "fleet.ues=2", name="paper")
    world = build_world(scenario)
    state = reset(jax.random.key(0), world)
    tflops = jnp.array([0.3, 20.0])
    devices = Devices(
        tflops, tflops * jnp.array([2.0, 5.0]), jnp.array([3.4, 9.0]) * 8e9, jnp.array([True, False])
    )
    episode = state.episode._replace(
        devices=devices, active=state.episode.active.at[0].set(jnp.array([True, False])),
        data_bits=state.episode.data_bits.at[0].set(jnp.array([500 * 8e6, 300 * 8e6])),
    )  # fmt: skip
    carried = state.carried._replace(spent_j=jnp.array([500.0, 9000.0]))
    seen = ue_features(world, observe(world, state._replace(episode=episode, carried=carried)))
    budget, speed, seconds, joules, largest, may, active = np.asarray(seen)[:, 4:].T
    np.testing.assert_allclose(budget, [0.8, -1], rtol=1e-5)
    np.testing.assert_allclose(speed, [-1, 1], atol=1e-5)
    np.testing.assert_allclose(seconds, [1, -1], atol=1e-5)
    np.testing.assert_allclose(joules, [-1, 1], atol=1e-4)
    np.testing.assert_allclose(largest, [10 / 32 / 0.8, 25 / 32 / 0.8], rtol=1e-5)
    np.testing.assert_array_equal(may, [-1, 1])
    np.testing.assert_array_equal(active, [1, -1])
    np.testing.assert_array_equal(seen[1, 1:3], 0)


@pytest.mark.parametrize("name", [pytest.param("paper", marks=pytest.mark.slow), "families"])
def test_environments_run_with_everything_on(name: str) -> None:
    changes = [*plain.changes_for(EVERYTHING), "fleet.ues=4", "fleet.tasks=6"]
    changes += [OTHER, *plain.changes_for({"cache"})] if name == "families" else []
    env, both = OrchestrationEnv(name, changes), parallel_env(name, changes)
    many = OrchestrationVectorEnv(2, name, changes)
    seen, _ = env.reset(seed=3)
    agents, _ = both.reset(seed=3)
    batch, _ = many.reset(seed=3)
    scenario = load_scenario(name, changes)
    count = len(features_of(build_world(scenario)))
    assert seen.shape == (4 * count + 1,)
    env.action_space.seed(1)
    for number in range(6):
        assert env.observation_space.contains(seen)
        assert both.observation_space("emulator").contains(agents["emulator"])
        np.testing.assert_array_equal(batch[0], seen)
        action = env.action_space.sample()
        seen, reward, ended, _, info = env.step(action)
        agents, rewards, *_, infos = both.step({"case": action["at_server"], "emulator": action["retention"]})
        actions = {part: np.stack([value, value]) for part, value in action.items()}
        batch, batch_rewards, _, _, batch_info = many.step(actions)
        assert rewards["case"] == reward == batch_rewards[0]
        assert data_equivalence(infos["case"], info)
        told = batch_info["final_info"] if number == 5 else batch_info
        np.testing.assert_array_equal(told["energy_j"][0], info["energy_j"])
        batch = np.stack(batch_info["final_obs"]) if number == 5 else batch
        assert info["active"].dtype == bool
        idle = ~info["active"]
        for field in ("delay_s", "perplexity", "energy_j", "training_s", "at_server", "retention"):
            assert not info[field][idle].any()
        assert (info["retention"] > 0)[~idle & ~info["at_server"]].all()
        assert not info["retention"][info["at_server"]].any()
    assert ended


@pytest.mark.slow
def test_private_data_stay_and_what_does_not_fit_is_not_held() -> None:
    env = OrchestrationEnv(world_with({"memory", "privacy"}, "fleet.ues=5", name="paper"))
    _, _ = env.reset(seed=0)
    everyone = {"at_server": np.ones(5, np.int8), "retention": np.full(5, 0.8, np.float32)}
    _, _, _, _, first = env.step(everyone)
    assert first["at_server"].sum() == 3
    assert (first["switched"] == ~first["at_server"]).all()
    everyone["at_server"][:] = 0
    retentions = env.step(everyone)[-1]["retention"]
    assert (retentions * 10.8 <= 9.0 * (1 + 1e-6)).all()
    assert len(set(retentions.tolist())) > 1


@pytest.mark.slow
def test_every_policy_keeps_to_what_is_possible() -> None:
    scenario = world_with(EVERYTHING, "privacy.share=1.0")
    drawn = held_out_episodes(scenario, 2)
    for policy in (AllServer(), Random(), Fixed(jnp.float32(0.8))):
        assert (evaluate_policy(scenario, policy, drawn).server_share == 0).all()
    for one, other in itertools.pairwise((AllServer(), Fixed(jnp.float32(0.8125)))):
        left, right = (evaluate_policy(scenario, policy, drawn).episode_return for policy in (one, other))
        np.testing.assert_allclose(left, right, rtol=2e-6)
