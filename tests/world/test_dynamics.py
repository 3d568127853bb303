"""One step of the world against the oracle, closed forms, and values worked out by hand."""

from __future__ import annotations

import dataclasses
import math
import typing

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from emutune.scenario import Scenario, load_scenario
from emutune.world import (
    Action,
    Cache,
    Outcome,
    State,
    Task,
    World,
    build_world,
    observe,
    reset,
    serve,
    step,
    ue_features,
)
from emutune.world.link import shared_rate_bps
from emutune.world.quality import complexity_factor, curve_perplexity
from worlds import Situation, as_oracle, edited, situations

PAPER = load_scenario("paper")
RELATIVE = 1e-5

# Each number of UEs is a program of its own to compile, so only a few are tried.
FLEET_SIZES = (1, 2, 5, 8)

reset_compiled = jax.jit(reset)
step_compiled = jax.jit(step)
serve_compiled = jax.jit(serve)


def assert_close(actual: jax.Array, expected: object) -> None:
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected, float), rtol=RELATIVE)


def assert_agree(cached: jax.Array, outcome: Outcome, expected: oracle.Outcome, layers: int) -> None:
    """The library's outcome of one step equals the oracle's."""
    local = np.array(expected.layers) > 0
    assert_close(outcome.retention[local], np.array(expected.layers)[local] / layers)
    np.testing.assert_array_equal(outcome.switched, expected.switched)
    np.testing.assert_array_equal(cached, expected.cached_layers)
    assert_close(outcome.delay_s, expected.delay_s)
    assert_close(outcome.perplexity, expected.perplexity)
    assert_close(outcome.step_delay_s, expected.step_delay_s)
    assert_close(outcome.reward, expected.reward)


@pytest.mark.parametrize("ues", FLEET_SIZES)
def test_step_agrees_with_the_oracle(ues: int) -> None:
    @settings(max_examples=150)
    @given(situations(PAPER, ues))
    def agrees(situation: Situation) -> None:
        assume(not situation.is_near_a_threshold)
        state, outcome = step_compiled(build_world(situation.scenario), situation.state, situation.action)
        expected = oracle.serve(
            as_oracle(situation.scenario), situation.fleet, situation.at_server, situation.wanted
        )
        assert_agree(state.cache.layers, outcome, expected, situation.scenario.model.layers)
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
        state, outcome = step_compiled(
            world, state, Action(jnp.asarray(at_server), jnp.asarray(wanted, jnp.float32))
        )
        assert_agree(state.cache.layers, outcome, expected, 32)
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


# Knots make another program: they have tests of their own.
STATIC = {"fleet.ues", "fleet.tasks", "quality.curve.knots"}
TRACED = {path: v for path, v in numeric_fields(PAPER.model_dump()).items() if path not in STATIC}


def episode_counting_traces() -> tuple[typing.Callable[[World], tuple], list[None]]:
    traces = []

    @jax.jit
    def start_and_serve(world: World) -> tuple:
        traces.append(None)
        state = reset(jax.random.key(0), world)
        everywhere = Action(jnp.arange(world.ues) % 2 == 0, jnp.full(world.ues, 0.5))
        state, outcome = step(world, state, everywhere)
        return outcome, ue_features(world, observe(world, state))

    return start_and_serve, traces


def test_no_number_but_ues_and_tasks_recompiles(paper: Scenario) -> None:
    start_and_serve, traces = episode_counting_traces()
    start_and_serve(build_world(paper))
    for path, value in TRACED.items():
        start_and_serve(build_world(edited(paper, {path: slightly_different(path, value)})))
    start_and_serve(build_world(edited(paper, {"quality.complexity_factor": "as_printed"})))
    assert len(traces) == 1
    for changes in ({"fleet.ues": 7}, {"fleet.tasks": 51}):
        start_and_serve(build_world(edited(paper, changes)))
    assert len(traces) == 3


@pytest.mark.parametrize("path", TRACED)
def test_every_number_of_a_scenario_reaches_the_world(paper: Scenario, path: str) -> None:
    changed = build_world(edited(paper, {path: slightly_different(path, TRACED[path])}))
    leaves = zip(jax.tree.leaves(build_world(paper)), jax.tree.leaves(changed), strict=True)
    assert any(not jnp.array_equal(before, after) for before, after in leaves)


def test_arrays_of_a_world_have_their_declared_shapes(paper: Scenario) -> None:
    world, declared = build_world(paper), typing.get_type_hints(World)
    for field in dataclasses.fields(World):
        value = getattr(world, field.name)
        assert isinstance(value, declared[field.name]), field.name
        assert not getattr(value, "weak_type", False), field.name


# --- closed forms ------------------------------------------------------------------------------------------


def serve_equal(
    scenario: Scenario,
    *,
    at_server: bool,
    wanted: float = 0.8,
    cached: int = 0,
    ues: int = 1,
    gain: float = 1e-4,
    complexity: float = 10.0,
) -> tuple[jax.Array, Outcome]:
    """Serve equal UEs of 0.5 W at 100 m with 400 MB each: one step from equal caches and orders."""
    world = build_world(edited(scenario, {"fleet.ues": ues}))
    task = Task(*(jnp.full(ues, value) for value in (gain, gain, complexity, 400 * 8e6, 0.5)))
    action = Action(jnp.full(ues, at_server), jnp.full(ues, wanted))
    cache, outcome = serve_compiled(world, Cache(jnp.full(ues, cached, jnp.int32)), task, action)
    return cache.layers, outcome


@settings(max_examples=30)
@given(st.floats(1e4, 1e9), st.floats(-180, -100), st.floats(1e-9, 1e-2))
def test_lone_upload_takes_its_bits_over_the_shannon_rate(
    bandwidth_hz: float, noise_dbm_per_hz: float, gain: float
) -> None:
    scenario = edited(
        PAPER, {"radio.uplink_bandwidth_hz": bandwidth_hz, "radio.noise_dbm_per_hz": noise_dbm_per_hz}
    )
    _, outcome = serve_equal(scenario, at_server=True, gain=gain)
    noise_w = 1e-3 * 10 ** (noise_dbm_per_hz / 10) * bandwidth_hz
    assert_close(
        outcome.delay_s, [8 * 400e6 / (bandwidth_hz * math.log1p(0.5 * gain / noise_w) / math.log(2))]
    )


@pytest.mark.parametrize("ues", [2, 3, 8])
def test_n_equal_downloads_take_n_times_as_long_as_one(paper: Scenario, ues: int) -> None:
    # Power and bandwidth are both split n ways, so the SNR stays and the rate falls n-fold (Eq. 7).
    _, alone = serve_equal(paper, at_server=False)
    _, together = serve_equal(paper, at_server=False, ues=ues)
    assert_close(together.delay_s, np.full(ues, ues * alone.step_delay_s))


@pytest.mark.parametrize("ues", [2, 3, 8])
def test_n_equal_uploads_take_less_than_n_times_as_long_as_one(paper: Scenario, ues: int) -> None:
    # Only the bandwidth is split: each UE keeps its own power, so its SNR rises n-fold (Eq. 2, 3).
    _, alone = serve_equal(paper, at_server=True)
    _, together = serve_equal(paper, at_server=True, ues=ues)
    snr_alone = 0.5 * 1e-4 / (10**-20.4 * 1e5)
    expected = ues * alone.step_delay_s * math.log(1 + snr_alone) / math.log(1 + ues * snr_alone)
    assert_close(together.delay_s, np.full(ues, expected))
    assert together.step_delay_s < ues * alone.step_delay_s


def test_uplink_and_downlink_do_not_slow_each_other(paper: Scenario) -> None:
    world = build_world(edited(paper, {"fleet.ues": 2}))
    task = Task(*(jnp.full(2, value) for value in (1e-4, 1e-4, 10.0, 3.2e9, 0.5)))
    mixed = Action(jnp.array([True, False]), jnp.full(2, 0.8))
    _, outcome = serve_compiled(world, Cache(jnp.zeros(2, jnp.int32)), task, mixed)
    _, upload = serve_equal(paper, at_server=True)
    _, download = serve_equal(paper, at_server=False)
    assert_close(outcome.delay_s, [upload.step_delay_s, download.step_delay_s])
    assert outcome.step_delay_s == jnp.max(outcome.delay_s)


# --- the cache ---------------------------------------------------------------------------------------------


def test_training_at_the_server_leaves_the_cache(paper: Scenario) -> None:
    cached, outcome = serve_equal(paper, at_server=True, cached=11, wanted=0.8)
    assert cached == 11
    assert not outcome.switched


def test_holding_an_emulator_costs_no_delay(paper: Scenario) -> None:
    cached, outcome = serve_equal(paper, at_server=False, cached=16, wanted=0.5)
    assert cached == 16
    assert not outcome.switched
    assert outcome.step_delay_s == 0


@pytest.mark.parametrize("wanted", [0.0, 0.2, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("hold_tolerance", [0.0, 0.9])
def test_first_local_task_always_downloads(paper: Scenario, wanted: float, hold_tolerance: float) -> None:
    # An empty cache is 0 layers, and a wide hold around 0 must not count it as an emulator (D10).
    scenario = edited(paper, {"retention.hold_tolerance": hold_tolerance})
    cached, outcome = serve_equal(scenario, at_server=False, cached=0, wanted=wanted)
    assert cached > 0
    assert outcome.switched
    assert outcome.step_delay_s > 0


@pytest.mark.parametrize("layers", [15, 17])
def test_lowering_retention_switches_as_raising_it_does(paper: Scenario, layers: int) -> None:
    cached, outcome = serve_equal(paper, at_server=False, cached=16, wanted=layers / 32)
    assert cached == layers
    assert outcome.switched
    assert outcome.step_delay_s > 0


@pytest.mark.parametrize(
    ("wanted", "layers"), [(0.0, 7), (0.2, 7), (0.23, 7), (0.3, 10), (0.8, 25), (1.0, 25)]
)
def test_retention_is_rounded_to_the_nearest_level_inside_the_bounds(
    paper: Scenario, wanted: float, layers: int
) -> None:
    # 0.2 and 0.8 of 32 layers are 6.4 and 25.6, so the levels inside are 7 to 25; 0.3 is 9.6.
    cached, outcome = serve_equal(paper, at_server=False, wanted=wanted)
    assert cached == layers
    assert_close(outcome.retention, [layers / 32])


@pytest.mark.parametrize(
    ("wanted", "held"), [(0.4005, True), (0.5995, True), (0.3995, False), (0.6005, False)]
)
def test_hold_tolerance_keeps_a_near_emulator(paper: Scenario, wanted: float, held: bool) -> None:
    scenario = edited(paper, {"retention.hold_tolerance": 0.1})
    cached, outcome = serve_equal(scenario, at_server=False, cached=16, wanted=wanted)
    assert (cached == 16) == held
    assert outcome.switched != held
    assert (outcome.step_delay_s == 0) == held


# --- values worked out by hand -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("retention", "perplexity"),
    [
        (1.0, 14.0),  # 25.2 - 43.1 + 31.9
        (0.8, 13.548),  # 16.128 - 34.48 + 31.9, below f(1): a large emulator beats the full model (D4)
        (0.5, 16.65),  # 6.3 - 21.55 + 31.9
        (0.2, 24.288),  # 1.008 - 8.62 + 31.9
        (0.855, 13.47133),  # 18.42183 - 36.8505 + 31.9, the lowest: 43.1 / 50.4 = 0.85516
    ],
)
def test_curve_by_hand(paper: Scenario, retention: float, perplexity: float) -> None:
    assert_close(curve_perplexity(build_world(paper), jnp.asarray(retention)), perplexity)


def test_knots_take_the_place_of_the_quadratic(paper: Scenario) -> None:
    knots = [[0.125, 90.0], [0.5, 63.0], [1.0, 52.8]]
    measured = edited(paper, {"quality.curve.knots": knots})
    retentions = np.linspace(0.05, 1.0, 39)
    expected = np.interp(retentions, *np.transpose(knots))
    assert_close(curve_perplexity(build_world(measured), jnp.asarray(retentions, jnp.float32)), expected)
    assert np.allclose([measured.quality.curve(value) for value in retentions], expected, rtol=1e-12)


def test_curve_is_lowest_at_0_855(paper: Scenario) -> None:
    retentions = jnp.linspace(0.2, 1.0, 801)
    lowest = retentions[jnp.argmin(curve_perplexity(build_world(paper), retentions))]
    assert lowest == pytest.approx(0.855, abs=0.0015)


@pytest.mark.parametrize(
    ("factor", "complexity", "expected"),
    [
        ("rising", 10.0, 2.0),  # (10 + 10) / 10
        ("as_printed", 10.0, 2.0),  # (10 + 10) / 10: the two meet where c = iota
        ("rising", 1.0, 1.1),  # (1 + 10) / 10
        ("as_printed", 1.0, 11.0),  # (1 + 10) / 1
    ],
)
def test_complexity_factor_by_hand(paper: Scenario, factor: str, complexity: float, expected: float) -> None:
    world = build_world(edited(paper, {"quality.complexity_factor": factor}))
    assert_close(complexity_factor(world, jnp.asarray(complexity)), expected)


@pytest.mark.parametrize(("sharers", "expected"), [(0, 1e6), (1, 1e6), (3, 12e5 / 3)])
def test_rate_by_hand(sharers: int, expected: float) -> None:
    # 102.3 W arrive over 1e5 Hz x 1e-6 W/Hz = 0.1 W of noise: SNR 1023, 10 bit/s per Hz, 1e6 bit/s.
    # A third of the band with the power that makes SNR 4095 has 12 bit/s per Hz: 12 x 1e5 / 3.
    received_w = 102.3 if sharers < 2 else 4095 * 0.1 / 3
    rate = shared_rate_bps(*(jnp.asarray(x) for x in (1e5, received_w, 1.0, 1e-6, float(sharers))))
    assert_close(rate, expected)


def test_upload_from_100_metres_by_hand(paper: Scenario) -> None:
    # Gain 100**-2 = 1e-4. Noise 10**-20.4 W/Hz x 1e5 Hz = 3.98107e-16 W. SNR 0.5 x 1e-4 / that = 1.25594e11,
    # log2 = 36.86998, rate 3.686998e6 bit/s; 400 MB = 3.2e9 bit take 867.915 s.
    # Perplexity f(1) (10 + 10) / 10 = 28; reward -0.092 x 28 - 0.015 x 867.915 / 60 = -2.576 - 0.2169787.
    _, outcome = serve_equal(paper, at_server=True)
    assert_close(outcome.delay_s, [867.91476])
    assert_close(outcome.perplexity, [28.0])
    assert_close(outcome.reward, -2.7929787)


def test_download_to_100_metres_by_hand(paper: Scenario) -> None:
    # SNR 60 W x 1e-4 / (10**-20.4 W/Hz x 1e6 Hz) = 1.50713e12, log2 = 40.454943, rate 4.0454943e7 bit/s;
    # half of 10.8 GB = 4.32e10 bit take 1067.8547 s. Perplexity 16.65 x 2 = 33.3;
    # reward -0.092 x 33.3 - 0.015 x 1067.8547 / 60 = -3.0636 - 0.26696367.
    _, outcome = serve_equal(paper, at_server=False, wanted=0.5)
    assert_close(outcome.delay_s, [1067.8547])
    assert_close(outcome.perplexity, [33.3])
    assert_close(outcome.reward, -3.3305637)


def test_nobody_transmits_when_everyone_holds(paper: Scenario) -> None:
    state = State(
        reset_compiled(jax.random.key(0), build_world(paper)).episode, Cache(jnp.full(6, 16)), jnp.asarray(0)
    )
    everyone_holds = Action(jnp.zeros(6, bool), jnp.full(6, 0.5))
    after, outcome = step_compiled(build_world(paper), state, everyone_holds)
    assert outcome.step_delay_s == 0
    assert not outcome.switched.any()
    assert_close(outcome.reward, -0.092 * outcome.perplexity.mean())
    np.testing.assert_array_equal(after.cache.layers, state.cache.layers)
