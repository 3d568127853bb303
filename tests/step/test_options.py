"""What UEs could do, what comes of a wish, and what each option takes."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import plain
from emutune.scenario import Scenario
from emutune.step import (
    Plan,
    at_server,
    build_rules,
    charge,
    plan_of_wish,
    possible_case,
    possible_levels,
    possible_plan,
    usable_layers,
)
from emutune.step.options import chooses_case, every_count, every_level, whole_training_s
from worlds import EVERYTHING, edited, fleet_alike, plan_from, serve_alike, situation_from, world_with

# Family, GB of memory, whether it is private and active, and what is wished for.
UE = st.tuples(st.integers(0, 1), st.floats(0.1, 12), *[st.booleans()] * 3, st.integers(0, 20))


def test_every_wish_becomes_what_is_possible() -> None:
    rules = build_rules(world_with({"memory", "privacy", "activity"}, name="paper"))
    # Layers of 10.8 GB / 32; levels 7 to 25. UE 1 can hold 9 layers, UE 2 none, UE 3 has nothing to do.
    situation = fleet_alike(4)._replace(
        memory_bits=jnp.array([1e3, 9.0, 6.9, 1e3]) * 8e9 * 10.8 / 32,
        private=jnp.array([True, False, False, False]),
        active=jnp.array([True, True, True, False]),
    )
    low, high = possible_levels(rules, situation)
    assert (low == 7).all()
    np.testing.assert_array_equal(high, [25, 9, 6, 25])
    for wish, expected in ((True, [0, 1, 1, 0]), (False, [0, 0, 1, 0])):
        np.testing.assert_array_equal(
            possible_case(rules, situation, jnp.full(4, wish)), np.array(expected, bool)
        )
    np.testing.assert_array_equal(chooses_case(rules, situation), [False, True, False, False])
    wished = plan_of_wish(rules, situation, jnp.zeros(4, bool), jnp.full(4, 0.75))
    plan = possible_plan(rules, situation, wished)
    np.testing.assert_array_equal(plan.layers, [24, 9, 0, 0])
    np.testing.assert_array_equal(plan.at_server, [False, False, True, False])


@settings(max_examples=60)
@given(st.lists(UE, min_size=3, max_size=3))
def test_wishes_come_to_what_plain_numbers_say(ues: list[tuple]) -> None:
    scenario = world_with(EVERYTHING, "families.cache_gb=8.0")
    rows = [
        {
            "family": family,
            "memory_bits": 8e9 * memory_gb,
            "private": private,
            "active": active,
            **dict.fromkeys(
                ("complexity", "data_bits", "transmit_power_w", "gain", "downlink_gain", "tflops"), 1.0
            ),
        }
        for family, memory_gb, private, active, _, _ in ues
    ]
    wanted = [(number + 0.1) / 20 for *_, number in ues]
    rules, nothing = build_rules(scenario), [plain.Carried()] * 3
    situation = situation_from(rows, nothing, 2)
    wish = plan_of_wish(rules, situation, jnp.asarray([there for *_, there, _ in ues]), jnp.asarray(wanted))
    plan, expected = (
        possible_plan(rules, situation, wish),
        plan_from(
            [plain.project(scenario, row, ue[4], one) for row, ue, one in zip(rows, ues, wanted, strict=True)]
        ),
    )
    np.testing.assert_array_equal(plan.at_server, expected.at_server)
    np.testing.assert_array_equal(plan.layers, expected.layers)
    for mine, again in zip(plan, possible_plan(rules, situation, plan), strict=True):
        np.testing.assert_array_equal(mine, again)


@pytest.mark.parametrize(
    ("wanted", "layers"), [(0.0, 7), (0.2, 7), (0.23, 7), (0.3, 10), (0.8, 25), (1.0, 25)]
)
def test_retention_is_rounded_to_the_nearest_level_inside_the_bounds(
    paper: Scenario, wanted: float, layers: int
) -> None:
    # 0.2 and 0.8 of 32 layers are 6.4 and 25.6, so the levels inside are 7 to 25; 0.3 is 9.6.
    cached, outcome = serve_alike(paper, at_server=False, wanted=wanted)
    assert cached == layers
    assert outcome.plan.layers == layers


@pytest.mark.parametrize(
    ("wanted", "held"), [(0.4005, True), (0.5995, True), (0.3995, False), (0.6005, False)]
)
def test_hold_tolerance_keeps_a_near_emulator(paper: Scenario, wanted: float, held: bool) -> None:
    scenario = edited(paper, {"retention.hold_tolerance": 0.1})
    cached, outcome = serve_alike(scenario, at_server=False, cached=16, wanted=wanted)
    assert (cached == 16) == held
    assert outcome.switched != held
    assert (outcome.charge.delay_s == 0) == held


def test_options_are_what_plans_of_them_are_charged(paper: Scenario) -> None:
    """The tables that planners read, against the charge of a fleet that does all of one thing."""
    rows = [
        {
            "family": n % 2,
            "complexity": 2.0 + n,
            "data_bits": 3e9 / (n + 1),
            "transmit_power_w": 0.5,
            "gain": 1e-5 / (n + 1),
            "downlink_gain": 3e-5 / (n + 1),
            "tflops": 0.5 + n,
            "compute_w": 3.0,
        }
        for n in range(3)
    ]
    rules = build_rules(world_with({"computation", "energy", "delta"}))
    situation = situation_from(rows, [plain.carrying(0, 4, 0.0)] * 3, 2)
    local, away = every_level(rules, situation), every_count(rules, situation)
    assert local.perplexity.shape == (rules.models.most + 1, 3)
    assert away.perplexity.shape == (4, 3)
    np.testing.assert_array_equal(jnp.stack(local)[:, 0], 0)
    for count in range(1, 4):
        there = jnp.arange(3) < count
        taken = charge(rules, situation, Plan(there, jnp.zeros(3, jnp.int32))).taken
        np.testing.assert_allclose(away.upload_s[count, :count], taken.upload_s[:count], rtol=1e-6)
        np.testing.assert_allclose(away.training_s[count, :count], taken.training_s[:count], rtol=1e-6)
        np.testing.assert_allclose(away.perplexity[count, :count], taken.perplexity[:count], rtol=1e-6)
    for n in range(3):
        for layers in (3, 4, 9):
            plan = Plan(jnp.zeros(3, bool), jnp.where(jnp.arange(3) == n, layers, 0))
            taken = charge(rules, situation, plan).taken
            np.testing.assert_allclose(local.download_s[layers, n], taken.download_s[n], rtol=1e-6)
            np.testing.assert_allclose(local.training_s[layers, n], taken.training_s[n], rtol=1e-6)
            np.testing.assert_allclose(local.perplexity[layers, n], taken.perplexity[n], rtol=1e-6)
    whole = [models_s(row) for row in rows]
    np.testing.assert_allclose(whole_training_s(rules, situation), whole, rtol=1e-6)
    np.testing.assert_array_equal(usable_layers(situation), [4, 0, 4])
    assert not whole_training_s(build_rules(paper), fleet_alike(2)).any()
    np.testing.assert_allclose(
        at_server(rules, situation, jnp.zeros(1)).upload_s, away.upload_s[1], rtol=1e-6
    )


def models_s(row: dict) -> float:
    """Seconds of training with the whole model: 4 P operations a token of 2000 bytes, twice over."""
    parameters = (2.7e9, 1.0e9)[row["family"]]
    return 4 * parameters * row["data_bits"] / 8 / 2000 * 2 / 1e12 / row["tflops"]
