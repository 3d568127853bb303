"""Measured links: alone, a UE has the rate of its window; two links may have two gains."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emutune.policies import AllServer, Fixed, LaterPrices, Random, plan_lookahead
from emutune.scenario import Scenario, load_scenario
from emutune.step import Plan, at_server, downlink_bps, on_ue, uplink_bps
from emutune.study.evaluate import evaluate_policy, held_out_episodes
from emutune.world import build_world, draw_episode, features_of, observe, reset, serve, ue_features
from emutune.world.dynamics import draw_links, during
from emutune.world.environments import OrchestrationEnv
from worlds import alike, step_wish

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
    links = world.rules.links
    up, down = (
        uplink_bps(links, power_w, channel.gain) / 1e6,
        downlink_bps(links, channel.downlink_gain) / 1e6,
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
    situation = during(state.episode, state.step, observe(world, state))
    one = jnp.arange(6) == 1
    _, outcome = serve_compiled(world, situation, Plan(~one, jnp.where(one, 16, 0)))
    down = float(downlink_bps(world.rules.links, situation.downlink_gain)[1])
    assert float(outcome.charge.taken.delay_s[1]) == pytest.approx(0.5 * 8e9 * 10.8 / down, rel=1e-5)
    assert down / 1e6 == pytest.approx(round(down / 1e6), abs=1e-3)


def test_planners_see_the_gains_of_the_task_before_and_no_later_ones() -> None:
    world = build_world(traced())
    state = reset_compiled(jax.random.key(2), world)
    state, _ = step_wish(world, state, *alike(world, True, 0.5))
    seen, episode = observe(world, state), state.episode
    np.testing.assert_array_equal(seen.gain, episode.gain[1])
    np.testing.assert_array_equal(seen.downlink_gain, episode.downlink_gain[1])
    alone = at_server(world.rules, seen, jnp.ones(1)).upload_s
    measured = np.asarray(seen.data_bits / alone) / 1e6
    np.testing.assert_allclose(measured * 4, np.round(measured * 4), atol=1e-3)
    # The largest emulator alone on the downlink: 25 of the 32 layers of 10.8 GB.
    fetched = 8e3 * 10.8 * 25 / 32 / np.asarray(on_ue(world.rules, seen, jnp.full(6, 25)).download_s)
    carried = downlink_bps(world.rules.links, episode.downlink_gain[1]) / 1e6
    np.testing.assert_allclose(fetched, carried, rtol=1e-4)


def test_features_span_the_trace() -> None:
    world = build_world(traced("fleet.ues=300"))
    seen = observe(world, reset(jax.random.key(3), world))
    features = np.asarray(ue_features(world, seen))
    assert features.shape == (300, len(features_of(world))) == (300, 5)
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
        plan_lookahead(world, LaterPrices(jnp.float32(0.5), jnp.float32(0.5))),
    )
    returns = [evaluate_policy(scenario, policy, drawn).episode_return for policy in policies]
    assert np.isfinite(returns).all()
    assert (returns[3] > returns[0]).all()
