"""Shipped worlds with the models of catalogues, and what their steps cost, against the simulator."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emutune.errors import FleetError
from emutune.fleet.comparison import Comparison
from emutune.fleet.costing import costs_of, replayed, simulated_costs
from emutune.fleet.server.drawn import Draws
from emutune.fleet.worlds import calibrated, served_world
from emutune.policies import Random
from emutune.policies.registry import baseline_policy
from emutune.scenario import Scenario, dump_scenario, load_scenario, parse_scenario, shipped_scenarios
from emutune.tuning.inventory import CatalogueInfo, Inventory
from emutune.tuning.manifest import Emulator, LayerEntry, Shard
from emutune.world import Carried, World, build_world, serve, situation_at
from emutune.world.dynamics import during

BASE = load_scenario("reference").model.base
NAMES = ("ue1", "ue2", "ue3", "ue4")
STEPS = 6


def shard(number: int, size: int) -> Shard:
    return Shard(sha256=f"{number:064x}", bytes=size)


def inventory(folder: Path, base: str | None = BASE) -> Inventory:
    """A catalogue of 2 + 8 + 2 layers of 400 bytes, whose embeddings have 3000."""
    info = CatalogueInfo(base=base, config={}, layers=12, bottom=2, top=2, text="", recipe="r")
    found = Inventory(folder, info)
    (folder / "emulators").mkdir(parents=True)
    for kept in range(1, 9):
        layers = [*range(2), *range(2, 2 + kept), 10, 11]
        emulator = Emulator(
            base=base, name=f"e{kept}", recipe="r", method=("layer_drop",), order="importance",
            retention=kept / 8, kept=tuple(range(2, 2 + kept)), seed=0, outer=shard(99, 3000),
            layers=tuple(LayerEntry(index=index, shard=shard(index, 400)) for index in layers),
        )  # fmt: skip
        found.manifest_path(emulator.name).write_text(emulator.model_dump_json())
    return found


@pytest.mark.parametrize("name", shipped_scenarios())
def test_a_world_is_served_with_the_models_of_its_catalogues(tmp_path: Path, name: str) -> None:
    world, catalogue = load_scenario(name), inventory(tmp_path)
    served, byte_scale = served_world(world, [catalogue], 4, STEPS)
    assert parse_scenario(dump_scenario(served)) == served
    (model,) = served.models
    assert (model.base, model.layers, served.fleet.ues, served.fleet.tasks) == (BASE, 8, 4, STEPS)
    for emulator in catalogue.emulators():
        layers = len(emulator.kept)
        assert model.emulator_gb(layers) * 1e9 == pytest.approx(emulator.bytes * byte_scale)
        assert model.curve(layers / 8) == pytest.approx(calibrated(BASE).curve(layers / 8))
    theirs = world.models[0]
    assert model.emulator_gb(4) == pytest.approx(theirs.shared_gb + theirs.size_gb / 2)
    # What sets devices and links apart is the world's.
    for section in ("radio", "computation", "energy", "privacy", "activity", "mobility", "trace"):
        assert getattr(served, section) == getattr(world, section)
    # The largest emulator is better than the smallest by as much reward.
    gains = [
        scenario.reward.perplexity_weight * (m.curve(m.fewest / m.layers) - m.curve(m.most / m.layers))
        for scenario, m in ((served, model), (world, theirs))
    ]
    assert gains[0] == pytest.approx(gains[1])
    # Missing layers alone are sent, and to who has none what all emulators share.
    rules = build_world(served).rules.models
    assert float(rules.missing_bits[0, 0, 2]) == pytest.approx(8 * byte_scale * (3000 + 6 * 400), rel=1e-6)
    assert float(rules.missing_bits[0, 2, 5]) == pytest.approx(8 * byte_scale * 3 * 400, rel=1e-6)


def test_catalogues_that_do_not_fit_the_world_are_refused(tmp_path: Path) -> None:
    world, one = load_scenario("paper"), inventory(tmp_path / "one")
    with pytest.raises(FleetError, match="2 were given, but the world 'paper' has 1 foundation"):
        served_world(world, [one, one], 4, STEPS)
    with pytest.raises(FleetError, match="no shipped scenario knows its curve"):
        served_world(world, [inventory(tmp_path / "other", "0" * 64)], 4, STEPS)


def played(world: World, scenario: Scenario, policy: str, seed: int) -> tuple[list[Comparison], np.ndarray]:
    """What a ledger would hold of an episode in which everything comes out as the simulator says; and its charges."""
    decider = baseline_policy(policy, scenario)
    episode = Draws(world, seed).episode(0, NAMES)
    carried, rows, charges = Carried(*[jnp.zeros((4, 1), jnp.int32)] * 2, jnp.zeros(4)), [], []
    for step in range(STEPS):
        known = situation_at(world, episode, jnp.asarray(step), carried)
        plan = decider.decide(world, known, jax.random.fold_in(jax.random.key(seed), step))
        carried, outcome = serve(world, during(episode, jnp.asarray(step), known), plan)
        charges.append(float(outcome.charge.total))
        taken = outcome.charge.taken
        delays = np.asarray(taken.delay_s)
        for number, name in enumerate(NAMES):
            if not known.active[number]:
                continue
            situation = {
                "complexity": float(known.complexity[number]),
                "data_bits": float(known.data_bits[number]),
                "memory_bits": float(known.memory_bits[number]),
                "private": bool(known.private[number]),
            }
            delay, joules = float(delays[number]), float(taken.joules[number])
            rows.append(
                Comparison(
                    step=step, device=name, lease=f"{step}-{name}", task="", base=None, kind="train", state="done",
                    at_server=bool(outcome.plan.at_server[number]), retention=None, emulator_name=None, gain=None,
                    complexity=None, rate_bps=None, predicted_bytes=0, measured_bytes=0, predicted_delay_s=delay,
                    measured_delay_s=delay, predicted_training_s=0.0, measured_training_s=None,
                    predicted_joules=joules, measured_joules=2 * joules,
                    predicted_perplexity=float(taken.perplexity[number]),
                    measured_perplexity=float(taken.perplexity[number]), perplexity_before=None,
                    adapter_sha256=None, accepted=True, situation=json.dumps(situation),
                )
            )  # fmt: skip
    return rows, np.array(charges)


def world_of(tmp_path: Path, name: str) -> Scenario:
    changes = ["energy={receive_w=1.5,weight_per_j=-1e-4,budget_j=30.0,over_budget_weight_per_j=-1e-3}"]
    return served_world(
        load_scenario(name, changes if name == "private" else []), [inventory(tmp_path)], 4, STEPS
    ).scenario


@pytest.mark.parametrize("name", ["paper", "edge-compute", "private", "urban"])
def test_what_a_fleet_costs_is_what_the_simulator_charges(tmp_path: Path, name: str) -> None:
    scenario = world_of(tmp_path, name)
    world = build_world(scenario)
    rows, charges = played(world, scenario, "random", 3)
    costs = costs_of(rows, scenario, NAMES)
    np.testing.assert_allclose(costs.predicted, charges, rtol=1e-4)
    assert (costs.measured >= costs.predicted - 1e-9).all()
    if scenario.energy is not None:
        assert costs.measured.sum() > costs.predicted.sum()
    missing = [replace(row, measured_perplexity=None) if row.step == 2 else row for row in rows]
    complete = costs_of(missing, scenario, NAMES).complete
    assert list(complete) == [step != 2 or not any(row.step == 2 for row in rows) for step in range(STEPS)]


@pytest.mark.parametrize("name", ["paper", "edge-compute", "private", "urban"])
def test_the_simulator_plays_a_fleets_own_tasks(tmp_path: Path, name: str) -> None:
    scenario = world_of(tmp_path, name)
    world = build_world(scenario)
    rows, charges = played(world, scenario, "random", 3)
    again = simulated_costs(rows, scenario, NAMES, Random(), 3)
    np.testing.assert_allclose(again, charges, rtol=1e-4)
    # Other tasks than were drawn are other costs.
    other = [
        replace(row, situation=json.dumps(json.loads(row.situation) | {"data_bits": 8e9, "complexity": 3.0}))
        for row in rows
    ]
    episode = replayed(other, Draws(world, 3).episode(0, NAMES), NAMES)
    there = {(row.step, NAMES.index(row.device)) for row in rows}
    assert {place for place in np.ndindex(STEPS, 4) if float(episode.data_bits[place]) == 8e9} == there
    assert not np.allclose(simulated_costs(other, scenario, NAMES, Random(), 3), charges)
