"""What a scenario amounts to: seconds per upload and emulator, and what deserves a second look."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from emutune.scenario import Scenario
from emutune.world import build_world
from emutune.world.channel import path_gain
from emutune.world.link import shared_rate_bps


def link_budget(scenario: Scenario) -> dict[str, Any]:
    """Rates and delays of one UE alone at the nearest and farthest distance, without fading."""
    world = build_world(scenario)
    one = jnp.asarray(1.0)
    low, high = scenario.level_bounds
    power_w = (scenario.fleet.transmit_power_w.min + scenario.fleet.transmit_power_w.max) / 2
    data_mb = (scenario.tasks.data_mb.min + scenario.tasks.data_mb.max) / 2
    budget: dict[str, Any] = {"levels": high - low + 1, "fewest_layers": low, "most_layers": high}
    for place, distance_m in (("nearest", world.distance_m[0]), ("farthest", world.distance_m[1])):
        gain = path_gain(distance_m, world.path_loss_exponent)
        up, down = (
            float(shared_rate_bps(bandwidth, jnp.asarray(power), gain, world.noise_w_per_hz, one))
            for bandwidth, power in (
                (world.uplink_bandwidth_hz, power_w),
                (world.downlink_bandwidth_hz, world.downlink_power_w),
            )
        )
        budget[place] = {
            "distance_m": float(distance_m),
            "uplink_mbps": up / 1e6,
            "downlink_mbps": down / 1e6,
            "upload_s": 8e6 * data_mb / up,
            "smallest_emulator_s": 8e9 * scenario.model.size_gb * low / scenario.model.layers / down,
            "largest_emulator_s": 8e9 * scenario.model.size_gb * high / scenario.model.layers / down,
        }
    budget["remarks"] = _remarks(scenario)
    return budget


def _remarks(scenario: Scenario) -> list[str]:
    remarks = []
    curve, bounds = scenario.quality.curve, scenario.retention
    best, lowest = curve.lowest_between(bounds.min, bounds.max)
    if lowest < curve(1.0):
        remarks.append(
            f"the curve gives an emulator at retention {best:.3g} a lower perplexity ({lowest:.4g}) than the "
            f"full model at the server ({curve(1.0):.4g})"
        )
    if scenario.reward.perplexity_weight == 0 or scenario.reward.delay_weight_per_min == 0:
        remarks.append("one of the two reward weights is zero: there is no trade-off to learn")
    return remarks
