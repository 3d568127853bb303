"""The law of the channel gain: Gamma(K, 1/K) fading over a power-law path loss, uniform distances (D8)."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from emutune.scenario import Scenario
from emutune.world import build_world, draw_episode
from emutune.world.channel import draw_fading, fading_quantiles, path_gain
from emutune.world.fading import Unfaded
from worlds import edited

BLOCKS = (2, 10, 100, 10_000)
DRAWS = 200_000

draw_episode_compiled = jax.jit(draw_episode)
draw_compiled = jax.jit(draw_fading, static_argnums=2)


def exact_quantiles(scores: np.ndarray, blocks: int) -> np.ndarray:
    """Gamma(K, 1/K) at normal scores, each from its nearer tail: 1 - 1e-9 has few digits left."""
    law = stats.gamma(blocks, scale=1 / blocks)
    return np.where(scores < 0, law.ppf(stats.norm.cdf(scores)), law.isf(stats.norm.sf(scores)))


def fading(blocks: int, shape: tuple[int, ...] = (DRAWS,), seed: int = 0) -> np.ndarray:
    quantiles = jnp.asarray(fading_quantiles(blocks), jnp.float32)
    return np.asarray(draw_compiled(jax.random.key(seed), quantiles, shape), float)


@pytest.mark.parametrize("blocks", BLOCKS)
def test_knots_are_exact_quantiles(blocks: int) -> None:
    table = fading_quantiles(blocks)
    scores = np.linspace(-6, 6, len(table))
    np.testing.assert_allclose(table, exact_quantiles(scores, blocks), rtol=1e-9)
    assert (np.diff(table) > 0).all()


@pytest.mark.parametrize(
    ("blocks", "absolute", "relative"),
    [(2, 5.1e-7, 1e-5), (10, 1e-7, 4e-7), (100, 1e-8, 2e-8), (10_000, 1e-10, 1e-10)],
)
def test_reading_between_the_knots_is_accurate_into_the_tails(
    blocks: int, absolute: float, relative: float
) -> None:
    table = fading_quantiles(blocks)
    scores = np.linspace(-6, 6, 4 * (len(table) - 1) + 1)
    exact = exact_quantiles(scores, blocks)
    error = np.abs(np.interp(scores, np.linspace(-6, 6, len(table)), table) - exact)
    assert error.max() < absolute
    assert (error / exact).max() < relative


@pytest.mark.parametrize("blocks", BLOCKS)
def test_draws_are_quantiles_at_normal_scores(blocks: int) -> None:
    # The tests of the law below could not see a table read one knot off.
    scores = np.asarray(jax.random.normal(jax.random.key(0), (DRAWS,)), float)
    assert np.abs(scores).max() < 6
    np.testing.assert_allclose(fading(blocks), exact_quantiles(scores, blocks), rtol=2e-5)


@pytest.mark.parametrize("blocks", BLOCKS)
def test_draws_follow_the_gamma_law(blocks: int) -> None:
    draws = fading(blocks)
    assert stats.kstest(draws, stats.gamma(blocks, scale=1 / blocks).cdf).pvalue > 1e-3
    # Five standard errors, from the moments of the Gamma law: its excess kurtosis is 6 / K.
    assert draws.mean() == pytest.approx(1, abs=5 * np.sqrt(1 / blocks / DRAWS))
    assert draws.var() == pytest.approx(1 / blocks, rel=5 * np.sqrt((2 + 6 / blocks) / DRAWS))


@pytest.mark.parametrize("blocks", [2, 10, 100])
def test_draws_match_averages_of_rayleigh_blocks(blocks: int) -> None:
    # The power of a Rayleigh block is exponential; one draw stands for the average of K of them.
    averages = np.random.default_rng(1).exponential(size=(20_000, blocks)).mean(axis=1)
    assert stats.ks_2samp(fading(blocks), averages).pvalue > 1e-3


@pytest.mark.parametrize("blocks", [2, 100])
@pytest.mark.parametrize("tail", [1e-2, 1e-3, 1e-4])
def test_tails_hold_their_share_of_draws(blocks: int, tail: float) -> None:
    # A Kolmogorov-Smirnov test is blind to the tails, and deep fades are what makes a fleet wait.
    draws, law = fading(blocks), stats.gamma(blocks, scale=1 / blocks)
    allowed = 5 * np.sqrt(tail / DRAWS)
    assert (draws < law.ppf(tail)).mean() == pytest.approx(tail, abs=allowed)
    assert (draws > law.isf(tail)).mean() == pytest.approx(tail, abs=allowed)


def test_draws_are_positive_and_independent() -> None:
    draws = fading(2, (1000, 200))
    assert draws.min() > 0
    for lagged in (draws[1:], draws[:-1]), (draws[:, 1:], draws[:, :-1]):
        correlation = np.corrcoef(lagged[0].ravel(), lagged[1].ravel())[0, 1]
        assert abs(correlation) < 5 / np.sqrt(DRAWS)


@pytest.mark.parametrize(
    ("distance_m", "exponent", "gain"),
    [(100.0, 2.0, 1e-4), (10.0, 3.5, 10**-3.5), (1.0, 4.0, 1.0), (2.0, 3.0, 0.125)],
)
def test_path_gain_falls_with_the_power_of_distance(distance_m: float, exponent: float, gain: float) -> None:
    assert path_gain(jnp.asarray(distance_m), jnp.asarray(exponent)) == pytest.approx(gain, rel=1e-6)


@pytest.fixture(scope="module")
def distances_m(paper: Scenario) -> np.ndarray:
    """The distances of many UEs: under one key, gains at path loss exponents 2 and 3 differ by d alone."""
    draw = partial(draw_episode_compiled, jax.random.key(5))
    worlds = (
        build_world(
            edited(paper, {"fleet.ues": 5000, "fleet.tasks": 3, "radio.path_loss_exponent": exponent})
        )
        for exponent in (2.0, 3.0)
    )
    square, cube = (np.asarray(draw(world).gain, float) for world in worlds)
    return square / cube


def test_distances_are_uniform(paper: Scenario, distances_m: np.ndarray) -> None:
    low, high = paper.fleet.distance_m.min, paper.fleet.distance_m.max
    assert stats.kstest(distances_m[0], stats.uniform(low, high - low).cdf).pvalue > 1e-3


def test_distances_are_fixed_for_an_episode(distances_m: np.ndarray) -> None:
    np.testing.assert_allclose(distances_m, np.broadcast_to(distances_m[0], distances_m.shape), rtol=1e-5)


def test_fading_of_an_episode_follows_the_gamma_law(paper: Scenario) -> None:
    # All UEs at 1 m: the gain is the fading alone.
    at_one_metre = {"fleet.distance_m": {"min": 1.0, "max": 1.0}, "fleet.ues": 100}
    episode = draw_episode_compiled(jax.random.key(6), build_world(edited(paper, at_one_metre)))
    blocks = paper.radio.fading_blocks
    gains = np.asarray(episode.gain, float).ravel()
    assert stats.kstest(gains, stats.gamma(blocks, scale=1 / blocks).cdf).pvalue > 1e-3


def test_fading_is_no_part_of_the_gain_where_it_is_in_the_rate(paper: Scenario) -> None:
    worlds = [build_world(edited(paper, {"radio.rate": rate})) for rate in ("ergodic", "shannon")]
    assert isinstance(worlds[0].radio.fading, Unfaded)
    ergodic, shannon = (np.asarray(draw_episode(jax.random.key(3), world).gain) for world in worlds)
    np.testing.assert_array_equal(ergodic, np.broadcast_to(ergodic[0], ergodic.shape))
    # The distances are the same ones: what sets the two apart is the fading, whose mean is 1.
    assert (shannon / ergodic).mean() == pytest.approx(1, abs=0.05)
