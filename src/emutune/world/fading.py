"""Fading that drifts: each block of a task has a Rayleigh amplitude that moves on from task to task.

The amplitudes of K blocks are complex Gaussian and keep the share rho = J0(2 pi f_D T) of themselves from one
task to the next (Gauss-Markov, with the correlation that waves from all around give a receiver on the move,
Clarke's and Jakes'). The mean of their powers has the law Gamma(K, 1/K) at every step, as where it is drawn
anew, and its correlation k steps apart is rho**(2k).

Seen as one vector of 2K normal components, the next state depends on the present one through its length
alone: turn the axes until the vector lies along the first. Two draws a step are therefore enough, whatever
K is, and exact:

    S' = (rho sqrt(S) + sqrt(1 - rho**2) g)**2 + (1 - rho**2) Q,    g normal, Q chi-squared of 2K - 1 degrees
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from emutune.scenario import Scenario
from emutune.step.special import bessel_j0
from emutune.world.channel import draw_fading, fading_at_scores, fading_quantiles
from emutune.world.draws import Draw, key_of
from emutune.world.mobility import Path

LIGHT_M_PER_S = 299_792_458.0


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Unfaded:
    """Fading is no part of the gain: a rate is the mean over it."""

    def bounds(self) -> float:
        """Of the factor that features and tables are scaled by."""
        return 1.0

    def draw(self, key: Key[Array, ""], path: Path, shape: tuple[int, int]) -> float:
        """A factor that changes nothing."""
        return 1.0


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FreshFading:
    """Fading that is drawn anew for every task.

    Attributes:
        quantiles: of Gamma(K, 1/K), see ``fading_quantiles``.
    """

    quantiles: Float[Array, "knots"]

    def bounds(self) -> Float[Array, "2"]:
        """Three standard normal scores against and in favour."""
        return fading_at_scores(self.quantiles, jnp.asarray([-3.0, 3.0]))

    def draw(self, key: Key[Array, ""], path: Path, shape: tuple[int, int]) -> Float[Array, "rows ues"]:
        """Mean fading power of each task."""
        return draw_fading(key_of(key, Draw.FADING), self.quantiles, shape)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DriftingFading(FreshFading):
    """Fading that drifts.

    Attributes:
        others: quantiles of Q / (2K - 1) at normal scores.
        blocks: K.
        carrier_hz: for the Doppler spread.
        interval_s: T, from one task to the next.
        speed_mps: of every UE; None where each moves at its own.
    """

    others: Float[Array, "knots"]
    blocks: Float[Array, ""]
    carrier_hz: Float[Array, ""]
    interval_s: Float[Array, ""]
    speed_mps: Float[Array, ""] | None

    def draw(self, key: Key[Array, ""], path: Path, shape: tuple[int, int]) -> Float[Array, "rows ues"]:
        """As where it is drawn anew, but correlated from row to row."""
        speed_mps = path.speed_mps[1:] if self.speed_mps is None else self.speed_mps
        kept = jnp.broadcast_to(fading_correlation(self, speed_mps), (shape[0] - 1, shape[1]))
        return draw_drifting(key_of(key, Draw.DRIFT), self, kept)


def build_fading(scenario: Scenario) -> Unfaded | FreshFading | DriftingFading:
    """The law of a scenario whose channel is a modelled one."""
    radio, real = scenario.radio, partial(jnp.asarray, dtype=jnp.float32)
    if radio.fading_blocks is None or radio.rate == "ergodic":
        return Unfaded()
    quantiles = real(fading_quantiles(radio.fading_blocks))
    if radio.fading is None or radio.carrier_ghz is None:
        return FreshFading(quantiles)
    return DriftingFading(
        quantiles=quantiles,
        others=real(fading_quantiles(radio.fading_blocks - 0.5)),
        blocks=real(radio.fading_blocks),
        carrier_hz=real(1e9 * radio.carrier_ghz),
        interval_s=real(scenario.fading_interval_s),
        speed_mps=jax.tree.map(real, radio.fading.speed_mps),
    )


def doppler_hz(speed_mps: Float[Array, "*batch"], carrier_hz: Float[Array, ""]) -> Float[Array, "*batch"]:
    """The greatest Doppler shift f_D of a receiver on the move."""
    return speed_mps * carrier_hz / LIGHT_M_PER_S


def fading_correlation(law: DriftingFading, speed_mps: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """Share of a block's amplitude that is left one task later: J0(2 pi f_D T)."""
    turns = doppler_hz(speed_mps, law.carrier_hz) * law.interval_s
    return bessel_j0(2 * math.pi * turns)


def draw_drifting(
    key: Key[Array, ""], law: DriftingFading, correlation: Float[Array, "later ues"]
) -> Float[Array, "rows ues"]:
    """Mean fading power of each task, mean 1 and variance 1/K, one row more than there are correlations.

    Args:
        key: of the episode.
        law: of the scenario.
        correlation: of each row's amplitudes with those of the row before.
    """
    first_key, along_key, others_key = jax.random.split(key, 3)
    freedom = 2 * law.blocks
    first = freedom * draw_fading(first_key, law.quantiles, correlation.shape[1:])
    along = jax.random.normal(along_key, correlation.shape)
    others = (freedom - 1) * draw_fading(others_key, law.others, correlation.shape)

    def move(before: Array, now: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        kept, normal, rest = now
        lost = jnp.maximum(1 - kept**2, 0.0)
        after = (kept * jnp.sqrt(before) + jnp.sqrt(lost) * normal) ** 2 + lost * rest
        return after, after

    _, later = jax.lax.scan(move, first, (correlation, along, others))
    return jnp.concatenate([first[None], later]) / freedom
