"""What a fleet's steps cost, predicted and measured, by the simulator's own definition; and what it says of the draws.

This needs JAX, as the process that decides does.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from emutune.fleet.comparison import Comparison
from emutune.fleet.server.drawn import Draws
from emutune.policies import Policy
from emutune.policies.playing import play
from emutune.scenario import Scenario
from emutune.step import situation_of
from emutune.step.charges import delay_cost, own_cost
from emutune.step.rules import Rules, build_rules
from emutune.step.taken import Taken
from emutune.world import Episode, build_world


class Steps(NamedTuple):
    """What every device took in some steps; 0 of those that had no task, NaN where something was not measured."""

    active: Bool[np.ndarray, "steps ues"]
    delay_s: Float[np.ndarray, "steps ues"]
    joules: Float[np.ndarray, "steps ues"]
    perplexity: Float[np.ndarray, "steps ues"]


@dataclass(frozen=True)
class Costs:
    """Costs of a fleet's steps in units of reward, positive; NaN for a step of which something was not measured."""

    predicted: Float[np.ndarray, "steps"]
    measured: Float[np.ndarray, "steps"]

    @property
    def complete(self) -> Bool[np.ndarray, "steps"]:
        """Of which steps all is known."""
        return np.isfinite(self.predicted) & np.isfinite(self.measured)


def costs_of(rows: Sequence[Comparison], scenario: Scenario, devices: Sequence[str]) -> Costs:
    """What the leases of one episode cost, predicted and measured.

    Args:
        rows: of its steps, from the ledger.
        scenario: with the weights.
        devices: who takes part; the mean energy is over all of them.
    """
    predicted = _steps(rows, devices, "predicted", scenario.fleet.tasks)
    measured = _steps(rows, devices, "measured", scenario.fleet.tasks)
    rules = build_rules(scenario)
    return Costs(*(np.asarray(_cost(rules, steps), np.float64) for steps in (predicted, measured)))


def simulated_costs(
    rows: Sequence[Comparison], scenario: Scenario, devices: Sequence[str], policy: Policy, seed: int
) -> Float[np.ndarray, "steps"]:
    """What the simulator charges a policy for the same tasks, links and devices as the fleet had.

    Args:
        rows: of the fleet's one episode, whose first step is 0.
        scenario: that it ran.
        devices: who took part.
        policy: what decides.
        seed: of the fleet's draws.
    """
    world = build_world(
        scenario.model_copy(update={"fleet": scenario.fleet.model_copy(update={"ues": len(devices)})})
    )
    episode = replayed(rows, Draws(world, seed).episode(0, devices), devices)
    charges = jax.jit(
        lambda episode: play(
            world, policy, episode, jax.random.key(seed), lambda step: step.outcome.charge.total
        )
    )(episode)
    return np.asarray(charges, np.float64)


def replayed(rows: Sequence[Comparison], drawn: Episode, devices: Sequence[str]) -> Episode:
    """An episode with the tasks that a fleet had in the place of those that were drawn, and its devices' limits."""
    place = {device: number for number, device in enumerate(devices)}
    tasks = _there(drawn, "complexity", "data_bits", "family")
    limits = _there(drawn.devices, "memory_bits", "private")
    for row in rows:
        known, device = json.loads(row.situation), place[row.device]
        for name, part in tasks.items():
            part[row.step, device] = known[name]
        for name, part in limits.items():
            part[device] = known.get(name, np.inf)
    of_devices = drawn.devices._replace(**{name: jnp.asarray(part) for name, part in limits.items()})
    return drawn._replace(**{name: jnp.asarray(part) for name, part in tasks.items()}, devices=of_devices)


def _there(drawn: NamedTuple, *names: str) -> dict[str, np.ndarray]:
    """Those of some fields that are drawn in a world, to be changed."""
    parts = {name: getattr(drawn, name) for name in names}
    return {name: np.array(part) for name, part in parts.items() if part is not None}


def _steps(rows: Sequence[Comparison], devices: Sequence[str], which: str, count: int) -> Steps:
    place = {device: number for number, device in enumerate(devices)}
    shape = (max(count, 1 + max((row.step for row in rows), default=0)), len(devices))
    steps = Steps(np.zeros(shape, bool), *(np.zeros(shape) for _ in range(3)))
    for row in rows:
        at = row.step % shape[0], place[row.device]
        steps.active[at] = True
        for name in ("delay_s", "joules", "perplexity"):
            value = getattr(row, f"{which}_{name}")
            getattr(steps, name)[at] = np.nan if value is None else value
    return steps


def _cost(rules: Rules, steps: Steps) -> jax.Array:
    active, joules = jnp.asarray(steps.active), jnp.asarray(steps.joules)
    nothing = jnp.zeros_like(joules)
    taken = Taken(nothing, nothing, jnp.asarray(steps.delay_s), joules, jnp.asarray(steps.perplexity))
    held = jnp.zeros((*nothing.shape, rules.models.families), jnp.int32)
    situation = situation_of(
        progress=jnp.zeros(nothing.shape[0]),
        complexity=nothing,
        data_bits=nothing,
        active=active,
        transmit_power_w=nothing,
        gain=nothing,
        held=held,
        age=held,
        # What was spent before each step.
        spent_j=jnp.cumsum(joules, axis=0) - joules,
    )
    return jnp.sum(own_cost(rules, situation, taken), axis=-1) + delay_cost(
        rules, jnp.max(taken.delay_s, axis=-1)
    )
