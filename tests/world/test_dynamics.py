"""Steps of the world against the oracle, what its programs depend on, and what UEs carry on."""

from __future__ import annotations

import dataclasses
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings

import oracle
from emutune.scenario import Scenario, load_scenario
from emutune.world import Outcome, World, build_world, observe, reset, ue_features
from worlds import Case, as_oracle, cases, edited, reset_compiled, serve_alike, step_wish

PAPER = load_scenario("paper")
RELATIVE = 1e-5

# Each number of UEs is a program of its own to compile, so only a few are tried.
FLEET_SIZES = (1, 2, 5, 8)


def assert_close(actual: jax.Array, expected: object) -> None:
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected, float), rtol=RELATIVE)


def assert_agree(held: jax.Array, outcome: Outcome, expected: oracle.Outcome) -> None:
    """The library's outcome of one step equals the oracle's."""
    np.testing.assert_array_equal(outcome.plan.layers, expected.layers)
    np.testing.assert_array_equal(outcome.switched, expected.switched)
    np.testing.assert_array_equal(held[:, 0], expected.cached_layers)
    assert_close(outcome.charge.taken.delay_s, expected.delay_s)
    assert_close(outcome.charge.taken.perplexity, expected.perplexity)
    assert_close(outcome.charge.delay_s, expected.step_delay_s)
    assert_close(outcome.reward, expected.reward)


@pytest.mark.parametrize("ues", FLEET_SIZES)
def test_step_agrees_with_the_oracle(ues: int) -> None:
    @settings(max_examples=150)
    @given(cases(PAPER, ues))
    def agrees(case: Case) -> None:
        assume(not case.is_near_a_threshold)
        state, outcome = step_wish(build_world(case.scenario), case.state, *case.wish)
        expected = oracle.serve(as_oracle(case.scenario), case.fleet, case.at_server, case.wanted)
        assert_agree(state.carried.held, outcome, expected)
        assert state.step == 1

    agrees()


@pytest.mark.parametrize("hold_tolerance", [0.0, 0.1])
def test_whole_episode_agrees_with_the_oracle(paper: Scenario, hold_tolerance: float) -> None:
    scenario = edited(paper, {"fleet.ues": 5, "retention.hold_tolerance": hold_tolerance})
    world, state = build_world(scenario), reset_compiled(jax.random.key(3), build_world(scenario))
    episode = jax.tree.map(lambda leaf: np.asarray(leaf, float), state.episode)
    plain, cached = as_oracle(scenario), np.zeros(5, int)
    random = np.random.default_rng(3)
    for t in range(scenario.fleet.tasks):
        at_server = random.random(5) < 0.4
        # A tenth of a level above a whole one, which is far from every threshold, at tolerance 0.1 too.
        wanted = (random.integers(7, 26, 5) + 0.1) / 32
        fleet = oracle.Fleet(
            power_w=episode.transmit_power_w,
            gain=episode.gain[t + 1],
            data_bytes=episode.data_bits[t] / 8,
            complexity=episode.complexity[t],
            cached_layers=cached,
        )
        expected = oracle.serve(plain, fleet, at_server, wanted)
        state, outcome = step_wish(world, state, jnp.asarray(at_server), jnp.asarray(wanted, jnp.float32))
        assert_agree(state.carried.held, outcome, expected)
        cached = np.array(expected.cached_layers)
    assert state.step == scenario.fleet.tasks


# --- one traced program for every scenario -----------------------------------------------------------------


def numeric_fields(tree: dict[str, object], path: tuple[str, ...] = ()) -> dict[str, float]:
    """Every number of a dumped scenario by its dotted path."""
    found = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            found |= numeric_fields(value, (*path, name))
        elif not isinstance(value, str | None):
            found[".".join((*path, name))] = value
    return found


def slightly_different(path: str, value: float) -> float:
    """Another valid value for a field of the paper's scenario."""
    if isinstance(value, int):
        return value + 1
    if value == 0:
        return 0.05
    return value * (1.1 if path.endswith(".max") else 0.9)


KNOTS = "quality.curve.knots"  # no number: they have tests of their own
NUMBERS = {path: v for path, v in numeric_fields(PAPER.model_dump()).items() if path != KNOTS}
# So many UEs, tasks and levels shape the arrays.
SHAPES = {"fleet.ues", "fleet.tasks", "model.layers", "retention.max"}
TRACED = {path: v for path, v in NUMBERS.items() if path not in SHAPES}


def episode_counting_traces() -> tuple[typing.Callable[[World], tuple], list[None]]:
    traces = []

    @jax.jit
    def start_and_serve(world: World) -> tuple:
        traces.append(None)
        state = reset(jax.random.key(0), world)
        state, outcome = step_wish(world, state, jnp.arange(world.ues) % 2 == 0, jnp.full(world.ues, 0.5))
        return outcome, ue_features(world, observe(world, state))

    return start_and_serve, traces


def test_no_number_but_ues_tasks_and_levels_recompiles(paper: Scenario) -> None:
    start_and_serve, traces = episode_counting_traces()
    start_and_serve(build_world(paper))
    for path, value in TRACED.items():
        start_and_serve(build_world(edited(paper, {path: slightly_different(path, value)})))
    start_and_serve(build_world(edited(paper, {"quality.complexity_factor": "as_printed"})))
    # As many levels as before.
    start_and_serve(build_world(edited(paper, {"retention.max": 0.79})))
    start_and_serve(build_world(edited(paper, {"model.layers": 50, "retention.max": 0.5})))
    assert len(traces) == 1
    for changes in ({"fleet.ues": 7}, {"fleet.tasks": 51}, {"model.layers": 40}):
        start_and_serve(build_world(edited(paper, changes)))
    assert len(traces) == 4


@pytest.mark.parametrize("path", sorted(NUMBERS.keys() - {"fleet.ues", "fleet.tasks"}))
def test_every_number_of_a_scenario_reaches_the_world(paper: Scenario, path: str) -> None:
    changed = build_world(edited(paper, {path: slightly_different(path, NUMBERS[path])}))
    leaves = zip(jax.tree.leaves(build_world(paper)), jax.tree.leaves(changed), strict=True)
    assert any(not jnp.array_equal(before, after) for before, after in leaves)


def test_arrays_of_a_world_have_their_declared_shapes(paper: Scenario) -> None:
    world = build_world(paper)
    for part in (world, world.rules, world.rules.models, world.rules.links):
        declared = typing.get_type_hints(type(part))
        for field in dataclasses.fields(part):
            value = getattr(part, field.name)
            kind = declared[field.name]
            assert isinstance(value, tuple if typing.get_origin(kind) is tuple else kind), field.name
            assert not getattr(value, "weak_type", False), field.name


# --- the cache ---------------------------------------------------------------------------------------------


def test_training_at_the_server_leaves_the_cache(paper: Scenario) -> None:
    cached, outcome = serve_alike(paper, at_server=True, cached=11, wanted=0.8)
    assert cached == 11
    assert not outcome.switched


def test_holding_an_emulator_costs_no_delay(paper: Scenario) -> None:
    cached, outcome = serve_alike(paper, at_server=False, cached=16, wanted=0.5)
    assert cached == 16
    assert not outcome.switched
    assert outcome.charge.delay_s == 0


@pytest.mark.parametrize("wanted", [0.0, 0.2, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("hold_tolerance", [0.0, 0.9])
def test_first_local_task_always_downloads(paper: Scenario, wanted: float, hold_tolerance: float) -> None:
    # An empty cache is 0 layers, and a wide hold around 0 must not count it as an emulator (D10).
    scenario = edited(paper, {"retention.hold_tolerance": hold_tolerance})
    cached, outcome = serve_alike(scenario, at_server=False, cached=0, wanted=wanted)
    assert cached > 0
    assert outcome.switched
    assert outcome.charge.delay_s > 0


@pytest.mark.parametrize("layers", [15, 17])
def test_lowering_retention_switches_as_raising_it_does(paper: Scenario, layers: int) -> None:
    cached, outcome = serve_alike(paper, at_server=False, cached=16, wanted=layers / 32)
    assert cached == layers
    assert outcome.switched
    assert outcome.charge.delay_s > 0
