"""Path loss: a power of the distance, or that of 3GPP TR 38.901 in street canyons (UMi) and macro cells (UMa).

Loss with and without line of sight and the breakpoint distance are those of table 7.4.1-1, the probability of
line of sight that of table 7.4.2-1, and what drifts with a UE's position does so exponentially, with the
correlation distances of shadowing (table 7.5-6) and of the line of sight (table 7.6.3.1-2). Both models hold
from 0.5 to 100 GHz, from 10 m to 5 km, and here for UEs below 13 m, so that nothing about the heights is random.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from emutune.scenario import Scenario
from emutune.world.channel import path_gain
from emutune.world.draws import Draw, key_of
from emutune.world.mobility import Path

_LIGHT_M_PER_S = 3.0e8


@dataclass(frozen=True)
class PathLossModel:
    """One model's numbers: distances in m, losses in dB, the carrier in GHz.

    Attributes:
        bs_height_m: where a scenario does not give it.
        los: constant, factor of log10 of the distance before and after the breakpoint, and the factor that
            keeps the two continuous there.
        nlos: constant, factors of log10 of distance and carrier, and of the UE's height above 1.5 m.
        los_scale_m: how far the line of sight reaches.
        shadowing_db: standard deviations with and without line of sight.
        shadowing_m: the distances at which their correlation is 1/e.
        los_m: the same of the line of sight.
    """

    bs_height_m: float
    los: tuple[float, float, float, float]
    nlos: tuple[float, float, float, float]
    los_scale_m: float
    shadowing_db: tuple[float, float]
    shadowing_m: tuple[float, float]
    los_m: float


MODELS = {
    "umi": PathLossModel(
        bs_height_m=10.0,
        los=(32.4, 21.0, 40.0, 9.5),
        nlos=(22.4, 35.3, 21.3, 0.3),
        los_scale_m=36.0,
        shadowing_db=(4.0, 7.82),
        shadowing_m=(10.0, 13.0),
        los_m=50.0,
    ),
    "uma": PathLossModel(
        bs_height_m=25.0,
        los=(28.0, 22.0, 40.0, 9.0),
        nlos=(13.54, 39.08, 20.0, 0.6),
        los_scale_m=63.0,
        shadowing_db=(4.0, 6.0),
        shadowing_m=(37.0, 50.0),
        los_m=50.0,
    ),
}


class PathLossTables(NamedTuple):
    """A model and a scenario's heights and carrier, as arrays.

    Attributes:
        los_odds: what is added to the probability of line of sight: -1 for never, 1 for always, 0 as drawn.
        shadowing_db: standard deviations with and without line of sight; 0 if there is no shadowing.
    """

    los: Float[Array, "4"]
    nlos: Float[Array, "4"]
    los_scale_m: Float[Array, ""]
    los_odds: Float[Array, ""]
    shadowing_db: Float[Array, "2"]
    shadowing_m: Float[Array, "2"]
    los_m: Float[Array, ""]
    bs_height_m: Float[Array, ""]
    ue_height_m: Float[Array, ""]
    carrier_ghz: Float[Array, ""]

    def end_gains(self, distance_m: Float[Array, "2"], scores: float = 0.0) -> Float[Array, "2"]:
        """Gains at the nearest and farthest distance.

        With line of sight at the one and without at the other; where it is not drawn, with or without it alike.
        Shadowing is of so many standard deviations, in favour at the one and against at the other.
        """
        line_of_sight = jnp.stack([self.los_odds >= 0, self.los_odds > 0])
        near_db, far_db = path_loss_db(self, distance_m, line_of_sight)
        in_favour_db, against_db = scores * self.shadowing_db[jnp.where(line_of_sight, 0, 1)]
        return _gain(jnp.stack([near_db - in_favour_db, far_db + against_db]))

    def mean_gain(self, distance_m: Float[Array, ""]) -> Float[Array, ""]:
        """Gain at a distance, in decibels the mean over line of sight and shadowing."""
        clear = los_probability(self, distance_m)
        with_los, without = path_loss_db(self, jnp.broadcast_to(distance_m, (2,)), jnp.asarray([True, False]))
        return _gain(clear * with_los + (1 - clear) * without)

    def draw(self, key: Key[Array, ""], path: Path) -> tuple[Float[Array, "rows ues"], dict[str, Array]]:
        """Gains along each UE's path, and the ``Propagation`` that they come of."""
        way = draw_propagation(key_of(key, Draw.PROPAGATION), self, path.distance_m, path.moved_m)
        loss_db = path_loss_db(self, path.distance_m, way.line_of_sight) + way.shadowing_db
        return _gain(loss_db), way._asdict()


class PowerLaw(NamedTuple):
    """A gain that is the distance to the power of minus an exponent."""

    exponent: Float[Array, ""]

    def end_gains(self, distance_m: Float[Array, "2"], scores: float = 0.0) -> Float[Array, "2"]:
        """Gains at the nearest and farthest distance; there is no shadowing."""
        return self.mean_gain(distance_m)

    def mean_gain(self, distance_m: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
        """Gain at a distance."""
        return path_gain(distance_m, self.exponent)

    def draw(self, key: Key[Array, ""], path: Path) -> tuple[Float[Array, "rows ues"], dict[str, Array]]:
        """Gains along each UE's path; nothing is drawn for them."""
        return self.mean_gain(path.distance_m), {}


class Propagation(NamedTuple):
    """Where waves go: whether there is line of sight, and the shadowing in dB."""

    line_of_sight: Bool[Array, "*rows ues"]
    shadowing_db: Float[Array, "*rows ues"]


def build_path_loss(scenario: Scenario) -> PathLossTables | PowerLaw:
    """The law of a scenario whose channel is a modelled one."""
    wanted = scenario.radio.path_loss
    if wanted is None:
        return PowerLaw(jnp.asarray(scenario.radio.path_loss_exponent, jnp.float32))
    model = MODELS[wanted.model]
    numbers = (
        model.los,
        model.nlos,
        model.los_scale_m,
        _ODDS[wanted.line_of_sight],
        model.shadowing_db if wanted.shadowing else (0.0, 0.0),
        model.shadowing_m,
        model.los_m,
        wanted.bs_height_m or model.bs_height_m,
        wanted.ue_height_m,
        scenario.radio.carrier_ghz,
    )
    return PathLossTables(*(jnp.asarray(number, jnp.float32) for number in numbers))


_ODDS: dict[Literal["drawn", "always", "never"], float] = {"drawn": 0.0, "always": 1.0, "never": -1.0}


def path_loss_db(
    tables: PathLossTables, distance_m: Float[Array, "*batch"], line_of_sight: Bool[Array, "*#batch"]
) -> Float[Array, "*batch"]:
    """Loss at a distance on the ground, without shadowing (table 7.4.1-1)."""
    los = los_loss_db(tables, distance_m)
    constant, of_distance, of_carrier, of_height = tables.nlos
    nlos = (
        constant
        + of_distance * jnp.log10(_slant_m(tables, distance_m))
        + of_carrier * jnp.log10(tables.carrier_ghz)
        - of_height * (tables.ue_height_m - 1.5)
    )
    return jnp.where(line_of_sight, los, jnp.maximum(los, nlos))


def los_loss_db(tables: PathLossTables, distance_m: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """Loss with line of sight: two slopes that meet at the breakpoint."""
    constant, near, far, joint = tables.los
    slant = jnp.log10(_slant_m(tables, distance_m))
    base = constant + 20 * jnp.log10(tables.carrier_ghz)
    breakpoint_ = breakpoint_m(tables)
    rise = tables.bs_height_m - tables.ue_height_m
    beyond = base + far * slant - joint * jnp.log10(breakpoint_**2 + rise**2)
    return jnp.where(distance_m <= breakpoint_, base + near * slant, beyond)


def breakpoint_m(tables: PathLossTables) -> Float[Array, ""]:
    """Distance at which the ground's reflection begins to cancel the line of sight.

    Heights count from 1 m above the ground.
    """
    heights = (tables.bs_height_m - 1) * (tables.ue_height_m - 1)
    return 4 * heights * tables.carrier_ghz * 1e9 / _LIGHT_M_PER_S


def los_probability(tables: PathLossTables, distance_m: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """How likely a UE at a distance on the ground has line of sight (table 7.4.2-1)."""
    near = 18.0 / jnp.maximum(distance_m, 18.0)
    drawn = near + jnp.exp(-distance_m / tables.los_scale_m) * (1 - near)
    return jnp.clip(drawn + tables.los_odds, 0.0, 1.0)


def draw_propagation(
    key: Key[Array, ""],
    tables: PathLossTables,
    distance_m: Float[Array, "rows ues"],
    moved_m: Float[Array, "rows ues"],
) -> Propagation:
    """Line of sight and shadowing along each UE's way.

    Both are read off Gaussian processes along the way, whose correlation falls exponentially with the
    distance moved: there is line of sight where the one's rank is below the probability at that place, and
    the other times its standard deviation is the shadowing. A UE that stays keeps both.

    Args:
        key: of the episode.
        tables: the model.
        distance_m: from the base station, on the ground.
        moved_m: since the row before; the first row's is of no account.
    """
    los_key, shadow_key = jax.random.split(key)
    rank = jax.scipy.special.ndtr(_drift(los_key, jnp.exp(-moved_m / tables.los_m)))
    line_of_sight = rank < los_probability(tables, distance_m)
    state = jnp.where(line_of_sight, 0, 1)
    score = _drift(shadow_key, jnp.exp(-moved_m / tables.shadowing_m[state]))
    return Propagation(line_of_sight, tables.shadowing_db[state] * score)


def _gain(loss_db: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    return 10 ** (-loss_db / 10)


def _slant_m(tables: PathLossTables, distance_m: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """Distance between the antennas."""
    return jnp.hypot(distance_m, tables.bs_height_m - tables.ue_height_m)


def _drift(key: Key[Array, ""], kept: Float[Array, "rows ues"]) -> Float[Array, "rows ues"]:
    """A standard normal process that keeps a share of its value from row to row."""
    fresh = jax.random.normal(key, kept.shape)

    def move(before: Array, now: tuple[Array, Array]) -> tuple[Array, Array]:
        share, drawn = now
        after = share * before + jnp.sqrt(jnp.maximum(1 - share**2, 0.0)) * drawn
        return after, after

    _, later = jax.lax.scan(move, fresh[0], (kept[1:], fresh[1:]))
    return jnp.concatenate([fresh[:1], later])
