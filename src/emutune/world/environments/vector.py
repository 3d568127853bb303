"""Many environments in one compiled step: a Gymnasium vector environment."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from jaxtyping import Bool, Float, Shaped

from emutune.errors import UsageError
from emutune.scenario import Scenario
from emutune.world.dynamics import State
from emutune.world.environments.simulation import (
    advance_many,
    begin_many,
    draw_seed,
    fetch,
    read_scenario,
)
from emutune.world.environments.spaces import action_space, observation_space, read_action
from emutune.world.parameters import build_world

Observations = Float[np.ndarray, "envs features"]


class OrchestrationVectorEnv(VectorEnv[Observations, dict[str, Any], np.ndarray]):
    """``num_envs`` independent fleets of one scenario; see ``OrchestrationEnv`` for what each one is.

    All episodes are T tasks long, so they end together. They are reset in the same step
    (``AutoresetMode.SAME_STEP``): the observation is then the first of the next episode, and the last of
    the ended one, with its info, is in ``final_obs`` and ``final_info``. No step is spent on resetting,
    and a learner that stops at ``terminated`` needs neither.

    Args:
        num_envs: how many sub-environments.
        scenario: a scenario, the name of a shipped one, or the path of a TOML file.
        overrides: assignments such as ``"fleet.ues=9"``.

    Raises:
        ScenarioError: the scenario cannot be read, or a value is invalid.
        UsageError: ``num_envs`` is below 1.
    """

    metadata: dict[str, Any] = {  # noqa: RUF012 - declared so by gymnasium.vector.VectorEnv
        "render_modes": [],
        "autoreset_mode": AutoresetMode.SAME_STEP,
    }

    def __init__(
        self, num_envs: int = 1, scenario: Scenario | str | Path = "paper", overrides: Iterable[str] = ()
    ) -> None:
        if num_envs < 1:
            raise UsageError(f"num_envs: must be at least 1, got {num_envs}")
        self.num_envs = num_envs
        self.scenario = read_scenario(scenario, overrides)
        self.single_action_space = action_space(self.scenario)
        self._world = build_world(self.scenario)
        self.single_observation_space = observation_space(self.scenario, self._world)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self._generators, self._seeds = _generators([None] * num_envs)
        self._state: State | None = None

    @property  # type: ignore[misc]
    def np_random(self) -> tuple[np.random.Generator, ...]:  # type: ignore[override]
        """The generator of each sub-environment, as in Gymnasium's own vector environments."""
        return tuple(self._generators)

    @property
    def np_random_seed(self) -> tuple[int, ...]:  # type: ignore[override]
        """The seed of each sub-environment's generator."""
        return tuple(self._seeds)

    def reset(
        self,
        *,
        seed: int | Sequence[int | None] | None = None,
        options: dict[str, Any] | None = None,
    ) -> tuple[Observations, dict[str, Any]]:
        """Start an episode everywhere.

        Args:
            seed: of sub-environment i, ``seed + i`` for one number and ``seed[i]`` for several; None
                goes on with the stream that is there.
            options: none exist.

        Raises:
            UsageError: as many seeds as sub-environments are needed, or only some are to be reset.
        """
        if "reset_mask" in (options or {}):
            raise UsageError("options.reset_mask: the episodes end together; reset all of them")
        self._seed(seed)
        return self._begin(), {}

    def step(
        self, actions: Mapping[str, Any]
    ) -> tuple[Observations, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Serve the current task of every UE of every fleet.

        Raises:
            UsageError: nothing was reset yet, or the actions have another shape or hold NaN.
        """
        if self._state is None:
            raise UsageError("step: no episode is under way; call reset() first")
        at_server, retention = read_action(actions, (self.num_envs, self._world.ues))
        progress, report = advance_many(self._world, self._state, at_server, retention)
        self._state = self._state._replace(**progress._asdict())
        observations, terminated, info = fetch(report)
        infos, rewards = _infos(info), info["reward"].copy()
        if terminated.all():
            infos = _final(observations, infos)
            observations = self._begin()
        return observations, rewards, terminated, np.zeros(self.num_envs, bool), infos

    def _begin(self) -> Observations:
        seeds = np.stack([draw_seed(generator) for generator in self._generators])
        self._state, observations = begin_many(seeds, self._world)
        return np.array(observations)

    def _seed(self, seed: int | Sequence[int | None] | None) -> None:
        if seed is None:
            return
        wanted = [seed + i for i in range(self.num_envs)] if isinstance(seed, int) else list(seed)
        if len(wanted) != self.num_envs:
            raise UsageError(f"seed: {len(wanted)} seeds for {self.num_envs} sub-environments; give one each")
        fresh, used = _generators(wanted)
        for index, given in enumerate(wanted):
            if given is not None:
                self._generators[index], self._seeds[index] = fresh[index], used[index]


def _generators(seeds: Sequence[int | None]) -> tuple[list[np.random.Generator], list[int]]:
    """A generator for each seed, as ``gymnasium.Env.reset`` makes them, and the seeds they came to have."""
    generators, used = zip(*(seeding.np_random(seed) for seed in seeds), strict=True)
    return list(generators), list(used)


def _infos(info: Mapping[str, Shaped[np.ndarray, "envs ..."]]) -> dict[str, np.ndarray]:
    """Arrays in Gymnasium's vector format: under ``_name`` stands which sub-environments have ``name``."""
    infos: dict[str, np.ndarray] = {}
    for name, values in info.items():
        infos[name] = values
        infos[f"_{name}"] = _everywhere(len(values))
    return infos


def _final(observations: Observations, infos: dict[str, np.ndarray]) -> dict[str, Any]:
    """The infos of a step that ended every episode."""
    final_obs = np.empty(len(observations), dtype=object)
    for index, observation in enumerate(observations):
        final_obs[index] = observation
    return {
        "final_obs": final_obs,
        "_final_obs": _everywhere(len(observations)),
        "final_info": infos,
        "_final_info": _everywhere(len(observations)),
    }


def _everywhere(num_envs: int) -> Bool[np.ndarray, "envs"]:
    return np.ones(num_envs, bool)
