"""Flat actions for learners that take no dictionaries."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict
from gymnasium.utils import RecordConstructorArgs
from gymnasium.vector import VectorActionWrapper, VectorEnv
from gymnasium.vector.utils import batch_space
from jaxtyping import Float

from emutune.world.environments.spaces import read_flat_action


class BoxAction(gymnasium.ActionWrapper[Any, np.ndarray, dict[str, np.ndarray]], RecordConstructorArgs):
    """Flat actions of 2N numbers in [-1, 1] for an ``OrchestrationEnv``; see ``from_box``."""

    def __init__(self, env: gymnasium.Env[Any, dict[str, np.ndarray]]) -> None:
        RecordConstructorArgs.__init__(self)
        super().__init__(env)
        self._retention = _retention_space(env.action_space)
        self._shape = (2 * self._retention.shape[0],)
        self.action_space = Box(-1.0, 1.0, self._shape, np.float32)

    def action(self, action: Any) -> dict[str, np.ndarray]:
        """The action that a flat one stands for.

        Raises:
            UsageError: the flat action has another shape or holds NaN.
        """
        return from_box(read_flat_action(action, self._shape), self._retention)


class VectorBoxAction(VectorActionWrapper):
    """Flat actions of 2N numbers in [-1, 1] for each fleet of an ``OrchestrationVectorEnv``."""

    def __init__(self, env: VectorEnv[Any, dict[str, np.ndarray], np.ndarray]) -> None:
        super().__init__(env)
        self._retention = _retention_space(env.single_action_space)
        self._shape = (env.num_envs, 2 * self._retention.shape[0])
        self.single_action_space = Box(-1.0, 1.0, self._shape[1:], np.float32)
        self.action_space = batch_space(self.single_action_space, env.num_envs)

    def actions(self, actions: Any) -> dict[str, np.ndarray]:
        """The actions that flat ones stand for.

        Raises:
            UsageError: the flat actions have another shape or hold NaN.
        """
        return from_box(read_flat_action(actions, self._shape), self._retention)


def from_box(flat: Float[np.ndarray, "*batch parts"], retention: Box) -> dict[str, np.ndarray]:
    """The action that 2N numbers in [-1, 1] stand for.

    A positive one of the first N sends a UE's task to the server. The last N map linearly from -1 and 1
    to the lowest and highest retention; numbers outside are clipped.
    """
    at_server, share = np.split(flat, 2, axis=-1)
    wanted = retention.low + (retention.high - retention.low) * (share + 1) / 2
    return {
        "at_server": (at_server > 0).astype(np.int8),
        "retention": np.clip(wanted, retention.low, retention.high),
    }


def _retention_space(action_space: gymnasium.Space[Any]) -> Box:
    assert isinstance(action_space, Dict)
    retention = action_space["retention"]
    assert isinstance(retention, Box)
    return retention
