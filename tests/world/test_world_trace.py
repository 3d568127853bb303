"""Measured links: alone, a UE has the rate of its window; two links may have two gains."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emutune.policies import AllServer, Fixed, LaterPrices, Random, plan_lookahead
from emutune.policies.prices import lone_downlink_bps, step_prices, upload_s
from emutune.scenario import Scenario, load_scenario
from emutune.study.evaluate import evaluate_policy, held_out_episodes
from emutune.world import Action, build_world, draw_episode, feature_count, observe, reset, step, ue_features
from emutune.world.dynamics import Cache, current_task, draw_links, serve
from emutune.world.environments import OrchestrationEnv
from emutune.world.link import shared_rate_bps

DOWN = [float(rate) for rate in range(10, 40)]
UP = [1.0 + 0.25 * rate for rate in range(30)]
reset_compiled, serve_compiled = jax.jit(reset), jax.jit(serve)


def traced(*changes: str) -> Scenario:
    """The paper's fleet on bands of 5 and 2 MHz and a trace of thirty intervals."""
    trace = f"trace={{interval_s=60, downlink_mbps={DOWN}, uplink_mbps={UP}}}"
    bands = ["radio.downlink_bandwidth_hz=5e6", "radio.uplink_bandwidth_hz=2e6"]
    return load_scenario("paper", [trace, *bands, "fleet.tasks=10", *changes])


@pytest.mark.parametrize("rate", ["shannon", "ergodic"])
def test_a_ue_alone_has_the_measured_rates(rate: str) -> None:
    world = build_world(traced(f"radio.rate={rate}", "fleet.ues=50"))
    channel, power_w = draw_links(jax.random.key(0), world)
    assert channel.downlink_gain is not None
    up, down = (
        shared_rate_bps(hertz, power, gain, world.noise_w_per_hz, jnp.asarray(1.0), world.ergodic_rate) / 1e6
        for hertz, power, gain in (
            (world.uplink_bandwidth_hz, power_w, channel.gain),
            (world.downlink_bandwidth_hz, world.downlink_power_w, channel.downlink_gain),
        )
    )
    begins = np.round(np.asarray(down)[0] - 10).astype(int)
    places = begins + np.arange(11)[:, None]
    np.testing.assert_allclose(down, np.array(DOWN)[places], rtol=1e-5)
    np.testing.assert_allclose(up, np.array(UP)[places], rtol=1e-5)
    # Windows begin anywhere that leaves room for an episode.
    assert begins.min() < 3
    assert begins.max() > 16


def test_windows_are_drawn_for_ue_and_episode_and_move_nothing_else() -> None:
    world, plain = build_world(traced()), build_world(load_scenario("paper", ["fleet.tasks=10"]))
    episodes = [reset_compiled(jax.random.key(seed), world).episode for seed in (0, 0, 1)]
    jax.tree.map(np.testing.assert_array_equal, *episodes[:2])
    assert not np.array_equal(episodes[0].downlink_gain, episodes[2].downlink_gain)
    other = draw_episode(jax.random.key(0), plain)
    for field in ("complexity", "data_bits", "transmit_power_w"):
        np.testing.assert_array_equal(getattr(episodes[0], field), getattr(other, field))


def test_each_link_is_served_at_its_own_gain() -> None:
    world = build_world(traced())
    state = reset_compiled(jax.random.key(1), world)
    task = current_task(state)
    one = Action(jnp.asarray([True, False, True, True, True, True]), jnp.full(6, 0.5))
    _, outcome = serve_compiled(world, Cache(jnp.full(6, 16, jnp.int32)), task, one)
    empty = Cache(jnp.asarray([16, 0, 16, 16, 16, 16], jnp.int32))
    _, outcome = serve_compiled(world, empty, task, one)
    down = float(lone_downlink_bps(world, task.downlink_gain)[1])
    assert float(outcome.delay_s[1]) == pytest.approx(0.5 * 8e9 * 10.8 / down, rel=1e-5)
    assert down / 1e6 == pytest.approx(round(down / 1e6), abs=1e-3)


def test_planners_see_the_gains_of_the_task_before_and_no_later_ones() -> None:
    world = build_world(traced())
    state = reset_compiled(jax.random.key(2), world)
    state, _ = step(world, state, Action(jnp.ones(6, bool), jnp.full(6, 0.5)))
    seen, episode = observe(world, state), state.episode
    np.testing.assert_array_equal(seen.previous_gain, episode.gain[1])
    np.testing.assert_array_equal(seen.previous_downlink_gain, episode.downlink_gain[1])
    alone = upload_s(world, seen, jnp.ones(1))[0]
    measured = np.asarray(seen.data_bits / alone) / 1e6
    np.testing.assert_allclose(measured * 4, np.round(measured * 4), atol=1e-3)
    # A whole emulator alone on the downlink: 32 layers of 10.8 GB.
    fetched = 8e3 * 10.8 / np.asarray(step_prices(world, seen, 32).download_s[:, 32])
    np.testing.assert_allclose(fetched, lone_downlink_bps(world, episode.downlink_gain[1]) / 1e6, rtol=1e-4)


def test_features_span_the_trace() -> None:
    world = build_world(traced("fleet.ues=300"))
    seen = observe(world, reset(jax.random.key(3), world))
    features = np.asarray(ue_features(world, seen))
    assert features.shape == (300, feature_count(world)) == (300, 5)
    assert np.abs(features).max() <= 1 + 1e-4
    assert features[:, 4].min() < -0.8
    assert OrchestrationEnv(traced()).reset(seed=0)[0].shape == (5 * 6 + 1,)


@pytest.mark.slow
def test_policies_of_every_kind_act_on_a_trace() -> None:
    scenario = traced()
    world, drawn = build_world(scenario), held_out_episodes(scenario, 3)
    policies = (
        Random(),
        AllServer(),
        Fixed(jnp.float32(0.7)),
        plan_lookahead(scenario, world, LaterPrices(jnp.float32(0.5), jnp.float32(0.5))),
    )
    returns = [evaluate_policy(scenario, policy, drawn).episode_return for policy in policies]
    assert np.isfinite(returns).all()
    assert (returns[3] > returns[0]).all()
