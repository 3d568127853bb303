"""The ergodic rate against exact values, Monte Carlo, and the properties that the bound rests on."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import special

from emutune.scenario import Scenario
from emutune.step import build_rules, charge
from emutune.step.ergodic import ergodic_nats, snr_of_efficiency, spectral_efficiency, spectral_nats
from worlds import decades, edited, fleet_alike, plan_from

compiled = jax.jit(ergodic_nats)


def exact_nats(snr: float) -> float:
    """exp(1/s) E1(1/s) with forty digits."""
    with mpmath.workdps(40):
        x = 1 / mpmath.mpf(snr)
        # Beyond exp's range the asymptotic series is exact to all digits.
        return float(
            mpmath.exp(x) * mpmath.e1(x)
            if x < 1e5
            else sum((-1) ** k * mpmath.fac(k) / x ** (k + 1) for k in range(6))
        )


def test_it_is_exact_over_the_whole_range_of_single_precision() -> None:
    snr = np.concatenate([np.logspace(-37, 37, 600), np.linspace(0.9, 1.1, 201)]).astype(np.float32)
    exact = np.array([exact_nats(float(one)) for one in snr])
    np.testing.assert_allclose(compiled(jnp.asarray(snr)), exact, rtol=4e-7)


def test_it_is_exact_in_double_precision_where_bounds_read_it() -> None:
    snr = np.concatenate([np.logspace(-30, 30, 200), np.linspace(0.9, 1.1, 21)])
    with jax.enable_x64(True):
        found = np.asarray(jax.jit(ergodic_nats)(jnp.asarray(snr)))
    np.testing.assert_allclose(found, [exact_nats(float(one)) for one in snr], rtol=1e-12)


def test_its_ends_are_finite() -> None:
    assert compiled(jnp.asarray(0.0)) == 0
    # exp(1/s) alone overflows below 0.011, and E1 underflows.
    assert compiled(jnp.asarray(1e-30)) == pytest.approx(1e-30, rel=1e-6)
    assert np.isposinf(compiled(jnp.asarray(jnp.inf)))
    assert np.isfinite(jax.grad(ergodic_nats)(jnp.asarray(1e-20)))
    assert np.isfinite(jax.grad(ergodic_nats)(jnp.asarray(1e20)))


@pytest.mark.parametrize("snr", [0.01, 0.5, 1.0, 20.0, 1e4])
def test_it_is_the_mean_rate_over_rayleigh_fading(snr: float) -> None:
    powers = np.random.default_rng(0).exponential(size=400_000)
    rates = np.log2(1 + snr * powers)
    error = rates.std() / math.sqrt(len(rates))
    assert float(compiled(jnp.asarray(snr))) / math.log(2) == pytest.approx(rates.mean(), abs=5 * error)


def test_double_precision_agrees_with_scipy_and_with_forty_digits() -> None:
    snr = np.logspace(-30, 30, 121)
    exact = np.array([exact_nats(one) for one in snr]) / math.log(2)
    np.testing.assert_allclose(spectral_efficiency(snr, True), exact, rtol=1e-9)
    moderate = snr[snr > 2e-3]
    np.testing.assert_allclose(
        spectral_efficiency(moderate, True),
        np.exp(1 / moderate) * special.exp1(1 / moderate) / math.log(2),
        rtol=1e-9,
    )
    np.testing.assert_allclose(spectral_efficiency(snr, False), np.log1p(snr) / math.log(2), atol=1e-12)


@given(decades(1e-12, 1e12), st.floats(1.001, 100))
def test_it_rises_with_the_ratio_and_less_than_in_proportion(snr: float, factor: float) -> None:
    one, other = spectral_efficiency(np.array([snr, snr * factor]), True)
    assert one < other < factor * one


@given(decades(1e-12, 1e12), st.floats(1.001, 1000))
def test_a_wider_band_carries_more_at_the_same_power(snr: float, factor: float) -> None:
    wide, narrow = spectral_efficiency(np.array([snr / factor, snr]), True)
    assert wide * factor > narrow


@given(decades(1e-3, 1e9))
def test_fading_costs_rate_but_less_than_a_factor_in_the_ratio(snr: float) -> None:
    shannon, least = spectral_efficiency(np.array([snr, snr * math.exp(-np.euler_gamma)]), False)
    assert least * (1 - 1e-9) <= spectral_efficiency(np.array([snr]), True)[0] <= shannon * (1 + 1e-9)


@given(st.floats(1e-6, 60), st.booleans())
def test_the_inverse_inverts(efficiency: float, ergodic: bool) -> None:
    snr = snr_of_efficiency(np.array([efficiency]), ergodic)
    assert spectral_efficiency(snr, ergodic)[0] == pytest.approx(efficiency, rel=1e-7)


def test_without_fading_it_is_shannon_s() -> None:
    snr = jnp.logspace(-3, 3, 13)
    np.testing.assert_array_equal(spectral_nats(snr, False), jnp.log1p(snr))


def test_a_step_of_an_ergodic_world_by_plain_numbers(paper: Scenario) -> None:
    # Wide bands, so that ratios are low enough for fading to matter.
    changes = {"radio.rate": "ergodic", "radio.uplink_bandwidth_hz": 1e8, "radio.noise_dbm_per_hz": -130.0}
    gain = 10 ** -np.linspace(3.4, 5.4, 6)
    situation = fleet_alike(6)._replace(gain=jnp.asarray(gain), downlink_gain=jnp.asarray(gain))
    at_server = np.array([True, True, False, False, False, True])
    plan = plan_from([("server", 0) if there else ("local", 16) for there in at_server])
    delay_s = charge(build_rules(edited(paper, changes)), situation, plan).taken.delay_s
    noise = 10 ** (-130 / 10) / 1000
    for n in range(6):
        if at_server[n]:
            hertz, power, bits = 1e8 / 3, 0.5, 3.2e9
        else:
            hertz, power, bits = 1e6 / 3, 20.0, 0.5 * 8e9 * 10.8
        rate = hertz * exact_nats(float(power * gain[n] / (noise * hertz))) / math.log(2)
        assert delay_s[n] == pytest.approx(bits / rate, rel=1e-5)
