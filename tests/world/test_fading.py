"""Fading that drifts: its stationary law, its correlation against J0, and who it depends on."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from emutune.scenario import load_scenario
from emutune.world import build_world, draw_episode
from emutune.world.fading import DriftingFading, build_fading, doppler_hz, draw_drifting, fading_correlation

draw = jax.jit(draw_drifting)
draw_episode_compiled = jax.jit(draw_episode)


def law_of(blocks: int, speed_mps: float = 1.0, interval_s: float = 0.01) -> DriftingFading:
    section = f"radio.fading={{speed_mps={speed_mps}, interval_s={interval_s}}}"
    scenario = load_scenario("paper", [section, "radio.carrier_ghz=3.5", f"radio.fading_blocks={blocks}"])
    law = build_fading(scenario)
    assert isinstance(law, DriftingFading)
    return law


def test_correlation_is_j0_of_the_doppler_spread_times_the_interval() -> None:
    law = law_of(10, interval_s=0.005)
    speeds = np.array([0.0, 0.5, 1.4, 8.3, 30.0])
    shift = speeds * 3.5e9 / 299_792_458
    np.testing.assert_allclose(doppler_hz(jnp.asarray(speeds), jnp.asarray(3.5e9)), shift, rtol=1e-6)
    expected = special.j0(2 * math.pi * shift * 0.005)
    np.testing.assert_allclose(fading_correlation(law, jnp.asarray(speeds)), expected, atol=1e-6)
    # 100 km/h within 5 ms: 32 waves' worth of phase, of either sign.
    assert expected.min() < 0 < expected.max() == 1


@pytest.mark.parametrize("blocks", [2, 10, 100])
@pytest.mark.parametrize("kept", [0.0, 0.6, 0.97, -0.3])
def test_every_row_has_the_law_of_fading_drawn_anew(blocks: int, kept: float) -> None:
    law = law_of(blocks)
    rows = np.asarray(draw(jax.random.key(0), law, jnp.full((4, 20_000), kept)), float)
    law = stats.gamma(blocks, scale=1 / blocks)
    for row in rows:
        assert stats.kstest(row, law.cdf).pvalue > 1e-4


@pytest.mark.parametrize("speed_mps", [0.2, 0.7, 1.4, 3.0])
def test_autocorrelation_is_that_of_powers_of_gaussian_amplitudes(speed_mps: float) -> None:
    law = law_of(4, speed_mps)
    kept = fading_correlation(law, jnp.full((3, 40_000), speed_mps))
    rows = np.asarray(draw(jax.random.key(1), law, kept), float)
    j0 = special.j0(2 * math.pi * speed_mps * 3.5e9 / 299_792_458 * 0.01)
    for lag in (1, 2, 3):
        # The power of a complex Gaussian amplitude is correlated by the square of the amplitude's.
        measured = np.corrcoef(rows[0], rows[lag])[0, 1]
        assert measured == pytest.approx(j0 ** (2 * lag), abs=6 / math.sqrt(40_000))


def test_it_agrees_with_blocks_simulated_one_by_one() -> None:
    blocks, kept, count = 3, 0.8, 20_000
    generator = np.random.default_rng(2)

    def normal() -> np.ndarray:
        return generator.normal(size=(count, blocks, 2)) * math.sqrt(0.5)

    before = normal()
    after = kept * before + math.sqrt(1 - kept**2) * normal()
    law = law_of(blocks)
    rows = np.asarray(draw(jax.random.key(3), law, jnp.full((1, count), kept)), float)
    first, second = ((part**2).sum((1, 2)) / blocks for part in (before, after))
    # Not only each row's law: the two rows' joint one, along the directions in which it is widest and narrowest.
    for mine, theirs in ((rows[1] - rows[0], second - first), (rows[0] + rows[1], first + second)):
        assert stats.ks_2samp(mine, theirs).pvalue > 1e-3


def test_who_stands_still_keeps_its_fading() -> None:
    law = law_of(10, 0.0)
    kept = fading_correlation(law, jnp.zeros((5, 50)))
    rows = np.asarray(draw(jax.random.key(4), law, kept))
    np.testing.assert_allclose(rows, np.broadcast_to(rows[0], rows.shape), rtol=1e-6)


def test_an_episode_drifts_and_leaves_other_draws_alone() -> None:
    slow = ["radio.carrier_ghz=3.5", "radio.fading={speed_mps=0.3, interval_s=0.01}", "fleet.ues=400"]
    drifting, plain = (
        draw_episode_compiled(jax.random.key(5), build_world(load_scenario("paper", changes)))
        for changes in (slow, slow[2:])
    )
    for field in ("complexity", "data_bits", "transmit_power_w"):
        np.testing.assert_array_equal(getattr(drifting, field), getattr(plain, field))
    # The distances are the same, so over many tasks are the mean gains.
    ratio = np.asarray(drifting.gain).mean(0) / np.asarray(plain.gain).mean(0)
    assert np.abs(np.log(ratio)).max() < 0.5
    assert np.median(ratio) == pytest.approx(1, abs=0.02)
    steps = np.diff(np.log(np.asarray(drifting.gain)), axis=0).std()
    fresh = np.diff(np.log(np.asarray(plain.gain)), axis=0).std()
    j0 = special.j0(2 * math.pi * 0.3 * 3.5e9 / 299_792_458 * 0.01)
    assert steps / fresh == pytest.approx(math.sqrt(1 - j0**2), rel=0.05)
