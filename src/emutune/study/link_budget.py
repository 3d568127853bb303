"""What a scenario amounts to: links, seconds and joules of what may be done, and whether there is much to learn."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float
from scipy import special

from emutune.bounds import certified_bounds
from emutune.policies import AllServer, Random
from emutune.policies.fixed import search_best_fixed
from emutune.policies.measure import watch_episodes
from emutune.scenario import Scenario
from emutune.step.ergodic import spectral_efficiency
from emutune.study.evaluate import evaluate_policy, held_out_episodes, held_out_key
from emutune.world import Episode, World, build_world
from emutune.world.dynamics import draw_links
from emutune.world.fading import LIGHT_M_PER_S

# Below this many percent over the bound, a policy that decides the same at every step is good enough.
_TRIVIAL_PERCENT = 2.0
# What is told of a UE's way: of which of its draws, and what of them.
_OF_WAY: tuple[tuple[str, str, Callable[[np.ndarray], float]], ...] = (
    ("distance_m", "distance_m", lambda rows: rows[0]),
    ("last_distance_m", "distance_m", lambda rows: rows[-1]),
    ("line_of_sight_share", "line_of_sight", np.mean),
)


class _Link(NamedTuple):
    """One UE's gains, one value or several."""

    gain: Float[np.ndarray, "*rows"]
    downlink_gain: Float[np.ndarray, "*rows"]
    transmit_power_w: float


def link_budget(scenario: Scenario) -> dict[str, Any]:
    """What links carry and how long transfers take, each UE alone; see ``docs/figures.md`` for the keys.

    At the nearest and farthest distance without shadowing and fading (with line of sight if it is drawn, and
    without), and for each UE of the first held-out episode, at its median gain.
    """
    world = build_world(scenario)
    low, high = scenario.level_bounds
    budget: dict[str, Any] = {"levels": high - low + 1, "fewest_layers": low, "most_layers": high}
    power = scenario.fleet.transmit_power_w
    for place, (distance_m, reached) in world.radio.ends().items():
        gain = np.asarray(reached, np.float64)
        link = _Link(gain, gain, (power.min + power.max) / 2)
        budget[place] = {"distance_m": float(distance_m), **_carried(scenario, link)}
    budget["ues"] = _each_ue(scenario, world)
    budget["coherence"] = _coherence(scenario)
    budget["models"] = _training(scenario, world)
    budget["shares"] = reward_shares(scenario)
    budget["remarks"] = [*_remarks(scenario), *_radio_remarks(scenario, budget)]
    return budget


def _carried(scenario: Scenario, link: _Link) -> dict[str, float]:
    """Ratios, rates and delays of a UE that has the bands to itself, at its median gain."""
    radio, model = scenario.radio, scenario.models[0]
    low, high = scenario.level_bounds
    noise = 10 ** ((radio.noise_dbm_per_hz - 30) / 10)
    up_hz, down_hz = radio.uplink_bandwidth_hz, radio.downlink_bandwidth_hz
    up_snr = link.transmit_power_w * np.median(link.gain) / (noise * up_hz)
    down_snr = radio.downlink_power_w * np.median(link.downlink_gain) / (noise * down_hz)
    up, down = (
        hertz * float(spectral_efficiency(np.asarray(snr), radio.rate == "ergodic"))
        for hertz, snr in ((up_hz, up_snr), (down_hz, down_snr))
    )
    data_mb = (scenario.tasks.data_mb.min + scenario.tasks.data_mb.max) / 2
    return {
        "path_loss_db": -10 * math.log10(np.median(link.downlink_gain)),
        "uplink_snr_db": 10 * math.log10(up_snr),
        "downlink_snr_db": 10 * math.log10(down_snr),
        "uplink_mbps": up / 1e6,
        "downlink_mbps": down / 1e6,
        "upload_s": 8e6 * data_mb / up,
        "smallest_emulator_s": 8e9 * model.emulator_gb(low) / down,
        "largest_emulator_s": 8e9 * model.emulator_gb(high) / down,
    }


def _each_ue(scenario: Scenario, world: World) -> list[dict[str, float]]:
    """The UEs of the first held-out episode."""
    channel, power_w = jax.jit(draw_links)(held_out_key(0), world)
    gain = np.asarray(channel.gain, np.float64)[1:]
    down = gain if channel.downlink_gain is None else np.asarray(channel.downlink_gain, np.float64)[1:]
    way = {name: np.asarray(rows) for name, rows in channel.way.items()}
    told = [(name, read, way[drawn]) for name, drawn, read in _OF_WAY if drawn in way]
    return [
        {name: float(read(rows[:, n])) for name, read, rows in told}
        | _carried(scenario, _Link(gain[:, n], down[:, n], float(power_w[n])))
        for n in range(world.ues)
    ]


def _coherence(scenario: Scenario) -> list[dict[str, float]]:
    """Doppler spread and coherence time 0.423 / f_D at the slowest and fastest speed, if speeds are known."""
    carrier_ghz, interval_s = scenario.radio.carrier_ghz, scenario.fading_interval_s or scenario.interval_s
    if carrier_ghz is None or interval_s is None:
        return []
    rows = []
    for speed in scenario.speeds_mps:
        doppler_hz = speed * 1e9 * carrier_ghz / LIGHT_M_PER_S
        row = {"speed_mps": speed, "doppler_hz": doppler_hz}
        if doppler_hz > 0:
            row["coherence_s"] = 0.423 / doppler_hz
        row["interval_s"] = interval_s
        row["correlation"] = float(special.j0(2 * math.pi * doppler_hz * interval_s))
        rows.append(row)
    return rows


def reward_shares(scenario: Scenario, episodes: int = 4) -> dict[str, float]:
    """What part of the random policy's cost each term of the reward is, in percent."""
    world, drawn = build_world(scenario), held_out_episodes(scenario, episodes)

    @jax.jit
    def terms(world: World, episodes: Episode) -> dict[str, jax.Array]:
        return watch_episodes(world, Random(), episodes, lambda step: step.outcome.charge.terms)

    costs = {name: float(part.sum()) for name, part in terms(world, drawn).items()}
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
    if wanted is None:
        return []
    compute = scenario.energy.compute_j_per_tflop if scenario.energy else None
    rows = []
    for model, per_bit in zip(scenario.models, world.rules.models.whole_tflop_per_bit, strict=True):
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
    return [*remarks, *_cache_remarks(scenario)]


def _cache_remarks(scenario: Scenario) -> list[str]:
    cache_gb = scenario.cache_gb
    if cache_gb is None:
        return []
    largest_gb = sum(model.emulator_gb(model.most) for model in scenario.models)
    smallest_gb = sorted(model.emulator_gb(model.fewest) for model in scenario.models)
    if largest_gb <= cache_gb:
        return [
            f"a cache of {cache_gb:g} GB holds the largest emulator of every family: none ever makes room"
        ]
    if sum(smallest_gb[:2]) > cache_gb:
        return [f"a cache of {cache_gb:g} GB holds no two emulators of different families"]
    return []


def _radio_remarks(scenario: Scenario, budget: dict[str, Any]) -> list[str]:
    remarks = []
    shortest_s = min(row["upload_s"] for row in budget["ues"])
    longest_s = float(np.median([row["largest_emulator_s"] for row in budget["ues"]]))
    for row in budget["coherence"]:
        at = f"at {row['speed_mps']:g} m/s the coherence time is {row.get('coherence_s', math.inf):.3g} s"
        if scenario.radio.rate == "ergodic" and row.get("coherence_s", math.inf) > shortest_s / 10:
            remarks.append(
                f"{at}, and an upload may take {shortest_s:.3g} s: too short for the ergodic rate, which is a mean "
                "over many coherence times"
            )
        if scenario.fading_interval_s:
            lasts = "hardly any of it is left" if row["correlation"] ** 2 < 0.01 else "some of it stays"
            remarks.append(
                f"{at} and a block's fading of the next task comes {row['interval_s']:.3g} s later: {lasts} "
                f"(J0 = {row['correlation']:.3f})"
            )
    interval_s = scenario.interval_s or math.inf
    if longest_s > interval_s:
        remarks.append(
            f"the largest emulator takes the median UE {longest_s:.3g} s alone, longer than the {interval_s:.3g} s "
            "from one task to the next, through which its gain stays the same"
        )
    return remarks
