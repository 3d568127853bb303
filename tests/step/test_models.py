"""The tables of levels against the paper's formulas."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import plain
from emutune.scenario import Scenario, load_scenario
from emutune.step import build_models, build_rules, missing_bits, retention_of
from emutune.step.rules import complexity_factor
from worlds import curves, edited, world_with

PAPER = load_scenario("paper")


def of_many_layers(scenario: Scenario, layers: int) -> Scenario:
    """The same model in finer layers, of which an emulator may keep any number."""
    return edited(
        scenario,
        {"model.layers": layers, "retention": {"min": 1 / layers, "max": 1.0, "hold_tolerance": 0.0}},
    )


def assert_close(actual: jax.Array, expected: object) -> None:
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected, float), rtol=1e-5)


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
    table = build_models(of_many_layers(paper, 1000)).perplexity
    assert_close(table[0, round(1000 * retention)], perplexity)


def test_knots_take_the_place_of_the_quadratic(paper: Scenario) -> None:
    knots = [[0.125, 90.0], [0.5, 63.0], [1.0, 52.8]]
    measured = edited(paper, {"quality.curve.knots": knots})
    retentions = np.arange(1, 41) / 40
    expected = np.interp(retentions, *np.transpose(knots))
    assert_close(build_models(of_many_layers(measured, 40)).perplexity[0, 1:], expected)
    assert np.allclose([measured.quality.curve(value) for value in retentions], expected, rtol=1e-12)


def test_curve_is_lowest_at_0_855(paper: Scenario) -> None:
    table = build_models(of_many_layers(paper, 1000)).perplexity[0]
    assert 1 + int(np.argmin(table[1:])) == pytest.approx(855, abs=1.5)


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
    rules = build_rules(edited(paper, {"quality.complexity_factor": factor}))
    assert_close(complexity_factor(rules, jnp.asarray(complexity)), expected)


@settings(max_examples=40)
@given(
    st.sets(st.sampled_from(["delta", "computation"])),
    curves(),
    st.sampled_from([("paper", 0.2, 0.8), ("families", 0.1, 1.0)]),
    st.sampled_from([8.0, 60.0]),
)
def test_tables_are_the_paper_s_formulas(
    features: set[str], curve: dict[str, float], source: tuple[str, float, float], cache_gb: float
) -> None:
    name, least, most = source
    changes = [f"retention.min={least}", f"retention.max={most}"]
    changes += [f"families.cache_gb={cache_gb}"] if name == "families" else []
    scenario = edited(world_with(features, *changes, name=name), {"quality.curve": curve})
    with jax.enable_x64(True):
        tables = build_models(scenario, jnp.float64)
        assert (tables.families, tables.most) == (
            len(scenario.models),
            max(one.most for one in scenario.models),
        )
        for m, model in enumerate(scenario.models):
            possible = plain.possible_layers(scenario, {"family": m, "memory_bits": np.inf})
            assert (tables.layers[m], tables.low[m], tables.high[m]) == (
                model.layers,
                possible[0],
                possible[-1],
            )
            levels = np.array([0, *possible])
            shares = levels / model.layers
            whole_bits, whole_tflop = 8e9 * model.size_gb, 0.0
            if scenario.computation:
                tokens_per_bit = scenario.computation.epochs / scenario.computation.bytes_per_token / 8
                whole_tflop = 4 * model.parameters_billion * 1e9 * tokens_per_bit / 1e12
            held, wanted = (jnp.asarray(part) for part in np.meshgrid(levels, levels, indexing="ij"))
            sent = (
                np.maximum(wanted - held, 0) if "delta" in features else np.where(wanted == held, 0, wanted)
            )
            for found, expected in (
                (tables.bits[m, levels], shares * whole_bits),
                (tables.memory_bits[m, levels], shares * whole_bits),
                (tables.tflop_per_bit[m, levels], shares * whole_tflop),
                (tables.perplexity[m, levels], [0.0, *(model.curve(share) for share in shares[1:])]),
                (tables.whole_tflop_per_bit[m], whole_tflop),
                (tables.whole_perplexity[m], model.curve(1.0)),
                (
                    missing_bits(tables, jnp.full(held.shape, m), held, wanted),
                    sent / model.layers * whole_bits,
                ),
                (retention_of(tables, jnp.full(levels.shape, m), jnp.asarray(levels)), shares),
            ):
                np.testing.assert_allclose(found, expected, rtol=1e-12)
