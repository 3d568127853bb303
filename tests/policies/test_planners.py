"""Planners against enumeration through the simulator, recursion in plain numbers (``test_worth``), and by hand."""

from __future__ import annotations

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emutune.policies import CountTable, Hold, LaterPrices, Lookahead, plan_lookahead
from emutune.scenario import Scenario, load_scenario
from emutune.step import Plan, Situation, usable_layers
from emutune.world import State, World, build_world, observe, reset, serve
from holding import charged_at, holding

STEADY = ["radio.fading_blocks=1000000"]
UNEQUAL = "families.others=[{size_gb = 4.0, layers = 4, curve = {quadratic = 0.0, linear = -12.0, constant = 30.0}}]"


def planned(world: World, exact: bool | None = None) -> Lookahead:
    plan = jax.jit(lambda world, price: plan_lookahead(world, LaterPrices(price, price), exact=exact))
    return plan(world, jnp.float32(0.5))


def some_state(scenario: Scenario, seed: int, step: int) -> State:
    """A state in the middle of an episode, with caches of any family and level, some of them empty."""
    world = build_world(scenario)
    state = reset(jax.random.key(seed), world)
    draw = np.random.default_rng(seed)
    ues = scenario.fleet.ues
    family = draw.integers(0, len(scenario.models), ues)
    layers = [draw.integers(scenario.models[f].fewest, scenario.models[f].most + 1) for f in family]
    layers = np.where(draw.random(ues) < 0.25, 0, layers)
    return state._replace(step=jnp.asarray(step, jnp.int32), carried=holding(world, family, layers))


def cheapest_reward(scenario: Scenario, state: State) -> float:
    """The best reward of one step over all joint plans, by the simulator itself."""
    world = build_world(scenario)
    true = charged_at(world, state)
    options = []
    for f in np.asarray(true.family):
        model = scenario.models[f]
        options.append([(True, 0), *((False, k) for k in range(model.fewest, model.most + 1))])
    chosen = np.array(list(itertools.product(*options)))
    plans = Plan(jnp.asarray(chosen[..., 0], bool), jnp.asarray(chosen[..., 1], jnp.int32))
    # Padded to one length, so that one program serves all states.
    padded = jax.tree.map(lambda leaf: jnp.resize(leaf, (1000, scenario.fleet.ues)), plans)
    return float(rewards_of(world, true, padded).max())


@jax.jit
def rewards_of(world: World, true: Situation, plans: Plan) -> jax.Array:
    return jax.vmap(lambda one: serve(world, true, one)[1].reward)(plans)


@pytest.mark.parametrize("delta", ["false", "true"])
def test_the_last_step_of_lookahead_is_the_best_there_is(delta: str) -> None:
    changes = [*STEADY, "fleet.ues=3", "model.layers=8", UNEQUAL, f"download.delta={delta}"]
    scenario = load_scenario("families", changes)
    world = build_world(scenario)
    policy = planned(world)
    assert policy.exact
    decide = jax.jit(lambda state: policy.decide(world, observe(world, state), jax.random.key(0)))
    for seed in range(6):
        state = some_state(scenario, seed, scenario.fleet.tasks - 1)
        chosen = jax.tree.map(lambda leaf: leaf[None], decide(state))
        reward = rewards_of(world, charged_at(world, state), chosen)[0]
        assert float(reward) == pytest.approx(cheapest_reward(scenario, state), rel=2e-3)


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("rent", [0.0, 0.3])
def test_what_several_emulators_are_worth_together_in_plain_numbers(delta: bool, rent: float) -> None:
    tasks, up, down = 4, 0.7, 0.4
    changes = [*STEADY, "fleet.ues=2", f"fleet.tasks={tasks}", "model.layers=4", UNEQUAL]
    changes += ["families.persistence=0.3", "tasks.complexity={min=5.0, max=5.0}", "families.cache_gb=50.0"]
    scenario = load_scenario("families", [*changes, f"download.delta={str(delta).lower()}"])
    prices = LaterPrices(*(jnp.float32(price) for price in (up, down)), rent=jnp.float32(rent))
    policy = plan_lookahead(build_world(scenario), prices)
    gain = float(jnp.exp(policy.kinds.log_gains[3]))
    noise = 10 ** (-174 / 10) / 1000
    scale = 0.092 / 2 * 1.5
    per_s = -scenario.reward.delay_weight_per_min / 60
    up_s = 3.2e9 / (1e5 * math.log2(1 + 0.6 * gain / (noise * 1e5)))
    rate = 1e6 * math.log2(1 + 60 * gain / (noise * 1e6))

    def sending(family: int, layers: int) -> float:
        model = scenario.models[family]
        return per_s * down * 8e9 * model.size_gb * layers / model.layers / rate

    def kept(held: tuple[int, ...]) -> list[tuple[float, tuple[int, ...]]]:
        """Every part of what is held, and the rent that it pays."""
        parts = itertools.product(*({0, layers} for layers in held))
        return [(rent * sum(map(sending, range(len(part)), part)), part) for part in parts]

    @functools.cache
    def later(step: int, task: int, held: tuple[int, ...]) -> float:
        """Expected cost of all steps after one, from plain recursion over all that is held."""
        if step + 1 == tasks:
            return 0.0
        chances = [0.3 * (task == m) + 0.7 / 2 for m in range(2)]
        return sum(chance * cost(step + 1, m, held) for m, chance in enumerate(chances))

    def cost(step: int, task: int, held: tuple[int, ...]) -> float:
        model = scenario.models[task]
        served = [(scale * model.curve(1.0) + per_s * up * up_s, held)]
        for k in range(model.fewest, model.most + 1):
            sent = 0 if k == held[task] else max(k - held[task], 0) if delta else k
            after = (k, held[1]) if task == 0 else (held[0], k)
            served.append((scale * model.curve(k / model.layers) + sending(task, sent), after))
        return min(
            now + paid + later(step, task, part) for now, after in served for paid, part in kept(after)
        )

    for step, task, *held in itertools.product(range(tasks), range(2), (0, 1, 3), (0, 2, 3)):
        worth = sum(policy.worth[step, 3, task, family, layers] for family, layers in enumerate(held))
        assert float(worth) == pytest.approx(later(step, task, tuple(held)), rel=1e-4, abs=1e-5)


def test_ranking_comes_close_to_trying_everything() -> None:
    # Uploads far apart: who uploads matters.
    changes = ["tasks.data_mb={min=20.0,max=900.0}", "reward.delay_weight_per_min=-0.1", *STEADY]
    scenario = load_scenario("families", ["fleet.ues=6", *changes])
    world = build_world(scenario)
    tried, ranked = (planned(world, exact) for exact in (True, False))

    @jax.jit
    def costs(state: State) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Cost of the step and of all that is expected to follow: by either, and by every change of one UE's choice."""
        seen = observe(world, state)
        kept, renewed = tried.later(world, seen)

        def cost(plan: Plan) -> jax.Array:
            _, outcome = serve(world, charged_at(world, state), plan)
            done = outcome.plan
            after = jnp.where(done.at_server, kept, renewed[done.layers, jnp.arange(6)])
            return -outcome.reward + after.sum()

        best, found = (policy.decide(world, seen, jax.random.key(0)) for policy in (tried, ranked))
        # To the server, or to 3 to 13 layers.
        who, what = jnp.divmod(jnp.arange(6 * 12), 12)
        change = jnp.arange(6) == who[:, None]
        changed = Plan(
            jnp.where(change, (what == 0)[:, None], found.at_server),
            jnp.where(change, what[:, None] + 2, found.layers),
        )
        return cost(best), cost(found), jax.vmap(cost)(changed).min()

    for step in (20, scenario.fleet.tasks - 1):
        best, found, changed = np.array([costs(some_state(scenario, seed, step)) for seed in range(30)]).T
        assert (found - best).min() > -2e-3 * best.mean()
        assert (found - best).mean() < 5e-3 * best.mean()
        assert (found <= changed * (1 + 1e-3)).all()


def test_a_batch_is_decided_as_its_members() -> None:
    scenario = load_scenario("delta", ["fleet.ues=4"])
    world = build_world(scenario)
    states = [some_state(scenario, seed, 7) for seed in range(3)]
    batch = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(observe(world, state) for state in states))
    key = jax.random.key(0)
    for policy in (
        planned(world),
        planned(world, exact=False),
        CountTable(jnp.array([0, 1, 1, 2, 2]), jnp.array([0.6, 0.8])),
    ):
        decide = jax.jit(lambda seen, policy=policy: policy.decide(world, seen, key))
        together = decide(batch)
        for n, state in enumerate(states):
            alone = decide(observe(world, state))
            np.testing.assert_array_equal(together.at_server[n], alone.at_server)
            np.testing.assert_array_equal(together.layers[n], alone.layers)


def test_the_count_table_by_hand() -> None:
    scenario = load_scenario("families", ["fleet.ues=4"])
    world = build_world(scenario)
    state = reset(jax.random.key(0), world)
    family = state.episode.family[0]
    # UE 0 holds what it needs, UE 1 something else, UEs 2 and 3 nothing; data decides who is fast.
    carried = holding(world, family.at[1].add(1) % 3, [9, 9, 0, 0])
    data = jnp.array([2.4e9, 4e9, 2.5e9, 3.2e9])
    episode = state.episode._replace(
        data_bits=state.episode.data_bits.at[0].set(data),
        gain=jnp.full_like(state.episode.gain, 1e-4),
        transmit_power_w=jnp.full(4, 0.5),
    )
    seen = observe(world, State(episode, carried, jnp.asarray(0)))
    table = CountTable(jnp.array([0, 1, 1, 2, 3]), jnp.array([0.25, 0.8125]))
    chosen = table.decide(world, seen, jax.random.key(0))
    np.testing.assert_array_equal(chosen.at_server, [False, False, True, True])
    assert chosen.layers[0] == 9
    # Two uploads of at most 3.2e9 bits share 1e5 Hz; one download must fit into their time.
    snr = 0.5 * 1e-4 / (10**-20.4 * 5e4)
    seconds = 3.2e9 / (5e4 * math.log2(1 + snr))
    rate = 1e6 * math.log2(1 + 60 * 1e-4 / (10**-20.4 * 1e6))
    level = max(k for k in range(3, 14) if 8 * 10.8e9 * k / 16 / rate <= seconds)
    assert chosen.layers[1] == level
    assert 3 < level < 13


def test_hold_uses_what_is_usable_and_tosses_for_the_rest() -> None:
    scenario = load_scenario("families", ["fleet.ues=4000"])
    world = build_world(scenario)
    state = some_state(scenario, 3, 5)
    seen = observe(world, state)
    chosen = Hold(jnp.float32(0.3), jnp.float32(0.75)).decide(world, seen, jax.random.key(1))
    held = np.asarray(usable_layers(seen))
    usable = held > 0
    assert not chosen.at_server[usable].any()
    np.testing.assert_array_equal(chosen.layers[usable], held[usable])
    assert chosen.at_server[~usable].mean() == pytest.approx(0.3, abs=0.03)
    assert (chosen.layers[~usable] == 12).all()
