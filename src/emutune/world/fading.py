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
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from emutune.scenario import Scenario
from emutune.step.special import bessel_j0
from emutune.world.channel import draw_fading, fading_quantiles

LIGHT_M_PER_S = 299_792_458.0


class FadingTables(NamedTuple):
    """What fading that drifts is drawn with.

    Attributes:
        others: quantiles of Q / (2K - 1) at normal scores, see ``fading_quantiles``.
        blocks: K.
        carrier_hz: for the Doppler spread.
        speed_mps: of every UE; None where each moves at its own.
        interval_s: T, from one task to the next.
    """

    others: Float[Array, "knots"]
    blocks: Float[Array, ""]
    carrier_hz: Float[Array, ""]
    speed_mps: Float[Array, ""] | None
    interval_s: Float[Array, ""]


def build_fading(scenario: Scenario) -> FadingTables | None:
    """The tables of a scenario; None if its fading is drawn anew for every task."""
    radio = scenario.radio
    if radio.fading is None or radio.fading_blocks is None or radio.carrier_ghz is None:
        return None
    blocks, real = radio.fading_blocks, partial(jnp.asarray, dtype=jnp.float32)
    return FadingTables(
        others=real(fading_quantiles(blocks - 0.5)),
        blocks=real(blocks),
        carrier_hz=real(1e9 * radio.carrier_ghz),
        speed_mps=None if radio.fading.speed_mps is None else real(radio.fading.speed_mps),
        interval_s=real(scenario.fading_interval_s),
    )


def doppler_hz(speed_mps: Float[Array, "*batch"], carrier_hz: Float[Array, ""]) -> Float[Array, "*batch"]:
    """The greatest Doppler shift f_D of a receiver on the move."""
    return speed_mps * carrier_hz / LIGHT_M_PER_S


def fading_correlation(tables: FadingTables, speed_mps: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """Share of a block's amplitude that is left one task later: J0(2 pi f_D T)."""
    turns = doppler_hz(speed_mps, tables.carrier_hz) * tables.interval_s
    return bessel_j0(2 * math.pi * turns)


def draw_drifting(
    key: Key[Array, ""],
    tables: FadingTables,
    quantiles: Float[Array, "knots"],
    correlation: Float[Array, "later ues"],
) -> Float[Array, "rows ues"]:
    """Mean fading power of each task, mean 1 and variance 1/K, one row more than there are correlations.

    Args:
        key: of the episode.
        tables: of the scenario.
        quantiles: of Gamma(K, 1/K), for the first row.
        correlation: of each row's amplitudes with those of the row before.
    """
    first_key, along_key, others_key = jax.random.split(key, 3)
    freedom = 2 * tables.blocks
    first = freedom * draw_fading(first_key, quantiles, correlation.shape[1:])
    along = jax.random.normal(along_key, correlation.shape)
    others = (freedom - 1) * draw_fading(others_key, tables.others, correlation.shape)

    def move(before: Array, now: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        kept, normal, rest = now
        lost = jnp.maximum(1 - kept**2, 0.0)
        after = (kept * jnp.sqrt(before) + jnp.sqrt(lost) * normal) ** 2 + lost * rest
        return after, after

    _, later = jax.lax.scan(move, first, (correlation, along, others))
    return jnp.concatenate([first[None], later]) / freedom
