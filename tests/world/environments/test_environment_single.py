"""The Gymnasium environment: its interface, its seeding, and that ``info`` explains every reward."""

from __future__ import annotations

import math
import subprocess
import sys

import gymnasium
import jax
import numpy as np
import pytest
import scipy.stats
from gymnasium.utils.env_checker import check_env, data_equivalence

from emutune.errors import ScenarioError, UsageError
from emutune.scenario import Scenario, dump_scenario, parse_scenario
from emutune.world.environments import OrchestrationEnv
from emutune.world.environments.spaces import read_action

ID = "emutune/Orchestration-v0"
SMALL = ("fleet.ues=3", "fleet.tasks=4")
PER_UE = {
    "gain": np.float32,
    "complexity": np.float32,
    "data_mb": np.float32,
    "transmit_power_w": np.float32,
    "at_server": np.bool_,
    "retention": np.float32,
    "cached_retention": np.float32,
    "switched": np.bool_,
    "delay_s": np.float32,
    "perplexity": np.float32,
}


def act(at_server=(0, 0, 0), retention=(0.5, 0.5, 0.5)):
    return {"at_server": np.array(at_server, np.int8), "retention": np.array(retention, np.float32)}


def play(env, seed=None):
    """One episode of random actions: the reset, then all steps."""
    env.action_space.seed(7)
    steps = [env.reset(seed=seed)]
    while len(steps) == 1 or not steps[-1][2]:
        steps.append(env.step(env.action_space.sample()))
    return steps


def recompute(scenario: Scenario, info):
    """Switches, delays, perplexities and reward of a step, from its info alone (Eq. 1 to 9, 12)."""
    radio, quality, weights = scenario.radio, scenario.quality, scenario.reward
    noise = 10 ** ((radio.noise_dbm_per_hz - 30) / 10)
    server = info["at_server"]
    switched = ~server & (info["retention"] != info["cached_retention"])
    delay, perplexity = np.zeros(len(server)), np.zeros(len(server))
    for ue in range(len(server)):
        if server[ue]:
            share, bits = radio.uplink_bandwidth_hz / server.sum(), 8e6 * info["data_mb"][ue]
            power = info["transmit_power_w"][ue]
        elif switched[ue]:
            share = radio.downlink_bandwidth_hz / switched.sum()
            power, bits = radio.downlink_power_w / switched.sum(), 8e9 * scenario.model.size_gb
            bits *= info["retention"][ue]
        else:
            share, power, bits = 1.0, 1.0, 0.0
        delay[ue] = bits / (share * math.log2(1 + power * info["gain"][ue] / (noise * share)))
        retention = 1.0 if server[ue] else float(info["retention"][ue])
        iota = quality.complexity_weight
        perplexity[ue] = quality.curve(retention) * (info["complexity"][ue] + iota) / iota
    reward = weights.perplexity_weight * perplexity.mean() + weights.delay_weight_per_min * delay.max() / 60
    return switched, delay, perplexity, reward


@pytest.fixture
def env():
    return OrchestrationEnv(overrides=SMALL)


# The gain is unbounded by nature, and retentions are shares of layers: both advices do not apply.
@pytest.mark.filterwarnings("ignore:.*A Box observation space (min|max)imum value is -?infinity")
@pytest.mark.filterwarnings("ignore:.*For Box action spaces, we recommend")
def test_it_passes_gymnasiums_checker():
    check_env(gymnasium.make(ID, overrides=SMALL).unwrapped)


def test_importing_emutune_registers_without_jax_and_making_starts_none():
    program = (
        "import sys, emutune\n"
        "assert 'jax' not in sys.modules\n"
        "import gymnasium\n"
        f"env = gymnasium.make('{ID}', overrides=('fleet.ues=2',))\n"
        f"gymnasium.make_vec('{ID}', num_envs=2, scenario='city')\n"
        # Processes may still be forked.
        "from jax._src.xla_bridge import backends_are_initialized\n"
        "assert not backends_are_initialized()\n"
        "assert env.reset(seed=0)[0].shape == (9,)\n"
        "assert backends_are_initialized()\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_an_episode_terminates_after_its_last_task():
    steps = play(gymnasium.make(ID))[1:]
    assert len(steps) == 50
    assert [step[2] for step in steps] == [False] * 49 + [True]
    assert not any(step[3] for step in steps)


def test_every_observation_is_in_its_space():
    env = OrchestrationEnv()
    for step in play(env, seed=1):
        assert step[0] in env.observation_space


def test_narrow_ranges_stay_in_the_observation_space():
    ranges = ("tasks.complexity={min=1.056021,max=1.0560232}", "tasks.data_mb={min=333.0,max=333.0}")
    env = OrchestrationEnv(overrides=(*SMALL, *ranges))
    for seed in range(20):
        for step in play(env, seed):
            assert step[0] in env.observation_space


def test_the_observation_lists_feature_after_feature(env, paper):
    before, _ = env.reset(seed=5)
    after, _, _, _, info = env.step(act(at_server=(0, 1, 0), retention=(0.5, 0.5, 0.25)))
    complexity = (info["complexity"] - 5.5) / 4.5
    data = (info["data_mb"] - 400) / 100
    deep, high = (scipy.stats.gamma.ppf(scipy.stats.norm.cdf(z), 100, scale=0.01) for z in (-3, 3))
    weakest, strongest = math.log(500.0**-2 * deep), math.log(50.0**-2 * high)
    gain = 2 * (np.log(info["gain"]) - weakest) / (strongest - weakest) - 1
    np.testing.assert_allclose(before[3:6], complexity, atol=1e-5)
    np.testing.assert_allclose(before[6:9], data, atol=1e-5)
    np.testing.assert_array_equal(before[9:12], 0)
    np.testing.assert_allclose(after[0:3], gain, atol=1e-5)
    np.testing.assert_allclose(after[9:12], [0.5 / 0.8, 0, 0.25 / 0.8], atol=1e-6)
    np.testing.assert_allclose([before[12], after[12]], [-1, -0.5], atol=1e-6)


def test_info_has_exactly_the_documented_entries(env):
    assert env.reset(seed=0)[1] == {}
    *_, info = env.step(act())
    assert set(info) == {*PER_UE, "step_delay_s", "reward"}
    for name, dtype in PER_UE.items():
        assert info[name].shape == (3,)
        assert info[name].dtype == dtype
        assert info[name].flags.writeable
    assert type(info["step_delay_s"]) is float
    assert type(info["reward"]) is float


def test_the_reward_follows_from_info(paper):
    for step in play(OrchestrationEnv(paper), seed=2)[1:]:
        info = step[4]
        switched, delay, perplexity, reward = recompute(paper, info)
        np.testing.assert_array_equal(info["switched"], switched)
        np.testing.assert_allclose(info["delay_s"], delay, rtol=1e-5)
        np.testing.assert_allclose(info["perplexity"], perplexity, rtol=1e-5)
        assert info["step_delay_s"] == pytest.approx(delay.max(), rel=1e-5)
        assert step[1] == info["reward"] == pytest.approx(reward, rel=1e-5)


def test_the_cache_is_reported_as_it_was_before_the_step(env):
    env.reset(seed=0)
    first = env.step(act(at_server=(1, 0, 0), retention=(0.5, 0.5, 0.25)))[4]
    second = env.step(act())[4]
    np.testing.assert_array_equal(first["retention"], [0, 0.5, 0.25])
    np.testing.assert_array_equal(first["cached_retention"], [0, 0, 0])
    np.testing.assert_array_equal(second["cached_retention"], [0, 0.5, 0.25])
    np.testing.assert_array_equal(second["switched"], [True, False, True])


def test_a_seed_fixes_the_episode_and_those_after_it(env):
    other = OrchestrationEnv(overrides=SMALL)
    for seed in (11, None, None, 12, None):
        assert data_equivalence(play(env, seed), play(other, seed), exact=True)


def test_seeds_and_episodes_differ(env):
    starts = [env.reset(seed=seed)[0] for seed in (0, None, None, 1)]
    assert len({start.tobytes() for start in starts}) == 4


def test_without_a_seed_two_environments_differ(env):
    assert not np.array_equal(env.reset()[0], OrchestrationEnv(overrides=SMALL).reset()[0])


@pytest.mark.parametrize("seed", [np.int64(11), np.int32(11), np.uint8(11)])
def test_numpy_integers_are_seeds(env, seed):
    expected, _ = env.reset(seed=11)
    observation, _ = env.reset(seed=seed)
    np.testing.assert_array_equal(observation, expected)
    assert env.np_random_seed == 11


# City has all that is drawn, UEs that move included.
@pytest.mark.parametrize("scenario", ["paper", "city"])
def test_an_episode_is_the_same_where_64_bits_are_the_default(scenario):
    env = OrchestrationEnv(scenario, ("fleet.tasks=3",))
    expected = play(env, seed=4)
    with jax.enable_x64(True):
        steps = play(OrchestrationEnv(scenario, ("fleet.tasks=3",)), seed=4)
    assert data_equivalence(steps, expected, exact=True)
    assert {step[0].dtype for step in steps} == {np.dtype(np.float32)}


def test_nothing_is_drawn():
    assert gymnasium.make(ID, overrides=SMALL, render_mode=None).render_mode is None
    with pytest.raises(UsageError, match=r"^render_mode: nothing is drawn, got 'rgb_array'"):
        OrchestrationEnv(overrides=SMALL, render_mode="rgb_array")


def test_max_episode_steps_truncates():
    env = gymnasium.make(ID, overrides=SMALL, max_episode_steps=2)
    env.reset(seed=0)
    assert [env.step(env.action_space.sample())[2:4] for _ in range(2)] == [(False, False), (False, True)]


def test_a_scenario_a_name_and_a_path_make_the_same_world(paper, tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(dump_scenario(paper))
    starts = [OrchestrationEnv(source).reset(seed=4)[0] for source in (paper, "paper", path, str(path))]
    assert all(np.array_equal(start, starts[0]) for start in starts)


def test_overrides_apply_to_a_scenario_object(paper):
    changed = parse_scenario(dump_scenario(paper), overrides=SMALL)
    assert OrchestrationEnv(paper, SMALL).scenario == changed


def test_a_wrong_override_names_the_field():
    with pytest.raises(ScenarioError, match=r"fleet\.ues"):
        gymnasium.make(ID, overrides=("fleet.ues=0",))


@pytest.mark.parametrize("wanted", [5.0, np.inf])
def test_a_retention_outside_the_box_is_clipped(env, wanted):
    env.reset(seed=0)
    info = env.step(act(retention=(wanted, -wanted, 0.0)))[4]
    np.testing.assert_array_equal(info["retention"] * 32, [25, 7, 7])


@pytest.mark.parametrize(
    ("action", "field"),
    [
        (act(at_server=(0, 0)), "action.at_server"),
        (act(retention=(0.5, 0.5, 0.5, 0.5)), "action.retention"),
        (act(retention=(0.5, np.nan, 0.5)), "action.retention"),
        (act(at_server=(0, 2, 0)), "action.at_server"),
        ({"at_server": np.array(["a", "b", "c"]), "retention": np.zeros(3)}, "action.at_server"),
        ({"at_server": np.zeros(3)}, "action"),
        (np.zeros(6), "action"),
    ],
)
def test_a_wrong_action_is_refused_by_name(action, field):
    with pytest.raises(UsageError, match=f"^{field}:"):
        read_action(action, (3,))


def test_a_refused_action_changes_nothing(env):
    env.reset(seed=3)
    with pytest.raises(UsageError, match=r"action\.retention"):
        env.step(act(retention=(np.nan, 0.5, 0.5)))
    other = OrchestrationEnv(overrides=SMALL)
    other.reset(seed=3)
    assert data_equivalence(env.step(act()), other.step(act()), exact=True)


def test_steps_before_a_reset_and_after_the_end_are_refused(env):
    with pytest.raises(UsageError, match="reset"):
        env.step(act())
    play(env)
    with pytest.raises(UsageError, match="reset"):
        env.step(act())
    env.reset()
    env.step(act())
