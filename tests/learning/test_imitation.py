"""A warm start: actors that do what their teacher does, critics that know what comes of it, and the same bits again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array, Key

from emutune.errors import UsageError
from emutune.learning.agents import LearnedPolicy, from_retention, to_retention
from emutune.learning.configuration import TrainingConfig
from emutune.learning.imitation import imitate
from emutune.learning.ppo import initial_state
from emutune.learning.training import train_seed
from emutune.policies import policy_pytree
from emutune.scenario import load_scenario
from emutune.step import Plan, Situation, plan_of_wish
from emutune.study.evaluate import evaluate_policy, held_out_episodes
from emutune.world import World, build_world

SCENARIO = load_scenario("families", ["fleet.ues=3", "fleet.tasks=8"])
WORLD = build_world(SCENARIO)
CONFIG = TrainingConfig(
    network="ranked", credit="marginal", width=16, steps=640, environments=8, teacher="lookahead"
)


@policy_pytree
@dataclass(frozen=True)
class Simple:
    """Uploads what is complex, and wants an emulator that grows with the data otherwise."""

    def decide(self, world: World, situation: Situation, key: Key[Array, ""]) -> Plan:
        share = situation.data_bits / world.data_bits[1]
        return plan_of_wish(world.rules, situation, situation.complexity > 6.0, 0.2 + 0.6 * share)


@pytest.fixture(scope="module")
def pupil():
    return imitate(CONFIG, WORLD, initial_state(CONFIG, WORLD, 0), Simple())


def test_the_pupil_decides_as_its_teacher(pupil) -> None:
    drawn = held_out_episodes(SCENARIO, 16)
    mine = evaluate_policy(SCENARIO, LearnedPolicy("ranked", pupil.parameters.actors), drawn)
    theirs = evaluate_policy(SCENARIO, Simple(), drawn)
    # A ranked network keeps a usable emulator, which its teacher changes, so they are not quite alike.
    np.testing.assert_allclose(mine.server_share.mean(), theirs.server_share.mean(), atol=0.02)
    np.testing.assert_allclose(mine.perplexity.mean(), theirs.perplexity.mean(), rtol=0.02)


def test_critics_know_the_scale_of_what_comes(pupil) -> None:
    assert pupil.value_scale > 0.01
    assert pupil.value_centre < 0
    assert int(pupil.update) == 0
    before = initial_state(CONFIG, WORLD, 0).parameters.critics
    assert any(
        not np.array_equal(one, other)
        for one, other in zip(jax.tree.leaves(before), jax.tree.leaves(pupil.parameters.critics), strict=True)
    )


def test_a_retention_goes_there_and_back() -> None:
    wanted = jnp.linspace(*WORLD.rules.retention_bounds, 7)
    np.testing.assert_allclose(to_retention(WORLD, from_retention(WORLD, wanted)), wanted, rtol=1e-6)


@pytest.mark.slow
def test_training_goes_on_from_the_teacher_and_repeats_to_the_bit(tmp_path: Path) -> None:
    one, two = (train_seed(SCENARIO, CONFIG, 3, tmp_path / name, teacher=Simple()) for name in ("a", "b"))
    for mine, other in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_array_equal(mine, other)
    # Once begun, a run needs its teacher no more.
    again = train_seed(SCENARIO, CONFIG, 3, tmp_path / "a")
    for mine, other in zip(jax.tree.leaves(one), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(mine, other)


def test_a_missing_teacher_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="teacher: the configuration names lookahead"):
        train_seed(SCENARIO, CONFIG, 0, tmp_path)
