"""The bound never exceeds what enumeration, or any simulated policy, finds."""

import itertools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emutune.bounds import certified_bounds, cost_bound, episode_costs
from emutune.errors import UsageError
from emutune.policies import AllServer, Fixed, Random
from emutune.scenario import load_scenario
from emutune.study.evaluate import evaluate_policy, held_out_episodes

UES, TASKS, LAYERS = 2, 3, 3


def enumerated_optimum(scenario, gain, complexity, data_bits, power):
    """Cheapest of all decision sequences, by Eq. 1 to 9 in plain loops."""
    low, high = scenario.level_bounds
    choices = [0, *range(low, high + 1)]  # 0: at the server
    best = np.inf
    fleets = list(itertools.product(choices, repeat=UES))
    for plan in itertools.product(fleets, repeat=TASKS):
        cached, cost = [0] * UES, 0.0
        for t, chosen in enumerate(plan):
            cost += step_cost(scenario, gain[t], complexity[t], data_bits[t], power, chosen, cached)
            cached = [c or old for c, old in zip(chosen, cached, strict=True)]
        best = min(best, cost)
    return best


def step_cost(scenario, gain, complexity, data_bits, power, chosen, cached):
    radio, curve, iota = scenario.radio, scenario.quality.curve, scenario.quality.complexity_weight
    noise = 10 ** ((radio.noise_dbm_per_hz - 30) / 10)
    uploads = sum(c == 0 for c in chosen)
    downloads = sum(c not in (0, old) for c, old in zip(chosen, cached, strict=True))
    delays, perplexities = [0.0], []
    for n, c in enumerate(chosen):
        retention = c / scenario.model.layers if c else 1.0
        divisor = complexity[n] if scenario.quality.complexity_factor == "as_printed" else iota
        perplexities.append(curve(retention) * (complexity[n] + iota) / divisor)
        if c == 0:
            share = radio.uplink_bandwidth_hz / uploads
            delays.append(data_bits[n] / (share * np.log2(1 + power[n] * gain[n] / (noise * share))))
        elif c != cached[n]:
            share = radio.downlink_bandwidth_hz / downloads
            snr = radio.downlink_power_w / downloads * gain[n] / (noise * share)
            delays.append(8e9 * scenario.model.size_gb * retention / (share * np.log2(1 + snr)))
    weights = scenario.reward
    return (
        -weights.perplexity_weight * np.mean(perplexities) - weights.delay_weight_per_min * max(delays) / 60
    )


def test_never_exceeds_the_enumerated_optimum():
    @settings(max_examples=12)
    @given(
        st.integers(0, 2**32 - 1),
        st.sampled_from([0.0, -0.001, -0.015, -0.5]),
        st.sampled_from([1e5, 3e6]),
        st.sampled_from(["rising", "as_printed"]),
    )
    def check(seed, delay_weight, uplink_hz, factor):
        scenario = load_scenario(
            "paper",
            [
                f"fleet.ues={UES}",
                f"fleet.tasks={TASKS}",
                f"model.layers={LAYERS}",
                "retention.max=0.7",
                f"reward.delay_weight_per_min={delay_weight}",
                f"radio.uplink_bandwidth_hz={uplink_hz}",
                f"quality.complexity_factor={factor}",
            ],
        )
        draw = np.random.default_rng(seed)
        shape = (TASKS, UES)
        gain = draw.uniform(50, 500, shape) ** -2
        complexity, data = draw.uniform(1, 10, shape), draw.uniform(2.4e9, 4e9, shape)
        power = draw.uniform(0.2, 1, UES)
        optimum = enumerated_optimum(scenario, gain, complexity, data, power)
        costs = episode_costs(scenario, gain, complexity, data, power)
        linear, integer = cost_bound(costs), cost_bound(costs, "integer")
        assert linear <= integer + 1e-5 * abs(integer)
        assert integer <= optimum
        assert linear >= 0.5 * optimum

    check()


@pytest.mark.parametrize("ues", [6, 9])
def test_no_policy_beats_it_and_holding_comes_close(ues):
    scenario = load_scenario("paper", [f"fleet.ues={ues}"])
    episodes = held_out_episodes(scenario, 2)
    bounds = certified_bounds(scenario, episodes)
    for policy in (Random(), AllServer(), Fixed(jax.numpy.float32(0.5))):
        assert (evaluate_policy(scenario, policy, episodes).episode_return < bounds).all()
    holding = evaluate_policy(scenario, Fixed(jax.numpy.float32(0.78125)), episodes).episode_return
    assert (holding < bounds).all()
    assert (holding > 1.005 * bounds).all()


def test_an_unknown_method_is_refused(paper):
    with pytest.raises(UsageError, match=r"method: must be 'linear' or 'integer'"):
        certified_bounds(paper, held_out_episodes(paper, 1), method="magic")  # type: ignore[arg-type]
