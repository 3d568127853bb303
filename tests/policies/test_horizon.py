"""Planning over a horizon: the programme's multipliers against brute force, and its decisions beside lookahead's."""

from __future__ import annotations

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emutune.errors import UsageError
from emutune.policies import LaterPrices, horizon, plan_horizon, plan_lookahead
from emutune.policies.expected import Expectation, link_shares
from emutune.policies.horizon import search_horizon
from emutune.scenario import load_scenario
from emutune.study.evaluate import evaluate_policy, held_out_episodes
from emutune.world import build_world, observe, reset

PRICES = LaterPrices(jnp.float32(0.5), jnp.float32(0.4))


def known(**changes) -> Expectation:
    """Two UEs and one family with one emulator; holding nothing, one step to go."""
    plain = {
        "local": np.full((2, 1, 2), 1.0),
        "upload": np.full((2, 1), 1.0),
        "sent": np.zeros((2, 1)),
        "allowed": np.array([[[False, True]]] * 2),
        "upload_delay": np.array([[4.0], [6.0]]),
        "layer_delay": np.array([[3.0], [3.0]]),
        "family": np.zeros(2, int),
        "held_family": np.zeros(2, int),
        "held": np.zeros(2, int),
        "after": np.zeros((2, 1, 1, 2)),
        "stays": np.array(1.0),
        "active": np.array(1.0),
        "delta": np.array(False),
        "left": np.array(1),
    }
    return Expectation(**{**plain, **changes})


def test_prices_are_those_of_the_best_split_between_the_links() -> None:
    # The second UE, whose upload is long, downloads; 6/7 of the first upload, so that both links take as long.
    # It is indifferent: 4 u = 3 d and u + d = 1. The second would pay 6 u for 3 d.
    shares = link_shares(known(), 2)
    np.testing.assert_allclose(shares, [[3 / 7, 4 / 7], [0, 0]], atol=1e-6)


def test_a_link_that_nobody_needs_has_no_price() -> None:
    held = known(held=np.ones(2, int), left=np.array(3), upload=np.full((2, 1), 9.0))
    shares = link_shares(held, 3)
    assert shares.shape == (3, 2)
    assert np.all(shares.sum(1) <= 1 + 1e-9)
    barred = known(upload=np.full((2, 1), np.inf))
    np.testing.assert_allclose(link_shares(barred, 1), [[0, 1]], atol=1e-6)


def test_what_an_emulator_is_worth_later_makes_the_downlink_dear_now() -> None:
    # Beyond the horizon an emulator saves more than any download costs.
    eager = known(after=np.array([[[[9.0, 0.0]]]] * 2))
    np.testing.assert_allclose(link_shares(eager, 1), [[0, 1]], atol=1e-6)


def test_an_emulator_that_most_will_need_again_is_paid_for_later() -> None:
    # Of two families; who downloads now holds the next task's emulator with a chance of 3/4. Later, all others
    # split between the links at 12/7 a head, so now 4 u = 3 d - 3/4 * 12/7 and u + d = 1.
    both = {"local": np.full((2, 2, 2), 1.0), "upload": np.full((2, 2), 1.0), "sent": np.zeros((2, 2))}
    both |= {"upload_delay": np.full((2, 2), 4.0), "layer_delay": np.full((2, 2), 3.0)}
    both |= {"allowed": np.array([[[False, True]] * 2] * 2), "after": np.zeros((2, 2, 2, 2))}
    shares = link_shares(known(**both, stays=np.array(0.5), left=np.array(2)), 2)
    now = (3 - 9 / 7) / 7
    np.testing.assert_allclose(shares, [[now, 1 - now], [3 / 7, 4 / 7]], atol=1e-6)


def test_who_has_no_task_comes_into_no_emulator() -> None:
    # Half of those who may not upload are idle now, so that some have to download in the next step still.
    barred = known(upload=np.full((2, 1), np.inf), active=np.array(0.5), left=np.array(2))
    np.testing.assert_allclose(link_shares(barred, 2), [[0, 1], [0, 1]], atol=1e-6)


def state_of(name: str, *changes: str, seed: int = 0):
    scenario = load_scenario(name, ["fleet.ues=4", "fleet.tasks=6", *changes])
    world = build_world(scenario)
    return scenario, world, observe(world, jax.jit(reset)(jax.random.key(seed), world))


def test_one_step_decides_as_lookahead_and_more_plan_to_the_end() -> None:
    _, world, seen = state_of("families")
    plan = plan_lookahead(world, PRICES)
    once = plan_horizon(world, PRICES, steps=1)
    key = jax.random.key(0)
    jax.tree.map(np.testing.assert_array_equal, once.decide(world, seen, key), plan.decide(world, seen, key))
    with pytest.raises(ValueError, match="at least 1 step, got 0"):
        plan_horizon(world, PRICES, steps=0)
    # In the last step nothing is worth anything later, however far one plans.
    last = seen._replace(progress=jnp.asarray(5 / 6))
    kept, renewed = plan_horizon(world, PRICES, steps=3).later(world, last)
    assert not np.any(kept)
    assert not np.any(renewed)


def test_without_a_solution_lookaheads_prices_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    _, world, seen = state_of("families")
    same = plan_lookahead(world, PRICES).later(world, seen)
    later = jax.jit(lambda seen: plan_horizon(world, PRICES, steps=3).later(world, seen))
    own = np.array([PRICES.upload, PRICES.download]) / (PRICES.upload + PRICES.download)
    # Or where the programme's prices of all later steps are the same; that of the present one has no part in it.
    for shares in (None, np.stack([1 - own, own, own])):
        monkeypatch.setattr(horizon, "link_shares", lambda known, steps, shares=shares: shares)
        kept, renewed = later(seen)
        # The table reads between gains, the programme is at each UE's own.
        np.testing.assert_allclose(kept, same[0], rtol=2e-2)
        np.testing.assert_allclose(renewed[3:14], same[1][3:14], rtol=2e-2)


@pytest.mark.parametrize(
    "name",
    [
        "delta",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("edge-compute", "private", "urban", "trace")
        ),
    ],
)
def test_it_decides_in_every_world_as_well_as_lookahead(name: str) -> None:
    scenario, world, _ = state_of(name)
    prices = PRICES._replace(background_s=jnp.float32(100.0)) if scenario.computation else PRICES
    drawn = held_out_episodes(scenario, 3)
    mine = evaluate_policy(scenario, plan_horizon(world, prices, steps=2), drawn)
    theirs = evaluate_policy(scenario, plan_lookahead(world, prices), drawn)
    assert mine.episode_return.mean() > 1.1 * theirs.episode_return.mean()


@pytest.mark.slow
def test_it_ends_on_two_devices_at_once() -> None:
    """Callbacks into Python can wait for each other; many decisions on two devices, side by side."""
    code = """
import jax, jax.numpy as jnp
from concurrent.futures import ThreadPoolExecutor
from emutune.policies import LaterPrices, plan_horizon
from emutune.scenario import load_scenario
from emutune.study.evaluate import evaluate_policy, held_out_episodes
from emutune.world import build_world
scenario = load_scenario("families", ["fleet.ues=3", "fleet.tasks=8"])
def run(device):
    with jax.default_device(device):
        prices = LaterPrices(jnp.float32(0.5), jnp.float32(0.4))
        policy = plan_horizon(build_world(scenario), prices, steps=2)
        return evaluate_policy(scenario, policy, held_out_episodes(scenario, 4)).episode_return.mean()
with ThreadPoolExecutor(2) as both:
    print(*both.map(run, jax.devices()[:2]))
"""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    ended = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **flags}, capture_output=True, text=True, timeout=240
    )
    assert ended.returncode == 0, ended.stderr
    first, second = ended.stdout.split()
    assert first == second


def test_caches_of_several_emulators_are_refused() -> None:
    with pytest.raises(UsageError, match=r"families\.cache_gb.*use lookahead"):
        search_horizon(load_scenario("families", ["families.cache_gb=16.0"]))
