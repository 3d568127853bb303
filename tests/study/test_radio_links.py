"""What ``emutune check`` says of each UE's link, against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import special

from emutune.scenario import load_scenario
from emutune.study.evaluate import held_out_episodes
from emutune.study.link_budget import link_budget


def test_the_paper_s_links_by_hand(paper):
    budget = link_budget(paper)
    # From 500 m the gain is 4e-6: 54 dB of loss; 0.6 W over 1e5 Hz at -174 dBm/Hz.
    far = budget["farthest"]
    assert far["path_loss_db"] == pytest.approx(20 * math.log10(500), abs=1e-4)
    snr = 0.6 * 4e-6 / (10**-20.4 * 1e5)
    assert far["uplink_snr_db"] == pytest.approx(10 * math.log10(snr), abs=1e-4)
    assert far["uplink_mbps"] == pytest.approx(0.1 * math.log2(1 + snr), rel=1e-5)
    assert far["upload_s"] == pytest.approx(400 * 8e6 / (1e5 * math.log2(1 + snr)), rel=1e-5)
    assert far["largest_emulator_s"] / far["smallest_emulator_s"] == pytest.approx(25 / 7)
    assert budget["coherence"] == []
    gain = np.median(np.asarray(held_out_episodes(paper, 1).gain, float)[0, 1:], axis=0)
    np.testing.assert_allclose(
        [row["path_loss_db"] for row in budget["ues"]], -10 * np.log10(gain), rtol=1e-6
    )


@pytest.mark.parametrize(("sight", "near", "far"), [("drawn", 1, 0), ("always", 1, 1), ("never", 0, 0)])
def test_path_loss_at_both_ends_has_the_line_of_sight_that_there_is(sight, near, far):
    scenario = load_scenario("city", ["fleet.ues=3", f"radio.path_loss.line_of_sight={sight}"])
    budget = link_budget(scenario)

    def loss(distance, clear):
        slant = math.log10(math.hypot(distance, 23.5))
        los = 28 + 22 * slant + 20 * math.log10(3.5)
        return los if clear else max(los, 13.54 + 39.08 * slant + 20 * math.log10(3.5))

    assert budget["nearest"]["path_loss_db"] == pytest.approx(loss(35, near), abs=1e-3)
    assert budget["farthest"]["path_loss_db"] == pytest.approx(loss(250, far), abs=1e-3)
    snr = 10 ** (budget["nearest"]["downlink_snr_db"] / 10)
    ergodic = math.exp(1 / snr) * special.exp1(1 / snr) / math.log(2)
    assert budget["nearest"]["downlink_mbps"] == pytest.approx(100 * ergodic, rel=1e-6)
    assert all(0 <= row["line_of_sight_share"] <= 1 for row in budget["ues"])


def test_coherence_time_stands_beside_the_interval():
    budget = link_budget(load_scenario("urban", ["radio.fading.interval_s=0.02", "fleet.ues=2"]))
    slow, fast = budget["coherence"]
    assert fast["doppler_hz"] == pytest.approx(1.5 * 3.5e9 / 299_792_458)
    assert fast["coherence_s"] == pytest.approx(0.423 / fast["doppler_hz"])
    assert slow["correlation"] == pytest.approx(special.j0(2 * math.pi * slow["doppler_hz"] * 0.02))
    told = [remark for remark in budget["remarks"] if "coherence time" in remark]
    assert "some of it stays (J0 = 0.870)" in told[0]
    assert {"distance_m", "last_distance_m"} <= set(budget["ues"][0])


def test_a_transfer_too_short_for_the_ergodic_rate_is_told():
    changes = ["radio.fading_blocks=12", "tasks.data_mb={min=0.001, max=0.002}"]
    mobility = "mobility={speed_mps={min=0.01, max=0.02}, interval_s=9}"
    told = link_budget(load_scenario("city", ["fleet.ues=2", mobility, *changes]))["remarks"]
    assert any("too short for the ergodic rate" in remark for remark in told)


def test_transfers_that_outlast_the_interval_are_told():
    told = link_budget(load_scenario("trace", ["model.size_gb=50"]))["remarks"]
    assert any("longer than the 60 s from one task to the next" in remark for remark in told)
