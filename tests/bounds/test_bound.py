"""The bound never exceeds what enumeration, or any simulated policy, finds."""

import itertools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special
from tiny import costs_of

from emutune.bounds import certified_bounds, cost_bound
from emutune.errors import UsageError
from emutune.policies import AllServer, Fixed, Random
from emutune.scenario import load_scenario
from emutune.study.evaluate import evaluate_policy, held_out_episodes
from emutune.world import Episode

UES, TASKS, LAYERS = 2, 3, 3


def drawn(gain, complexity, data_bits, power, family=None, down=None):
    """An episode of such draws during its tasks; what was known before the first is never read."""
    before = [None if part is None else np.vstack([np.full(UES, np.nan), part]) for part in (gain, down)]
    return Episode(before[0], complexity, data_bits, power, family, downlink_gain=before[1])


def enumerated_optimum(scenario, gain, complexity, data_bits, power, family=None, down=None):
    """Cheapest of all decision sequences, by Eq. 1 to 9 in plain loops."""
    family = np.zeros((TASKS, UES), int) if family is None else family
    down = gain if down is None else down
    choices = [[0, *range(model.fewest, model.most + 1)] for model in scenario.models]  # 0: at the server
    best = np.inf
    fleets = [list(itertools.product(*(choices[f] for f in row))) for row in family]
    for plan in itertools.product(*fleets):
        cached, cost = [(0, 0)] * UES, 0.0
        for t, chosen in enumerate(plan):
            held = [old if of == f else 0 for (of, old), f in zip(cached, family[t], strict=True)]
            cost += step_cost(
                scenario, gain[t], complexity[t], data_bits[t], power, family[t], chosen, held, down[t]
            )
            cached = [(f, c) if c else old for c, f, old in zip(chosen, family[t], cached, strict=True)]
        best = min(best, cost)
    return best


def efficiency(scenario, snr):
    return (
        np.exp(1 / snr) * special.exp1(1 / snr) / np.log(2)
        if scenario.radio.rate == "ergodic"
        else np.log2(1 + snr)
    )


def step_cost(scenario, gain, complexity, data_bits, power, family, chosen, held, down=None):
    down = gain if down is None else down
    radio, iota = scenario.radio, scenario.quality.complexity_weight
    noise = 10 ** ((radio.noise_dbm_per_hz - 30) / 10)
    uploads = sum(c == 0 for c in chosen)
    sent = [
        0 if c in (0, old) else max(c - old, 0) if scenario.delta_download else c
        for c, old in zip(chosen, held, strict=True)
    ]
    downloads = sum(layers > 0 for layers in sent)
    delays, perplexities = [0.0], []
    for n, c in enumerate(chosen):
        model = scenario.models[family[n]]
        retention = c / model.layers if c else 1.0
        divisor = complexity[n] if scenario.quality.complexity_factor == "as_printed" else iota
        perplexities.append(model.curve(retention) * (complexity[n] + iota) / divisor)
        if c == 0:
            share = radio.uplink_bandwidth_hz / uploads
            delays.append(data_bits[n] / (share * efficiency(scenario, power[n] * gain[n] / (noise * share))))
        elif sent[n]:
            share = radio.downlink_bandwidth_hz / downloads
            snr = radio.downlink_power_w / downloads * down[n] / (noise * share)
            delays.append(8e9 * model.size_gb * sent[n] / model.layers / (share * efficiency(scenario, snr)))
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
        costs = costs_of(scenario, drawn(gain, complexity, data, power))
        linear, integer = cost_bound(costs), cost_bound(costs, "integer")
        assert linear <= integer + 1e-5 * abs(integer)
        assert integer <= optimum
        assert linear >= 0.5 * optimum

    check()


@pytest.mark.parametrize("delta", ["false", "true"])
def test_never_exceeds_the_enumerated_optimum_with_families(delta):
    other = "{size_gb = 5.4, layers = 4, curve = {quadratic = 0.0, linear = -9.0, constant = 24.0}}"

    @settings(max_examples=8)
    @given(st.integers(0, 2**32 - 1), st.sampled_from([-0.001, -0.015, -0.1]), st.sampled_from([1e5, 3e6]))
    def check(seed, delay_weight, uplink_hz):
        scenario = load_scenario(
            "families",
            [
                f"fleet.ues={UES}",
                f"fleet.tasks={TASKS}",
                "model.layers=3",
                "retention.max=0.75",
                f"families.others=[{other}]",
                f"download.delta={delta}",
                f"reward.delay_weight_per_min={delay_weight}",
                f"radio.uplink_bandwidth_hz={uplink_hz}",
            ],
        )
        draw = np.random.default_rng(seed)
        shape = (TASKS, UES)
        gain = draw.uniform(50, 500, shape) ** -2
        complexity, data = draw.uniform(1, 10, shape), draw.uniform(2.4e9, 4e9, shape)
        power, family = draw.uniform(0.2, 1, UES), draw.integers(0, 2, shape)
        optimum = enumerated_optimum(scenario, gain, complexity, data, power, family)
        costs = costs_of(scenario, drawn(gain, complexity, data, power, family))
        linear, integer = cost_bound(costs), cost_bound(costs, "integer")
        assert linear <= integer + 1e-5 * abs(integer)
        assert integer <= optimum
        assert linear >= 0.5 * optimum

    check()


def test_never_exceeds_the_enumerated_optimum_of_ergodic_rates_and_two_gains():
    @settings(max_examples=12)
    @given(
        st.integers(0, 2**32 - 1),
        st.sampled_from([-0.001, -0.015, -0.1]),
        st.sampled_from([-190, -150, -130]),
    )
    def check(seed, delay_weight, noise):
        scenario = load_scenario(
            "paper",
            [
                "radio.rate=ergodic",
                f"fleet.ues={UES}",
                f"fleet.tasks={TASKS}",
                f"model.layers={LAYERS}",
                "retention.max=0.7",
                f"reward.delay_weight_per_min={delay_weight}",
                f"radio.noise_dbm_per_hz={noise}",
            ],
        )
        draw = np.random.default_rng(seed)
        shape = (TASKS, UES)
        gain, down = draw.uniform(50, 500, shape) ** -3, draw.uniform(50, 500, shape) ** -3
        complexity, data = draw.uniform(1, 10, shape), draw.uniform(2.4e9, 4e9, shape)
        power = draw.uniform(0.2, 1, UES)
        optimum = enumerated_optimum(scenario, gain, complexity, data, power, down=down)
        costs = costs_of(scenario, drawn(gain, complexity, data, power, down=down))
        linear, integer = cost_bound(costs), cost_bound(costs, "integer")
        assert linear <= integer + 1e-5 * abs(integer)
        assert integer <= optimum
        assert linear >= 0.3 * optimum

    check()


@pytest.mark.parametrize("name", ["families", "delta"])
def test_no_policy_beats_it_with_families(name):
    scenario = load_scenario(name, ["fleet.ues=3", "fleet.tasks=8"])
    episodes = held_out_episodes(scenario, 2)
    bounds = certified_bounds(scenario, episodes)
    for policy in (Random(), Fixed(jax.numpy.float32(0.75))):
        assert (evaluate_policy(scenario, policy, episodes).episode_return < bounds).all()


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
    with pytest.raises(UsageError, match=r"method: must be 'linear', 'integer' or 'prices'"):
        certified_bounds(paper, held_out_episodes(paper, 1), method="magic")  # type: ignore[arg-type]
