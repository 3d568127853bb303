"""Several foundation models and delta downloads against a plain re-implementation and closed forms."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from emutune.policies import Fixed, Random
from emutune.scenario import Scenario, load_scenario
from emutune.study.evaluate import evaluate_policy, held_out_episodes
from emutune.world import (
    Action,
    all_tasks,
    build_world,
    draw_episode,
    feature_count,
    observe,
    reset,
    serve,
    step,
    ue_features,
)
from emutune.world.environments import OrchestrationEnv, parallel_env

UNEQUAL = [
    "fleet.ues=5",
    "families.persistence=0.4",
    "families.others=[{size_gb = 3.5, layers = 12, curve = {quadratic = 0.0, linear = -10.0, constant = 30.0}},"
    " {size_gb = 20.0, layers = 40, curve = {quadratic = 0.0, linear = 0.0, constant = 1.0,"
    " knots = [[0.25, 40.0], [0.5, 25.0], [1.0, 11.0]]}}]",
]


GOLDEN = [-176.654495, -177.308777, -175.65506]


def plain_step(scenario: Scenario, task: dict, cache: list, action: tuple) -> tuple[list, dict]:
    """One step in plain numbers, from the description of the features alone; ``cache`` holds (family, layers)."""
    radio, quality = scenario.radio, scenario.quality
    noise = 10 ** (radio.noise_dbm_per_hz / 10) / 1000
    ues = len(cache)
    plans = []
    for n in range(ues):
        model = scenario.models[task["family"][n]]
        held = cache[n][1] if cache[n] and cache[n][0] == task["family"][n] else 0
        levels = [
            k
            for k in range(1, model.layers + 1)
            if scenario.retention.min - 1e-9 <= k / model.layers <= scenario.retention.max + 1e-9
        ]
        chosen = min(levels, key=lambda k: abs(k / model.layers - action[1][n]))
        sent = 0
        if not action[0][n] and chosen != held:
            sent = max(chosen - held, 0) if scenario.download and scenario.download.delta else chosen
        plans.append((model, held, chosen, sent))
    uploads, downloads = sum(action[0]), sum(plan[3] > 0 for plan in plans)
    delays, perplexities, switched, after = [], [], [], []
    for n, (model, held, chosen, sent) in enumerate(plans):
        delay = 0.0
        if action[0][n]:
            share = radio.uplink_bandwidth_hz / uploads
            snr = task["transmit_power_w"][n] * task["gain"][n] / (noise * share)
            delay = task["data_bits"][n] / (share * math.log2(1 + snr))
        elif sent:
            snr = radio.downlink_power_w * task["gain"][n] / (noise * radio.downlink_bandwidth_hz)
            rate = radio.downlink_bandwidth_hz / downloads * math.log2(1 + snr)
            delay = 8e9 * model.size_gb * sent / model.layers / rate
        factor = (task["complexity"][n] + quality.complexity_weight) / quality.complexity_weight
        retention = 1.0 if action[0][n] else chosen / model.layers
        perplexities.append(model.curve(retention) * factor)
        delays.append(delay)
        switched.append(not action[0][n] and chosen != held)
        after.append(cache[n] if action[0][n] else (task["family"][n], chosen))
    reward = scenario.reward.perplexity_weight * np.mean(perplexities)
    reward += scenario.reward.delay_weight_per_min * max(delays) / 60
    return after, {"delay_s": delays, "perplexity": perplexities, "switched": switched, "reward": reward}


@pytest.mark.parametrize("delta", ["false", "true"])
@pytest.mark.parametrize("name", ["unequal", "families"])
def test_a_whole_episode_agrees_with_plain_numbers(name: str, delta: str) -> None:
    changes = [f"download.delta={delta}", *(UNEQUAL if name == "unequal" else [])]
    scenario = load_scenario("families", changes)
    world = build_world(scenario)
    state = reset(jax.random.key(3), world)
    drawn = all_tasks(state.episode)._asdict()
    fields = ("gain", "complexity", "data_bits", "transmit_power_w", "family")
    tasks = {key: np.asarray(drawn[key]) for key in fields}
    assert set(np.unique(tasks["family"])) == {0, 1, 2}
    cache: list = [None] * scenario.fleet.ues
    random = np.random.default_rng(5)
    compiled = jax.jit(step)
    lowered = 0
    for t in range(scenario.fleet.tasks):
        at_server = random.random(scenario.fleet.ues) < 0.3
        # A little off the levels and far from where two of them are equally near.
        wanted = (random.integers(240, 960, scenario.fleet.ues) + 0.1) / 1200
        task = {key: [value.item() for value in part[t]] for key, part in tasks.items()}
        before, (cache, expected) = cache, plain_step(scenario, task, cache, (at_server, wanted))
        state, outcome = compiled(
            world, state, Action(jnp.asarray(at_server), jnp.asarray(wanted, jnp.float32))
        )
        for field in ("delay_s", "perplexity", "reward"):
            np.testing.assert_allclose(getattr(outcome, field), expected[field], rtol=2e-5, atol=1e-6)
        np.testing.assert_array_equal(outcome.switched, expected["switched"])
        held = [
            (int(f), int(k)) if k else None
            for f, k in zip(state.cache.family, state.cache.layers, strict=True)
        ]
        assert held == cache
        lowered += sum(
            old is not None and old[0] == new[0] and old[1] > new[1]
            for old, new in zip(before, cache, strict=True)
            if new
        )
    assert lowered > 5


@pytest.mark.parametrize("persistence", [0.0, 0.5, 0.8, 1.0])
def test_the_family_of_a_task_is_the_chain_it_says(persistence: float) -> None:
    world = build_world(
        load_scenario("families", [f"families.persistence={persistence}", "fleet.ues=2000", "fleet.tasks=6"])
    )
    family = np.asarray(draw_episode(jax.random.key(1), world).family)
    for row in family:
        assert stats.chisquare(np.bincount(row, minlength=3)).pvalue > 1e-4
    expected = persistence + (1 - persistence) / 3
    for stays in np.mean(family[1:] == family[:-1], axis=1):
        assert stays == pytest.approx(expected, abs=5 * math.sqrt(expected * (1 - expected) / 2e3) + 1e-12)
    # Where it does not stay, both other families are equally likely: it steps on by 1 or by 2.
    moves = (family[1:] - family[:-1])[family[1:] != family[:-1]] % 3
    assert persistence == 1.0 or np.mean(moves == 1) == pytest.approx(0.5, abs=0.05)


def test_a_chain_that_never_leaves_is_the_world_of_one_model() -> None:
    families = load_scenario("families", ["families.persistence=1"])
    one = families.model_copy(update={"families": None})
    drawn = held_out_episodes(families, 3)
    alone = held_out_episodes(one, 3)
    for field in ("gain", "complexity", "data_bits", "transmit_power_w"):
        np.testing.assert_array_equal(getattr(drawn, field), getattr(alone, field))
    for policy in (Fixed(jnp.float32(0.5)), Random()):
        mine, plain = (
            evaluate_policy(scenario, policy, held_out_episodes(scenario, 3)) for scenario in (families, one)
        )
        np.testing.assert_allclose(mine, plain, rtol=1e-6)


def test_the_paper_s_world_is_as_before_there_were_families(paper: Scenario) -> None:
    world = build_world(paper)
    assert world.families is None
    assert not world.delta_download
    state = reset(jax.random.key(0), world)
    assert state.episode.family is None
    assert state.cache.family is None
    assert feature_count(world) == 4
    # Measured before these features existed.
    returns = evaluate_policy(paper, Random(), held_out_episodes(paper, 3)).episode_return
    np.testing.assert_allclose(returns, GOLDEN, rtol=1e-6)
    assert (world.path_loss, world.fading, world.mobility, world.trace) == (None,) * 4
    assert not world.ergodic_rate
    assert len(jax.tree.leaves(world)) == 21
    assert len(jax.tree.leaves(state.episode)) == 4
    small = jax.make_jaxpr(serve)(world, state.cache, *_first(state))
    large = jax.make_jaxpr(serve)(*_families_serve())
    assert len(small.eqns) < len(large.eqns)


def test_growing_an_emulator_by_delta_costs_as_much_as_sending_it_at_once() -> None:
    scenario = load_scenario(
        "delta", ["families.persistence=1", "fleet.ues=1", "radio.fading_blocks=1000000"]
    )
    world = build_world(scenario)

    def minutes(levels: list[int]) -> float:
        state, total = reset(jax.random.key(0), world), 0.0
        for level in levels:
            state, outcome = step(world, state, Action(jnp.zeros(1, bool), jnp.full(1, level / 16)))
            total += float(outcome.step_delay_s) / 60
        return total

    whole = minutes([12])
    assert minutes([4, 7, 12]) == pytest.approx(whole, rel=5e-3)
    assert minutes([12, 5, 5]) == pytest.approx(whole, rel=5e-3)
    # What was dropped has to be sent again.
    assert minutes([12, 5, 12]) == pytest.approx(whole * (1 + 7 / 12), rel=5e-3)


def test_a_ue_that_only_lowers_takes_no_share_of_the_downlink() -> None:
    world = build_world(load_scenario("delta", ["families.persistence=1", "fleet.ues=2"]))
    state = reset(jax.random.key(0), world)
    state, _ = step(world, state, Action(jnp.array([False, True]), jnp.array([0.8, 0.8])))
    _, outcome = step(world, state, Action(jnp.zeros(2, bool), jnp.array([0.5, 0.5])))
    assert outcome.delay_s[0] == 0
    assert outcome.switched.all()
    _, alone = step(world, state, Action(jnp.array([True, False]), jnp.array([0.5, 0.5])))
    np.testing.assert_allclose(outcome.delay_s[1], alone.delay_s[1], rtol=1e-6)


def test_what_is_held_of_another_family_is_seen_and_kept_through_uploads() -> None:
    world = build_world(load_scenario("families"))
    state = reset(jax.random.key(2), world)
    state, _ = step(world, state, Action(jnp.zeros(6, bool), jnp.full(6, 0.5)))
    first = np.asarray(state.episode.family)[0]
    state, _ = step(world, state, Action(jnp.ones(6, bool), jnp.full(6, 0.8)))
    seen, family = observe(world, state), np.asarray(state.episode.family)[2]
    np.testing.assert_array_equal(seen.held_retention, 0.5)
    np.testing.assert_array_equal(seen.held_family, first)
    np.testing.assert_array_equal(seen.cached_retention, np.where(family == first, 0.5, 0))
    features = ue_features(world, seen)
    assert features.shape == (6, feature_count(world))
    highest = 13 / 16
    np.testing.assert_allclose(features[:, 3], np.where(family == first, 0.5, 0) / highest, rtol=1e-6)
    np.testing.assert_allclose(features[:, 4], np.where(family == first, 0, 0.5) / highest, rtol=1e-6)


def test_environments_show_the_families() -> None:
    env = OrchestrationEnv("families", UNEQUAL)
    seen, _ = env.reset(seed=0)
    assert env.observation_space.contains(seen)
    assert seen.shape == (7 * 5 + 1,)
    seen, _, _, _, info = env.step(env.action_space.sample())
    assert env.observation_space.contains(seen)
    assert info["family"].dtype == np.int32
    both = parallel_env("families", UNEQUAL)
    observations, _ = both.reset(seed=0)
    assert observations["emulator"].shape == (5 * 5 + 1,)
    assert both.observation_space("emulator").contains(observations["emulator"])


def _first(state: object) -> tuple:
    task = jax.tree.map(lambda leaf: leaf[0], all_tasks(state.episode))  # type: ignore[attr-defined]
    return task, Action(jnp.ones(6, bool), jnp.full(6, 0.5))


def _families_serve() -> tuple:
    world = build_world(load_scenario("families"))
    state = reset(jax.random.key(0), world)
    return world, state.cache, *_first(state)
