"""What each UE adds to a step, against serving the step without it."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import plain
from emutune.scenario import Scenario, load_scenario
from emutune.step import Plan, marginal_charges, plan_of_wish
from emutune.world import build_world, reset, serve
from holding import charged_at, holding

serve_compiled = jax.jit(serve)
credit_compiled = jax.jit(marginal_charges)


def step_delay_s(scenario: Scenario, fleet: dict, sends: list[tuple[str, float]]) -> float:
    """Delay of a step in plain numbers: each UE sends nothing, its data up, or so many bits down."""
    radio = scenario.radio
    noise = 10 ** (radio.noise_dbm_per_hz / 10) / 1000
    count = {link: sum(kind == link for kind, _ in sends) for link in ("up", "down")}
    delays = [0.0]
    for n, (link, bits) in enumerate(sends):
        if link == "up":
            share = radio.uplink_bandwidth_hz / count["up"]
            snr = fleet["transmit_power_w"][n] * fleet["gain"][n] / (noise * share)
            delays.append(bits / (share * math.log2(1 + snr)))
        elif link == "down":
            share = radio.downlink_bandwidth_hz / count["down"]
            snr = radio.downlink_power_w * fleet["gain"][n] / (noise * radio.downlink_bandwidth_hz)
            delays.append(bits / (share * math.log2(1 + snr)))
    return max(delays)


@pytest.mark.parametrize("seed", range(8))
def test_credit_is_the_cost_less_the_cost_without_the_ue(seed: int) -> None:
    scenario = load_scenario("families", ["fleet.ues=5"])
    world, draw = build_world(scenario), np.random.default_rng(seed)
    state = reset(jax.random.key(seed), world)
    # First some emulators of the families that tasks have now, so that some UEs can hold.
    warm = Plan(jnp.asarray(draw.random(5) < 0.5), jnp.full(5, 8, jnp.int32))
    carried, _ = serve_compiled(world, charged_at(world, state), warm)
    at_server = draw.random(5) < (0.0, 0.3, 0.5, 1.0)[seed % 4]
    levels = np.where(draw.random(5) < 0.5, 8, draw.integers(3, 14, 5))
    true = charged_at(world, state._replace(carried=carried))
    _, outcome = serve_compiled(world, true, Plan(jnp.asarray(at_server), jnp.asarray(levels, jnp.int32)))
    sends = []
    for n in range(5):
        if at_server[n]:
            sends.append(("up", float(true.data_bits[n])))
        elif outcome.switched[n]:
            sends.append(("down", 8 * 10.8e9 * levels[n] / 16))
        else:
            sends.append(("none", 0.0))
    fleet = {name: np.asarray(getattr(true, name), float) for name in ("transmit_power_w", "gain")}
    whole = step_delay_s(scenario, fleet, sends)
    assert whole == pytest.approx(float(outcome.charge.delay_s), rel=1e-5)
    expected = []
    for n in range(5):
        without = step_delay_s(scenario, fleet, [*sends[:n], ("none", 0.0), *sends[n + 1 :]])
        perplexity = float(outcome.charge.taken.perplexity[n])
        expected.append(0.092 / 5 * perplexity + 0.017 / 60 * (whole - without))
    added = credit_compiled(world.rules, true, outcome.plan)
    np.testing.assert_allclose(added, expected, rtol=1e-4, atol=1e-5)


def test_a_lone_sender_is_charged_the_whole_delay() -> None:
    scenario = load_scenario("families", ["fleet.ues=1"])
    world = build_world(scenario)
    true = charged_at(world, reset(jax.random.key(0), world))
    for at_server in (True, False):
        _, outcome = serve_compiled(world, true, Plan(jnp.array([at_server]), jnp.array([8])))
        added = credit_compiled(world.rules, true, outcome.plan)
        np.testing.assert_allclose(added.sum(), -outcome.reward, rtol=1e-5)


EVERYTHING = {"computation", "budget", "memory", "privacy", "activity"}


@pytest.mark.parametrize("features", [EVERYTHING, {"computation", "energy"}, {"activity", "privacy"}])
def test_credit_counts_training_and_joules(features: set[str]) -> None:
    for seed in range(8):
        changes = plain.changes_for(features)
        # With a fast server all wait for a UE that trains what it holds.
        changes += ["computation.server_tflops=500.0"] * (seed % 2 and "computation" in features)
        scenario = load_scenario("families", ["fleet.ues=5", "model.parameters_billion=2.7", *changes, OTHER])
        world = build_world(scenario)
        draw = np.random.default_rng(seed)
        state = jax.jit(reset)(jax.random.key(seed), world)
        rows = plain.tasks_of(state.episode)[0]
        family = np.array([row["family"] for row in rows])
        possible = [plain.possible_layers(scenario, row) for row in rows]
        held = [int(draw.choice(one)) if one and draw.random() < 0.5 else 0 for one in possible]
        spent = draw.uniform(0, 4000, 5)
        carried = [plain.carrying(*mine) for mine in zip(family, held, spent, strict=True)]
        true = charged_at(world, state._replace(carried=holding(world, family, held, spent)))
        at_server, wanted = draw.random(5) < 0.5, (draw.integers(240, 960, 5) + 0.1) / 1200
        # Half of those that hold something keep it.
        whole = np.array([scenario.models[f].layers for f in family])
        keeps = (draw.random(5) < 0.5) & (np.array(held) > 0)
        wanted = np.where(keeps, np.array(held) / whole, wanted)
        plan = [plain.project(scenario, *wish) for wish in zip(rows, at_server, wanted, strict=True)]
        wish = plan_of_wish(world.rules, true, jnp.asarray(at_server), jnp.asarray(wanted, jnp.float32))
        _, outcome = serve_compiled(world, true, wish)
        _, charged = plain.serve(scenario, rows, carried, plan)
        np.testing.assert_allclose(outcome.charge.taken.delay_s, charged["delay_s"], rtol=1e-4, atol=1e-4)
        active = max(sum(row["active"] for row in rows), 1)
        expected = []
        for n in range(5):
            # Without a UE the others do the same, and their tasks' share of the mean stays what it is.
            quiet = [*plan[:n], ("idle", 0), *plan[n + 1 :]]
            _, spared = plain.serve(scenario, rows, carried, quiet)
            delay = 0.017 / 60 * (max(charged["delay_s"]) - max(spared["delay_s"]))
            joules = energy_cost(scenario, spent, charged) - energy_cost(scenario, spent, spared)
            expected.append(0.092 / active * charged["perplexity"][n] + delay + joules)
        added = credit_compiled(world.rules, true, outcome.plan)
        np.testing.assert_allclose(added, expected, rtol=2e-4, atol=2e-5)


OTHER = "families.others=[{size_gb = 5.4, layers = 16, parameters_billion = 1.0}]"


def energy_cost(scenario: Scenario, spent: np.ndarray, charged: dict) -> float:
    if scenario.energy is None:
        return 0.0
    used = np.array(charged["energy_j"])
    cost = -scenario.energy.weight_per_j * used.mean()
    if scenario.energy.budget_j:
        over = np.maximum(spent + used - scenario.energy.budget_j, 0)
        over -= np.maximum(spent - scenario.energy.budget_j, 0)
        cost -= scenario.energy.over_budget_weight_per_j * over.mean()
    return cost
