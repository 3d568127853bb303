"""Compare policies on the same held-out episodes, against the certified bound."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from emutune.bounds import certified_bounds
from emutune.errors import UsageError
from emutune.files import make_writable
from emutune.learning.configuration import GuidedConfig, Settings, TrainingConfig
from emutune.learning.learners import find_learner, learner_names
from emutune.learning.teachers import teacher_of
from emutune.learning.training import train_seeds
from emutune.policies import Policy, Random
from emutune.policies.registry import RULES, baseline_policy, find_policy, policy_names
from emutune.scenario import Scenario, dump_scenario
from emutune.study.evaluate import decision_time_ms, evaluate_policy, held_out_episodes
from emutune.study.statistics import bootstrap_interval, interquartile_mean
from emutune.world import Episode, Summary

LEARNED: dict[str, TrainingConfig] = {
    "ippo": TrainingConfig(algorithm="ippo"),
    "hmppo": TrainingConfig(),
}
RANKED = TrainingConfig(
    network="ranked",
    credit="marginal",
    width=48,
    steps=300_000,
    environments=32,
    minibatches=8,
    entropy_weight=1e-3,
    initial_std=0.2,
)
TAUGHT = RANKED.model_copy(
    update={
        "teacher": "lookahead",
        "credit": "mixed",
        "steps": 200_000,
        "learning_rate": 3e-4,
        "initial_std": 0.05,
        "entropy_weight": 1e-4,
    }
)
SIZED = TAUGHT.model_copy(update={"network": "sized", "steps": 800_000})
STUDIES: dict[str, Settings] = {
    "hmppo_ranked": RANKED,
    "hmppo_taught": TAUGHT,
    "hmppo_sized": SIZED,
    "guided": GuidedConfig(),
    "hmppo_flat": TrainingConfig(network="flat"),
    "hmppo_as_printed": TrainingConfig(baseline="as_printed"),
}

_RULES = {rule.name for rule in RULES}

Progress = Callable[[str], None]


class Effort(NamedTuple):
    """How much a comparison trains and measures.

    Attributes:
        seeds: of each learned policy's training.
        episodes: held out, on which every policy is measured.
        steps: of each training in the environment, instead of the default.
    """

    seeds: int
    episodes: int = 64
    steps: int | None = None


def expand_policy_names(names: str, scenario: Scenario) -> list[str]:
    """The policies of a comma-separated list; ``all`` stands for those that the scenario is a matter for.

    Where there is one foundation model and UEs differ in nothing but their radio, an emulator once fetched
    stays of use, and the rules that plan for other tasks only take time.

    Raises:
        UsageError: a name is unknown, or a policy of one's own cannot be imported.
    """
    known = [*policy_names(), *LEARNED, *STUDIES, *learner_names()]
    everything = [*(rule.name for rule in RULES if not rule.slow), *LEARNED, "hmppo_ranked", "guided"]
    if scenario.families is None and not scenario.has_devices:
        everything = [*(rule.name for rule in RULES if not rule.plans), *LEARNED]
    chosen: list[str] = []
    for name in (part.strip() for part in names.split(",")):
        if name != "all" and name not in _RULES and not training_config(name) and find_policy(name) is None:
            raise UsageError(
                f"policies: no policy {name!r}; choose all or from {', '.join(known)}, "
                "or name your own as file.py:Class"
            )
        chosen += everything if name == "all" else [name]
    return list(dict.fromkeys(chosen))


def compare(
    scenario: Scenario,
    names: Sequence[str],
    effort: Effort,
    *,
    directory: str | Path,
    retention: float | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train what needs training, measure every policy and the bound; see ``docs/figures.md`` for the keys.

    Args:
        scenario: the world.
        names: policies, from ``expand_policy_names``.
        effort: how much is trained and measured.
        directory: where runs are kept; finished and interrupted ones are taken up again. A run's own
            directory is named after what it was trained for, so that comparisons can share this one.
        retention: of the ``fixed`` policy.
        progress: called with a line on what is being done.

    Raises:
        UsageError: nothing can be written to the directory.
        CheckpointError: a run cannot be written, or is damaged.
    """
    say = progress or (lambda line: None)
    seeds, episodes, steps = effort
    if any(training_config(name) for name in names):
        make_writable("--out", Path(directory))
    drawn = held_out_episodes(scenario, episodes)
    say(f"bound on {episodes} episodes")
    bounds = certified_bounds(scenario, drawn)
    random = evaluate_policy(scenario, Random(), drawn)
    policies: dict[str, Any] = {}
    for name in names:
        say(name)
        config = training_config(name, steps)
        candidates: Sequence[Policy]
        if config is None:
            run, candidates = None, [baseline_policy(name, scenario, retention)]
        else:
            run = str(run_directory(Path(directory), name, scenario, config))
            told = _told(say, name, seeds, config.total_steps(scenario.fleet.ues, scenario.fleet.tasks))
            teacher = teacher_of(config, scenario)
            candidates = train_seeds(scenario, config, range(seeds), run, teacher=teacher, progress=told)
        policies[name] = {**_figures(scenario, candidates, drawn, bounds, random), "run": run}
    return {
        "scenario": scenario.name,
        "ues": scenario.fleet.ues,
        "seeds": seeds,
        "bound": {"return_mean": float(bounds.mean()), "episodes": episodes},
        "policies": policies,
    }


def training_config(name: str, steps: int | None = None) -> Settings | None:
    """How a policy of a comparison is trained; None for one that needs no training.

    Args:
        name: of the policy, or of a learner of one's own, with the defaults of its settings.
        steps: environment steps instead of the default; guided lookahead has rounds instead.
    """
    config = (LEARNED | STUDIES).get(name)
    if config is None and name in learner_names():
        config = find_learner(name).settings()
    if steps is None or not isinstance(config, TrainingConfig):
        return config
    return config.model_copy(update={"steps": steps})


def run_directory(directory: Path, name: str, scenario: Scenario, config: Settings) -> Path:
    """Where a policy's training is kept: a name of its own for every scenario and configuration."""
    told = (dump_scenario(scenario) + config.model_dump_json()).encode()
    return directory / f"{name}-{hashlib.sha256(told).hexdigest()[:12]}"


def _told(say: Progress, name: str, seeds: int, steps_of_each: int) -> Callable[[int], None]:
    """Turns steps done by any seed into a line for the user."""
    total, done = seeds * steps_of_each, 0
    lock = threading.Lock()

    def advance(steps: int) -> None:
        nonlocal done
        with lock:
            done += steps
            say(f"{name}: {min(100, 100 * done // total)} % of {seeds} seeds' training")

    return advance


def _figures(
    scenario: Scenario,
    candidates: Sequence[Policy],
    drawn: Episode,
    bounds: Float[np.ndarray, "episodes"],
    random: Summary,
) -> dict[str, Any]:
    measured = [evaluate_policy(scenario, policy, drawn) for policy in candidates]
    returns = np.stack([one.episode_return for one in measured])
    over_bound = 100 * (returns.mean(axis=1) / bounds.mean() - 1)

    def mean(field: str) -> float:
        return float(np.mean([getattr(one, field) for one in measured]))

    return {
        "return_mean": float(returns.mean()),
        "return_iqm": interquartile_mean(returns),
        "return_ci": bootstrap_interval(returns),
        "cost_over_bound_percent": float(over_bound.mean()),
        "worst_seed_cost_over_bound_percent": float(over_bound.max()),
        "delay_min": mean("delay_min"),
        "delay_ratio_to_random": mean("delay_min") / float(random.delay_min.mean()),
        "perplexity_mean": mean("perplexity"),
        "changes_per_ue": mean("changes_per_ue"),
        "server_share": mean("server_share"),
        "energy_kj": mean("energy_kj"),
        "decision_ms": decision_time_ms(scenario, candidates[0]),
    }
