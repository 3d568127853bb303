"""Where UEs are: each stays where it is, or moves by random waypoints in the cell, seen once per task.

A UE that moves walks straight to a point drawn from the cell's area at a speed drawn for the way, pauses there,
and goes on. The cell is the ring between the nearest and the farthest distance. Who crosses the hole in the
middle is taken to be at its rim: path loss models end there.

Episodes begin in the stationary state. Drawing the first way like any other would not do: long ways, slow
ways and long pauses are more likely to be under way when one looks (Navidi and Camp, "Stationary distributions
for the random waypoint mobility model", 2004).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from emutune.scenario import Range, Scenario
from emutune.world.draws import Draw, bounds_of, key_of, uniform

# The step of NR's timing advance at 30 kHz of subcarrier spacing, as a distance: half the way that light goes
# in 16 * 64 / 2 units of 1 / (480 kHz * 4096) (TS 38.213, 4.2). No base station sees its UEs' places finer.
TIMING_ADVANCE_M = 39.06


class Walk(NamedTuple):
    """Where a UE is on its way; the pause begins at the end of the way.

    Attributes:
        left_s: of the way, until the UE arrives.
        pause_s: of the pause after it.
        ways: begun so far, which keeps draws apart.
    """

    target_m: Float[Array, "2"]
    velocity_mps: Float[Array, "2"]
    left_s: Float[Array, ""]
    pause_s: Float[Array, ""]
    ways: Int[Array, ""]


class Path(NamedTuple):
    """What UEs' paths amount to, one row more than there are tasks; one row where they stay.

    Attributes:
        distance_m: from the base station.
        moved_m: straight from the place of the row before; 0 in the first.
        speed_mps: mean speed since the row before; in the first, the speed at that moment.
    """

    distance_m: Float[Array, "rows ues"]
    moved_m: Float[Array, "rows ues"]
    speed_mps: Float[Array, "rows ues"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Standing:
    """UEs that stay where they are.

    Attributes:
        distance_m: bounds of uniform draws.
    """

    distance_m: Float[Array, "2"]
    stride_m: ClassVar[float] = 0.0
    moves: ClassVar[bool] = False

    def draw(self, key: Key[Array, ""], rows: int, ues: int) -> Path:
        """The places of all UEs."""
        distance_m = uniform(key_of(key, Draw.DISTANCE), self.distance_m, (1, ues))
        return Path(distance_m, *jnp.zeros((2, 1, ues)))

    def told(self, path: Path) -> dict[str, Float[Array, "rows ues"]]:
        """Nothing is told of ways that nobody walks."""
        return {}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Waypoints:
    """UEs that walk from one waypoint to the next.

    Attributes:
        distance_m: of the ring's rims.
        speed_mps: bounds of uniform draws.
        pause_s: the same.
        pausing: share of the time that a UE pauses.
        interval_s: from one task to the next.
    """

    distance_m: Float[Array, "2"]
    speed_mps: Float[Array, "2"]
    pause_s: Float[Array, "2"]
    pausing: Float[Array, ""]
    interval_s: Float[Array, ""]
    moves: ClassVar[bool] = True

    @property
    def stride_m(self) -> Float[Array, ""]:
        """How far a UE gets from one task to the next at most."""
        return self.speed_mps[1] * self.interval_s

    def draw(self, key: Key[Array, ""], rows: int, ues: int) -> Path:
        """The paths of all UEs over an episode."""
        keys = jax.random.split(key_of(key, Draw.PATHS), ues)
        return jax.vmap(_draw_path, (0, None, None), out_axes=1)(keys, self, rows)

    def told(self, path: Path) -> dict[str, Float[Array, "rows ues"]]:
        """Paths, and what the base station knows of distances: multiples of a step, inside the cell."""
        steps = jnp.round(path.distance_m / TIMING_ADVANCE_M)
        known_m = jnp.clip(steps * TIMING_ADVANCE_M, self.distance_m[0], self.distance_m[1])
        return {**path._asdict(), "timing_advance_m": known_m}


def build_place(scenario: Scenario, distance: Range) -> Standing | Waypoints:
    """Where the UEs of a scenario are, between two distances."""
    mobility = scenario.mobility
    if mobility is None:
        return Standing(bounds_of(distance))
    slow, fast = mobility.speed_mps.min, mobility.speed_mps.max
    slowness = math.log(fast / slow) / (fast - slow) if fast > slow else 1 / fast
    way_s = mean_way_m(distance.min, distance.max) * slowness
    pause_s = (mobility.pause_s.min + mobility.pause_s.max) / 2
    return Waypoints(
        distance_m=bounds_of(distance),
        speed_mps=bounds_of(mobility.speed_mps),
        pause_s=bounds_of(mobility.pause_s),
        pausing=jnp.asarray(pause_s / (pause_s + way_s), jnp.float32),
        interval_s=jnp.asarray(mobility.interval_s, jnp.float32),
    )


@lru_cache(maxsize=64)
def mean_way_m(near_m: float, far_m: float) -> float:
    """Mean distance of two points drawn from the area of a ring, by quadrature; good to one part in 1e4."""
    inner = near_m / far_m
    share = (np.arange(120) + 0.5) / 120
    radius = np.sqrt(inner**2 + (1 - inner**2) * share)
    angle = np.pi * (np.arange(400) + 0.5) / 400
    squared = radius[:, None, None] ** 2 + radius[:, None] ** 2
    return float(
        far_m
        * np.sqrt(np.maximum(squared - 2 * radius[:, None, None] * radius[:, None] * np.cos(angle), 0)).mean()
    )


def _draw_path(key: Key[Array, ""], law: Waypoints, rows: int) -> Path:
    begin = _begin(key, law)

    def advance(walk: Walk, _: None) -> tuple[Walk, tuple[Array, Array]]:
        after, walked_m = _advance(key, law, walk)
        return after, (_place(after), walked_m)

    _, (places, walked_m) = jax.lax.scan(advance, begin, length=rows - 1)
    places = jnp.concatenate([_place(begin)[None], places])
    moved_m = _length(jnp.diff(places, axis=0))
    speed_mps = jnp.where(begin.left_s > 0, _length(begin.velocity_mps), 0.0)
    return Path(
        distance_m=jnp.maximum(_length(places), law.distance_m[0]),
        moved_m=jnp.concatenate([jnp.zeros(1), moved_m]),
        speed_mps=jnp.concatenate([speed_mps[None], walked_m / law.interval_s]),
    )


def _begin(key: Key[Array, ""], law: Waypoints) -> Walk:
    """The stationary state: pausing, or on a way drawn by its length and by how long it takes."""
    start, target = _draw_long_way(key, law.distance_m)
    draws = jax.random.uniform(jax.random.fold_in(key, 0), (7,))
    state, where, pace, rest, pause = draws[:5]
    slow, fast = law.speed_mps
    speed = slow * (fast / slow) ** pace
    length = _length(target - start)
    walking = Walk(
        target_m=target,
        velocity_mps=speed / length * (target - start),
        left_s=(1 - where) * length / speed,
        pause_s=_between(law.pause_s, pause),
        ways=jnp.asarray(1),
    )
    low, high = law.pause_s
    resting = walking._replace(
        # Where UEs pause is drawn like any target.
        target_m=_point(draws[5:], law.distance_m),
        left_s=jnp.zeros(()),
        pause_s=(1 - rest) * jnp.sqrt(low**2 + (high**2 - low**2) * pause),
    )
    return jax.tree.map(lambda one, other: jnp.where(state < law.pausing, one, other), resting, walking)


def _draw_long_way(
    key: Key[Array, ""], distance_m: Float[Array, "2"]
) -> tuple[Float[Array, "2"], Float[Array, "2"]]:
    """Two points of the ring, drawn in proportion to their distance, by rejection."""

    def attempt(state: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        count = state[0] + 1
        # Numbers of ways count from 0 up, those of attempts from the top down.
        draws = jax.random.uniform(jax.random.fold_in(key, -count), (5,))
        start, target = _point(draws[:2], distance_m), _point(draws[2:4], distance_m)
        accepted = draws[4] * 2 * distance_m[1] < _length(target - start)
        return count, accepted, start, target

    def refused(state: tuple[Array, Array, Array, Array]) -> Bool[Array, ""]:
        return ~state[1]

    nowhere = jnp.zeros(2)
    first = (jnp.zeros((), jnp.int32), jnp.zeros((), bool), nowhere, nowhere)
    _, _, start, target = jax.lax.while_loop(refused, attempt, first)
    return start, target


def _advance(key: Key[Array, ""], law: Waypoints, walk: Walk) -> tuple[Walk, Float[Array, ""]]:
    """A UE one interval later, over as many ways as that takes, and how far it walked."""

    def spend(state: tuple[Walk, Array, Array]) -> tuple[Walk, Array, Array]:
        now, time_s, walked_m = state
        walked_s = jnp.minimum(now.left_s, time_s)
        rested_s = jnp.minimum(now.pause_s, time_s - walked_s)
        after = now._replace(left_s=now.left_s - walked_s, pause_s=now.pause_s - rested_s)
        left_s = time_s - walked_s - rested_s
        following = _next_way(key, law, after)
        after = jax.tree.map(lambda new, old: jnp.where(left_s > 0, new, old), following, after)
        return after, left_s, walked_m + walked_s * _length(now.velocity_mps)

    def some_left(state: tuple[Walk, Array, Array]) -> Bool[Array, ""]:
        return state[1] > 0

    after, _, walked_m = jax.lax.while_loop(some_left, spend, (walk, law.interval_s, jnp.zeros(())))
    return after, walked_m


def _next_way(key: Key[Array, ""], law: Waypoints, walk: Walk) -> Walk:
    """From the end of a way to a new target."""
    draws = jax.random.uniform(jax.random.fold_in(key, walk.ways), (4,))
    target = _point(draws[:2], law.distance_m)
    speed, way = _between(law.speed_mps, draws[2]), target - walk.target_m
    length = jnp.maximum(_length(way), 1e-3)
    return Walk(
        target_m=target,
        velocity_mps=speed / length * way,
        left_s=length / speed,
        pause_s=_between(law.pause_s, draws[3]),
        ways=walk.ways + 1,
    )


def _place(walk: Walk) -> Float[Array, "2"]:
    return walk.target_m - walk.left_s * walk.velocity_mps


def _point(uniform: Float[Array, "2"], distance_m: Float[Array, "2"]) -> Float[Array, "2"]:
    """A point of the ring, uniform over its area, from two uniform draws."""
    share, turn = uniform
    near, far = distance_m**2
    radius = jnp.sqrt(near + (far - near) * share)
    return radius * jnp.stack([jnp.cos(2 * math.pi * turn), jnp.sin(2 * math.pi * turn)])


def _between(bounds: Float[Array, "2"], share: Float[Array, ""]) -> Float[Array, ""]:
    return bounds[0] + (bounds[1] - bounds[0]) * share


def _length(vector: Float[Array, "*batch 2"]) -> Float[Array, "*batch"]:
    return jnp.sqrt(jnp.sum(vector**2, axis=-1))
