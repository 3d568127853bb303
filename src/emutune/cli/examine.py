"""The commands that examine: ``check``, ``bound``, ``compare``, ``reproduce``. Heavy imports wait."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from emutune.cli.grouped import grouped
from emutune.cli.jax_setup import prepare_jax
from emutune.cli.options import Episodes, JsonFile, Overrides, ScenarioArgument, Seeds, Steps
from emutune.cli.terminal import print_comparison, print_links, progress_bar, resumable, write_json


def check(
    scenario: ScenarioArgument,
    trivial: Annotated[
        bool,
        typer.Option("--trivial", help="Also measure policies that always do the same, against the bound."),
    ] = False,
    overrides: Overrides = [],  # noqa: B006
    json_file: JsonFile = None,
) -> None:
    """Validate a scenario and print what its world amounts to."""
    prepare_jax()
    from emutune.scenario import load_scenario
    from emutune.study.link_budget import link_budget, trivial_policies

    loaded = load_scenario(scenario, overrides)
    budget = link_budget(loaded)
    print(f"{loaded.name}: {loaded.fleet.ues} UEs, {loaded.fleet.tasks} tasks each; {loaded.description}")
    print(f"{budget['levels']} emulators, of {budget['fewest_layers']} to {budget['most_layers']} layers")
    for place in ("nearest", "farthest"):
        if place in budget:
            row = budget[place]
            print(
                f"{place} UE alone, {row['distance_m']:.0f} m: {row['uplink_mbps']:.3g} Mbit/s up, "
                f"{row['downlink_mbps']:.3g} down; upload {row['upload_s']:.0f} s, emulator "
                f"{row['smallest_emulator_s']:.0f} to {row['largest_emulator_s']:.0f} s"
            )
    for number, row in enumerate(budget["models"]):
        energy = f", {row['least_j']:.3g} to {row['most_j']:.3g} J" if "least_j" in row else ""
        print(
            f"training, model {number}: {row['fastest_smallest_s']:.3g} s (fastest UE, smallest emulator) to "
            f"{row['slowest_largest_s']:.3g} s (slowest, largest){energy}; at the server "
            f"{row['server_alone_s']:.3g} s alone, {row['server_all_s']:.3g} s with all UEs there"
        )
    shares = ", ".join(f"{name} {share:.0f} %" for name, share in budget["shares"].items())
    print(f"cost of the random policy: {shares}")
    if not loaded.plain_radio:
        print_links(budget["ues"])
    for remark in budget["remarks"]:
        print(f"note: {remark}")
    if trivial:
        budget["trivial"] = trivial_policies(loaded)
        print(budget["trivial"]["verdict"])
    write_json(json_file, budget)


def bound(
    scenario: ScenarioArgument,
    episodes: Episodes = 64,
    method: Annotated[
        str | None,
        typer.Option(help="linear, integer or prices; linear if not given, prices in large fleets."),
    ] = None,
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
    with progress_bar("bound", episodes) as advance:
        bounds = certified_bounds(
            loaded,
            held_out_episodes(loaded, episodes),
            method=method,  # type: ignore[arg-type]
            time_limit_s=time_limit_s,
            progress=advance,
        )
    print(f"no policy returns more than {bounds.mean():.3f} on average over {episodes} episodes")
    write_json(
        json_file, {"return_mean": float(bounds.mean()), "episodes": episodes, "returns": bounds.tolist()}
    )


@dataclass(frozen=True)
class Compared:
    """Options of which policies are compared, and with how much effort."""

    policies: Annotated[str, typer.Option(help="Comma-separated names, or all.")] = "all"
    seeds: Seeds = 10
    episodes: Episodes = 64
    steps: Steps = None
    retention: Annotated[float | None, typer.Option(help="Retention of the fixed policy.")] = None


@grouped
def compare(
    scenario: ScenarioArgument,
    compared: Compared,
    out: Annotated[Path, typer.Option(help="Directory of the training runs.")] = Path("runs/compare"),
    figure: Annotated[
        Path | None, typer.Option(help="Draw the comparison into this file: .png, .svg or .pdf.")
    ] = None,
    overrides: Overrides = [],  # noqa: B006
    json_file: JsonFile = None,
) -> None:
    """Compare policies with common random numbers, against the certified bound."""
    prepare_jax(compared.seeds)
    from rich.console import Console

    from emutune.scenario import load_scenario
    from emutune.study.comparison import Effort, expand_policy_names
    from emutune.study.comparison import compare as run_comparison
    from emutune.study.comparison_figure import check_figure_path, draw_comparison, save_figure

    check_figure_path(figure)
    loaded = load_scenario(scenario, overrides)
    names = expand_policy_names(compared.policies, loaded)
    with resumable(out), Console(stderr=True).status("starting") as status:
        figures = run_comparison(
            loaded,
            names,
            Effort(compared.seeds, compared.episodes, compared.steps),
            retention=compared.retention,
            directory=out,
            progress=status.update,
        )
    print_comparison(figures)
    write_json(json_file, figures)
    if figure is not None:
        save_figure(draw_comparison(figures), figure)


def reproduce(
    out: Annotated[Path, typer.Option(help="Directory of runs, figures and report.")],
    quick: Annotated[bool, typer.Option("--quick", help="Fewer seeds, sizes and episodes.")] = False,
    json_file: JsonFile = None,
) -> None:
    """Run the paper's Fig. 2 and Table I, beside the paper's own numbers, and write a report."""
    prepare_jax(sys.maxsize)
    from rich.console import Console

    from emutune.study.reproduction import reproduce as run_reproduction

    with resumable(out), Console(stderr=True).status("starting") as status:
        report = run_reproduction(out, quick=quick, progress=status.update)
    print(f"report: {report.resolve()}")
    write_json(json_file, json.loads((out / "figures.json").read_text("utf-8")))
