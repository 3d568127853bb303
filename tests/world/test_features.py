"""Every feature of a UE in plain numbers, from what the documentation says of it."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np
from scipy import stats

import plain
from emutune.scenario import Range, Scenario
from emutune.world import build_world, features_of, observe, ue_features
from worlds import EVERYTHING, play_both, world_with

# NR's timing advance at 30 kHz of subcarrier spacing, as a distance.
STEP_M = 39.06


def centred(value: float, low: float, high: float) -> float:
    return 2 * (value - low) / (high - low) - 1


def between(value: float, bounds: Range) -> float:
    return centred(value, bounds.min, bounds.max)


def gain_feature(scenario: Scenario, gain: float) -> float:
    """Between the farthest and nearest distance, fading three standard normal scores against and in favour."""
    exponent, distance = scenario.radio.path_loss_exponent, scenario.fleet.distance_m
    blocks = scenario.radio.fading_blocks
    weak, strong = stats.gamma(blocks, scale=1 / blocks).ppf(stats.norm.cdf([-3, 3]))
    ends = distance.max**-exponent * weak, distance.min**-exponent * strong
    return centred(math.log(gain), *map(math.log, ends))


def training_tflop(scenario: Scenario, family: int, bits: float) -> float:
    tokens = bits / 8 / scenario.computation.bytes_per_token
    return 4e-3 * scenario.models[family].parameters_billion * tokens * scenario.computation.epochs


def expected_features(scenario: Scenario, task: dict[str, Any], mine: plain.Carried) -> list[float]:
    """Of one UE, in the order in which ``ue_features`` lists them."""
    models, family, energy = scenario.models, task["family"], scenario.energy
    most = scenario.retention.max

    def retention(of: int) -> float:
        return mine.of(of) / models[of].layers

    others = [retention(of) for of in range(len(models)) if of != family]
    tflops, computation = task["tflops"], scenario.computation
    every = range(len(models))
    fast, slow = computation.device_tflops.max, computation.device_tflops.min
    data = [8e6 * scenario.tasks.data_mb.min, 8e6 * scenario.tasks.data_mb.max]
    quickest = min(training_tflop(scenario, of, data[0]) for of in every) / fast
    longest = max(training_tflop(scenario, of, data[1]) for of in every) / slow
    seconds = training_tflop(scenario, family, task["data_bits"]) / tflops
    return [
        gain_feature(scenario, task["previous_gain"]),
        between(task["complexity"], scenario.tasks.complexity) if task["active"] else 0.0,
        centred(task["data_bits"], *data) if task["active"] else 0.0,
        retention(family) / most,
        max(others) / most,
        sum(retention(of) * models[of].size_gb for of in every) / scenario.families.cache_gb,
        max(1 - mine.spent_j / energy.budget_j, -1.0),
        models[family].size_gb / max(model.size_gb for model in models),
        models[family].curve(1.0) / max(model.curve(1.0) for model in models),
        between(task["distance_m"], scenario.fleet.distance_m),
        task["approach_m"] / (scenario.mobility.speed_mps.max * scenario.mobility.interval_s + STEP_M),
        centred(*map(math.log, (tflops, slow, fast))),
        centred(*map(math.log, (seconds, quickest, longest))),
        between(task["compute_w"] / tflops, energy.compute_j_per_tflop),
        max(plain.possible_layers(scenario, task), default=0) / models[family].layers / most,
        -1.0 if task["private"] else 1.0,
        1.0 if task["active"] else -1.0,
    ]


def test_every_feature_is_what_the_documentation_says() -> None:
    scenario = world_with(EVERYTHING | {"cache", "mobility"}, "fleet.ues=5", "energy.budget_j=20000.0")
    world = build_world(scenario)
    features = jax.jit(lambda state: ue_features(world, observe(world, state)))
    spread = []
    for told, _, _ in play_both(scenario, 3, 12):
        episode, t = told["state"].episode, told["t"]
        distance, gain = np.asarray(episode.distance_m, float), np.asarray(episode.gain, float)
        approach = distance[max(t - 1, 0)] - distance[t]
        expected = [
            expected_features(
                scenario,
                task | {"previous_gain": gain[t, n], "distance_m": distance[t, n], "approach_m": approach[n]},
                mine,
            )
            for n, (task, mine) in enumerate(zip(told["tasks"], told["before"], strict=True))
        ]
        found = np.asarray(features(told["state"]))
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=2e-4)
        for column, feature in zip(found.T, features_of(world), strict=True):
            assert feature.low - 1e-4 <= column.min() <= column.max() <= feature.high + 1e-4
        spread.append(found)
    # Nothing was compared with a feature that never moves.
    assert (np.concatenate(spread).std(axis=0) > 0.02).all()
