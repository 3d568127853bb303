"""Bounds in worlds of computation, energy, memory, larger caches and idle UEs: below every plan and every policy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import OTHER, tiny

import plain
from emutune.bounds import certified_bounds
from emutune.policies import AllServer, CountTable, Fixed, Hold, LaterPrices, Random, plan_lookahead
from emutune.scenario import load_scenario
from emutune.study.evaluate import evaluate_policy, held_out_episodes
from emutune.world import build_world, draw_episode

EVERYTHING = {"computation", "budget", "memory", "privacy", "activity"}


def assert_below_the_optimum(features: set[str], seed: int, *changes: str) -> tuple[float, ...]:
    scenario = tiny(features, *changes)
    episodes = jax.tree.map(
        lambda leaf: leaf[None], jax.jit(draw_episode)(jax.random.key(seed), build_world(scenario))
    )
    best = plain.best_return(scenario, plain.tasks_of(jax.tree.map(lambda leaf: leaf[0], episodes)))
    linear, integer, prices = (
        certified_bounds(scenario, episodes, method=m)[0] for m in ("linear", "integer", "prices")
    )
    assert linear >= integer - 1e-5 * abs(integer)
    assert integer >= best
    assert prices >= best
    return linear, integer, prices, best


@pytest.mark.parametrize(
    "features",
    [
        {"computation", "budget"},
        EVERYTHING | {"trace"},
        {"cache"},
        {"multicast"},
        {"unshared", "computation"},
        *(
            pytest.param(few, marks=pytest.mark.slow)
            for few in (
                {"computation"},
                {"memory", "privacy"},
                {"activity"},
                {"cache", "delta"},
                {"unshared"},
                {"unshared", "delta", "memory", "activity"},
                {"multicast", "delta"},
                {"multicast", "computation", "energy"},
            )
        ),
    ],
)
def test_enumeration_never_beats_it(features: set[str]) -> None:
    gaps = []
    for seed, weight in enumerate((-0.001, -0.015, -0.1, -0.015)):
        found = assert_below_the_optimum(features, seed, f"reward.delay_weight_per_min={weight}")
        gaps.append([bound / found[-1] for bound in found[:-1]])
    linear, integer, prices = np.mean(gaps, axis=0)
    # How near they come: what is left is uploads' ratios and the mean over those that share.
    assert linear > 0.6
    assert integer > 0.75
    assert prices > 0.5


@pytest.mark.slow
@settings(max_examples=60)
@given(
    plain.feature_sets(),
    st.integers(0, 2**31 - 1),
    st.sampled_from([0.0, -0.001, -0.015, -0.1]),
    st.sampled_from([1e5, 3e6]),
    st.sampled_from([0.5, 5.0, 500.0]),
)
def test_enumeration_never_beats_it_in_any_world(features, seed, weight, uplink_hz, server_tflops) -> None:
    changes = [f"reward.delay_weight_per_min={weight}", f"radio.uplink_bandwidth_hz={uplink_hz}"]
    if "computation" in features:
        changes.append(f"computation.server_tflops={server_tflops}")
    linear, *_, best = assert_below_the_optimum(features, seed, *changes)
    assert linear >= best / 0.3


def every_policy(scenario):
    world = build_world(scenario)
    patience = [jnp.float32(300.0)] if scenario.computation else []
    counts = jnp.minimum(jnp.arange(scenario.fleet.ues + 1), 2)
    return [
        Random(),
        AllServer(),
        Fixed(jnp.float32(0.75)),
        Hold(jnp.float32(0.3), jnp.float32(0.5), *patience),
        CountTable(counts, jnp.array([0.3, 0.75]), *patience),
        plan_lookahead(world, LaterPrices(jnp.float32(0.5), jnp.float32(0.5), *patience)),
    ]


def assert_no_policy_beats_it(features: set[str], *changes: str, wanted: slice = slice(None)) -> None:
    scenario = load_scenario(
        "families",
        [
            "fleet.ues=3",
            "fleet.tasks=6",
            f"families.others=[{OTHER}]",
            "model.layers=6",
            *plain.changes_for(features),
            *(["memory.device_gb={min=3.7,max=9.0}"] if "memory" in features else []),
            *changes,
        ],
    )
    episodes = held_out_episodes(scenario, 3)
    bounds = certified_bounds(scenario, episodes)
    for policy in every_policy(scenario)[wanted]:
        assert (evaluate_policy(scenario, policy, episodes).episode_return <= bounds).all(), policy


# Fixed and hold; the others take longer to compile.
@pytest.mark.parametrize("wanted", [slice(2, 4), pytest.param(slice(None), marks=pytest.mark.slow)])
def test_no_policy_beats_it(wanted: slice) -> None:
    assert_no_policy_beats_it(EVERYTHING, wanted=wanted)


@pytest.mark.slow
@settings(max_examples=25)
@given(plain.feature_sets(), st.sampled_from([1.0, 20.0, 500.0]), st.sampled_from([-0.001, -0.1]))
def test_no_policy_beats_it_in_any_world(features, server_tflops, weight) -> None:
    changes = [f"reward.delay_weight_per_min={weight}"]
    if "computation" in features:
        changes.append(f"computation.server_tflops={server_tflops}")
    assert_no_policy_beats_it(features, *changes)
