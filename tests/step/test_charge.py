"""A step's charge against plain numbers over all features, closed forms, and values worked out by hand."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import plain
from emutune.scenario import Scenario, load_scenario
from emutune.step import (
    Plan,
    build_rules,
    charge,
    empty_cache,
    marginal_charges,
    on_ue,
    possible_plan,
    situation_of,
)
from worlds import decades, edited, fleet_alike, plan_from, serve_alike, situation_from, world_with

PAPER = load_scenario("paper")


def assert_close(actual: jax.Array, expected: object) -> None:
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected, float), rtol=1e-5)


# --- plain numbers -----------------------------------------------------------------------------------------

# What a step is charged with; the other features only say what is drawn.
CHARGED = {
    "computation", "energy", "budget", "memory", "privacy", "activity", "delta", "multicast", "cache", "ergodic",
    "unshared",
}  # fmt: skip


def test_ues_that_fetch_the_same_layers_share_one_transmission_at_the_rate_of_the_weakest() -> None:
    scenario = world_with({"multicast", "energy"}, "families.persistence=0.5")
    rules, ues = build_rules(scenario), 4
    gain = jnp.array([1e-7, 1e-9, 1e-8, 1e-8])
    held, age = empty_cache(rules, ues)
    situation = situation_of(
        progress=jnp.zeros(()),
        family=jnp.array([0, 0, 0, 1]),
        complexity=jnp.ones(ues),
        data_bits=jnp.full(ues, 1e9),
        transmit_power_w=jnp.ones(ues),
        gain=gain,
        held=held,
        age=age,
    )
    layers = jnp.array([3, 3, 2, 3])
    taken = charge(rules, situation, Plan(jnp.zeros(ues, bool), layers)).taken
    alone_s = np.asarray(on_ue(rules, situation, layers).download_s)
    # Three transmissions: the weak UE's also serves the strong one.
    expected = 3 * np.array([alone_s[1], alone_s[1], alone_s[2], alone_s[3]])
    np.testing.assert_allclose(taken.download_s, expected, rtol=1e-5)
    np.testing.assert_allclose(taken.joules, scenario.energy.receive_w * expected, rtol=1e-5)


def test_with_delta_download_the_same_level_from_another_is_another_transmission() -> None:
    rules, ues = build_rules(world_with({"multicast", "delta"})), 3
    _, age = empty_cache(rules, ues)
    situation = situation_of(
        progress=jnp.zeros(()),
        family=jnp.zeros(ues, int),
        complexity=jnp.ones(ues),
        data_bits=jnp.full(ues, 1e9),
        transmit_power_w=jnp.ones(ues),
        gain=jnp.array([1e-7, 1e-9, 1e-8]),
        # The first two hold three layers and lack two; the third lacks one.
        held=jnp.zeros_like(age).at[:, 0].set(jnp.array([3, 3, 4])),
        age=age,
    )
    layers = jnp.array([5, 5, 5])
    taken = charge(rules, situation, Plan(jnp.zeros(ues, bool), layers)).taken
    alone_s = np.asarray(on_ue(rules, situation, layers).download_s)
    np.testing.assert_allclose(taken.download_s, 2 * alone_s[[1, 1, 2]], rtol=1e-5)


@st.composite
def steps(draw: st.DrawFn) -> tuple[Scenario, list, list, list]:
    """A world with any features, a fleet in it, and a plan that is possible."""
    scenario = world_with(draw(plain.feature_sets()) & CHARGED, "quality.complexity_factor=" + draw(FACTORS))
    rows, carried, plan = [], [], []
    for _ in range(draw(st.sampled_from([1, 4]))):
        row = draw_row(draw, scenario)
        rows.append(row)
        carried.append(draw_carried(draw, scenario, row))
        plan.append(draw(st.sampled_from(choices(scenario, row, carried[-1]))))
    return scenario, rows, carried, plan


FACTORS = st.sampled_from(["rising", "as_printed"])


def draw_row(draw: st.DrawFn, scenario: Scenario) -> dict:
    """What a UE is and is asked, neutral where a feature is off."""
    row = {
        "family": draw(st.integers(0, len(scenario.models) - 1)),
        "complexity": draw(decades(0.5, 50)),
        "data_bits": draw(decades(1e7, 1e11)),
        "transmit_power_w": draw(decades(0.01, 5)),
        "gain": draw(decades(1e-15, 1e-1)),
        "downlink_gain": draw(decades(1e-15, 1e-1)),
        "tflops": draw(decades(0.3, 20)) if scenario.computation else None,
        "memory_bits": 8e9 * draw(st.floats(0.1, 12)) if scenario.memory else math.inf,
        "private": draw(st.booleans()) if scenario.privacy else False,
        "active": draw(st.booleans()) if scenario.activity else True,
    }
    watts = scenario.computation and scenario.energy
    return row | {"compute_w": draw(decades(0.5, 100)) if watts else None}


def draw_carried(draw: st.DrawFn, scenario: Scenario, row: dict) -> plain.Carried:
    """A history of emulators, each of which the UE could hold."""
    emulators: tuple[tuple[int, int], ...] = ()
    for family in draw(st.permutations(range(len(scenario.models)))):
        levels = plain.possible_layers(scenario, row | {"family": family})
        if levels and draw(st.booleans()):
            emulators = plain.kept_after(scenario, emulators, (family, draw(st.sampled_from(levels))))
    return plain.Carried(emulators, draw(st.floats(0, 5000)) if scenario.energy else 0.0)


def choices(scenario: Scenario, row: dict, mine: plain.Carried) -> list[tuple[str, int]]:
    """What the UE can do; what it holds already comes again and again, so that many do."""
    held = [("local", mine.of(row["family"]))] * 6
    possible = plain.options(scenario, row)
    return possible + [one for one in held if one in possible]


@settings(max_examples=150)
@given(steps(), st.sampled_from([jnp.float32, jnp.float64]))
def test_the_charge_is_what_plain_numbers_say(step: tuple, dtype: jax.typing.DTypeLike) -> None:
    scenario, rows, carried, wished = step
    _, expected = plain.serve(scenario, rows, carried, wished)
    exact = dtype == jnp.float64
    with jax.enable_x64(exact):
        rules = build_rules(scenario, dtype)
        situation = situation_from(rows, carried, len(scenario.models), dtype)
        plan = plan_from(wished)
        for mine, other in zip(possible_plan(rules, situation, plan), plan, strict=True):
            np.testing.assert_array_equal(mine, other)
        charged = charge(rules, situation, plan)
        # The ergodic rate is an approximation in either precision.
        rtol = 3e-5 if not exact else 1e-6 if rules.links.ergodic else 1e-11
        taken = charged.taken
        for found, name in (
            (taken.delay_s, "delay_s"),
            (taken.training_s, "training_s"),
            (taken.joules, "energy_j"),
            (taken.perplexity, "perplexity"),
            (-charged.total, "reward"),
        ):
            assert found.dtype == dtype
            np.testing.assert_allclose(found, expected[name], rtol=rtol, atol=1e-12, err_msg=name)
        np.testing.assert_allclose(charged.delay_s, max(expected["delay_s"]), rtol=rtol)


@settings(max_examples=60)
@given(steps())
def test_the_total_is_the_sum_of_the_named_terms(step: tuple) -> None:
    scenario, rows, carried, wished = step
    after, expected = plain.serve(scenario, rows, carried, wished)
    charged = charge(
        build_rules(scenario), situation_from(rows, carried, len(scenario.models)), plan_from(wished)
    )
    tasks = max(sum(row["active"] for row in rows), 1)
    terms = {
        "perplexity": -scenario.reward.perplexity_weight * sum(expected["perplexity"]) / tasks,
        "delay": -scenario.reward.delay_weight_per_min / 60 * max(expected["delay_s"]),
    }
    if scenario.energy:
        terms["energy"] = -scenario.energy.weight_per_j * np.mean(expected["energy_j"])
        if scenario.energy.budget_j:
            over = [
                max(mine.spent_j - scenario.energy.budget_j, 0)
                for spent in (after, carried)
                for mine in spent
            ]
            excess = (sum(over[: len(rows)]) - sum(over[len(rows) :])) / len(rows)
            terms["budget"] = -scenario.energy.over_budget_weight_per_j * excess
    assert set(charged.terms) == set(terms)
    for name, cost in terms.items():
        np.testing.assert_allclose(charged.terms[name], cost, rtol=3e-5, atol=1e-5, err_msg=name)
    np.testing.assert_allclose(charged.total, sum(float(term) for term in charged.terms.values()), rtol=1e-6)


@settings(max_examples=60)
@given(steps())
def test_a_ue_adds_the_charge_less_the_charge_without_it(step: tuple) -> None:
    scenario, rows, carried, wished = step
    tasks, weight = max(sum(row["active"] for row in rows), 1), -scenario.reward.perplexity_weight
    _, whole = plain.serve(scenario, rows, carried, wished)

    def beside_perplexity(outcome: dict, of: int) -> float:
        return -outcome["reward"] - weight * sum(outcome["perplexity"]) / of

    expected = []
    for n in range(len(rows)):
        _, without = plain.serve(scenario, rows, carried, [*wished[:n], ("idle", 0), *wished[n + 1 :]])
        # Without a UE the others' part of the mean stays what it is.
        others = max(sum(kind != "idle" for kind, _ in wished) - (wished[n][0] != "idle"), 1)
        spared = beside_perplexity(whole, tasks) - beside_perplexity(without, others)
        expected.append(weight / tasks * whole["perplexity"][n] + spared)
    added = marginal_charges(
        build_rules(scenario), situation_from(rows, carried, len(scenario.models)), plan_from(wished)
    )
    np.testing.assert_allclose(added, expected, rtol=1e-4, atol=1e-5 * abs(whole["reward"]))


def test_plans_may_have_axes_before_the_ues(paper: Scenario) -> None:
    rules, situation = build_rules(paper), fleet_alike(2, cached=16)
    kinds = [("server", 0), ("local", 16), ("local", 25)]
    plans = [plan_from([one, other]) for one in kinds for other in kinds]
    stacked = Plan(*(jnp.stack(parts).reshape(3, 3, 2) for parts in zip(*plans, strict=True)))
    together = charge(rules, situation, stacked)
    alone = [charge(rules, situation, plan).total for plan in plans]
    np.testing.assert_allclose(together.total.ravel(), alone, rtol=1e-6)
    assert together.taken.joules.shape == (3, 3, 2)


# --- what is off ----------------------------------------------------------------------------------------------


def test_neutral_fields_change_nothing() -> None:
    """A world with every feature, at values that mean nothing, charges what a world without them does."""
    neutral = {
        "computation": ["computation={device_tflops={min=1e6,max=1e6},server_tflops=1e6,"
                        "bytes_per_token=1e9,epochs=1e-6}", "model.parameters_billion=1e-6"],
        "energy": ["energy={receive_w=0.0,weight_per_j=0.0,budget_j=1e12,over_budget_weight_per_j=-1.0,"
                   "compute_j_per_tflop={min=1e-6,max=1e-6}}"],
        "memory": ["memory={device_gb={min=1e3,max=1e3}}"],
        "privacy": ["privacy={share=0.0}"],
        "activity": ["activity={task_probability=1.0}"],
    }  # fmt: skip
    without, on = (
        load_scenario("paper"),
        load_scenario("paper", [one for each in neutral.values() for one in each]),
    )
    assert set(build_rules(on).terms) > set(build_rules(without).terms)
    plan = plan_from([("server", 0), ("local", 16), ("local", 25), ("server", 0)])
    bare = fleet_alike(4, cached=16)
    full = bare._replace(tflops=jnp.full(4, 1e6), compute_w=jnp.full(4, 1.0), memory_bits=jnp.full(4, 8e12))
    np.testing.assert_allclose(
        charge(build_rules(on), full, plan).total, charge(build_rules(without), bare, plan).total, rtol=1e-6
    )


# --- closed forms ------------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(st.floats(1e4, 1e9), st.floats(-180, -100), st.floats(1e-9, 1e-2))
def test_lone_upload_takes_its_bits_over_the_shannon_rate(
    bandwidth_hz: float, noise_dbm_per_hz: float, gain: float
) -> None:
    scenario = edited(
        PAPER, {"radio.uplink_bandwidth_hz": bandwidth_hz, "radio.noise_dbm_per_hz": noise_dbm_per_hz}
    )
    _, outcome = serve_alike(scenario, at_server=True, gain=gain)
    noise_w = 1e-3 * 10 ** (noise_dbm_per_hz / 10) * bandwidth_hz
    assert_close(
        outcome.charge.taken.delay_s,
        [8 * 400e6 / (bandwidth_hz * math.log1p(0.5 * gain / noise_w) / math.log(2))],
    )


@pytest.mark.parametrize("ues", [2, 3, 8])
def test_n_equal_downloads_take_n_times_as_long_as_one(paper: Scenario, ues: int) -> None:
    # Power and bandwidth are both split n ways, so the SNR stays and the rate falls n-fold (Eq. 7).
    _, alone = serve_alike(paper, at_server=False)
    _, together = serve_alike(paper, at_server=False, ues=ues)
    assert_close(together.charge.taken.delay_s, np.full(ues, ues * alone.charge.delay_s))


@pytest.mark.parametrize("ues", [2, 3, 8])
def test_n_equal_uploads_take_less_than_n_times_as_long_as_one(paper: Scenario, ues: int) -> None:
    # Only the bandwidth is split: each UE keeps its own power, so its SNR rises n-fold (Eq. 2, 3).
    _, alone = serve_alike(paper, at_server=True)
    _, together = serve_alike(paper, at_server=True, ues=ues)
    snr_alone = 0.5 * 1e-4 / (10**-20.4 * 1e5)
    expected = ues * alone.charge.delay_s * math.log(1 + snr_alone) / math.log(1 + ues * snr_alone)
    assert_close(together.charge.taken.delay_s, np.full(ues, expected))
    assert together.charge.delay_s < ues * alone.charge.delay_s


def test_uplink_and_downlink_do_not_slow_each_other(paper: Scenario) -> None:
    mixed = charge(build_rules(paper), fleet_alike(2), plan_from([("server", 0), ("local", 25)]))
    _, upload = serve_alike(paper, at_server=True)
    _, download = serve_alike(paper, at_server=False)
    assert_close(mixed.taken.delay_s, [upload.charge.delay_s, download.charge.delay_s])
    assert mixed.delay_s == jnp.max(mixed.taken.delay_s)


# --- values worked out by hand -----------------------------------------------------------------------------


def test_upload_from_100_metres_by_hand(paper: Scenario) -> None:
    # Gain 100**-2 = 1e-4. Noise 10**-20.4 W/Hz x 1e5 Hz = 3.98107e-16 W. SNR 0.5 x 1e-4 / that = 1.25594e11,
    # log2 = 36.86998, rate 3.686998e6 bit/s; 400 MB = 3.2e9 bit take 867.915 s.
    # Perplexity f(1) (10 + 10) / 10 = 28; reward -0.092 x 28 - 0.015 x 867.915 / 60 = -2.576 - 0.2169787.
    _, outcome = serve_alike(paper, at_server=True)
    assert_close(outcome.charge.taken.delay_s, [867.91476])
    assert_close(outcome.charge.taken.perplexity, [28.0])
    assert_close(outcome.reward, -2.7929787)


def test_download_to_100_metres_by_hand(paper: Scenario) -> None:
    # SNR 60 W x 1e-4 / (10**-20.4 W/Hz x 1e6 Hz) = 1.50713e12, log2 = 40.454943, rate 4.0454943e7 bit/s;
    # half of 10.8 GB = 4.32e10 bit take 1067.8547 s. Perplexity 16.65 x 2 = 33.3;
    # reward -0.092 x 33.3 - 0.015 x 1067.8547 / 60 = -3.0636 - 0.26696367.
    _, outcome = serve_alike(paper, at_server=False, wanted=0.5)
    assert_close(outcome.charge.taken.delay_s, [1067.8547])
    assert_close(outcome.charge.taken.perplexity, [33.3])
    assert_close(outcome.reward, -3.3305637)


def test_nobody_transmits_when_everyone_holds(paper: Scenario) -> None:
    held, outcome = serve_alike(paper, at_server=False, wanted=0.5, cached=16, ues=6)
    assert outcome.charge.delay_s == 0
    assert not outcome.switched.any()
    assert_close(outcome.reward, -0.092 * outcome.charge.taken.perplexity.mean())
    np.testing.assert_array_equal(held, 16)
