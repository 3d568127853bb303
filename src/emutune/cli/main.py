"""The ``emutune`` command. Nothing heavy is imported until a command runs."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from emutune.cli.jax_setup import prepare_jax
from emutune.errors import EmutuneError, UsageError

app = typer.Typer(
    name="emutune",
    help="Learn to orchestrate emulator-assisted tuning of foundation models on fleets of edge devices.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ScenarioArgument = Annotated[
    str, typer.Argument(metavar="SCENARIO", help="A file, or a shipped name: paper.")
]
Overrides = Annotated[list[str], typer.Option("--set", help="Override a field: fleet.ues=9. Repeatable.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")]
Episodes = Annotated[int, typer.Option(min=1, help="Held-out episodes.")]
Seeds = Annotated[int, typer.Option(min=1, help="Training seeds: 0, 1, ...")]
Steps = Annotated[int | None, typer.Option(min=1, help="Environment steps of training.")]


def run() -> NoReturn:
    """Entry point: exit status 2 and one line on a user's error, 130 on Ctrl-C."""
    try:
        app()
    except EmutuneError as error:
        print(f"emutune: {error}", file=sys.stderr)
        sys.exit(2)
    sys.exit(0)


@app.command()
def check(scenario: ScenarioArgument, overrides: Overrides = [], json_file: JsonFile = None) -> None:  # noqa: B006
    """Validate a scenario and print what its world amounts to."""
    prepare_jax()
    from emutune.scenario import load_scenario
    from emutune.study.link_budget import link_budget

    loaded = load_scenario(scenario, overrides)
    budget = link_budget(loaded)
    print(f"{loaded.name}: {loaded.fleet.ues} UEs, {loaded.fleet.tasks} tasks each; {loaded.description}")
    print(f"{budget['levels']} emulators, of {budget['fewest_layers']} to {budget['most_layers']} layers")
    for place in ("nearest", "farthest"):
        row = budget[place]
        print(
            f"{place} UE alone, {row['distance_m']:.0f} m: {row['uplink_mbps']:.3g} Mbit/s up, "
            f"{row['downlink_mbps']:.3g} down; upload {row['upload_s']:.0f} s, emulator "
            f"{row['smallest_emulator_s']:.0f} to {row['largest_emulator_s']:.0f} s"
        )
    for remark in budget["remarks"]:
        print(f"note: {remark}")
    _write_json(json_file, budget)


@app.command()
def train(
    scenario: ScenarioArgument,
    out: Annotated[Path, typer.Option(help="Directory of the run; an interrupted run is resumed.")],
    algorithm: Annotated[str, typer.Option(help="hmppo or ippo.")] = "hmppo",
    network: Annotated[str, typer.Option(help="set or flat.")] = "set",
    baseline: Annotated[str, typer.Option(help="sequential or as_printed.")] = "sequential",
    seeds: Seeds = 1,
    steps: Steps = None,
    overrides: Overrides = [],  # noqa: B006
    json_file: JsonFile = None,
) -> None:
    """Learn to orchestrate a scenario."""
    prepare_jax(seeds)
    from emutune.learning.training import train_seeds, update_count
    from emutune.scenario import load_scenario
    from emutune.study.evaluate import evaluate_policy, held_out_episodes

    loaded = load_scenario(scenario, overrides)
    config = _training_config(
        algorithm=algorithm,
        network=network,
        baseline=baseline,
        **({} if steps is None else {"steps": steps}),
        **({"width": 64} if network == "flat" else {}),
    )
    total = seeds * update_count(config, loaded.fleet.tasks) * config.environments * loaded.fleet.tasks
    with _progress_bar("training", total) as advance:
        try:
            policies = train_seeds(loaded, config, range(seeds), out, progress=advance)
        except KeyboardInterrupt:
            print(f"\nstopped; what was learned is in {out}; the same command resumes it", file=sys.stderr)
            sys.exit(130)
    drawn = held_out_episodes(loaded, 64)
    returns = [float(evaluate_policy(loaded, policy, drawn).episode_return.mean()) for policy in policies]
    for seed, value in enumerate(returns):
        print(f"seed {seed}: mean return {value:.2f} on 64 held-out episodes")
    _write_json(json_file, {"returns": returns, "out": str(out)})


@app.command()
def evaluate(
    target: Annotated[
        str, typer.Argument(metavar="RUN_DIR|SCENARIO", help="A run, or with --policy a scenario.")
    ],
    policy: Annotated[str | None, typer.Option(help="random, all_server, fixed or best_fixed.")] = None,
    retention: Annotated[float | None, typer.Option(help="Retention of the fixed policy.")] = None,
    episodes: Episodes = 64,
    overrides: Overrides = [],  # noqa: B006
    json_file: JsonFile = None,
) -> None:
    """Measure a trained run, or a policy that needs no training, on held-out episodes."""
    prepare_jax()
    from emutune.learning.training import load_policy
    from emutune.scenario import load_scenario
    from emutune.study.compare import baseline_policy
    from emutune.study.evaluate import evaluate_policy, held_out_episodes

    measured = {}
    if policy is not None:
        loaded = load_scenario(target, overrides)
        measured[policy] = (loaded, baseline_policy(policy, loaded, retention))
    else:
        if overrides:
            raise UsageError("--set: a run is measured in the scenario it was trained in; leave --set out")
        checkpoints = sorted(Path(target).glob("**/checkpoint.safetensors"))
        if not checkpoints:
            raise UsageError(
                f"{target}: holds no checkpoint; give a run directory, or --policy and a scenario"
            )
        for checkpoint in checkpoints:
            learned, header = load_policy(checkpoint)
            measured[str(checkpoint.parent)] = (header.scenario, learned)
    figures = {}
    for name, (loaded, decider) in measured.items():
        rows = evaluate_policy(loaded, decider, held_out_episodes(loaded, episodes))
        figures[name] = {field: float(column.mean()) for field, column in rows._asdict().items()}
        print(name + ": " + ", ".join(f"{field} {value:.4g}" for field, value in figures[name].items()))
    _write_json(json_file, figures)


@app.command()
def bound(
    scenario: ScenarioArgument,
    episodes: Episodes = 64,
    method: Annotated[str, typer.Option(help="linear or integer.")] = "linear",
    time_limit_s: Annotated[float, typer.Option(min=0.1, help="Limit of each integer programme.")] = 60.0,
    overrides: Overrides = [],  # noqa: B006
    json_file: JsonFile = None,
) -> None:
    """Certify how good any policy, clairvoyant ones included, can be on held-out episodes."""
    prepare_jax()
    from emutune.bounds import certified_bounds
    from emutune.scenario import load_scenario
    from emutune.study.evaluate import held_out_episodes

    loaded = load_scenario(scenario, overrides)
    with _progress_bar("bound", episodes) as advance:
        bounds = certified_bounds(
            loaded,
            held_out_episodes(loaded, episodes),
            method=method,  # type: ignore[arg-type]
            time_limit_s=time_limit_s,
            progress=advance,
        )
    print(f"no policy returns more than {bounds.mean():.3f} on average over {episodes} episodes")
    _write_json(
        json_file, {"return_mean": float(bounds.mean()), "episodes": episodes, "returns": bounds.tolist()}
    )


@app.command()
def compare(
    scenario: ScenarioArgument,
    policies: Annotated[str, typer.Option(help="Comma-separated names, or all.")] = "all",
    seeds: Seeds = 10,
    episodes: Episodes = 64,
    steps: Steps = None,
    retention: Annotated[float | None, typer.Option(help="Retention of the fixed policy.")] = None,
    out: Annotated[Path, typer.Option(help="Directory of the training runs.")] = Path("runs/compare"),
    overrides: Overrides = [],  # noqa: B006
    json_file: JsonFile = None,
) -> None:
    """Compare policies with common random numbers, against the certified bound."""
    prepare_jax(seeds)
    from rich.console import Console
    from rich.table import Table

    from emutune.scenario import load_scenario
    from emutune.study.compare import compare as run_comparison
    from emutune.study.compare import expand_policy_names

    console = Console(stderr=True)
    loaded = load_scenario(scenario, overrides)
    names = expand_policy_names(policies)
    with console.status("starting") as status:
        figures = run_comparison(
            loaded,
            names,
            seeds=seeds,
            episodes=episodes,
            steps=steps,
            retention=retention,
            directory=out / f"{loaded.name}-{loaded.fleet.ues}",
            progress=status.update,
        )
    table = Table(
        "policy",
        "return",
        "95 % interval",
        "over bound %",
        "worst seed %",
        "delay/random",
        "perplexity",
        "changes/UE",
    )
    for name, row in figures["policies"].items():
        table.add_row(
            name,
            f"{row['return_mean']:.2f}",
            "{:.2f} to {:.2f}".format(*row["return_ci"]),
            f"{row['cost_over_bound_percent']:.2f}",
            f"{row['worst_seed_cost_over_bound_percent']:.2f}",
            f"{row['delay_ratio_to_random']:.3f}",
            f"{row['perplexity_mean']:.2f}",
            f"{row['changes_per_ue']:.2f}",
        )
    Console().print(table)
    print(
        f"certified bound: {figures['bound']['return_mean']:.2f} on {episodes} episodes, "
        f"N = {loaded.fleet.ues}"
    )
    _write_json(json_file, figures)


@app.command()
def reproduce(
    out: Annotated[Path, typer.Option(help="Directory of runs, figures and report.")],
    quick: Annotated[bool, typer.Option("--quick", help="Fewer seeds, steps and sizes.")] = False,
    json_file: JsonFile = None,
) -> None:
    """Run the paper's Fig. 2 and Table I, beside the paper's own numbers, and write a report."""
    prepare_jax(sys.maxsize)
    from rich.console import Console

    from emutune.study.reproduce import reproduce as run_reproduction

    with Console(stderr=True).status("starting") as status:
        report = run_reproduction(out, quick=quick, progress=status.update)
    print(f"report: {report.resolve()}")
    _write_json(json_file, json.loads((out / "figures.json").read_text("utf-8")))


def _training_config(**values: Any) -> Any:
    from pydantic import ValidationError

    from emutune.learning.configuration import TrainingConfig

    try:
        return TrainingConfig(**values)
    except ValidationError as error:
        first = error.errors()[0]
        raise UsageError(f"--{first['loc'][0]}: {first['msg']}, got {first['input']!r}") from error


def _progress_bar(label: str, total: int) -> Any:
    """A context manager that shows a bar and yields a function to advance it by a number."""
    from contextlib import contextmanager

    from rich.console import Console
    from rich.progress import Progress

    @contextmanager
    def shown() -> Any:
        with Progress(console=Console(stderr=True)) as bar:
            task = bar.add_task(label, total=total)
            yield lambda count: bar.advance(task, count)

    return shown()


def _write_json(path: Path | None, figures: Any) -> None:
    if path is None:
        return
    aside = path.with_name(path.name + ".partial")
    try:
        aside.write_text(json.dumps(figures, indent=2) + "\n", "utf-8")
        os.replace(aside, path)
    except OSError as error:
        raise UsageError(f"--json {path}: cannot be written: {error.strerror}") from error
