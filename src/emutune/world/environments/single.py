"""One controller that decides for the whole fleet: a Gymnasium environment."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from jaxtyping import Float, Shaped

from emutune.errors import UsageError
from emutune.scenario import Scenario
from emutune.world.dynamics import State
from emutune.world.environments.simulation import (
    advance,
    begin,
    check_render_mode,
    draw_seed,
    fetch,
    plain_seed,
    read_scenario,
)
from emutune.world.environments.spaces import action_space, observation_space, read_action
from emutune.world.parameters import World, build_world


class OrchestrationEnv(gymnasium.Env[Float[np.ndarray, "features"], dict[str, Any]]):
    """Orchestration of N UEs over the T tasks of an episode.

    The observation holds the features of s1 (sec. IV-A), 4N numbers of about -1 to 1: all gains, all
    complexities, all data sizes, all cached retentions. Where the world has families, computation, energy,
    memory, privacy or idle UEs, N more follow for each of their features, in the order of
    ``emutune.world.ue_features``. The progress through the episode follows as the last.
    After the last task the features of complexity and data are still that task's.

    The action holds ``at_server`` (N bits) and ``retention`` (N shares of layers). The nearest whole
    number of layers within the scenario's bounds is used (D9). What is impossible is brought to what is
    possible: data that may not leave are trained on where they are, a level that does not fit becomes
    the largest that does, and where none fits the server trains (D15).

    An episode ends with the T-th task. T belongs to the world, so the episode terminates and is never
    truncated.

    ``info`` describes the step that was taken, with one entry per UE: ``gain``, ``complexity``,
    ``data_mb``, ``transmit_power_w``, ``at_server``, ``retention`` (the level used on the UE; 0 at the server
    and without a task), ``cached_retention`` (before the step; 0: none), ``switched``, ``delay_s`` and
    ``perplexity``; where the world has them, ``family``, ``training_s`` (part of the delay), ``energy_j`` and
    ``active`` (has a task; without one there is neither delay nor perplexity); for the fleet, ``step_delay_s``
    and ``reward``. It is empty after a reset, since nothing has happened yet.

    JAX starts with the first ``reset``, so environments may be made before processes are forked.

    Args:
        scenario: a scenario, the name of a shipped one, or the path of a TOML file.
        overrides: assignments such as ``"fleet.ues=9"``.
        render_mode: none but None; there is nothing to look at.

    Raises:
        ScenarioError: the scenario cannot be read, or a value is invalid.
        UsageError: there is no such render mode.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 - declared so by gymnasium.Env
    action_space: gymnasium.spaces.Dict
    observation_space: gymnasium.spaces.Box

    def __init__(
        self,
        scenario: Scenario | str | Path = "paper",
        overrides: Iterable[str] = (),
        render_mode: str | None = None,
    ) -> None:
        check_render_mode(render_mode)
        self.scenario = read_scenario(scenario, overrides)
        self.action_space = action_space(self.scenario)
        self.observation_space = observation_space(self.scenario)
        self._state: State | None = None

    @cached_property
    def _world(self) -> World:
        # Not with the environment: Gymnasium makes one to look at before it forks a process for each, and JAX
        # must not be in use by then.
        return build_world(self.scenario)

    def reset(
        self, *, seed: int | np.integer | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Float[np.ndarray, "features"], dict[str, Any]]:
        """Start an episode: one that ``seed`` determines, or the next of the stream; no options exist.

        Raises:
            UsageError: JAX cannot compute in this process, since it was forked from one that used it.
        """
        super().reset(seed=plain_seed(seed))
        self._state, observation = begin(draw_seed(self.np_random), self._world)
        return np.array(observation), {}

    def step(
        self, action: Mapping[str, Any]
    ) -> tuple[Float[np.ndarray, "features"], float, bool, bool, dict[str, Any]]:
        """Serve the current task of every UE.

        Raises:
            UsageError: no episode is under way, the action has another shape or holds NaN, or JAX cannot
                compute in this process.
        """
        if self._state is None:
            raise UsageError("step: no episode is under way; call reset() first")
        at_server, retention = read_action(action, (self.scenario.fleet.ues,))
        progress, report = advance(self._world, self._state, at_server, retention)
        observation, terminated, values = fetch(report)
        self._state = None if terminated else self._state._replace(**progress._asdict())
        info = _plain(values)
        return observation, info["reward"], bool(terminated), False, info


def _plain(values: Mapping[str, Shaped[np.ndarray, "..."]]) -> dict[str, Any]:
    return {name: value if value.ndim else value.item() for name, value in values.items()}
