"""Joint choices where UEs differ in more than their radio: exact costs, against every choice there is."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import plain
from emutune.policies import CountTable, Hold, LaterPrices, plan_lookahead
from emutune.policies.choices import Options, joint_cost, list_options
from emutune.policies.joint import assign_jointly, single_changes
from emutune.scenario import load_scenario
from emutune.step import Plan
from emutune.world import State, World, build_world, observe, reset, serve
from holding import charged_at, holding

OTHER = "{size_gb=5.4,layers=4,parameters_billion=1.0,curve={quadratic=0.0,linear=-9.0,constant=24.0}}"
EVERYTHING = {"computation", "budget", "memory", "privacy", "activity"}
# With a million blocks of fading the gain that is known before a task is the gain during it.
STEADY = ["radio.fading_blocks=1000000", "memory.device_gb={min=3.7,max=9.0}"]


def make(features: set[str], ues: int, *changes: str):
    steady = STEADY if "memory" in features else STEADY[:1]
    base = [f"fleet.ues={ues}", "model.layers=6", f"families.others=[{OTHER}]"]
    return load_scenario("families", [*base, *plain.changes_for(features), *steady, *changes])


def some_state(scenario, seed: int, step: int):
    """A state in the middle of an episode, with caches that devices can hold, some of them empty."""
    world, draw = build_world(scenario), np.random.default_rng(seed)
    state = jax.jit(reset)(jax.random.key(seed), world)
    rows = plain.tasks_of(state.episode)[step]
    family, layers = [], []
    for task in rows:
        of = int(draw.integers(0, 2))
        possible = plain.possible_layers(scenario, {**task, "family": of})
        family.append(of)
        layers.append(int(draw.choice(possible)) if possible and draw.random() < 0.7 else 0)
    spent = draw.uniform(0, 5000, len(rows)) if scenario.energy else 0.0
    carried = holding(world, family, layers, spent)
    mine = zip(family, layers, np.broadcast_to(spent, len(rows)), strict=True)
    state = state._replace(step=jnp.asarray(step, jnp.int32), carried=carried)
    return state, rows, [plain.carrying(*one) for one in mine]


def options_of(world: World, state: State) -> Options:
    """Options of a step after which nothing is worth anything."""
    nothing = jnp.zeros(world.ues)
    renewed = jnp.zeros((world.rules.models.most + 1, world.ues))
    return list_options(world.rules, observe(world, state), nothing, renewed, nothing)


@pytest.mark.parametrize(
    "features",
    [EVERYTHING, {"multicast"}, {"unshared"}, pytest.param({"computation"}, marks=pytest.mark.slow),
     pytest.param({"computation", "budget", "delta"}, marks=pytest.mark.slow),
     pytest.param({"computation", "budget", "delta", "multicast"}, marks=pytest.mark.slow)],
)  # fmt: skip
def test_the_last_step_is_the_best_there_is(features: set[str]) -> None:
    scenario = make(features, 3, "reward.delay_weight_per_min=-0.1")
    world = build_world(scenario)
    policy = plan_lookahead(world, LaterPrices(jnp.float32(0.5), jnp.float32(0.5), jnp.float32(0.0)))

    @jax.jit
    def act(state):
        plan = policy.decide(world, observe(world, state), jax.random.key(0))
        return serve(world, charged_at(world, state), plan)[1].reward

    for seed in range(8):
        state, rows, carried = some_state(scenario, seed, scenario.fleet.tasks - 1)
        best = max(
            plain.serve(scenario, rows, carried, list(plan))[1]["reward"]
            for plan in itertools.product(*(plain.options(scenario, task) for task in rows))
        )
        assert float(act(state)) == pytest.approx(best, rel=3e-3)


@pytest.mark.parametrize(
    "features", [EVERYTHING, {"multicast", "delta", "energy"}], ids=["everything", "multicast"]
)
def test_a_joint_choice_costs_what_the_step_costs(features: set[str]) -> None:
    scenario = make(features, 5)
    world = build_world(scenario)

    @jax.jit
    def both(state, plan):
        _, outcome = serve(world, charged_at(world, state), plan)
        return joint_cost(options_of(world, state), plan), -outcome.reward

    draw = np.random.default_rng(0)
    for seed in range(6):
        state, rows, _ = some_state(scenario, seed, 3)
        for _ in range(4):
            every = [plain.options(scenario, task) for task in rows]
            plan = [one[draw.integers(len(one))] for one in every]
            at_server = jnp.array([kind == "server" for kind, _ in plan])
            layers = jnp.array([int(k) for _, k in plan])
            predicted, charged = both(state, Plan(at_server, layers))
            assert float(predicted) == pytest.approx(float(charged), rel=1e-3)


@pytest.mark.parametrize(
    "features",
    [EVERYTHING - {"memory"}, set(), {"multicast"}, {"unshared", "computation"}],
    ids=["everything", "plain", "multicast", "unshared"],
)
def test_single_changes_cost_what_the_changed_choice_does_and_improvement_ends_where_none_helps(
    features: set[str],
) -> None:
    scenario = make(features, 9, "reward.delay_weight_per_min=-0.1")
    world = build_world(scenario)

    @jax.jit
    def solve(state, drawn):
        listed = options_of(world, state)
        who, what = jnp.divmod(jnp.arange(9 * 6), 6)

        def one_by_one(chosen):
            changed = jnp.arange(9) == who[:, None]
            at_server = jnp.where(changed, (what == 5)[:, None], chosen.at_server)
            layers = jnp.where(changed, jnp.minimum(what, 4)[:, None], chosen.layers)
            return joint_cost(listed, Plan(at_server, layers)).reshape(9, 6).T

        best = assign_jointly(listed)
        exists = listed.after < 1e5
        some = Plan(drawn & (listed.left < 1e5) | ~exists.any(0), jnp.argmax(exists, axis=0))
        same = [(single_changes(listed, chosen), one_by_one(chosen)) for chosen in (best, some)]
        return joint_cost(listed, best), same

    draw = np.random.default_rng(0)
    for seed in range(5):
        cost, same = solve(some_state(scenario, seed, 3)[0], draw.random(9) < 0.5)
        for quick, slow in same:
            possible = slow < 1e5
            assert possible.sum() > 9
            np.testing.assert_allclose(quick[possible], slow[possible], rtol=1e-4)
        assert float(same[0][1].min()) >= float(cost) * (1 - 2e-6)


def slow_and_fast(scenario):
    """UE 0 trains slowly, UE 1 fast; both hold 4 of 6 layers of what they need."""
    world = build_world(scenario)
    state = jax.jit(reset)(jax.random.key(0), world)
    episode = state.episode._replace(
        devices=state.episode.devices._replace(tflops=jnp.array([0.3, 20.0])),
        family=state.episode.family.at[0].set(0),
    )
    return world, observe(world, state._replace(episode=episode, carried=holding(world, [0, 0], [4, 4])))


def test_rules_send_the_slow_to_the_server() -> None:
    world, seen = slow_and_fast(make({"computation"}, 2))
    # Whole-model training of at most 500 MB takes 5400 TFLOP: 18,000 s and 270 s.
    key = jax.random.key(0)
    patient, impatient = jnp.float32(1e6), jnp.float32(2000.0)
    for patience, expected in ((patient, [False, False]), (impatient, [True, False])):
        hold = Hold(jnp.float32(0.0), jnp.float32(0.5), patience)
        np.testing.assert_array_equal(hold.decide(world, seen, key).at_server, expected)
        table = CountTable(jnp.array([0, 1, 2]), jnp.array([0.25, 0.75]), patience)
        np.testing.assert_array_equal(table.decide(world, seen, key).at_server, expected)
    # Of two that hold nothing, the one whose training an upload saves.
    table = CountTable(jnp.array([0, 1, 1]), jnp.array([0.25, 0.75]), patient)
    nothing = seen._replace(held=jnp.zeros_like(seen.held))
    np.testing.assert_array_equal(table.decide(world, nothing, key).at_server, [True, False])


@pytest.mark.slow
def test_lookahead_sends_the_slow_to_the_server() -> None:
    scenario = make({"computation"}, 2, "computation.server_tflops=500.0", "reward.delay_weight_per_min=-0.5")
    world, seen = slow_and_fast(scenario)
    policy = plan_lookahead(world, LaterPrices(jnp.float32(0.5), jnp.float32(0.5), jnp.float32(0.0)))
    chosen = jax.jit(policy.decide)(world, seen, jax.random.key(0))
    np.testing.assert_array_equal(chosen.at_server, [True, False])
