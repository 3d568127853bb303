"""Bits per second and Hz at a mean signal-to-noise ratio: Shannon's, or its mean over Rayleigh fading.

A transfer that lasts many coherence times sees all of the fading. Its rate is then not that of one gain but
the mean over the law of the gain, X ~ Exp(1):

    C(s) = E[log2(1 + s X)] = exp(1/s) E1(1/s) / ln 2

Two properties make ``C`` as good as ``log2(1 + s)`` wherever bands are shared, the certified bound included:

- *C rises and is concave.* For each X >= 0, log2(1 + s X) rises with s and is concave in it, and a mean of
  rising concave functions is one.
- *W C(P / (W N0)) rises with the band W.* With a = P / N0 it is W C(a / W). C is concave and C(0) = 0, so
  C(s) / s falls with s, and W C(a / W) = a C(s) / s at s = a / W, which falls as W rises.

So a link that has a share of band and power alike keeps its ratio, one that has its power to itself
loses ratio but gains rate with every wider share, and no upload is faster than with the whole band.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy import optimize, special

from emutune.step.special import polynomial

_EULER = 0.5772156649015329
# Rational minimax approximation of x exp(x) E1(x) for x >= 1, off by less than 5e-8: Abramowitz and Stegun,
# "Handbook of Mathematical Functions", 5.1.56. In s = 1/x it neither over- nor underflows.
_ABOVE = (1.0, 8.5733287401, 18.0590169730, 8.6347608925, 0.2677737343)
_BELOW = (1.0, 9.5733223454, 25.6329561486, 21.0996530827, 3.9584969228)
# The entire part of E1 about 0, 5.1.11: terms beyond the tenth are below 3e-8 for x <= 1, beyond the 18th below 5e-19.
_ENTIRE = tuple((-1) ** (k + 1) / (k * math.factorial(k)) for k in range(1, 19))
_ENOUGH_IN_SINGLE = 10
# exp(x) E1(x) is the integral of exp(-t) / (x + t): by this quadrature off by less than 4e-13 of it for x >= 1.
_NODES, _WEIGHTS = np.polynomial.laguerre.laggauss(64)


def spectral_nats(snr: Float[Array, "*batch"], ergodic: bool) -> Float[Array, "*batch"]:
    """Nats per second and Hz: ln(1 + s), or its mean over Rayleigh fading."""
    return ergodic_nats(snr) if ergodic else jnp.log1p(snr)


def ergodic_nats(snr: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """``exp(1/s) E1(1/s)`` at every ratio from 0 to infinity.

    Off by less than 3e-7 of its value, and in double precision, which bounds are computed in, by less than 1e-12.
    """
    double = snr.dtype == jnp.float64
    weak = jnp.minimum(snr, 1.0)
    strong = jnp.maximum(snr, 1.0)
    inverse = 1.0 / strong
    if double:
        few = weak * jnp.sum(_WEIGHTS / (1.0 + weak[..., None] * _NODES), axis=-1)
    else:
        few = weak * polynomial(_ABOVE, weak) / polynomial(_BELOW, weak)
    entire = polynomial(_ENTIRE if double else _ENTIRE[:_ENOUGH_IN_SINGLE], inverse)
    many = jnp.exp(inverse) * (jnp.log(strong) - _EULER + inverse * entire)
    return jnp.where(snr < 1.0, few, many)


def spectral_efficiency(snr: Float[np.ndarray, "*batch"], ergodic: bool) -> Float[np.ndarray, "*batch"]:
    """Bits per second and Hz in double precision: log2(1 + s), or C(s)."""
    if not ergodic:
        return np.asarray(np.log2(1 + snr))
    # U(1, 1, x) is exp(x) E1(x) without the overflow.
    return np.asarray(special.hyperu(1.0, 1.0, 1 / snr) / math.log(2))


def snr_of_efficiency(efficiency: Float[np.ndarray, "*batch"], ergodic: bool) -> Float[np.ndarray, "*batch"]:
    """The ratio at which a link carries so many bits per second and Hz: ``spectral_efficiency`` inverted.

    Args:
        efficiency: positive, at most 100.
        ergodic: which of the two laws.
    """
    shannon = np.expm1(efficiency * math.log(2))
    if not ergodic:
        return shannon

    def inverse(bits: float, least: float) -> float:
        # Fading costs rate, so the ratio is above Shannon's, and by less than a factor e: C(s) exceeds
        # log2(1 + s exp(-gamma)), since a mean of a convex function of ln X exceeds the function of its mean.
        def excess(log_snr: float) -> float:
            return float(spectral_efficiency(np.asarray(math.exp(log_snr)), True)) - bits

        low = math.log(least)
        return math.exp(optimize.brentq(excess, low - 1e-9, low + 1, xtol=1e-13))

    return np.vectorize(inverse, otypes=[float])(efficiency, shannon)
