"""Episodes small enough to try every plan, drawn without JAX, with their coefficients."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

import plain
from emutune.bounds import Costs, episode_costs
from emutune.scenario import Scenario, load_scenario
from emutune.world import Episode
from emutune.world.devices import Devices

OTHER = "{size_gb=5.4,layers=4,parameters_billion=1.0,curve={quadratic=0.0,linear=-9.0,constant=24.0}}"


def tiny(features: set[str], *changes: str) -> Scenario:
    """Two UEs, three tasks and five emulators of two families."""
    return load_scenario(
        "families",
        [
            "fleet.ues=2",
            "fleet.tasks=3",
            "model.layers=3",
            "retention.min=0.2",
            "retention.max=0.75",
            f"families.others=[{OTHER}]",
            *plain.changes_for(features),
            *(["memory.device_gb={min=3.7,max=9.0}"] if "memory" in features else []),
            *changes,
        ],
    )


@dataclass(frozen=True)
class Drawn:
    """An episode of NumPy arrays."""

    scenario: Scenario
    episode: Episode

    @property
    def tasks(self) -> list[list[dict[str, Any]]]:
        """Every step's UEs in plain numbers."""
        return plain.tasks_of(self.episode)

    @property
    def costs(self) -> Costs:
        """The coefficients of its bounds."""
        return costs_of(self.scenario, self.episode)

    def alike(self) -> Drawn:
        """The same episode with every UE like the first, but for when it has a task."""

        alike = jax.tree.map(lambda part: np.repeat(part[..., :1], part.shape[-1], axis=-1), self.episode)
        return replace(self, episode=alike._replace(active=self.episode.active))


def costs_of(scenario: Scenario, episode: Episode) -> Costs:
    """The coefficients of one episode's bounds."""
    (costs,) = episode_costs(scenario, jax.tree.map(lambda part: part[None], episode))
    return costs


def draw_tiny(features: set[str], seed: int, *changes: str) -> Drawn:
    """An episode of a tiny world; gains and devices far apart."""
    scenario, draw = tiny(features, *changes), np.random.default_rng(seed)
    ues, tasks = scenario.fleet.ues, scenario.fleet.tasks
    shape, rows = (tasks, ues), (tasks + 1, ues)
    tflops = draw.uniform(0.3, 20, ues) if scenario.computation else None
    energy = scenario.energy
    consumes = tflops is not None and energy is not None and energy.compute_j_per_tflop is not None
    memory = scenario.memory and draw.uniform(
        scenario.memory.device_gb.min, scenario.memory.device_gb.max, ues
    )
    devices = Devices(
        tflops=tflops,
        compute_w=draw.uniform(2, 5, ues) * tflops if consumes else None,
        memory_bits=None if memory is None else 8e9 * memory,
        private=draw.permutation(ues) < scenario.private_ues if scenario.privacy else None,
    )
    episode = Episode(
        gain=draw.uniform(50, 500, rows) ** -2,
        complexity=draw.uniform(1, 10, shape),
        data_bits=draw.uniform(2.4e9, 4e9, shape),
        transmit_power_w=draw.uniform(0.2, 1, ues),
        family=draw.integers(0, len(scenario.models), shape),
        devices=devices,
        active=draw.random(shape) < 0.6 if scenario.activity else None,
        downlink_gain=draw.uniform(50, 500, rows) ** -2 if scenario.trace else None,
    )
    return Drawn(scenario, episode)


def only_plan(drawn: Drawn) -> tuple[float, list[dict[str, Any]]]:
    """What the one possible plan costs, and every step's outcome, with how many upload."""
    carried, outcomes = [plain.Carried()] * drawn.scenario.fleet.ues, []
    for row in drawn.tasks:
        ((*plan,),) = itertools.product(*(plain.options(drawn.scenario, task) for task in row))
        carried, outcome = plain.serve(drawn.scenario, row, carried, plan)
        outcomes.append({**outcome, "uploads": sum(kind == "server" for kind, _ in plan)})
    return -sum(outcome["reward"] for outcome in outcomes), outcomes
