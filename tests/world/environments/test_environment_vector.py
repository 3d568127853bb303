"""The vector environment is the single one, many times over."""

from __future__ import annotations

import itertools

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import data_equivalence
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import TimeLimit
from gymnasium.wrappers import vector as wrappers

from emutune.errors import UsageError
from emutune.world.environments import OrchestrationEnv, OrchestrationVectorEnv, VectorBoxAction

ID = "emutune/Orchestration-v0"
SMALL = ("fleet.ues=3", "fleet.tasks=4")
ENVS = 5
SEEDS = [40, 3, 3, 2**40, 0]


@pytest.fixture
def vector():
    return OrchestrationVectorEnv(ENVS, overrides=SMALL)


def reference(mode, limit=None):
    """Single environments, one after the other, with Gymnasium's own reset."""

    def make():
        env = OrchestrationEnv(overrides=SMALL)
        return env if limit is None else TimeLimit(env, limit)

    return SyncVectorEnv([make] * ENVS, autoreset_mode=mode)


def assert_same_step(step, expected):
    np.testing.assert_array_equal(step[0], expected[0])
    assert data_equivalence(step, expected)


@pytest.mark.parametrize("mode", AutoresetMode)
@pytest.mark.parametrize(("limit", "seed"), [(None, SEEDS), (3, 17)])
def test_it_equals_single_environments_step_by_step(mode, limit, seed):
    vector = OrchestrationVectorEnv(ENVS, overrides=SMALL, autoreset_mode=mode, max_episode_steps=limit)
    expected = reference(mode, limit)
    assert vector.metadata == expected.metadata
    assert_same_step(vector.reset(seed=seed), expected.reset(seed=seed))
    vector.action_space.seed(1)
    ended, seen = np.zeros(ENVS, bool), []
    for index in range(12):
        # Resetting some alone takes the episodes out of step with each other.
        mask = ended if mode is AutoresetMode.DISABLED and ended.any() else None
        mask = np.array([True, False, False, True, False]) if index in (2, 6) else mask
        if mask is not None:
            seeds = [index, None, 5, 6, 7] if index == 2 else None
            assert_same_step(
                vector.reset(seed=seeds, options={"reset_mask": mask}),
                expected.reset(seed=seeds, options={"reset_mask": mask}),
            )
            ended = ended & ~mask
            if mode is AutoresetMode.DISABLED and ended.any():
                continue
        actions = vector.action_space.sample()
        step = vector.step(actions)
        assert_same_step(step, expected.step(actions))
        ended = step[2] | step[3]
        seen.append((step[2].any(), step[3].any(), ended.any() and not ended.all()))
    assert [any(column) for column in zip(*seen, strict=True)] == [limit is None, limit is not None, True]
    assert_same_step(vector.reset(), expected.reset())
    assert vector.np_random_seed == expected.np_random_seed


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
        ID,
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
    recorded = wrappers.RecordEpisodeStatistics(vector)
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


@pytest.mark.parametrize("seed", [np.int64(40), np.uint8(40)])
def test_numpy_integers_are_seeds(vector, seed):
    expected, _ = vector.reset(seed=40)
    np.testing.assert_array_equal(vector.reset(seed=seed)[0], expected)
    np.testing.assert_array_equal(vector.reset(seed=np.arange(40, 40 + ENVS))[0], expected)
    assert vector.np_random_seed == (40, 41, 42, 43, 44)
    assert all(type(each) is int for each in vector.np_random_seed)


@pytest.mark.parametrize("steps", [4, -1, 9])
def test_a_limit_beyond_the_last_task_truncates_nothing_before_it(steps):
    vector = gymnasium.make_vec(ID, num_envs=2, overrides=SMALL, max_episode_steps=steps, render_mode=None)
    vector.reset(seed=0)
    ends = [vector.step(vector.action_space.sample())[2:4] for _ in range(4)]
    assert [end.all() for end, _ in ends] == [False, False, False, True]
    assert [cut.all() for _, cut in ends] == [False, False, False, steps == 4]


OF_GYMNASIUM = {
    "RecordEpisodeStatistics": {},
    "NormalizeReward": {},
    "ClipAction": {},
    "ClipReward": {"max_reward": 1.0},
    "DictInfoToList": {},
    "RescaleAction": {"min_action": np.float32(-2.0), "max_action": np.float32(2.0)},
    "FlattenObservation": {},
    "DtypeObservation": {"dtype": np.float64},
}


# Gymnasium's NormalizeObservation knows one mode alone.
@pytest.mark.parametrize(
    ("name", "mode"),
    [("NormalizeObservation", "NextStep"), *itertools.product(OF_GYMNASIUM, ["NextStep", "Disabled"])],
)
def test_gymnasiums_wrappers_take_it(name, mode):
    made = gymnasium.make_vec(ID, num_envs=3, overrides=SMALL, autoreset_mode=mode)
    assert made.metadata["autoreset_mode"] is AutoresetMode(mode)
    wrapped = getattr(wrappers, name)(VectorBoxAction(made), **OF_GYMNASIUM.get(name, {}))
    observations, _ = wrapped.reset(seed=0)
    assert observations.shape == (3, 13)
    progress = []
    for _ in range(4):
        observations, _, ended, *_ = wrapped.step(wrapped.action_space.sample())
        progress.append(ended.tolist())
    assert progress == [[False] * 3] * 3 + [[True] * 3]
    if mode == "Disabled":
        observations, _ = wrapped.reset(options={"reset_mask": ended})
    else:
        observations, rewards, ended, *_ = wrapped.step(wrapped.action_space.sample())
        assert not ended.any()
        np.testing.assert_array_equal(rewards, 0)
    assert np.isfinite(observations).all()


def test_wrong_calls_are_refused_by_name(vector):
    actions = vector.action_space.sample()
    with pytest.raises(UsageError, match="reset"):
        vector.step(actions)
    with pytest.raises(UsageError, match=r"^seed: 2 seeds for 5"):
        vector.reset(seed=[1, 2])
    some = np.array([True, False, False, False, False])
    with pytest.raises(UsageError, match=r"reset_mask: no episode is under way"):
        vector.reset(options={"reset_mask": some})
    vector.reset()
    for mask in (some.tolist(), some[:4], some.astype(int)):
        with pytest.raises(UsageError, match=r"reset_mask: must be a NumPy array of 5 bools"):
            vector.reset(options={"reset_mask": mask})
    with pytest.raises(UsageError, match=r"reset_mask: names no sub-environment"):
        vector.reset(options={"reset_mask": np.zeros(ENVS, bool)})
    with pytest.raises(UsageError, match=r"action\.retention: holds NaN"):
        vector.step({**actions, "retention": np.full((ENVS, 3), np.nan, np.float32)})
    with pytest.raises(UsageError, match=r"action\.at_server: .*\(5, 3\)"):
        vector.step({**actions, "at_server": np.zeros(3)})


def test_wrong_arguments_are_refused_by_name():
    for arguments in ({"num_envs": 0}, {"max_episode_steps": 0}, {"render_mode": "human"}):
        with pytest.raises(UsageError, match=f"^{next(iter(arguments))}: "):
            OrchestrationVectorEnv(**arguments)
    with pytest.raises(UsageError, match=r"no mode 'never'; choose from NextStep, SameStep, Disabled"):
        OrchestrationVectorEnv(autoreset_mode="never")


def test_an_ended_episode_goes_on_only_after_its_reset():
    vector = OrchestrationVectorEnv(2, overrides=SMALL, autoreset_mode="Disabled")
    vector.reset(seed=0)
    for _ in range(4):
        vector.step(vector.action_space.sample())
    with pytest.raises(UsageError, match=r"step: the episodes of sub-environments \[0, 1\] have ended"):
        vector.step(vector.action_space.sample())
    vector.reset(options={"reset_mask": np.array([True, False])})
    with pytest.raises(UsageError, match=r"sub-environments \[1\] have ended"):
        vector.step(vector.action_space.sample())
