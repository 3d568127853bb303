"""Rules, planners and learners in the worlds with features, on common held-out episodes, against the bound.

python benchmarks/worlds.py --json worlds.json
"""

import argparse
import json
from pathlib import Path

from emutune.cli.jax_setup import prepare_jax

WORLDS = (
    ("families", ()),
    ("families", ("families.persistence=0.8",)),
    ("delta", ()),
    ("families", ("fleet.ues=24",)),
    ("edge-compute", ()),
    ("private", ()),
    ("urban", ()),
    ("trace", ()),
    ("families", ("fleet.ues=64",)),
    ("city", ()),
)
POLICIES = ("best_fixed", "hold", "count_table", "lookahead", "hmppo", "hmppo_ranked", "guided")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/worlds"))
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--episodes", type=int, default=64)
    parser.add_argument("--figures", type=Path, help="directory of a figure for each world")
    parser.add_argument("--worlds", default=",".join(map(str, range(len(WORLDS)))), help="which, from 0")
    parser.add_argument("--policies", default=",".join(POLICIES))
    arguments = parser.parse_args()
    prepare_jax(arguments.seeds)
    from emutune.scenario import load_scenario
    from emutune.study.comparison import Effort, compare
    from emutune.study.comparison_figure import draw_comparison, save_figure

    results = []
    for index in map(int, arguments.worlds.split(",")):
        name, changes = WORLDS[index]
        figures = compare(
            load_scenario(name, changes),
            arguments.policies.split(","),
            Effort(arguments.seeds, arguments.episodes),
            directory=arguments.out,
        )
        results.append({"changes": changes, **figures})
        print(f"\n{name} {' '.join(changes)}: bound {figures['bound']['return_mean']:.2f}")
        print(
            "| policy | return | 95 % interval | over bound % | worst seed % | decision ms |\n|---|---|---|---|---|---|"
        )
        for policy, row in figures["policies"].items():
            low, high = row["return_ci"]
            print(
                f"| `{policy}` | {row['return_mean']:.2f} | {low:.2f} to {high:.2f} "
                f"| {row['cost_over_bound_percent']:.2f} | {row['worst_seed_cost_over_bound_percent']:.2f} "
                f"| {row['decision_ms']:.2f} |",
                flush=True,
            )
        if arguments.figures:
            arguments.figures.mkdir(parents=True, exist_ok=True)
            save_figure(draw_comparison(figures), arguments.figures / f"world-{index}.png")
        if arguments.json:
            arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
