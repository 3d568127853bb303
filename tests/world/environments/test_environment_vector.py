"""The vector environment is the single one, many times over."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import data_equivalence
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers.vector import RecordEpisodeStatistics

from emutune.errors import UsageError
from emutune.world.environments import OrchestrationEnv, OrchestrationVectorEnv

SMALL = ("fleet.ues=3", "fleet.tasks=4")
ENVS = 5
SEEDS = [40, 3, 3, 2**40, 0]


@pytest.fixture
def vector():
    return OrchestrationVectorEnv(ENVS, overrides=SMALL)


@pytest.fixture
def reference():
    """Single environments, one after the other, with Gymnasium's own reset in the same step."""
    make = [lambda: OrchestrationEnv(overrides=SMALL)] * ENVS
    return SyncVectorEnv(make, autoreset_mode=AutoresetMode.SAME_STEP)


def assert_same_step(step, expected):
    np.testing.assert_array_equal(step[0], expected[0])
    assert data_equivalence(step, expected)


@pytest.mark.parametrize("seed", [SEEDS, 17])
def test_it_equals_single_environments_step_by_step(vector, reference, seed):
    assert_same_step(vector.reset(seed=seed), reference.reset(seed=seed))
    vector.action_space.seed(1)
    ends = []
    for _ in range(2 * 4 + 1):
        actions = vector.action_space.sample()
        step, expected = vector.step(actions), reference.step(actions)
        assert_same_step(step, expected)
        ends.append(step[2].tolist())
    assert ends == [[index % 4 == 3] * ENVS for index in range(2 * 4 + 1)]
    assert_same_step(vector.reset(), reference.reset())
    assert vector.np_random_seed == reference.np_random_seed


def test_the_last_step_of_an_episode_carries_final_entries_only(vector):
    vector.reset(seed=0)
    for _ in range(4):
        observations, *_, infos = vector.step(vector.action_space.sample())
    assert set(infos) == {"final_obs", "_final_obs", "final_info", "_final_info"}
    np.testing.assert_array_equal(observations[:, -1], -1)
    np.testing.assert_array_equal([last[-1] for last in infos["final_obs"]], 1)
    assert infos["final_info"]["delay_s"].shape == (ENVS, 3)
    assert infos["final_info"]["_delay_s"].all()


def test_returned_values_are_in_their_spaces_and_never_reused(vector):
    kept = [vector.reset(seed=0)]
    for _ in range(5):
        kept.append(vector.step(vector.action_space.sample()))
        assert kept[-1][0] in vector.observation_space
        assert not any(np.shares_memory(kept[-1][0], step[0]) for step in kept[:-1])
        assert kept[-1][0].flags.writeable
        assert kept[-1][1].dtype == np.float64


def test_make_vec_gives_it():
    vector = gymnasium.make_vec(
        "emutune/Orchestration-v0",
        num_envs=16,
        vectorization_mode="vector_entry_point",
        scenario="paper",
        overrides=("fleet.ues=2",),
    )
    assert isinstance(vector, OrchestrationVectorEnv)
    assert vector.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
    assert vector.reset(seed=0)[0].shape == (16, 9)
    assert vector.single_observation_space.shape == (9,)
    vector.close()


def test_gymnasiums_statistics_add_up(vector):
    recorded = RecordEpisodeStatistics(vector)
    recorded.reset(seed=0)
    returns = np.zeros(ENVS)
    for _ in range(4):
        _, rewards, _, _, infos = recorded.step(recorded.action_space.sample())
        returns += rewards
    np.testing.assert_allclose(infos["episode"]["r"], returns)
    np.testing.assert_array_equal(infos["episode"]["l"], 4)


def test_a_seed_of_none_goes_on_with_the_stream(vector):
    first, _ = vector.reset(seed=SEEDS)
    mixed, _ = vector.reset(seed=[None, 3, None, None, None])
    vector.reset(seed=SEEDS)
    second, _ = vector.reset()
    np.testing.assert_array_equal(mixed[1], first[1])
    np.testing.assert_array_equal(np.delete(mixed, 1, axis=0), np.delete(second, 1, axis=0))


def test_wrong_calls_are_refused_by_name(vector):
    actions = vector.action_space.sample()
    with pytest.raises(UsageError, match="reset"):
        vector.step(actions)
    with pytest.raises(UsageError, match=r"^seed: 2 seeds for 5"):
        vector.reset(seed=[1, 2])
    with pytest.raises(UsageError, match="reset_mask"):
        vector.reset(options={"reset_mask": np.ones(ENVS, bool)})
    vector.reset()
    with pytest.raises(UsageError, match=r"action\.retention: holds NaN"):
        vector.step({**actions, "retention": np.full((ENVS, 3), np.nan, np.float32)})
    with pytest.raises(UsageError, match=r"action\.at_server: .*\(5, 3\)"):
        vector.step({**actions, "at_server": np.zeros(3)})
    with pytest.raises(UsageError, match="num_envs"):
        OrchestrationVectorEnv(0)
