"""Special functions in single precision against SciPy's."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from scipy import special

from emutune.step.special import bessel_j0


def test_j0_is_scipy_s() -> None:
    x = np.concatenate([np.linspace(0, 60, 6001), np.geomspace(60, 1000, 500)]).astype(np.float32)
    np.testing.assert_allclose(bessel_j0(jnp.asarray(x)), special.j0(x.astype(float)), atol=1e-6)
