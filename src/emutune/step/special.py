"""Special functions in single precision that JAX lacks."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

# Polynomial and asymptotic approximations of J0, off by less than 1e-7 before rounding: Abramowitz and Stegun,
# "Handbook of Mathematical Functions", 9.4.1 and 9.4.3.
_NEAR = (1.0, -2.2499997, 1.2656208, -0.3163866, 0.0444479, -0.0039444, 0.00021)
_SIZE = (0.79788456, -0.00000077, -0.0055274, -0.00009512, 0.00137237, -0.00072805, 0.00014476)
_PHASE = (-0.78539816, -0.04166397, -0.00003954, 0.00262573, -0.00054125, -0.00029333, 0.00013558)


def bessel_j0(x: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """The Bessel function of the first kind and order 0 at x >= 0, off by less than 1e-6 up to 1000."""
    third = jnp.minimum(x, 3.0) / 3
    far = jnp.maximum(x, 3.0)
    inverse = 3 / far
    beyond = polynomial(_SIZE, inverse) * jnp.cos(far + polynomial(_PHASE, inverse)) / jnp.sqrt(far)
    return jnp.where(x <= 3.0, polynomial(_NEAR, third**2), beyond)


def polynomial(coefficients: tuple[float, ...], x: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """The polynomial with these coefficients, by rising power."""
    value = jnp.full_like(x, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        value = value * x + coefficient
    return value
