"""What each UE adds to a step, against serving the step without it."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emutune.learning.credit import marginal_costs
from emutune.scenario import Scenario, load_scenario
from emutune.world import Action, build_world, current_task, reset, serve

serve_compiled = jax.jit(serve)
credit_compiled = jax.jit(marginal_costs)


def step_delay_s(scenario: Scenario, task: dict, sends: list[tuple[str, float]]) -> float:
    """Delay of a step in plain numbers: each UE sends nothing, its data up, or so many bits down."""
    radio = scenario.radio
    noise = 10 ** (radio.noise_dbm_per_hz / 10) / 1000
    count = {link: sum(kind == link for kind, _ in sends) for link in ("up", "down")}
    delays = [0.0]
    for n, (link, bits) in enumerate(sends):
        if link == "up":
            share = radio.uplink_bandwidth_hz / count["up"]
            snr = task["transmit_power_w"][n] * task["gain"][n] / (noise * share)
            delays.append(bits / (share * math.log2(1 + snr)))
        elif link == "down":
            share = radio.downlink_bandwidth_hz / count["down"]
            snr = radio.downlink_power_w * task["gain"][n] / (noise * radio.downlink_bandwidth_hz)
            delays.append(bits / (share * math.log2(1 + snr)))
    return max(delays)


@pytest.mark.parametrize("seed", range(8))
def test_credit_is_the_cost_less_the_cost_without_the_ue(seed: int) -> None:
    scenario = load_scenario("families", ["fleet.ues=5"])
    world, draw = build_world(scenario), np.random.default_rng(seed)
    state = reset(jax.random.key(seed), world)
    # First some emulators of the families that tasks have now, so that some UEs can hold.
    warm = Action(jnp.asarray(draw.random(5) < 0.5), jnp.full(5, 0.5))
    cache, _ = serve_compiled(world, state.cache, current_task(state), warm)
    at_server = draw.random(5) < (0.0, 0.3, 0.5, 1.0)[seed % 4]
    levels = np.where(draw.random(5) < 0.5, 8, draw.integers(3, 14, 5))
    action = Action(jnp.asarray(at_server), jnp.asarray(levels / 16, jnp.float32))
    task = current_task(state)
    _, outcome = serve_compiled(world, cache, task, action)
    sends = []
    for n in range(5):
        if at_server[n]:
            sends.append(("up", float(task.data_bits[n])))
        elif outcome.switched[n]:
            sends.append(("down", 8 * 10.8e9 * levels[n] / 16))
        else:
            sends.append(("none", 0.0))
    plain = {key: np.asarray(value, float) for key, value in task._asdict().items()}
    whole = step_delay_s(scenario, plain, sends)
    assert whole == pytest.approx(float(outcome.step_delay_s), rel=1e-5)
    expected = []
    for n in range(5):
        without = step_delay_s(scenario, plain, [*sends[:n], ("none", 0.0), *sends[n + 1 :]])
        expected.append(0.092 / 5 * float(outcome.perplexity[n]) + 0.017 / 60 * (whole - without))
    added = credit_compiled(world, task, action.at_server, outcome)
    np.testing.assert_allclose(added, expected, rtol=1e-4, atol=1e-5)


def test_a_lone_sender_is_charged_the_whole_delay() -> None:
    scenario = load_scenario("families", ["fleet.ues=1"])
    world = build_world(scenario)
    state = reset(jax.random.key(0), world)
    task = current_task(state)
    for at_server in (True, False):
        action = Action(jnp.array([at_server]), jnp.array([0.5]))
        _, outcome = serve_compiled(world, state.cache, task, action)
        added = credit_compiled(world, task, action.at_server, outcome)
        np.testing.assert_allclose(added.sum(), -outcome.reward, rtol=1e-5)
