"""What a scenario amounts to: seconds and joules of what may be done, and whether there is something to learn."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax.numpy as jnp

from emutune.bounds import certified_bounds
from emutune.policies import AllServer, Random
from emutune.scenario import Scenario
from emutune.study.evaluate import evaluate_policy, held_out_episodes, run_episodes, search_best_fixed
from emutune.world import World, build_world
from emutune.world.channel import path_gain
from emutune.world.link import shared_rate_bps

# Below this many percent over the bound, a policy that decides the same at every step is good enough.
_TRIVIAL_PERCENT = 2.0


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
    budget["models"] = _training(scenario, world)
    budget["shares"] = reward_shares(scenario)
    budget["remarks"] = _remarks(scenario)
    return budget


def reward_shares(scenario: Scenario, episodes: int = 4) -> dict[str, float]:
    """What part of the random policy's cost each term of the reward is, in percent."""
    world, drawn = build_world(scenario), held_out_episodes(scenario, episodes)
    zero, energy = jnp.asarray(0.0), world.devices.energy
    # The random policy decides the same whatever the weights are, and they are no part of the program.
    costless = replace(world, perplexity_weight=zero, delay_weight_per_s=zero)
    free = costless
    if energy is not None:
        over = energy.over_budget_weight_per_j
        nothing = energy._replace(weight_per_j=zero, over_budget_weight_per_j=None if over is None else zero)
        free = replace(costless, devices=world.devices._replace(energy=nothing))
    worlds = {
        "perplexity": replace(free, perplexity_weight=world.perplexity_weight),
        "delay": replace(free, delay_weight_per_s=world.delay_weight_per_s),
    }
    if energy is not None:
        worlds["energy"] = costless
    costs = {name: -float(run_episodes(one, Random(), drawn)[0].mean()) for name, one in worlds.items()}
    total = sum(costs.values())
    return {name: 100 * cost / total if total else 0.0 for name, cost in costs.items()}


def trivial_policies(scenario: Scenario, episodes: int = 8) -> dict[str, Any]:
    """How far policies that always do the same are from the certified bound, and what follows from that."""
    drawn = held_out_episodes(scenario, episodes)
    bound = certified_bounds(scenario, drawn).mean()
    over = {
        name: float(100 * (evaluate_policy(scenario, policy, drawn).episode_return.mean() / bound - 1))
        for name, policy in (("all_server", AllServer()), ("best_fixed", search_best_fixed(scenario)))
    }
    best = min(over, key=lambda name: over[name])
    costs = f"{best} costs at most {over[best]:.2f} % more than any policy must"
    verdict = (
        f"nothing to learn here: {costs}"
        if over[best] <= _TRIVIAL_PERCENT
        else f"no policy that always does the same comes near the bound: {costs}"
    )
    return {"over_bound_percent": over, "episodes": episodes, "verdict": verdict}


def _training(scenario: Scenario, world: World) -> list[dict[str, float]]:
    """Seconds and joules of training a task of mean size, for each model; nothing where it takes no time."""
    wanted = scenario.computation
    if wanted is None or world.devices.computation is None:
        return []
    compute = None if scenario.energy is None else scenario.energy.compute_j_per_tflop
    rows = []
    for model, per_bit in zip(scenario.models, world.devices.computation.tflop_per_bit, strict=True):
        tflop = float(per_bit * world.data_bits.mean())
        smallest, largest = (tflop * layers / model.layers for layers in (model.fewest, model.most))
        row = {
            "fastest_smallest_s": smallest / wanted.device_tflops.max,
            "slowest_largest_s": largest / wanted.device_tflops.min,
            "server_alone_s": tflop / wanted.server_tflops,
            "server_all_s": tflop * scenario.fleet.ues / wanted.server_tflops,
        }
        if compute is not None:
            row |= {"least_j": smallest * compute.min, "most_j": largest * compute.max}
        rows.append(row)
    return rows


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
