"""A scenario as arrays: what the simulator computes with."""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from emutune.forking import refuse_fork
from emutune.scenario import Range, Scenario
from emutune.world.channel import fading_quantiles
from emutune.world.devices import DeviceTables, build_devices
from emutune.world.fading import FadingTables, build_fading
from emutune.world.families import FamilyTables, build_families
from emutune.world.mobility import MobilityTables, build_mobility
from emutune.world.path_loss import PathLossTables, build_path_loss
from emutune.world.trace import TraceTables, build_trace


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class World:
    """The numbers of a scenario in SI units.

    The number of UEs and tasks shapes the arrays and is static, and so is whether a feature is on; every
    other number is traced, so one compiled program serves any weights, bandwidths, sizes and ranges.
    What is off is no part of the program.
    """

    ues: int = field(metadata={"static": True})
    tasks: int = field(metadata={"static": True})
    delta_download: bool = field(metadata={"static": True})
    ergodic_rate: bool = field(metadata={"static": True})
    transmit_power_w: Float[Array, "2"]
    distance_m: Float[Array, "2"] | None
    data_bits: Float[Array, "2"]
    complexity: Float[Array, "2"]
    model_bits: Float[Array, ""]
    model_layers: Int[Array, ""]
    level_bounds: Int[Array, "2"]
    retention_bounds: Float[Array, "2"]
    hold_tolerance: Float[Array, ""]
    uplink_bandwidth_hz: Float[Array, ""]
    downlink_bandwidth_hz: Float[Array, ""]
    downlink_power_w: Float[Array, ""]
    noise_w_per_hz: Float[Array, ""]
    path_loss_exponent: Float[Array, ""] | None
    fading_quantiles: Float[Array, "knots"] | None
    curve: Float[Array, "3"]
    curve_knots: Float[Array, "2 knots_of_curve"]
    complexity_weight: Float[Array, ""]
    complexity_as_printed: Bool[Array, ""]
    perplexity_weight: Float[Array, ""]
    delay_weight_per_s: Float[Array, ""]
    families: FamilyTables | None
    devices: DeviceTables
    path_loss: PathLossTables | None
    fading: FadingTables | None
    mobility: MobilityTables | None
    trace: TraceTables | None


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
    fleet, radio, quality, reward = scenario.fleet, scenario.radio, scenario.quality, scenario.reward
    curve = quality.curve
    return World(
        ues=fleet.ues,
        tasks=fleet.tasks,
        delta_download=scenario.delta_download,
        ergodic_rate=radio.rate == "ergodic",
        transmit_power_w=_interval(fleet.transmit_power_w),
        distance_m=None if fleet.distance_m is None else _interval(fleet.distance_m),
        data_bits=_interval(scenario.tasks.data_mb, scale=8e6),
        complexity=_interval(scenario.tasks.complexity),
        model_bits=_real(8e9 * scenario.model.size_gb),
        model_layers=jnp.asarray(scenario.model.layers, jnp.int32),
        level_bounds=jnp.asarray(scenario.level_bounds, jnp.int32),
        retention_bounds=jnp.asarray([scenario.retention.min, scenario.retention.max], jnp.float32),
        hold_tolerance=_real(scenario.retention.hold_tolerance),
        uplink_bandwidth_hz=_real(radio.uplink_bandwidth_hz),
        downlink_bandwidth_hz=_real(radio.downlink_bandwidth_hz),
        downlink_power_w=_real(radio.downlink_power_w),
        noise_w_per_hz=_real(10 ** ((radio.noise_dbm_per_hz - 30) / 10)),
        path_loss_exponent=None if radio.path_loss_exponent is None else _real(radio.path_loss_exponent),
        fading_quantiles=_fading_quantiles(scenario),
        curve=jnp.asarray([curve.quadratic, curve.linear, curve.constant], jnp.float32),
        curve_knots=jnp.asarray(curve.knots, jnp.float32).reshape(-1, 2).T,
        complexity_weight=_real(quality.complexity_weight),
        complexity_as_printed=jnp.asarray(quality.complexity_factor == "as_printed"),
        perplexity_weight=_real(reward.perplexity_weight),
        delay_weight_per_s=_real(reward.delay_weight_per_min / 60),
        families=build_families(scenario),
        devices=build_devices(scenario),
        path_loss=build_path_loss(scenario),
        fading=build_fading(scenario),
        mobility=build_mobility(scenario),
        trace=build_trace(scenario),
    )


def bits_of(world: World, family: Int[Array, "*batch"] | None) -> Float[Array, "*batch"]:
    """Size of the whole model of each task's family, in bits."""
    if world.families is None or family is None:
        return world.model_bits
    return world.families.model_bits[family]


def layers_of(world: World, family: Int[Array, "*batch"] | None) -> Int[Array, "*batch"]:
    """Layers of the whole model of each task's family."""
    if world.families is None or family is None:
        return world.model_layers
    return world.families.model_layers[family]


def levels_of(
    world: World, family: Int[Array, "*batch"] | None
) -> tuple[Int[Array, "*batch"], Int[Array, "*batch"]]:
    """Fewest and most layers of an emulator of each task's family."""
    if world.families is None or family is None:
        return world.level_bounds[0], world.level_bounds[1]
    bounds = world.families.level_bounds[family]
    return bounds[..., 0], bounds[..., 1]


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
