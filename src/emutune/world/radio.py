"""The channel of an episode, whichever law a scenario gives it, and the range of its gains."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from emutune.world.channel import draw_fading, fading_at_scores, path_gain
from emutune.world.fading import draw_drifting, fading_correlation
from emutune.world.mobility import Path, draw_paths
from emutune.world.parameters import World
from emutune.world.path_loss import draw_propagation, los_probability, loss_range_db, path_loss_db
from emutune.world.trace import draw_windows

# The step of NR's timing advance at 30 kHz of subcarrier spacing, as a distance: half the way that light goes
# in 16 * 64 / 2 units of 1 / (480 kHz * 4096) (TS 38.213, 4.2). No base station sees its UEs' places finer.
TIMING_ADVANCE_M = 39.06
# What is drawn for these features is drawn from keys of its own, so that other draws stay as they were.
_PATHS, _PROPAGATION, _DRIFT, _WINDOWS = 100, 101, 102, 103


class Channel(NamedTuple):
    """Gains of an episode, and where they come from; None where a scenario has no such thing.

    One row more than there are tasks: row t is known before task t, row t + 1 holds during it.

    Attributes:
        gain: of the uplink, and of the downlink where that has none of its own.
        downlink_gain: of the downlink.
        path: distances, and how far and fast each UE moves.
        line_of_sight: at each row.
        shadowing_db: at each row.
    """

    gain: Float[Array, "rows ues"]
    downlink_gain: Float[Array, "rows ues"] | None = None
    path: Path | None = None
    line_of_sight: Bool[Array, "rows ues"] | None = None
    shadowing_db: Float[Array, "rows ues"] | None = None


def draw_channel(
    key: Key[Array, ""],
    distance_key: Key[Array, ""],
    fading_key: Key[Array, ""],
    world: World,
    transmit_power_w: Float[Array, "ues"],
) -> Channel:
    """Draw the gains of an episode.

    Args:
        key: of the episode, from which features get keys of their own.
        distance_key: of the distances of UEs that stay where they are.
        fading_key: of fading that is drawn anew for every task.
        world: says which law holds.
        transmit_power_w: at which a UE alone has the rate that a trace says.
    """
    rows, ues = world.tasks + 1, world.ues
    if world.trace is not None:
        uplink_snr, downlink_gain = draw_windows(jax.random.fold_in(key, _WINDOWS), world.trace, rows, ues)
        noise_w = world.rules.links.noise_w_per_hz * world.rules.links.uplink_bandwidth_hz
        return Channel(uplink_snr * noise_w / transmit_power_w, downlink_gain)
    assert world.distance_m is not None
    path = None
    if world.mobility is not None:
        path = draw_paths(jax.random.fold_in(key, _PATHS), world.mobility, world.distance_m, rows, ues)
        distance_m = path.distance_m
    else:
        near, far = world.distance_m
        distance_m = jax.random.uniform(distance_key, (ues,), minval=near, maxval=far)
    if world.path_loss is None:
        assert world.path_loss_exponent is not None
        channel = Channel(path_gain(distance_m, world.path_loss_exponent), path=path)
    else:
        still = path is None
        moved_m = jnp.zeros((1, ues)) if path is None else path.moved_m
        tables, place_m = world.path_loss, jnp.atleast_2d(distance_m)
        way = draw_propagation(jax.random.fold_in(key, _PROPAGATION), tables, place_m, moved_m)
        loss_db = path_loss_db(tables, place_m, way.line_of_sight) + way.shadowing_db
        gain = 10 ** (-loss_db / 10)
        channel = Channel(gain[0] if still else gain, None, path, way.line_of_sight, way.shadowing_db)
    fading = _draw_fading(key, fading_key, world, path, (rows, ues))
    gain = channel.gain if fading is None else channel.gain * fading
    return channel._replace(gain=jnp.broadcast_to(gain, (rows, ues)))


def timing_advance_m(world: World, path: Path | None) -> Float[Array, "rows ues"] | None:
    """What the base station knows of the distance of UEs that move: a multiple of a step, inside the cell."""
    if path is None or world.distance_m is None:
        return None
    steps = jnp.round(path.distance_m / TIMING_ADVANCE_M)
    return jnp.clip(steps * TIMING_ADVANCE_M, world.distance_m[0], world.distance_m[1])


def gain_bounds(world: World) -> Float[Array, "2"]:
    """The weakest and the strongest gain of the uplink that features and tables are scaled by.

    Those at the farthest and nearest distance, shadowing and fading against and in favour; or of a trace.
    """
    if world.trace is not None:
        snr = world.trace.uplink_snr
        noise_w = world.rules.links.noise_w_per_hz * world.rules.links.uplink_bandwidth_hz
        return jnp.stack([snr.min(), snr.max()]) * noise_w / world.transmit_power_w[::-1]
    assert world.distance_m is not None
    if world.path_loss is not None:
        least, greatest = loss_range_db(world.path_loss, world.distance_m)
        unfaded = 10 ** (-jnp.stack([greatest, least]) / 10)
    else:
        assert world.path_loss_exponent is not None
        strongest, weakest = world.distance_m**-world.path_loss_exponent
        unfaded = jnp.stack([weakest, strongest])
    if world.fading_quantiles is None:
        return unfaded
    return unfaded * fading_at_scores(world.fading_quantiles, jnp.asarray([-3.0, 3.0]))


def downlink_gain_bounds(world: World) -> Float[Array, "2"]:
    """The same of the downlink."""
    if world.trace is None:
        return gain_bounds(world)
    return jnp.stack([world.trace.downlink_gain.min(), world.trace.downlink_gain.max()])


def middle_gain(world: World) -> Float[Array, ""]:
    """The downlink's gain at the middle of the distances, without shadowing and fading; or of a trace."""
    if world.trace is not None:
        return jnp.exp(jnp.log(world.trace.downlink_gain).mean())
    assert world.distance_m is not None
    middle_m = world.distance_m.mean()
    if world.path_loss is None:
        assert world.path_loss_exponent is not None
        return middle_m**-world.path_loss_exponent
    clear = los_probability(world.path_loss, middle_m)
    with_los, without = path_loss_db(
        world.path_loss, jnp.broadcast_to(middle_m, (2,)), jnp.asarray([True, False])
    )
    return 10 ** (-(clear * with_los + (1 - clear) * without) / 10)


def _draw_fading(
    key: Key[Array, ""],
    fading_key: Key[Array, ""],
    world: World,
    path: Path | None,
    shape: tuple[int, int],
) -> Float[Array, "rows ues"] | None:
    """Mean fading power of each task; None where the rate itself is the mean over fading."""
    if world.fading_quantiles is None:
        return None
    if world.fading is None:
        return draw_fading(fading_key, world.fading_quantiles, shape)
    speed_mps = world.fading.speed_mps
    if speed_mps is None:
        assert path is not None
        speed_mps = path.speed_mps[1:]
    correlation = jnp.broadcast_to(fading_correlation(world.fading, speed_mps), (shape[0] - 1, shape[1]))
    return draw_drifting(jax.random.fold_in(key, _DRIFT), world.fading, world.fading_quantiles, correlation)
