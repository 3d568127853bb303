"""A learner of one's own: registered, trained, stopped and taken up again like any other."""

from typing import Any, ClassVar, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

from emutune.errors import CheckpointError, UsageError
from emutune.learning import Settings, load_policy, register_learner
from emutune.learning.training import train_seeds
from emutune.policies import Fixed
from emutune.policies.fixed import search_best_fixed
from emutune.policies.measure import draw_episodes, run_episodes
from emutune.policies.search import SEARCH_STREAM
from emutune.scenario import load_scenario
from emutune.study.comparison import Effort, compare, expand_policy_names
from emutune.world import build_world


class SweepSettings(Settings):
    algorithm: Literal["sweep"] = "sweep"
    points: int = 25

    def total_steps(self, ues, tasks):
        return self.points


class SweepState(NamedTuple):
    best: Any
    best_return: Any
    tried: Any


class Sweep:
    """Tries one retention after another and keeps the best."""

    settings: ClassVar[type[Settings]] = SweepSettings
    programs: ClassVar[tuple[Any, ...]] = ()
    steps_each = 1

    def __init__(self, scenario, config, seed):
        self.length, self._world = config.points, build_world(scenario)
        low, high = scenario.retention.min, scenario.retention.max
        self._points = jnp.linspace(low, high, config.points)
        self._drawn = draw_episodes(self._world, SEARCH_STREAM, 32)

    def template(self):
        return SweepState(jnp.zeros(()), jnp.asarray(-jnp.inf), jnp.zeros((), jnp.int32))

    def start(self, teacher):
        return self.template()

    def done(self, state):
        return int(state.tried)

    def advance(self, state):
        point = self._points[state.tried]
        value = run_episodes(self._world, Fixed(point), self._drawn).episode_return.mean()
        better = value > state.best_return
        best, highest = (
            jnp.where(better, *pair) for pair in ((point, state.best), (value, state.best_return))
        )
        return SweepState(best, highest, state.tried + 1), [{"validation_return": float(highest)}]

    def policy(self, state):
        return Fixed(state.best)


class Nameless(Sweep):
    settings = Settings


def test_one_of_ones_own_is_compared_trained_and_read_back(tmp_path):
    scenario = load_scenario("paper", ["fleet.ues=2", "fleet.tasks=3"])
    register_learner("sweep", Sweep)
    assert expand_policy_names("sweep", scenario) == ["sweep"]
    figures = compare(scenario, ["sweep", "best_fixed"], Effort(1, 2), directory=tmp_path)
    own, found = (figures["policies"][name] for name in ("sweep", "best_fixed"))
    assert own["return_mean"] == pytest.approx(found["return_mean"], rel=1e-3)
    policy, header = load_policy(f"{own['run']}/seed-000/checkpoint.safetensors")
    assert header.config == SweepSettings()
    best = search_best_fixed(scenario)
    np.testing.assert_allclose(policy.retention, best.retention, atol=0.6 / 24)
    with pytest.raises(CheckpointError, match="training points is 25 there and 3 here"):
        train_seeds(scenario, SweepSettings(points=3), [0], own["run"])


@pytest.mark.parametrize(
    ("name", "learner", "message"),
    [
        ("hmppo", Sweep, "there is a shipped one of that name"),
        ("other", Sweep, "its settings have algorithm 'sweep'; give both one name"),
        ("sweep", Nameless, "its settings have algorithm ''"),
        ("sweep", object, "has no settings, programs, template"),
    ],
)
def test_what_is_no_learner_is_refused(name, learner, message):
    with pytest.raises(UsageError, match=message):
        register_learner(name, learner)
