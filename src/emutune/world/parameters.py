"""A scenario as arrays: what a step is computed with, and the laws that episodes are drawn from."""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from emutune.forking import refuse_fork
from emutune.scenario import Scenario
from emutune.step import Rules, build_rules
from emutune.world.devices import DeviceLaws, build_devices
from emutune.world.draws import bounds_of
from emutune.world.families import FamilyChain
from emutune.world.radio import Radio, build_radio


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class World:
    """The numbers of a scenario in SI units.

    The numbers of UEs, tasks and levels shape the arrays and are static, and so is whether a feature is on; every
    other number is traced, so one compiled program serves any weights, bandwidths, sizes and ranges.
    What is off is no part of the program.

    Attributes:
        has_devices: see ``Scenario.has_devices``.
        rules: what a step is computed with.
        radio: from which gains are drawn.
        families: from which the foundation model of each task is drawn.
        devices: from which speeds, powers, memory, privacy and activity are drawn.
    """

    ues: int = field(metadata={"static": True})
    tasks: int = field(metadata={"static": True})
    has_devices: bool = field(metadata={"static": True})
    rules: Rules
    transmit_power_w: Float[Array, "2"]
    data_bits: Float[Array, "2"]
    complexity: Float[Array, "2"]
    radio: Radio
    families: FamilyChain
    devices: DeviceLaws


def build_world(scenario: Scenario) -> World:
    """The arrays of a scenario.

    Raises:
        UsageError: JAX cannot compute in this process, since it was forked from one that used it.
    """
    refuse_fork()
    return _arrays(scenario)


def world_outline(scenario: Scenario) -> World:
    """Shapes and kinds of a scenario's arrays instead of the arrays; JAX computes nothing, nor does it start."""
    return jax.eval_shape(lambda: _arrays(scenario))


def _arrays(scenario: Scenario) -> World:
    fleet, stays = scenario.fleet, scenario.families.persistence if scenario.families else 1.0
    return World(
        ues=fleet.ues,
        tasks=fleet.tasks,
        has_devices=scenario.has_devices,
        rules=build_rules(scenario),
        transmit_power_w=bounds_of(fleet.transmit_power_w),
        data_bits=bounds_of(scenario.tasks.data_mb, scale=8e6),
        complexity=bounds_of(scenario.tasks.complexity),
        radio=build_radio(scenario),
        families=FamilyChain(len(scenario.models), jnp.asarray(stays, jnp.float32)),
        devices=build_devices(scenario),
    )
