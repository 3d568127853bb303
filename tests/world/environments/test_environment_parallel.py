"""The PettingZoo environment: two agents, one world."""

from __future__ import annotations

import numpy as np
import pytest
from pettingzoo.test import parallel_api_test, parallel_seed_test

from emutune.errors import UsageError
from emutune.world.environments import OrchestrationEnv, parallel_env

SMALL = ("fleet.ues=3", "fleet.tasks=4")


@pytest.fixture
def env():
    return parallel_env(overrides=SMALL)


def sample(env):
    return {agent: env.action_space(agent).sample() for agent in env.agents}


def test_it_passes_pettingzoos_interface_test():
    parallel_api_test(parallel_env(), num_cycles=120)


def test_it_passes_pettingzoos_seed_test():
    parallel_seed_test(parallel_env, num_cycles=60)


def test_it_is_the_single_environment_seen_by_two(env):
    single = OrchestrationEnv(overrides=SMALL)
    expected, _ = single.reset(seed=9)
    observations, _ = env.reset(seed=9)
    for _ in range(4):
        emulator = np.concatenate([expected[3:6], expected[9:12], expected[12:]])
        np.testing.assert_array_equal(observations["case"], expected)
        np.testing.assert_array_equal(observations["emulator"], emulator)
        np.testing.assert_array_equal(env.state(), expected)
        actions = sample(env)
        observations, rewards, ended, cut, infos = env.step(actions)
        expected, reward, terminated, truncated, info = single.step(
            {"at_server": actions["case"], "retention": actions["emulator"]}
        )
        assert rewards == {"case": reward, "emulator": reward}
        assert ended == {"case": terminated, "emulator": terminated}
        assert cut == {"case": truncated, "emulator": truncated}
        np.testing.assert_equal(infos, {"case": info, "emulator": info})
    assert env.agents == []
    np.testing.assert_array_equal(env.state(), expected)


def test_its_spaces_hold_what_it_returns(env):
    observations, infos = env.reset(seed=0)
    assert infos == {"case": {}, "emulator": {}}
    assert {agent: env.observation_space(agent).shape for agent in env.agents} == {
        "case": (13,),
        "emulator": (7,),
    }
    for _ in range(4):
        assert env.state() in env.state_space
        assert all(observations[agent] in env.observation_space(agent) for agent in env.agents)
        observations, *_ = env.step(sample(env))


def test_it_is_named_as_pettingzoo_names_environments(env):
    assert str(env) == env.metadata["name"] == "orchestration_v0"
    assert env.possible_agents == ["case", "emulator"]


def test_seeds_and_render_modes_are_those_of_the_single_environment(env):
    expected, _ = env.reset(seed=9)
    observations, _ = env.reset(seed=np.int64(9))
    np.testing.assert_array_equal(observations["case"], expected["case"])
    assert observations["case"].dtype == observations["emulator"].dtype == np.float32
    assert parallel_env(overrides=SMALL, render_mode=None).render_mode is None
    with pytest.raises(UsageError, match=r"^render_mode: "):
        parallel_env(overrides=SMALL, render_mode="human")


def test_wrong_calls_are_refused_by_name(env):
    with pytest.raises(UsageError, match=r"^state: .*reset"):
        env.state()
    with pytest.raises(UsageError, match="reset"):
        env.step({})
    env.reset(seed=0)
    actions = sample(env)
    with pytest.raises(UsageError, match="case and emulator"):
        env.step({"case": actions["case"]})
    with pytest.raises(UsageError, match="NaN"):
        env.step({**actions, "emulator": np.full(3, np.nan, np.float32)})
    for _ in range(4):
        env.step(actions)
    with pytest.raises(UsageError, match="reset"):
        env.step(actions)
