"""The two agents of the paper as a PettingZoo parallel environment."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from jaxtyping import Bool, Float
from pettingzoo import ParallelEnv

from emutune.errors import UsageError
from emutune.scenario import Scenario
from emutune.world.environments.single import OrchestrationEnv
from emutune.world.features import features_of
from emutune.world.parameters import world_outline

Observations = dict[str, Float[np.ndarray, "features"]]

_AGENTS = ("case", "emulator")
# What s2 leaves out of s1.
_UNSEEN = {"gain", "data"}


class OrchestrationParallelEnv(ParallelEnv[str, np.ndarray, np.ndarray]):  # type: ignore[misc]
    """The agents ``case`` (where to train, N bits) and ``emulator`` (N retentions) of one fleet.

    ``case`` sees s1 and the progress: the observation of ``OrchestrationEnv``, 4N + 1 numbers or more.
    ``emulator`` sees that without the features ``gain`` and ``data``, 2N + 1 numbers. In the
    paper its state s2 also holds the action of ``case`` in the same step (sec. IV-A). Agents of a
    parallel environment act at the same time, so that action does not exist yet and is left out.

    Both agents get the same reward and the same ``info``, that of ``OrchestrationEnv``.

    Args:
        scenario: a scenario, the name of a shipped one, or the path of a TOML file.
        overrides: assignments such as ``"fleet.ues=9"``.
        render_mode: none but None; there is nothing to look at.

    Raises:
        ScenarioError: the scenario cannot be read, or a value is invalid.
        UsageError: there is no such render mode.
    """

    metadata: dict[str, Any] = {"name": "orchestration_v0", "render_modes": []}  # noqa: RUF012 - as PettingZoo

    def __init__(
        self,
        scenario: Scenario | str | Path = "paper",
        overrides: Iterable[str] = (),
        render_mode: str | None = None,
    ) -> None:
        self._env = OrchestrationEnv(scenario, overrides, render_mode)
        self._emulator_sees = _emulator_sees(self._env.scenario)
        self._last_seen: Float[np.ndarray, "features"] | None = None
        self.possible_agents = list(_AGENTS)
        self.agents: list[str] = []
        self.render_mode = render_mode
        actions, state = self._env.action_space, self._env.observation_space
        self.state_space = state
        self.action_spaces: dict[str, gymnasium.Space[Any]] = {
            "case": actions["at_server"],
            "emulator": actions["retention"],
        }
        self.observation_spaces: dict[str, gymnasium.Space[Any]] = {
            "case": state,
            "emulator": gymnasium.spaces.Box(state.low[self._emulator_sees], state.high[self._emulator_sees]),
        }

    def action_space(self, agent: str) -> gymnasium.Space[Any]:
        """The action space of an agent, always the same object."""
        return self.action_spaces[agent]

    def observation_space(self, agent: str) -> gymnasium.Space[Any]:
        """The observation space of an agent, always the same object."""
        return self.observation_spaces[agent]

    def reset(
        self, seed: int | np.integer | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observations, dict[str, dict[str, Any]]]:
        """Start an episode: one that ``seed`` determines, or the next of the stream; no options exist."""
        seen, info = self._env.reset(seed=seed)
        self.agents = list(_AGENTS)
        return self._observations(seen), _infos(info)

    def step(
        self, actions: Mapping[str, Any]
    ) -> tuple[Observations, dict[str, float], dict[str, bool], dict[str, bool], dict[str, dict[str, Any]]]:
        """Let both agents act on the current task of every UE.

        Raises:
            UsageError: no episode is under way, an agent's action is missing, has another shape or
                holds NaN.
        """
        if set(actions) != set(_AGENTS) and self.agents:
            raise UsageError("actions: pass one for each of the agents case and emulator")
        action = {"at_server": actions.get("case"), "retention": actions.get("emulator")}
        seen, reward, terminated, truncated, info = self._env.step(action)
        self.agents = [] if terminated else self.agents
        return (
            self._observations(seen),
            dict.fromkeys(_AGENTS, reward),
            dict.fromkeys(_AGENTS, terminated),
            dict.fromkeys(_AGENTS, truncated),
            _infos(info),
        )

    def state(self) -> Float[np.ndarray, "features"]:
        """The latest s1 and progress, 4N + 1 numbers.

        Raises:
            UsageError: nothing was reset yet.
        """
        if self._last_seen is None:
            raise UsageError("state: no episode has begun; call reset() first")
        return self._last_seen.copy()

    def _observations(self, seen: Float[np.ndarray, "features"]) -> Observations:
        self._last_seen = seen
        return {"case": seen.copy(), "emulator": seen[self._emulator_sees]}


def parallel_env(
    scenario: Scenario | str | Path = "paper", overrides: Iterable[str] = (), render_mode: str | None = None
) -> OrchestrationParallelEnv:
    """The parallel environment of a scenario, under the name that PettingZoo's users look for."""
    return OrchestrationParallelEnv(scenario, overrides, render_mode)


def _emulator_sees(scenario: Scenario) -> Bool[np.ndarray, "features"]:
    """Which numbers of the observation the emulator agent sees; the progress is the last."""
    seen = [feature.name not in _UNSEEN for feature in features_of(world_outline(scenario))]
    return np.append(np.repeat(seen, scenario.fleet.ues), True)


def _infos(info: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {agent: dict(info) for agent in _AGENTS}
