"""Rates of shared links, worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from emutune.scenario import Scenario
from emutune.step import Links, build_rules, downlink_bps, uplink_bps
from emutune.step.link import downlink_gain, uplink_gain
from worlds import edited


def links(bandwidth_hz: float, noise_w_per_hz: float, ergodic: bool = False) -> Links:
    """A cell whose links have one bandwidth, and a downlink of 60 W."""
    values = (bandwidth_hz, bandwidth_hz, 60.0, noise_w_per_hz)
    return Links(ergodic, True, *(jnp.asarray(value) for value in values))


def test_a_link_of_its_own_has_its_rate_whoever_else_sends() -> None:
    own = replace(links(1e5, 1e-6), shared=False)
    rates = uplink_bps(own, jnp.asarray([102.3, 409.5]), jnp.asarray(1.0), jnp.asarray([[1.0], [3.0]]))
    assert rates.shape == (2, 2)
    np.testing.assert_allclose(rates, np.broadcast_to([1e6, 1e5 * np.log2(4096)], (2, 2)), rtol=1e-6)


@pytest.mark.parametrize("ergodic", [False, True])
def test_the_gain_of_a_rate_has_that_rate(ergodic: bool) -> None:
    cell, rates, power = links(1e5, 1e-6, ergodic), np.array([1e3, 2e5, 3e6]), np.array([0.2, 1.0, 0.5])
    found = uplink_bps(cell, jnp.asarray(power), jnp.asarray(uplink_gain(cell, power, rates)))
    np.testing.assert_allclose(found, rates, rtol=1e-5)
    np.testing.assert_allclose(downlink_bps(cell, jnp.asarray(downlink_gain(cell, rates))), rates, rtol=1e-5)


@pytest.mark.parametrize(("sharers", "expected"), [(0, 1e6), (1, 1e6), (3, 12e5 / 3)])
def test_rate_by_hand(sharers: int, expected: float) -> None:
    # 102.3 W arrive over 1e5 Hz x 1e-6 W/Hz = 0.1 W of noise: SNR 1023, 10 bit/s per Hz, 1e6 bit/s.
    # A third of the band with the power that makes SNR 4095 has 12 bit/s per Hz: 12 x 1e5 / 3.
    received_w = 102.3 if sharers < 2 else 4095 * 0.1 / 3
    rate = uplink_bps(links(1e5, 1e-6), jnp.asarray(received_w), jnp.asarray(1.0), float(sharers))
    assert rate == pytest.approx(expected, rel=1e-5)


def test_a_lone_download_has_band_and_power_to_itself() -> None:
    # 60 W over 1e5 Hz x 1e-6 W/Hz = 0.1 W of noise at a gain of 1.705: SNR 1023, 10 bit/s per Hz.
    assert downlink_bps(links(1e5, 1e-6), jnp.asarray(102.3 / 60)) == pytest.approx(1e6, rel=1e-5)


def test_noise_is_per_hertz_and_in_decibels(paper: Scenario) -> None:
    # -174 dBm is 10**-17.4 mW, 10**-20.4 W.
    for dbm, watts in ((-174.0, 10**-20.4), (-30.0, 1e-6)):
        noise = build_rules(edited(paper, {"radio.noise_dbm_per_hz": dbm})).links.noise_w_per_hz
        assert noise == pytest.approx(watts, rel=1e-6)


def test_shared_links_have_the_rate_by_hand() -> None:
    # A half of 1e6 Hz at SNR 1: C(1) = e E1(1) / ln 2 = 0.86034..., so 430 kbit/s.
    rate = uplink_bps(links(1e6, 1e-6, ergodic=True), jnp.asarray(0.5), jnp.asarray(1.0), 2.0)
    assert float(rate) == pytest.approx(5e5 * math.e * special.exp1(1) / math.log(2), rel=1e-6)
    assert float(rate) == pytest.approx(430_173, rel=1e-4)
