"""Flat actions mean what they say, one at a time or many at once."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from emutune.errors import UsageError
from emutune.world.environments import BoxAction, OrchestrationEnv, OrchestrationVectorEnv, VectorBoxAction

SMALL = ("fleet.ues=3", "fleet.tasks=4")


@pytest.fixture
def env():
    return BoxAction(OrchestrationEnv(overrides=SMALL))


def test_signs_choose_the_server_and_the_rest_the_retention(env):
    action = env.action(np.array([-1, 0, 1e-6, -1, 0, 1], np.float32))
    np.testing.assert_array_equal(action["at_server"], [0, 0, 1])
    np.testing.assert_allclose(action["retention"], [0.2, 0.5, 0.8], atol=1e-6)


def test_every_flat_action_is_an_action(env):
    env.action_space.seed(0)
    corners = [np.full(6, value, np.float32) for value in (-1, 1, -3, 3)]
    for flat in [*corners, *(env.action_space.sample() for _ in range(50))]:
        assert env.action(flat) in env.env.action_space


def test_its_space_is_symmetric_and_normalised(env):
    assert env.action_space == gymnasium.spaces.Box(-1.0, 1.0, (6,), np.float32)


# The gain is unbounded by nature; being a wrapper is what this environment is for.
@pytest.mark.filterwarnings("ignore:.*A Box observation space (min|max)imum value is -?infinity")
@pytest.mark.filterwarnings("ignore:.*is different from the unwrapped version")
def test_it_passes_gymnasiums_checker():
    check_env(BoxAction(gymnasium.make("emutune/Orchestration-v0", overrides=SMALL)))


def test_the_vector_twin_does_the_same(env):
    vector = VectorBoxAction(OrchestrationVectorEnv(2, overrides=SMALL))
    vector.reset(seed=[5, 6])
    flat = vector.action_space.sample()
    assert flat.shape == (2, 6)
    assert vector.single_action_space == env.action_space
    _, rewards, _, _, infos = vector.step(flat)
    for index, seed in enumerate((5, 6)):
        env.reset(seed=seed)
        _, reward, _, _, info = env.step(flat[index])
        assert rewards[index] == pytest.approx(reward, rel=1e-6)
        np.testing.assert_array_equal(infos["retention"][index], info["retention"])


@pytest.mark.parametrize("flat", [np.zeros(5), np.array([np.nan, 0, 0, 0, 0, 0])])
def test_wrong_flat_actions_are_refused(env, flat):
    env.reset()
    with pytest.raises(UsageError, match=r"^action: "):
        env.step(flat)
