"""Several emulators in a UE's cache: which go, what is seen of them, and when it is the world of one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emutune.policies import CountTable, Fixed, Hold, Policy, Random
from emutune.scenario import Scenario, load_scenario
from emutune.step import usable_layers
from emutune.study.evaluate import evaluate_policy, held_out_episodes
from emutune.world import State, build_world, cached_retention, features_of, observe, reset, ue_features
from emutune.world.environments import OrchestrationEnv
from emutune.world.features import other_retention
from worlds import alike, step_wish

# 16 layers of 10.8 GB are 0.675 GB each.
LAYER_GB = 10.8 / 16


def cached(gb: float, *changes: str) -> Scenario:
    return load_scenario("families", [f"families.cache_gb={gb}", *changes])


def with_families(state: State, families: list[int]) -> State:
    """The state with one family of task after another, for every UE."""
    rows = jnp.broadcast_to(jnp.asarray(families)[:, None], (len(families), state.episode.family.shape[1]))
    return state._replace(
        episode=state.episode._replace(family=state.episode.family.at[: len(families)].set(rows))
    )


def play(scenario: Scenario, families: list[int], layers: list[int | None]) -> list[State]:
    """States after each task of one UE; None for layers is training at the server."""
    world = build_world(scenario)
    state = with_families(reset(jax.random.key(0), world), families)
    states = []
    for level in layers:
        state, _ = step_wish(world, state, *alike(world, level is None, (level or 8) / 16))
        states.append(state)
    return states


def test_the_least_recently_used_go_by_hand() -> None:
    # Room for 20 layers.
    scenario = cached(20 * LAYER_GB, "fleet.ues=1")
    played = play(
        scenario,
        families=[0, 1, 0, 2, 1, 0, 2, 0],
        #  0 and 1 fit; 0 is used again, so that 2 drives 1 out; an upload touches nothing; 1 drives 0 out.
        layers=[8, 8, 8, 8, None, None, 12, 10],
    )
    held = [state.carried.held[0].tolist() for state in played]
    assert held == [
        [8, 0, 0],
        [8, 8, 0],
        [8, 8, 0],
        [8, 0, 8],
        [8, 0, 8],
        [8, 0, 8],
        [8, 0, 12],
        [10, 0, 0],
    ]
    # The one used last is the youngest.
    assert [int(jnp.argmin(state.carried.age[0])) for state in played] == [0, 1, 0, 2, 2, 2, 2, 0]


def test_what_fills_the_cache_to_the_last_bit_fits() -> None:
    for layers in range(4, 14):
        scenario = cached(3 * layers * LAYER_GB, "fleet.ues=1")
        held = play(scenario, [0, 1, 2], [layers] * 3)[-1].carried.held
        np.testing.assert_array_equal(held, [[layers] * 3])


def test_one_large_emulator_may_drive_out_several() -> None:
    scenario = cached(12.4 * LAYER_GB, "fleet.ues=1")
    played = play(scenario, [0, 1, 2, 0], [4, 4, 4, 12])
    assert [state.carried.held[0].tolist() for state in played[2:]] == [[4, 4, 4], [12, 0, 0]]


def test_with_room_for_all_nothing_is_fetched_twice() -> None:
    for rho in (1.0, 0.3):
        scenario = cached(100.0, f"families.persistence={rho}")
        drawn = held_out_episodes(scenario, 6)
        needed = [[len(set(column)) for column in one.T] for one in np.asarray(drawn.family)]
        changes = evaluate_policy(scenario, Fixed(jnp.float32(0.75)), drawn).changes_per_ue
        np.testing.assert_allclose(changes, np.mean(needed, axis=1), rtol=1e-6)
    one = load_scenario("paper", ["model.layers=16", "retention.min=0.1875", "retention.max=0.8125"])
    changes = evaluate_policy(one, Fixed(jnp.float32(0.75)), held_out_episodes(one, 2)).changes_per_ue
    np.testing.assert_allclose(changes, 1)


ONE = (Hold(jnp.float32(0.4), jnp.float32(0.75)), Random())
MORE = (
    CountTable(jnp.array([0, 1, 1, 2, 2, 3, 3]), jnp.array([0.5, 0.8125])),
    Fixed(jnp.float32(0.6)),
    *ONE,
)


@pytest.mark.parametrize(
    ("delta", "policies"),
    [("false", ONE), *(pytest.param(delta, MORE, marks=pytest.mark.slow) for delta in ("false", "true"))],
)
def test_a_cache_that_holds_one_is_the_world_of_one(delta: str, policies: tuple[Policy, ...]) -> None:
    # Two emulators of 8 layers or more do not fit where one of 13 does.
    changes = ["retention.min=0.5", f"download.delta={delta}"]
    several, one = cached(13 * LAYER_GB, *changes), load_scenario("families", changes)
    drawn = held_out_episodes(one, 8)
    for policy in policies:
        mine, theirs = (evaluate_policy(scenario, policy, drawn) for scenario in (several, one))
        for left, right in zip(mine, theirs, strict=True):
            np.testing.assert_array_equal(left, right)


def test_an_emulator_is_no_larger_than_the_cache() -> None:
    scenario = cached(9.5 * LAYER_GB)
    assert {model.most for model in scenario.models} == {9}
    assert scenario.level_bounds == (3, 9)
    env = OrchestrationEnv(scenario)
    env.reset(seed=0)
    action = {"at_server": np.zeros(6, np.int8), "retention": np.full(6, 0.8125, np.float32)}
    assert (env.step(action)[-1]["retention"] == 9 / 16).all()


def test_delta_downloads_add_to_what_is_held_of_the_family() -> None:
    scenario = cached(17.0, "fleet.ues=1", "download.delta=true", "radio.fading_blocks=1000000")
    world = build_world(scenario)
    state = with_families(reset(jax.random.key(0), world), [0, 1, 0, 1])
    minutes = []
    for level in (8, 12, 12, 6):
        state, outcome = step_wish(world, state, *alike(world, False, level / 16))
        minutes.append(float(outcome.charge.delay_s) / 60)
    # 8 layers of one, 12 of another, then the 4 that the first lacks, and none to go down.
    np.testing.assert_allclose(np.array(minutes) / minutes[0], [1, 1.5, 0.5, 0], atol=0.01)
    np.testing.assert_array_equal(state.carried.held, [[12, 6, 0]])


def test_what_else_is_held_is_seen() -> None:
    scenario = cached(20.0, "fleet.ues=1")
    world = build_world(scenario)
    assert len(features_of(world)) == len(features_of(build_world(load_scenario("families")))) + 1
    state = play(scenario, [0, 1, 1, 2], [4, 10, 10])[-1]
    seen = observe(world, state)
    np.testing.assert_array_equal(seen.held, [[4, 10, 0]])
    np.testing.assert_array_equal(seen.age[:, :2], [[1, 0]])
    assert cached_retention(world, seen) == 0
    assert other_retention(world, seen) == 10 / 16
    features = np.asarray(ue_features(world, seen))[0]
    np.testing.assert_allclose(features[3:6], [0, 10 / 13, 14 * LAYER_GB / 20], rtol=1e-6)
    of_first = ue_features(world, observe(world, with_families(state, [0, 0, 0, 0])))
    np.testing.assert_allclose(of_first[0, 3:6], [4 / 13, 10 / 13, 14 * LAYER_GB / 20], rtol=1e-6)
    of_second = ue_features(world, observe(world, with_families(state, [1, 1, 1, 1])))
    np.testing.assert_allclose(of_second[0, 3:5], [10 / 13, 4 / 13], rtol=1e-6)
    assert features_of(world)[5][:4] == ("cache_share", "1", 0.0, 1.0)


def test_numbers_of_families_do_not_matter() -> None:
    """Families of one size that change their names are seen as before."""
    world = build_world(cached(20.0, "fleet.ues=1"))
    played = [
        play(cached(20.0, "fleet.ues=1"), order, [4, 10, 6])[-1] for order in ([0, 1, 2, 0], [2, 0, 1, 2])
    ]
    left, right = (ue_features(world, observe(world, state)) for state in played)
    np.testing.assert_array_equal(left[:, 3:], right[:, 3:])


def test_without_the_field_a_ue_keeps_one() -> None:
    world = build_world(load_scenario("families"))
    assert not world.rules.several
    assert "cache_share" not in {feature.name for feature in features_of(world)}
    state = with_families(reset(jax.random.key(0), world), [0, 1])
    for layers in (4, 6):
        state, _ = step_wish(world, state, *alike(world, False, layers / 16))
    np.testing.assert_array_equal(state.carried.held, [[0, 6, 0]] * 6)


def test_usable_is_what_is_held_of_the_task_s_family() -> None:
    scenario = cached(20.0, "fleet.ues=1")
    seen = observe(build_world(scenario), play(scenario, [0, 1, 1], [4, 10])[-1])
    for family, layers in enumerate((4, 10, 0)):
        assert usable_layers(seen._replace(family=jnp.asarray([family]))) == layers
