"""Rate and latency of real links, from transfers whose rate and latency are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emutune.fleet.rows import Transfer
from emutune.fleet.server.rates import LinkEstimate, estimate_link, estimate_links

SIZES = np.array([3e5, 2e6, 6e5, 4e6, 9e5, 1e5, 3e6, 1.5e6, 5e5, 2.5e6])


def over(rate_bps: float, latency_s: float, sizes: np.ndarray = SIZES) -> list[Transfer]:
    return [Transfer(moved, latency_s + 8 * moved / rate_bps) for moved in sizes]


def noisy(transfers: list[Transfer], noise: float, seed: int) -> list[Transfer]:
    factors = np.exp(np.random.default_rng(seed).normal(0, noise, len(transfers)))
    return [
        one._replace(seconds=one.seconds * factor) for one, factor in zip(transfers, factors, strict=True)
    ]


def known(transfers: list[Transfer]) -> LinkEstimate:
    found = estimate_link(transfers)
    assert found is not None
    return found


@given(st.floats(1e4, 1e9), st.floats(0, 0.02))
def test_a_constant_rate_with_latency_is_recovered(rate_bps: float, part: float) -> None:
    latency_s = part * 8 * SIZES.mean() / rate_bps
    found = known(over(rate_bps, latency_s))
    assert found.rate_bps == pytest.approx(rate_bps, rel=1e-6)
    assert found.latency_s == pytest.approx(latency_s, rel=1e-6, abs=1e-9)


def test_small_transfers_tell_the_latency_and_large_ones_the_rate() -> None:
    found = known(over(1e8, 0.5))
    assert (found.rate_bps, found.latency_s) == pytest.approx((1e8, 0.5))
    assert found.seconds(1000) == pytest.approx(0.5, rel=1e-3)


def test_one_transfer_tells_a_rate_of_which_little_is_known() -> None:
    assert estimate_link([]) is None
    found = known([Transfer(1e6, 2.0)])
    assert found == LinkEstimate(4e6, 0.0, math.log(2))
    assert found.within(1e6) == pytest.approx((1.0, 4.0))
    assert str(found) == "4 Mbit/s (2 to 8), 0 s"


def test_sizes_that_are_alike_tell_no_latency() -> None:
    alike = noisy(over(5e6, 0.0, 1e6 * np.linspace(1.0, 1.9, 20)), 0.1, 0)
    assert known(alike).latency_s == 0


def test_a_change_of_the_rate_is_followed_within_a_few_transfers() -> None:
    before, after = noisy(over(2e7, 0.05, np.tile(SIZES, 2)), 0.03, 1), noisy(over(2e6, 0.05), 0.03, 2)
    assert known(before).seconds(1e6) == pytest.approx(0.45, rel=0.1)
    assert known(before + after[:1]).seconds(1e6) == pytest.approx(0.45, rel=0.1)
    for count in range(4, 10):
        assert known(before + after[:count]).seconds(1e6) == pytest.approx(4.05, rel=0.15)


@pytest.mark.parametrize("factor", [0.01, 100.0])
def test_outliers_do_not_move_it(factor: float) -> None:
    transfers = over(5e6, 0.5)
    for index in (1, 4, 7):
        transfers[index] = transfers[index]._replace(seconds=factor * transfers[index].seconds)
    found = known(transfers)
    assert (found.rate_bps, found.latency_s) == pytest.approx((5e6, 0.5))


@pytest.mark.parametrize("noise", [0.05, 0.3])
def test_the_interval_covers_nine_of_ten_and_is_as_wide_as_the_noise(noise: float) -> None:
    covered, spreads = [], []
    for seed in range(40):
        sizes = np.random.default_rng(seed).choice(SIZES, 30)
        transfers = noisy(over(5e6, 0.1, sizes), noise, seed)
        for count in range(10, 30):
            found, following = known(transfers[:count]), transfers[count]
            low, high = found.within(following.bytes)
            covered.append(low <= following.seconds <= high)
            spreads.append(found.spread)
    assert 0.8 < np.mean(covered) < 0.97
    assert 1.0 * noise < np.median(spreads) < 2.5 * noise


def test_a_device_that_moved_nothing_has_the_middle_of_the_others() -> None:
    fleet = {"ue1": over(1e6, 0.1), "ue2": over(4e6, 0.3), "ue3": over(2e6, 0.2), "ue4": []}
    *others, new = estimate_links(lambda device, kind: fleet[device], list(fleet), "train")
    assert others == [estimate_link(fleet[name]) for name in ("ue1", "ue2", "ue3")]
    assert new is not None
    assert (new.rate_bps, new.latency_s) == pytest.approx((2e6, 0.2))
    assert new.spread >= math.log(2)
    assert estimate_links(lambda device, kind: [], list(fleet), "train") == [None] * 4
