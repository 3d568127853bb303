"""Prices: any of them prove a bound, and those that are found prove nearly what the linear programme does."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_bound import TASKS, UES, drawn, enumerated_optimum
from tiny import costs_of, draw_tiny

import plain
from emutune.bounds import (
    Costs,
    Prices,
    Room,
    bound_at_prices,
    certified_bounds,
    cost_bound,
    find_prices,
    price_bound,
)
from emutune.policies import AllServer, Fixed, Random
from emutune.scenario import Scenario, load_scenario
from emutune.study.evaluate import evaluate_policy, held_out_episodes

OTHER = "{size_gb = 5.4, layers = 4, curve = {quadratic = 0.0, linear = -9.0, constant = 24.0}}"
SMALL = {
    name: [
        f"fleet.ues={UES}", f"fleet.tasks={TASKS}", "model.layers=3", "retention.max=0.75",
        *([] if name == "paper" else [f"families.others=[{OTHER}]"]),
    ]
    for name in ("paper", "families", "delta")
}  # fmt: skip


def small_episode(name: str, seed: int, delay_weight: float) -> tuple[Scenario, Costs, float]:
    """A world small enough to try every schedule, its coefficients, and what the best schedule costs."""
    scenario = load_scenario(name, [*SMALL[name], f"reward.delay_weight_per_min={delay_weight}"])
    draw = np.random.default_rng(seed)
    shape = (TASKS, UES)
    gain = draw.uniform(50, 500, shape) ** -2
    complexity, data = draw.uniform(1, 10, shape), draw.uniform(2.4e9, 4e9, shape)
    power = draw.uniform(0.2, 1, UES)
    family = None if name == "paper" else draw.integers(0, 2, shape)
    optimum = enumerated_optimum(scenario, gain, complexity, data, power, family)
    return scenario, costs_of(scenario, drawn(gain, complexity, data, power, family)), optimum


@pytest.mark.parametrize("name", ["paper", "families", "delta"])
def test_no_prices_prove_more_than_the_best_schedule(name: str) -> None:
    @settings(max_examples=6)
    @given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, -0.001, -0.015, -0.1]))
    def check(seed: int, delay_weight: float) -> None:
        _, costs, optimum = small_episode(name, seed, delay_weight)
        draw = np.random.default_rng(seed)
        for _ in range(20):
            # Far apart, far too high, and zero: all prove something, none too much.
            shares = draw.gamma(0.3, 10 ** draw.uniform(-2, 2), (TASKS, UES + 2)) * draw.integers(
                0, 2, UES + 2
            )
            assert bound_at_prices(costs, Prices(shares[:, 0], shares[:, 1], shares[:, 2:])) <= optimum
        found, linear = price_bound(costs, 150), cost_bound(costs)
        assert 0.98 * linear <= found <= optimum

    check()


RENTED = [
    {"cache"},
    {"budget"},
    {"cache", "budget", "privacy"},
    {"cache", "energy", "computation", "activity"},
    {"cache", "budget", "computation", "memory", "trace"},
    {"cache", "budget", "delta", "ergodic"},
    {"budget", "computation", "privacy", "activity", "delta"},
]
DEAR = ["energy.receive_w=40.0", "energy.weight_per_j=-1e-4"]


def assert_rents_and_joules_prove_no_more(features: set[str], seed: int, *changes: str) -> None:
    if features & {"energy", "budget"}:
        changes = (*changes, *DEAR)
    small, draw = draw_tiny(features, seed, *changes), np.random.default_rng(seed)
    costs, cost = small.costs, -plain.best_return(small.scenario, small.tasks)
    limits = len(costs.room.limits)
    for _ in range(25):
        shares = draw.gamma(0.3, 10 ** draw.uniform(-2, 2), (TASKS, UES + 2)) * draw.integers(0, 2, UES + 2)
        joule = draw.uniform(0, 1, UES) ** draw.choice([0, 1, 10])
        rent = draw.gamma(0.5, cost * 10 ** draw.uniform(-4, 0), (TASKS, UES, limits))
        prices = Prices(shares[:, 0], shares[:, 1], shares[:, 2:], joule, rent * draw.integers(0, 2, limits))
        assert bound_at_prices(costs, prices) <= cost


@pytest.mark.parametrize("features", RENTED, ids=lambda part: "-".join(sorted(part)))
def test_no_rents_and_no_prices_of_joules_prove_more_than_the_best_plan(features: set[str]) -> None:
    for seed, weight in enumerate((0.0, -0.001, -0.015)):
        assert_rents_and_joules_prove_no_more(features, seed, f"reward.delay_weight_per_min={weight}")


@pytest.mark.slow
@settings(max_examples=100)
@given(plain.feature_sets(), st.integers(0, 2**31 - 1), st.sampled_from([0.0, -0.001, -0.1]))
def test_no_prices_prove_more_than_the_best_plan_in_any_world(
    features: set[str], seed: int, weight: float
) -> None:
    assert_rents_and_joules_prove_no_more(features, seed, f"reward.delay_weight_per_min={weight}")


def test_a_cache_of_one_emulator_is_a_cache_of_several_with_room_for_one() -> None:
    small, draw = draw_tiny({"computation", "delta"}, 3, "fleet.tasks=6"), np.random.default_rng(3)
    one = small.costs
    several = one._replace(
        room=Room(one.family, np.asarray(small.episode.family), np.ones((1, len(one.family))))
    )
    assert cost_bound(several) == pytest.approx(cost_bound(one), rel=1e-6)
    found = find_prices(several, 100)
    for scale in (0.0, 0.3, 1.0, 3.0, *draw.gamma(1.0, 1.0, 20)):
        rented = bound_at_prices(several, found._replace(rent=scale * found.rent))
        # Without rents there are as many caches as families.
        assert rented <= bound_at_prices(one, found._replace(rent=0.0))
    assert bound_at_prices(several, found) >= 0.97 * bound_at_prices(one, found._replace(rent=0.0))


def test_free_seconds_prove_what_perplexity_costs_at_least() -> None:
    _, costs, _ = small_episode("families", 1, -0.1)
    nothing = Prices(np.zeros(TASKS), np.zeros(TASKS), np.zeros((TASKS, UES)))
    local = np.where(costs.usable, costs.local_cost, np.inf).min(2)
    expected = np.minimum(local, costs.server_cost).sum()
    assert bound_at_prices(costs, nothing) == pytest.approx(expected, rel=1e-6)


def test_delay_that_costs_nothing_has_no_price() -> None:
    _, costs, optimum = small_episode("paper", 2, 0.0)
    assert price_bound(costs, 20) == pytest.approx(optimum, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "ues"),
    [
        ("families", 6),
        ("delta", 6),
        *(pytest.param(name, 6, marks=pytest.mark.slow) for name in ("paper", "urban", "trace")),
    ],
)
def test_found_prices_come_within_a_tenth_of_a_percent_of_the_linear_programme(name: str, ues: int) -> None:
    scenario = load_scenario(name, [f"fleet.ues={ues}", "fleet.tasks=20"])
    episodes = held_out_episodes(scenario, 1)
    linear, prices = (certified_bounds(scenario, episodes, method=method) for method in ("linear", "prices"))  # type: ignore[arg-type]
    # Returns: the higher is the weaker bound.
    assert (prices >= linear - 1e-5 * np.abs(linear)).all()
    assert (prices <= linear + 1e-3 * np.abs(linear)).all()


@pytest.mark.slow
def test_large_fleets_are_bounded_by_prices_and_no_policy_beats_them() -> None:
    scenario = load_scenario("families", ["fleet.ues=200", "fleet.tasks=20"])
    episodes = held_out_episodes(scenario, 1)
    bounds = certified_bounds(scenario, episodes)
    np.testing.assert_array_equal(bounds, certified_bounds(scenario, episodes, method="prices"))
    for policy in (Random(), AllServer(), Fixed(jax.numpy.float32(0.75))):
        assert (evaluate_policy(scenario, policy, episodes).episode_return < bounds).all()
