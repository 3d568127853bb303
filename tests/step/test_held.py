"""What is held once an emulator is taken up, against plain numbers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

import plain
from emutune.scenario import Scenario, load_scenario
from emutune.step import build_rules, empty_cache, put_in_cache
from emutune.step.cache import cache_share

UNEQUAL = "families.others=[{size_gb=4.0,layers=12},{size_gb=20.0,layers=40},{size_gb=1.0,layers=8}]"
USES = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 39)), min_size=1, max_size=30)

put_compiled = jax.jit(put_in_cache)


def layers_of(scenario: Scenario, family: int, number: int) -> int:
    """A level of a family, for any number."""
    model = scenario.models[family]
    return model.fewest + number % (model.most - model.fewest + 1)


@settings(max_examples=60)
@given(USES, st.floats(16.5, 40))
def test_any_history_leaves_what_plain_numbers_say(uses: list[tuple[int, int]], cache_gb: float) -> None:
    scenario = load_scenario("families", [f"families.cache_gb={cache_gb}", UNEQUAL, "retention.max=0.8"])
    rules = build_rules(scenario)
    held, age = empty_cache(rules, 1)
    emulators: tuple[tuple[int, int], ...] = ()
    for family, number in uses:
        layers = layers_of(scenario, family, number)
        emulators = plain.kept_after(scenario, emulators, (family, layers))
        held, age = put_compiled(rules, held, age, jnp.asarray([family]), jnp.asarray([layers]))
        assert held[0].tolist() == [dict(emulators).get(one, 0) for one in range(4)]
        assert sorted(age[0].tolist()) == [0, 1, 2, 3]
        ages = age[0].tolist()
        assert [one for one, _ in emulators] == sorted((one for one, _ in emulators), key=ages.__getitem__)
        full = sum(scenario.models[one].size_gb * k / scenario.models[one].layers for one, k in emulators)
        np.testing.assert_allclose(cache_share(rules, held), full / cache_gb, rtol=1e-5)


@settings(max_examples=40)
@given(USES)
def test_a_cache_of_one_is_a_cache_of_several_without_room(uses: list[tuple[int, int]]) -> None:
    # Two emulators of half of one model are more than any of one.
    changes = ["retention.min=0.5", "retention.max=0.8125"]
    one = load_scenario("families", changes)
    several = load_scenario("families", [*changes, f"families.cache_gb={10.8 * 13 / 16}"])
    held = {
        name: empty_cache(build_rules(scenario), 1) for name, scenario in (("one", one), ("several", several))
    }
    for family, number in uses:
        family, layers = family % 3, layers_of(one, family % 3, number)
        for name, scenario in (("one", one), ("several", several)):
            taken = jnp.asarray([family]), jnp.asarray([layers])
            held[name] = put_compiled(build_rules(scenario), *held[name], *taken)
            np.testing.assert_array_equal(held[name][0][0], np.where(np.arange(3) == family, layers, 0))


def test_nothing_taken_up_changes_nothing() -> None:
    for cache_gb in ([], ["families.cache_gb=12.0"]):
        rules = build_rules(load_scenario("families", cache_gb))
        held, age = jnp.asarray([[4, 6, 0]]), jnp.asarray([[1, 0, 2]])
        for family in range(3):
            after = put_in_cache(rules, held, age, jnp.asarray([family]), jnp.asarray([0]))
            np.testing.assert_array_equal(after, (held, age))
