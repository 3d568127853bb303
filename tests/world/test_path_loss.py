"""Path loss of TR 38.901 against golden values and an independent copy of its formulas, and its random part."""

from __future__ import annotations

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from tr3gpp import tr38901

from emutune.scenario import Scenario, load_scenario, parse_scenario
from emutune.scenario.load import dump_scenario
from emutune.world import build_world, draw_episode
from emutune.world.dynamics import draw_links
from emutune.world.path_loss import (
    MODELS,
    PathLossTables,
    breakpoint_m,
    build_path_loss,
    draw_propagation,
    los_probability,
    path_loss_db,
)

# Compiled once for every path loss: what differs between models are numbers.
propagate = jax.jit(draw_propagation)
links = jax.jit(draw_links)
draw_episode_compiled = jax.jit(draw_episode)
NAMES = {"umi": "UMi-StreetCanyon", "uma": "UMa"}


def scenario_of(model: str, *changes: str, carrier_ghz: float = 3.5) -> Scenario:
    """The paper's world with a path loss of TR 38.901."""
    text = dump_scenario(load_scenario("paper")).replace("path_loss_exponent = 2.0\n", "")
    return parse_scenario(
        text, overrides=[f"radio.path_loss.model={model}", f"radio.carrier_ghz={carrier_ghz}", *changes]
    )


def tables_of(model: str, *changes: str, carrier_ghz: float = 3.5) -> PathLossTables:
    tables = build_path_loss(scenario_of(model, *changes, carrier_ghz=carrier_ghz))
    assert isinstance(tables, PathLossTables)
    return tables


def python_of(latex: str) -> str:
    """A formula as Python writes it."""
    for pattern, written in (
        (r"\\log_\{10\}", "*log10"),
        (r"d_\{3D\}", "d3"),
        (r"d'_\{BP\}", "bp"),
        (r"h_\{BS\}", "hb"),
        (r"h_\{UT\}", "hu"),
        (r"f_c", "f"),
        (r"\^2", "**2"),
        (r"([0-9.]+)\(h", r"\1*(h"),
    ):
        latex = re.sub(pattern, written, latex)
    return latex.strip()


def by_the_report(model: str, condition: str, distance_m: float, hb: float, hu: float, f: float) -> float:
    """Path loss, evaluated from the text of the formulas as the report prints them."""
    d3, bp = math.hypot(distance_m, hb - hu), 4 * (hb - 1) * (hu - 1) * f * 1e9 / 3e8
    known = {"d3": d3, "bp": bp, "hb": hb, "hu": hu, "f": f, "log10": math.log10}
    formula = tr38901.section("7.4").pathloss(scenario=NAMES[model], condition=condition).formula
    if condition == "LOS":
        part = "PL_1" if distance_m <= bp else "PL_2"
        return float(eval(python_of(formula.split(f"{part} = ")[1].split(";")[0]), known))
    hidden = eval(python_of(re.split(r"PL'_\{\w+-NLOS\} = ", formula)[1]), known)
    return max(by_the_report(model, "LOS", distance_m, hb, hu, f), float(hidden))


@pytest.mark.parametrize(
    ("model", "clear", "hidden", "breakpoint"), [("umi", 85.31, 104.64, 210.0), ("uma", 83.14, 103.04, 560.0)]
)
def test_golden_values_at_3_5_ghz_and_100_m(
    model: str, clear: float, hidden: float, breakpoint: float
) -> None:
    tables = tables_of(model)
    loss = path_loss_db(tables, jnp.full(2, 100.0), jnp.asarray([True, False]))
    np.testing.assert_allclose(loss, [clear, hidden], atol=0.005)
    assert float(breakpoint_m(tables)) == pytest.approx(breakpoint, rel=1e-6)


@pytest.mark.parametrize("model", ["umi", "uma"])
@pytest.mark.parametrize(("carrier_ghz", "ue_height_m"), [(3.5, 1.5), (0.7, 5.0), (28.0, 1.5), (100.0, 12.0)])
def test_losses_are_those_of_the_report(model: str, carrier_ghz: float, ue_height_m: float) -> None:
    tables = tables_of(model, f"radio.path_loss.ue_height_m={ue_height_m}", carrier_ghz=carrier_ghz)
    heights = (MODELS[model].bs_height_m, ue_height_m)
    distances = np.concatenate([np.geomspace(10, 5000, 60), [209.9, 210.1, 559.9, 560.1]])
    for condition, clear in (("LOS", True), ("NLOS", False)):
        loss = path_loss_db(tables, jnp.asarray(distances, jnp.float32), jnp.asarray([clear]))
        expected = [by_the_report(model, condition, d, *heights, carrier_ghz) for d in distances]
        np.testing.assert_allclose(loss, expected, atol=2e-4)


@pytest.mark.parametrize("model", ["umi", "uma"])
def test_the_two_slopes_meet_at_the_breakpoint(model: str) -> None:
    tables = tables_of(model)
    around = float(breakpoint_m(tables)) * jnp.asarray([1 - 1e-5, 1 + 1e-5])
    near, far = path_loss_db(tables, around, jnp.asarray([True]))
    assert float(near) == pytest.approx(float(far), abs=0.01)


@pytest.mark.parametrize("model", ["umi", "uma"])
def test_shadowing_and_correlation_distances_are_those_of_the_report(model: str) -> None:
    for index, condition in enumerate(("LOS", "NLOS")):
        entry = tr38901.section("7.4").pathloss(scenario=NAMES[model], condition=condition)
        assert MODELS[model].shadowing_db[index] == entry.shadow_fading_std_db[0].value_db
        name = {"umi": "UMi - Street Canyon", "uma": "UMa"}[model]
        fast = tr38901.section("7.5").channel_model_parameters(scenario=name, condition=condition)
        assert MODELS[model].shadowing_m[index] == float(fast.corr_distance_SF_m)
        place = tr38901.section("7.6").correlation_distance(scenario=NAMES[model][:3], condition=condition)
        assert MODELS[model].los_m == float(place.los_nlos_state_m)


@pytest.mark.parametrize(("model", "scale"), [("umi", 36.0), ("uma", 63.0)])
def test_line_of_sight_is_as_likely_as_the_report_says(model: str, scale: float) -> None:
    assert f"{{{scale:.0f}}}" in tr38901.section("7.4").los_probability(scenario=NAMES[model]).formula
    distances = np.array([10.0, 18.0, 18.01, 50.0, 100.0, 500.0, 5000.0])
    expected = [1 if d <= 18 else 18 / d + math.exp(-d / scale) * (1 - 18 / d) for d in distances]
    np.testing.assert_allclose(los_probability(tables_of(model), jnp.asarray(distances)), expected, rtol=1e-5)
    for wanted, probability in (("always", 1.0), ("never", 0.0)):
        tables = tables_of(model, f"radio.path_loss.line_of_sight={wanted}")
        assert (los_probability(tables, jnp.asarray(distances)) == probability).all()


@pytest.mark.parametrize("model", ["umi", "uma"])
def test_draws_have_the_laws_of_line_of_sight_and_shadowing(model: str) -> None:
    tables, ues = tables_of(model), 20_000
    # Half of a correlation distance a row: later rows must have the same laws as the first.
    distance_m, moved_m = jnp.full((4, ues), 80.0), jnp.full((4, ues), 25.0)
    way = propagate(jax.random.key(0), tables, distance_m, moved_m)
    clear, shadow = np.asarray(way.line_of_sight), np.asarray(way.shadowing_db, float)
    expected = float(los_probability(tables, jnp.asarray(80.0)))
    for row in range(4):
        share = clear[row].mean()
        assert share == pytest.approx(expected, abs=5 * math.sqrt(expected * (1 - expected) / ues))
        for state, deviation in zip((True, False), MODELS[model].shadowing_db, strict=True):
            drawn = shadow[row][clear[row] == state]
            assert stats.kstest(drawn, stats.norm(0, deviation).cdf).pvalue > 1e-4


@pytest.mark.parametrize("moved", [0.0, 5.0, 13.0, 40.0])
def test_shadowing_is_correlated_exponentially_in_the_distance_moved(moved: float) -> None:
    tables, ues = tables_of("umi", "radio.path_loss.line_of_sight=never"), 20_000
    way = propagate(jax.random.key(1), tables, jnp.full((3, ues), 100.0), jnp.full((3, ues), moved))
    drawn = np.asarray(way.shadowing_db, float)
    for lag in (1, 2):
        expected = math.exp(-lag * moved / 13)
        assert np.corrcoef(drawn[0], drawn[lag])[0, 1] == pytest.approx(expected, abs=5 / math.sqrt(ues))


def test_line_of_sight_changes_less_over_short_ways() -> None:
    tables, ues = tables_of("umi"), 20_000
    # Orthant probability of two normals of correlation r at the threshold: by quadrature.
    threshold = stats.norm.ppf(float(los_probability(tables, jnp.asarray(60.0))))
    for moved in (1.0, 10.0, 50.0):
        way = propagate(jax.random.key(2), tables, jnp.full((2, ues), 60.0), jnp.full((2, ues), moved))
        clear = np.asarray(way.line_of_sight)
        r = math.exp(-moved / 50)
        both = stats.multivariate_normal([0, 0], [[1, r], [r, 1]]).cdf([threshold, threshold])
        assert (clear[0] & clear[1]).mean() == pytest.approx(both, abs=5 * math.sqrt(both * (1 - both) / ues))


def test_ues_that_stay_keep_their_line_of_sight_and_shadowing() -> None:
    world = build_world(scenario_of("umi", "fleet.ues=500", "fleet.tasks=4", "radio.rate=ergodic"))
    channel, _ = links(jax.random.key(0), world)
    gain = np.asarray(channel.gain)
    np.testing.assert_array_equal(gain, np.broadcast_to(gain[0], gain.shape))
    assert np.unique(gain[0]).size > 490


def test_an_episode_s_gain_is_loss_shadowing_and_fading() -> None:
    quiet = scenario_of("umi", "fleet.ues=300", "radio.path_loss.shadowing=false")
    world = build_world(quiet)
    episode = draw_episode_compiled(jax.random.key(4), world)
    fading = np.asarray(episode.gain) / np.median(np.asarray(episode.gain), axis=0)
    assert fading.std() == pytest.approx(0.1, rel=0.05)
    distance = np.asarray(
        jax.random.uniform(jax.random.split(jax.random.key(4), 5)[0], (300,), minval=50.0, maxval=500.0)
    )
    loss_db = -10 * np.log10(np.asarray(episode.gain, float).mean(0))
    either = [[by_the_report("umi", c, d, 10.0, 1.5, 3.5) for d in distance] for c in ("LOS", "NLOS")]
    assert np.abs(np.array(either) - loss_db).min(0).max() < 0.3
    # A tenth of the UEs or so has line of sight at these distances.
    clear = np.abs(either[0] - loss_db) < 0.3
    assert 0.05 < clear.mean() < 0.3


@pytest.mark.parametrize(("model", "sight"), [("umi", "drawn"), ("umi", "always"), ("uma", "never")])
def test_features_are_scaled_by_the_gains_that_occur(model: str, sight: str) -> None:
    world = build_world(scenario_of(model, "fleet.ues=3000", f"radio.path_loss.line_of_sight={sight}"))
    gain = np.asarray(draw_episode_compiled(jax.random.key(5), world).gain)
    low, high = np.asarray(world.radio.gain_bounds)
    assert 0.95 < ((gain > low) & (gain < high)).mean() <= 1
    assert low < float(world.radio.middle_gain) < high


def test_path_loss_is_a_thing_of_its_own_keys() -> None:
    plain, with_loss = (
        draw_episode_compiled(jax.random.key(6), build_world(scenario))
        for scenario in (load_scenario("paper"), scenario_of("umi"))
    )
    for field in ("complexity", "data_bits", "transmit_power_w"):
        np.testing.assert_array_equal(getattr(plain, field), getattr(with_loss, field))
