"""A scenario as arrays: what a step is computed with, and the laws that episodes are drawn from."""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from emutune.forking import refuse_fork
from emutune.scenario import Range, Scenario
from emutune.step import Rules, build_rules
from emutune.world.channel import fading_quantiles
from emutune.world.devices import DeviceLaws, build_devices
from emutune.world.fading import FadingTables, build_fading
from emutune.world.mobility import MobilityTables, build_mobility
from emutune.world.path_loss import PathLossTables, build_path_loss
from emutune.world.trace import TraceTables, build_trace


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class World:
    """The numbers of a scenario in SI units.

    The numbers of UEs, tasks and levels shape the arrays and are static, and so is whether a feature is on; every
    other number is traced, so one compiled program serves any weights, bandwidths, sizes and ranges.
    What is off is no part of the program.

    Attributes:
        rules: what a step is computed with.
        persistence: how likely the next task is of the same family for certain; None where there is one family.
        devices: from which speeds, powers, memory, privacy and activity are drawn.
    """

    ues: int = field(metadata={"static": True})
    tasks: int = field(metadata={"static": True})
    rules: Rules
    transmit_power_w: Float[Array, "2"]
    distance_m: Float[Array, "2"] | None
    data_bits: Float[Array, "2"]
    complexity: Float[Array, "2"]
    path_loss_exponent: Float[Array, ""] | None
    fading_quantiles: Float[Array, "knots"] | None
    persistence: Float[Array, ""] | None
    devices: DeviceLaws
    path_loss: PathLossTables | None
    fading: FadingTables | None
    mobility: MobilityTables | None
    trace: TraceTables | None

    @property
    def stays(self) -> Float[Array, ""]:
        """Probability that the next task is of the same family for certain; else it is drawn from all."""
        return jnp.asarray(1.0) if self.persistence is None else self.persistence

    @property
    def task_probability(self) -> Float[Array, ""]:
        """Probability that a UE has a task."""
        known = self.devices.task_probability
        return jnp.asarray(1.0) if known is None else known

    @property
    def has_devices(self) -> bool:
        """Whether UEs differ in more than their radio: in what they can compute, spend, hold or tell."""
        return self.rules.uses_energy or bool(jax.tree.leaves(self.devices))


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
    fleet, radio = scenario.fleet, scenario.radio
    return World(
        ues=fleet.ues,
        tasks=fleet.tasks,
        rules=build_rules(scenario),
        transmit_power_w=_interval(fleet.transmit_power_w),
        distance_m=None if fleet.distance_m is None else _interval(fleet.distance_m),
        data_bits=_interval(scenario.tasks.data_mb, scale=8e6),
        complexity=_interval(scenario.tasks.complexity),
        path_loss_exponent=None if radio.path_loss_exponent is None else _real(radio.path_loss_exponent),
        fading_quantiles=_fading_quantiles(scenario),
        persistence=None if scenario.families is None else _real(scenario.families.persistence),
        devices=build_devices(scenario),
        path_loss=build_path_loss(scenario),
        fading=build_fading(scenario),
        mobility=build_mobility(scenario),
        trace=build_trace(scenario),
    )


def _fading_quantiles(scenario: Scenario) -> Float[Array, "knots"] | None:
    """None where fading is no part of the gain: it is in a trace's rates, or in the rate itself."""
    blocks = scenario.radio.fading_blocks
    if blocks is None or scenario.trace is not None or scenario.radio.rate == "ergodic":
        return None
    return jnp.asarray(fading_quantiles(blocks), jnp.float32)


def _real(value: float) -> Float[Array, ""]:
    return jnp.asarray(value, jnp.float32)


def _interval(bounds: Range, scale: float = 1.0) -> Float[Array, "2"]:
    return jnp.asarray([bounds.min * scale, bounds.max * scale], jnp.float32)
