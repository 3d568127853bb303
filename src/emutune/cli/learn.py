"""The commands around learning: ``train`` and ``evaluate``. Heavy imports wait until one runs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from emutune.cli.grouped import grouped
from emutune.cli.jax_setup import prepare_jax
from emutune.cli.options import Episodes, JsonFile, Overrides, ScenarioArgument, Seeds, Steps, validated
from emutune.cli.terminal import progress_bar, resumable, write_json
from emutune.errors import UsageError

if TYPE_CHECKING:
    from emutune.learning.configuration import Settings


@dataclass(frozen=True)
class Learner:
    """Options of who learns."""

    settings: Annotated[
        str,
        typer.Option(
            help="Those of a learned policy of compare, such as hmppo_ranked or guided; options change them."
        ),
    ] = "hmppo"
    algorithm: Annotated[str | None, typer.Option(help="hmppo or ippo.")] = None
    network: Annotated[str | None, typer.Option(help="set, flat, ranked or sized.")] = None
    credit: Annotated[str | None, typer.Option(help="fleet, marginal or mixed.")] = None
    baseline: Annotated[str | None, typer.Option(help="sequential or as_printed.")] = None
    teacher: Annotated[str | None, typer.Option(help="none, or lookahead: learn that first.")] = None

    def config(self, steps: int | None) -> Settings:
        """The settings that they say, with so many steps where that is given."""
        from emutune.study.comparison import training_config

        given = asdict(self) | {"steps": steps}
        base = training_config(given.pop("settings"))
        if base is None:
            raise UsageError(
                f"--settings: {self.settings!r} is no policy that trains; see emutune compare --help"
            )
        changed = {name: value for name, value in given.items() if value is not None}
        return validated(type(base), **{**base.model_dump(exclude_unset=True), **changed})


@grouped
def train(
    scenario: ScenarioArgument,
    out: Annotated[Path, typer.Option(help="Directory of the run; an interrupted run is resumed.")],
    learner: Learner,
    seeds: Seeds = 1,
    steps: Steps = None,
    overrides: Overrides = [],  # noqa: B006
    json_file: JsonFile = None,
) -> None:
    """Learn to orchestrate a scenario."""
    prepare_jax(seeds)
    from emutune.learning.teachers import teacher_of
    from emutune.learning.training import train_seeds
    from emutune.scenario import load_scenario
    from emutune.study.evaluate import evaluate_policy, held_out_episodes

    loaded = load_scenario(scenario, overrides)
    config = learner.config(steps)
    total = seeds * config.total_steps(loaded.fleet.ues, loaded.fleet.tasks)
    with resumable(out), progress_bar("training", total) as advance:
        policies = train_seeds(
            loaded, config, range(seeds), out, teacher=teacher_of(config, loaded), progress=advance
        )
    drawn = held_out_episodes(loaded, 64)
    returns = [float(evaluate_policy(loaded, policy, drawn).episode_return.mean()) for policy in policies]
    for seed, value in enumerate(returns):
        print(f"seed {seed}: mean return {value:.2f} on 64 held-out episodes")
    write_json(json_file, {"returns": returns, "out": str(out)})


def evaluate(
    target: Annotated[
        str, typer.Argument(metavar="RUN_DIR|SCENARIO", help="A run, or with --policy a scenario.")
    ],
    policy: Annotated[
        str | None,
        typer.Option(help="One that needs no training, such as best_fixed."),
    ] = None,
    retention: Annotated[float | None, typer.Option(help="Retention of the fixed policy.")] = None,
    episodes: Episodes = 64,
    overrides: Overrides = [],  # noqa: B006
    json_file: JsonFile = None,
) -> None:
    """Measure a trained run, or a policy that needs no training, on held-out episodes.

    With --set a run is measured elsewhere than where it was trained, such as in a larger fleet.
    """
    prepare_jax()
    from emutune.policies.registry import baseline_policy
    from emutune.scenario import load_scenario
    from emutune.study.evaluate import evaluate_policy, held_out_episodes

    if policy is not None:
        loaded = load_scenario(target, overrides)
        measured = {policy: (loaded, baseline_policy(policy, loaded, retention))}
    else:
        measured = _policies_of(Path(target), overrides)
    figures = {}
    for name, (loaded, decider) in measured.items():
        rows = evaluate_policy(loaded, decider, held_out_episodes(loaded, episodes))
        figures[name] = {field: float(column.mean()) for field, column in rows._asdict().items()}
        print(name + ": " + ", ".join(f"{field} {value:.4g}" for field, value in figures[name].items()))
    write_json(json_file, figures)


def _policies_of(run: Path, overrides: list[str]) -> dict[str, Any]:
    """Scenario and learned policy of every seed of a run."""
    from emutune.learning.training import load_policy
    from emutune.scenario import dump_scenario, parse_scenario
    from emutune.study.transfer import transferred

    checkpoints = sorted(run.glob("**/checkpoint.safetensors"))
    if not checkpoints:
        raise UsageError(f"{run}: holds no checkpoint; give a run directory, or --policy and a scenario")
    policies = {}
    for checkpoint in checkpoints:
        learned, header = load_policy(checkpoint)
        scenario = header.scenario
        if overrides:
            scenario = parse_scenario(dump_scenario(header.scenario), overrides=overrides)
        policies[str(checkpoint.parent)] = (scenario, transferred(learned, header.scenario, scenario))
    return policies
