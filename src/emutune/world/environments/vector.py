"""Many environments in one compiled step: a Gymnasium vector environment."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
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
    check_render_mode,
    draw_seed,
    fetch,
    merge_many,
    plain_seed,
    read_scenario,
)
from emutune.world.environments.spaces import action_space, observation_space, read_action
from emutune.world.parameters import World, build_world

Observations = Float[np.ndarray, "envs features"]
Seeds = int | np.integer | Sequence[int | np.integer | None] | np.ndarray | None


class OrchestrationVectorEnv(VectorEnv[Observations, dict[str, Any], np.ndarray]):
    """``num_envs`` independent fleets of one scenario; see ``OrchestrationEnv`` for what each one is.

    What follows the end of an episode is chosen as Gymnasium defines it. ``AutoresetMode.SAME_STEP``: the step
    that ends an episode returns the first observation of the next, and the last of the ended one, with its
    info, is in ``final_obs`` and ``final_info``; no step is spent on resetting. ``NEXT_STEP``: the step after
    it begins the next episode, whatever the action, with a reward of 0. ``DISABLED``: the caller resets, with
    ``options={"reset_mask": ...}`` if not everywhere.

    Args:
        num_envs: how many sub-environments.
        scenario: a scenario, the name of a shipped one, or the path of a TOML file.
        overrides: assignments such as ``"fleet.ues=9"``.
        autoreset_mode: an ``AutoresetMode``, or its value: ``SameStep``, ``NextStep``, ``Disabled``.
        max_episode_steps: steps after which an episode is truncated; None or -1 for all T tasks.
        render_mode: none but None; there is nothing to look at.

    Raises:
        ScenarioError: the scenario cannot be read, or a value is invalid.
        UsageError: ``num_envs`` or ``max_episode_steps`` is below 1, or there is no such mode.
    """

    metadata: dict[str, Any] = {  # noqa: RUF012 - declared so by gymnasium.vector.VectorEnv
        "render_modes": [],
        "autoreset_mode": AutoresetMode.SAME_STEP,
    }

    def __init__(
        self,
        num_envs: int = 1,
        scenario: Scenario | str | Path = "paper",
        overrides: Iterable[str] = (),
        autoreset_mode: AutoresetMode | str = AutoresetMode.SAME_STEP,
        max_episode_steps: int | None = None,
        render_mode: str | None = None,
    ) -> None:
        if num_envs < 1:
            raise UsageError(f"num_envs: must be at least 1, got {num_envs}")
        check_render_mode(render_mode)
        self.num_envs = num_envs
        self.render_mode = render_mode
        self.autoreset_mode = _autoreset_mode(autoreset_mode)
        self.metadata = {**self.metadata, "autoreset_mode": self.autoreset_mode}
        self.max_episode_steps = _step_limit(max_episode_steps)
        self.scenario = read_scenario(scenario, overrides)
        self.single_action_space = action_space(self.scenario)
        self.single_observation_space = observation_space(self.scenario)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self._generators, self._seeds = _generators([None] * num_envs)
        self._state: State | None = None
        self._observations = np.zeros(self.observation_space.shape or (), np.float32)
        self._elapsed = np.zeros(num_envs, np.int64)
        self._ended = np.zeros(num_envs, bool)

    @cached_property
    def _world(self) -> World:
        # As late as in ``OrchestrationEnv``.
        return build_world(self.scenario)

    @property  # type: ignore[misc]
    def np_random(self) -> tuple[np.random.Generator, ...]:  # type: ignore[override]
        """The generator of each sub-environment, as in Gymnasium's own vector environments."""
        return tuple(self._generators)

    @property
    def np_random_seed(self) -> tuple[int, ...]:  # type: ignore[override]
        """The seed of each sub-environment's generator."""
        return tuple(self._seeds)

    def reset(
        self, *, seed: Seeds = None, options: dict[str, Any] | None = None
    ) -> tuple[Observations, dict[str, Any]]:
        """Start an episode everywhere, or where a mask says.

        Args:
            seed: of sub-environment i, ``seed + i`` for one number and ``seed[i]`` for several; None
                goes on with the stream that is there.
            options: ``reset_mask``, a bool for each sub-environment, says which to reset; the others go on.

        Raises:
            UsageError: as many seeds as sub-environments are needed, the mask is no such array, or JAX cannot
                compute in this process.
        """
        chosen = self._chosen((options or {}).get("reset_mask"))
        self._seed(seed, chosen)
        self._restart(chosen)
        return self._observations.copy(), {}

    def step(
        self, actions: Mapping[str, Any]
    ) -> tuple[Observations, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Serve the current task of every UE of every fleet.

        Raises:
            UsageError: nothing was reset yet, or an ended episode was not where that is the caller's part; the
                actions have another shape or hold NaN; or JAX cannot compute in this process.
        """
        if self._state is None:
            raise UsageError("step: no episode is under way; call reset() first")
        begins = self._ended
        if begins.any() and self.autoreset_mode is AutoresetMode.DISABLED:
            raise UsageError(
                f"step: the episodes of sub-environments {np.flatnonzero(begins).tolist()} have ended; reset them "
                'with reset(options={"reset_mask": terminated | truncated})'
            )
        at_server, retention = read_action(actions, (self.num_envs, self.scenario.fleet.ues))
        progress, report = advance_many(self._world, self._state, at_server, retention)
        self._state = self._state._replace(**progress._asdict())
        self._elapsed = self._elapsed + 1
        self._observations, terminated, info = fetch(report)
        terminated = terminated & ~begins
        truncated = self._over_limit() & ~begins
        rewards, infos = np.where(begins, 0.0, info["reward"]), _infos(info, ~begins)
        self._ended = terminated | truncated
        if self.autoreset_mode is AutoresetMode.SAME_STEP:
            begins = self._ended
            infos = _infos(info, ~begins) | _final(self._observations, info, begins)
        if begins.any():
            self._restart(begins)
        return self._observations.copy(), rewards, terminated, truncated, infos

    def _restart(self, chosen: Bool[np.ndarray, "envs"]) -> None:
        """Begin the next episode of some sub-environments."""
        seeds = np.zeros((self.num_envs, 2), np.uint32)
        for index in np.flatnonzero(chosen):
            seeds[index] = draw_seed(self._generators[index])
        state, observations = begin_many(seeds, self._world)
        if not chosen.all():
            state = merge_many(chosen, state, self._state)
        self._state = state
        self._observations = np.where(chosen[:, None], observations, self._observations)
        self._elapsed = np.where(chosen, 0, self._elapsed)
        self._ended = self._ended & ~chosen

    def _over_limit(self) -> Bool[np.ndarray, "envs"]:
        if self.max_episode_steps is None:
            return np.zeros(self.num_envs, bool)
        return self._elapsed >= self.max_episode_steps

    def _chosen(self, mask: Any) -> Bool[np.ndarray, "envs"]:
        """Which sub-environments are to be reset."""
        if mask is None:
            return np.ones(self.num_envs, bool)
        if not isinstance(mask, np.ndarray) or mask.shape != (self.num_envs,) or mask.dtype != np.bool_:
            got = f"{type(mask).__name__} {getattr(mask, 'dtype', '')} {getattr(mask, 'shape', '')}".strip()
            raise UsageError(f"options.reset_mask: must be a NumPy array of {self.num_envs} bools, got {got}")
        if not mask.any():
            raise UsageError("options.reset_mask: names no sub-environment; set one or more to True")
        if self._state is None and not mask.all():
            raise UsageError("options.reset_mask: no episode is under way; reset all of them first")
        return mask

    def _seed(self, seed: Seeds, chosen: Bool[np.ndarray, "envs"]) -> None:
        if seed is None:
            return
        if isinstance(seed, Sequence | np.ndarray):
            wanted = [plain_seed(each) for each in seed]
        else:
            first = plain_seed(seed)
            assert first is not None
            wanted = [first + index for index in range(self.num_envs)]
        if len(wanted) != self.num_envs:
            raise UsageError(f"seed: {len(wanted)} seeds for {self.num_envs} sub-environments; give one each")
        fresh, used = _generators(wanted)
        for index in np.flatnonzero(chosen):
            if wanted[index] is not None:
                self._generators[index], self._seeds[index] = fresh[index], used[index]


def _autoreset_mode(mode: AutoresetMode | str) -> AutoresetMode:
    try:
        return AutoresetMode(mode)
    except ValueError as error:
        known = ", ".join(each.value for each in AutoresetMode)
        raise UsageError(f"autoreset_mode: no mode {mode!r}; choose from {known}") from error


def _step_limit(max_episode_steps: int | None) -> int | None:
    """Steps of an episode at most; -1 stands for no limit, as in ``gymnasium.make``."""
    if max_episode_steps is None or max_episode_steps == -1:
        return None
    if max_episode_steps < 1:
        raise UsageError(
            f"max_episode_steps: must be at least 1, or -1 for no limit, got {max_episode_steps}"
        )
    return max_episode_steps


def _generators(seeds: Sequence[int | None]) -> tuple[list[np.random.Generator], list[int]]:
    """A generator for each seed, as ``gymnasium.Env.reset`` makes them, and the seeds they came to have."""
    generators, used = zip(*(seeding.np_random(seed) for seed in seeds), strict=True)
    return list(generators), list(used)


def _infos(
    info: Mapping[str, Shaped[np.ndarray, "envs ..."]], where: Bool[np.ndarray, "envs"]
) -> dict[str, np.ndarray]:
    """Arrays in Gymnasium's vector format: 0 elsewhere, and ``_name`` says which sub-environments have ``name``."""
    infos: dict[str, np.ndarray] = {}
    if not where.any():
        return infos
    for name, values in info.items():
        infos[name] = values.copy()
        infos[name][~where] = 0
        infos[f"_{name}"] = where.copy()
    return infos


def _final(
    observations: Observations, info: Mapping[str, np.ndarray], ended: Bool[np.ndarray, "envs"]
) -> dict[str, Any]:
    """What is told of episodes that end in a step, beside the first observation of the next."""
    if not ended.any():
        return {}
    final_obs = np.full(len(observations), None, dtype=object)
    for index in np.flatnonzero(ended):
        final_obs[index] = observations[index].copy()
    return {
        "final_obs": final_obs,
        "_final_obs": ended.copy(),
        "final_info": _infos(info, ended),
        "_final_info": ended.copy(),
    }
