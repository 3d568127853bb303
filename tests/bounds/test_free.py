"""No policy without foresight beats the bound: by enumeration of tiny worlds, by quadrature, and along policies."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import OTHER, tiny

import plain
from emutune.bounds import bound_without_foresight
from emutune.bounds.chains import Tariff, Worths, _expect, find_tariff, pay_for_task, price_chains
from emutune.bounds.chances import Chances, Seconds, read_chances, read_seconds, read_tasks
from emutune.bounds.foresight import Foreseen, charge_path, foresee, penalised_bound
from emutune.errors import UsageError
from emutune.policies import Random
from emutune.policies.measure import watch_episodes
from emutune.scenario import Scenario, load_scenario
from emutune.study.evaluate import held_out_episodes
from emutune.world import Episode, build_world

UES, TASKS = 2, 3
ALIKE = "{size_gb=10.8,layers=3}"
WORLDS = {
    "unlike": (set(), OTHER),
    "alike": (set(), ALIKE),
    "delta, unlike": ({"delta"}, OTHER),
    "delta, alike": ({"delta"}, ALIKE),
    "ergodic": ({"ergodic", "delta"}, ALIKE),
    "trace": ({"trace"}, OTHER),
}


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


class Tiny(NamedTuple):
    """A world whose tasks differ in their family only, so that all that can come is a short list."""

    scenario: Scenario
    episodes: tuple[Episode, ...]
    probability: np.ndarray

    @property
    def tasks(self) -> dict[tuple, list]:
        """Plain rows of each episode, by its families."""
        return {families_of(episode): plain.tasks_of(episode) for episode in self.episodes}


def families_of(episode: Episode) -> tuple[tuple[int, ...], ...]:
    return tuple(map(tuple, np.asarray(episode.family).tolist()))


def all_that_can_come(world: str, seed: int) -> Tiny:
    features, other = WORLDS[world]
    draw = np.random.default_rng(seed)
    data_mb, complexity = draw.uniform(300, 500), draw.uniform(1, 10)
    persistence = draw.choice([0.0, 1.0, draw.uniform()], p=[0.1, 0.1, 0.8])
    scenario = tiny(
        features,
        f"families.others=[{other}]",
        f"families.persistence={persistence}",
        f"tasks.data_mb={{min={data_mb},max={data_mb}}}",
        f"tasks.complexity={{min={complexity},max={complexity}}}",
        f"reward.delay_weight_per_min={-(10 ** draw.uniform(-2.5, -1))}",
    )
    world_arrays = build_world(scenario)
    shape, rows = (TASKS, UES), (TASKS + 1, UES)
    certain = {
        "gain": draw.uniform(50, 500, rows) ** -2,
        "complexity": np.full(shape, np.float64(world_arrays.complexity[0])),
        "data_bits": np.full(shape, np.float64(world_arrays.data_bits[0])),
        "transmit_power_w": draw.uniform(0.2, 1, UES),
        "downlink_gain": draw.uniform(50, 500, rows) ** -2 if scenario.trace else None,
    }
    stays = float(world_arrays.families.stays)
    episodes, probability = [], []
    for family in np.ndindex(*(2,) * (TASKS * UES)):
        family = np.array(family).reshape(shape)
        episodes.append(Episode(**certain, family=family))
        same = family[1:] == family[:-1]
        probability.append(0.5**UES * np.where(same, (1 + stays) / 2, (1 - stays) / 2).prod())
    return Tiny(scenario, tuple(episodes), np.array(probability))


def best_expectation(drawn: Tiny) -> float:
    """What the best policy without foresight pays, by a dynamic programme over all that fleets can hold."""
    rows = {key[: t + 1]: tasks[t] for key, tasks in drawn.tasks.items() for t in range(TASKS)}
    chances: dict[tuple, float] = {}
    for key, probability in zip(drawn.tasks, drawn.probability, strict=True):
        for t in range(TASKS + 1):
            chances[key[:t]] = chances.get(key[:t], 0.0) + probability

    @cache
    def expects(seen: tuple, carried: tuple) -> float:
        if len(seen) == TASKS or chances[seen] == 0:
            return 0.0
        total = 0.0
        for families in itertools.product(range(2), repeat=UES):
            now = (*seen, families)
            total += chances[now] / chances[seen] * min(after(now, carried, plan) for plan in plans(now))
        return total

    def plans(now: tuple) -> Iterator[tuple]:
        return itertools.product(*(plain.options(drawn.scenario, task) for task in rows[now]))

    def after(now: tuple, carried: tuple, plan: tuple) -> float:
        following, outcome = plain.serve(drawn.scenario, rows[now], list(carried), list(plan))
        return -outcome["reward"] + expects(now, tuple(following))

    return expects((), (plain.Carried(),) * UES)


def held_out(scenario: Scenario, count: int) -> list[Episode]:
    """Episodes, drawn as the simulator draws them: in single precision."""
    with jax.enable_x64(False):
        episodes = jax.device_get(held_out_episodes(scenario, count))
    return [jax.tree.map(lambda part: part[index], episodes) for index in range(count)]  # noqa: B023


class Proved(NamedTuple):
    chances: Chances
    seconds: Seconds
    worths: Worths


def chains_of(drawn: Tiny, seed: int, rounds: int = 25) -> Proved:
    """Chains at good prices, or at prices that follow nothing."""
    chances = read_chances(drawn.scenario, build_world(drawn.scenario), 5)
    seconds = read_seconds(drawn.scenario, drawn.episodes[0])
    tariff = find_tariff(chances, seconds, rounds)
    if seed % 3 == 0:
        draw = np.random.default_rng(seed)
        tariff = Tariff(*(part * draw.uniform(0, 2, part.shape) for part in tariff))
    return Proved(chances, seconds, price_chains(chances, tariff))


def foreseen_by(drawn: Tiny, proved: Proved) -> list[Foreseen]:
    return [
        foresee(proved.chances, proved.worths, read_tasks(drawn.scenario, episode))
        for episode in drawn.episodes
    ]


def number_held(chances: Chances, carried: plain.Carried) -> int:
    if not carried.layers:
        return 0
    family, layers = carried.emulators[0]
    return int(chances.slot[family, layers - 1])


@pytest.mark.parametrize("world", WORLDS)
def test_the_best_policy_without_foresight_pays_more(world: str) -> None:
    @settings(max_examples=3)
    @given(st.integers(0, 2**32 - 1))
    def check(seed: int) -> None:
        drawn = all_that_can_come(world, seed)
        best = best_expectation(drawn)
        proved = chains_of(drawn, seed=1)
        expected = float(proved.worths.start.sum())
        bounds = [
            penalised_bound(proved.chances, proved.seconds, proved.worths, each, 25)
            for each in foreseen_by(drawn, proved)
        ]
        penalised = float(drawn.probability @ bounds)
        assert 0 < expected <= penalised + 1e-3 * best
        assert penalised <= best * (1 + 1e-9)
        assert penalised >= 0.8 * best

    check()


@pytest.mark.parametrize("world", WORLDS)
def test_foresight_is_charged_nothing_in_expectation_of_a_policy_without_any(world: str) -> None:
    @settings(max_examples=3)
    @given(st.integers(0, 2**32 - 1))
    def check(seed: int) -> None:
        drawn = all_that_can_come(world, seed)
        proved = chains_of(drawn, seed)
        paid, spread = [], 0.0
        for episode, foreseen in zip(drawn.episodes, foreseen_by(drawn, proved), strict=True):
            carried, held = [plain.Carried()] * UES, []
            for t, row in enumerate(plain.tasks_of(episode)):
                # Any rule that knows what was seen so far, and no more.
                seen = families_of(episode)[: t + 1]
                rule = np.random.default_rng(abs(hash((seed, seen, tuple(carried)))))
                options = [plain.options(drawn.scenario, task) for task in row]
                plan = [each[rule.integers(len(each))] for each in options]
                carried, _ = plain.serve(drawn.scenario, row, carried, plan)
                held.append([number_held(proved.chances, one) for one in carried])
            paid.append(charge_path(foreseen, np.array(held)))
            spread = max(spread, abs(paid[-1]))
        assert abs(drawn.probability @ paid) <= 1e-9 * max(spread, 1.0)

    check()


@pytest.mark.parametrize("world", ["unlike", "alike", "delta, unlike", "delta, alike"])
def test_no_path_costs_less_than_payments_say(world: str) -> None:
    for seed in range(2):
        drawn = all_that_can_come(world, seed)
        proved = chains_of(drawn, seed)
        chosen = np.random.default_rng(seed).integers(len(drawn.episodes))
        foreseen = foreseen_by(drawn, proved)[chosen]
        tasks = plain.tasks_of(drawn.episodes[chosen])
        reached = {(plain.Carried(),) * UES: float(np.sum(foreseen.start))}
        for t, row in enumerate(tasks):
            following: dict[tuple, float] = {}
            for carried, paid in reached.items():
                for plan in itertools.product(*(plain.options(drawn.scenario, task) for task in row)):
                    after, outcome = plain.serve(drawn.scenario, row, list(carried), list(plan))
                    held = [number_held(proved.chances, one) for one in after]
                    total = paid - outcome["reward"]
                    total += float(sum(foreseen.charge[t, n, k] for n, k in enumerate(held)))
                    following[tuple(after)] = min(total, following.get(tuple(after), np.inf))
            reached = following
        least = min(reached.values())
        for rounds in (0, 5, 25):
            found = penalised_bound(proved.chances, proved.seconds, proved.worths, foreseen, rounds)
            assert found <= least + 1e-9 * abs(least)
        if seed % 3:
            assert found >= 0.9 * least


@pytest.mark.parametrize("name", ["paper", "families", "delta", "trace"])
def test_at_the_prices_of_chains_payments_say_what_chains_expect(name: str) -> None:
    scenario = load_scenario(name, ["fleet.ues=4", "fleet.tasks=10"])
    (episode,) = held_out(scenario, 1)
    chances = read_chances(scenario, build_world(scenario), 5)
    seconds = read_seconds(scenario, episode)
    worths = price_chains(chances, find_tariff(chances, seconds, 5))
    foreseen = foresee(chances, worths, read_tasks(scenario, episode))
    found = penalised_bound(chances, seconds, worths, foreseen, 0)
    assert found == pytest.approx(float(worths.start.sum()), rel=1e-11)


@pytest.mark.parametrize("factor", ["rising", "as_printed"])
@pytest.mark.parametrize("name", ["families", "delta"])
def test_expectations_are_those_of_quadrature_and_no_more(name: str, factor: str) -> None:
    scenario = load_scenario(name, ["fleet.ues=2", f"quality.complexity_factor={factor}"])
    world = build_world(scenario)
    chances = read_chances(scenario, world, 33)
    draw = np.random.default_rng(0)
    tariff = Tariff(jnp.asarray([2e-10, 6e-10]), jnp.asarray([1e-11, 3e-11]))
    after = jnp.asarray(draw.uniform(0, 0.5, (2, len(chances.first))))
    found = np.asarray(_expect(chances, tariff, after))
    # Cells at their mean factor and data: no less than the expectation, since what is paid is concave in both.
    cells = 120
    edges = np.linspace(*np.asarray(world.complexity, np.float64), cells + 1)
    weight = scenario.quality.complexity_weight
    if factor == "as_printed":
        factors = 1 + weight * np.log(edges[1:] / edges[:-1]) / np.diff(edges)
    else:
        factors = 1 + (edges[1:] + edges[:-1]) / 2 / weight
    low, high = map(float, chances.data_bits)
    data = low + (np.arange(cells) + 0.5) / cells * (high - low)

    def mean_over_data(scaled: jax.Array) -> jax.Array:
        pay = jax.vmap(lambda bits: pay_for_task(chances, tariff, jnp.full(2, scaled), bits, after))
        return pay(jnp.asarray(data)).mean(0)

    expected = np.asarray(jax.lax.map(mean_over_data, jnp.asarray(factors))).mean(0)
    assert np.all(found <= expected * (1 + 1e-12))
    np.testing.assert_allclose(found, expected, rtol=1e-3)


def test_charges_along_a_policy_are_nothing_on_average() -> None:
    scenario = load_scenario("families", ["fleet.ues=3", "fleet.tasks=12"])
    world = build_world(scenario)
    with jax.enable_x64(False):
        episodes = held_out_episodes(scenario, 100)
        held = np.asarray(watch_episodes(world, Random(), episodes, lambda step: step.after.held))
    chances = read_chances(scenario, world, 33)
    charges = []
    for episode, after in zip(held_out(scenario, 100), held, strict=True):
        worths = price_chains(chances, find_tariff(chances, read_seconds(scenario, episode), 10))
        foreseen = foresee(chances, worths, read_tasks(scenario, episode))
        family, layers = after.argmax(-1), after.max(-1)
        number = np.where(layers > 0, np.asarray(chances.slot)[family, layers - 1], 0)
        charges.append(charge_path(foreseen, number))
    assert abs(np.mean(charges)) <= 3.5 * np.std(charges) / np.sqrt(100)
    # They would be of one sign for somebody who knew what comes.
    assert np.std(charges) > 0.1


def test_worlds_that_it_does_not_allow_are_refused_in_a_line_that_names_the_methods_that_do() -> None:
    scenario = load_scenario("edge-compute")
    with pytest.raises(UsageError, match=r"^method: 'foresight-free' does not allow computation, .*'prices'"):
        bound_without_foresight(scenario, held_out_episodes(scenario, 1))
