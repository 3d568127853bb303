"""Policies trained at N = 8 in fleets of 6 to 256 UEs, beside rules and policies trained at that size.

python benchmarks/transfer.py --json transfer.json
python benchmarks/transfer.py --scenario city --sizes 64,256 --episodes 32 --no-own --json city.json
"""

import argparse
import json
from pathlib import Path

import numpy as np

from emutune.cli.jax_setup import prepare_jax

# Fewer episodes and, for what is trained there, fewer steps in larger fleets: a step takes as much longer.
EPISODES = {6: 64, 8: 64, 24: 32, 64: 16, 256: 8}
STEPS = {6: 200_000, 8: 200_000, 24: 200_000, 64: 50_000, 256: 12_800}
RULES = ("hold", "count_table", "lookahead")


def print_row(cells) -> None:
    print("| " + " | ".join(cells) + " |", flush=True)


def shown(row) -> str:
    """The mean, and of several seeds the worst."""
    returns = row["return_of_seeds"]
    return f"{np.mean(returns):.2f}" + (f" ({min(returns):.2f})" if len(returns) > 1 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--scenario", default="families")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sizes", default="6,8,24,64,256")
    parser.add_argument(
        "--episodes", type=int, help="held-out ones at every size, instead of fewer in larger fleets"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/transfer"))
    parser.add_argument(
        "--own", action=argparse.BooleanOptionalAction, default=True, help="train at each size too"
    )
    arguments = parser.parse_args()
    prepare_jax(arguments.seeds)
    from emutune.learning.teachers import teacher_of
    from emutune.learning.training import train_seeds
    from emutune.policies.registry import baseline_policy
    from emutune.scenario import load_scenario
    from emutune.study.comparison import run_directory, training_config
    from emutune.study.evaluate import evaluate_policy, held_out_episodes
    from emutune.study.statistics import bootstrap_interval
    from emutune.study.transfer import transferred

    def learn(name, scenario, steps=None):
        config = training_config(name, steps)
        run = run_directory(arguments.out, name, scenario, config)
        return train_seeds(
            scenario, config, range(arguments.seeds), run, teacher=teacher_of(config, scenario)
        )

    home = load_scenario(arguments.scenario, ["fleet.ues=8"])
    travellers, guided = learn("hmppo_sized", home), learn("guided", home)
    results = []
    columns = [*RULES, "guided from 8 (worst seed)", "hmppo_sized from 8 (worst seed)"]
    columns += ["hmppo_taught at N"] * arguments.own
    print_row(["N", *columns])
    print("|---" * (1 + len(columns)) + "|")
    for ues in map(int, arguments.sizes.split(",")):
        scenario = load_scenario(arguments.scenario, [f"fleet.ues={ues}"])
        drawn = held_out_episodes(scenario, arguments.episodes or EPISODES[ues])
        policies = {name: [baseline_policy(name, scenario)] for name in RULES}
        policies["guided"] = [transferred(one, home, scenario) for one in guided]
        policies["sized"] = [transferred(one, home, scenario) for one in travellers]
        if arguments.own:
            policies["trained_at_n"] = learn("hmppo_taught", scenario, STEPS[ues])
        measured = {}
        for name, seeds in policies.items():
            returns = np.stack([evaluate_policy(scenario, one, drawn).episode_return for one in seeds])
            measured[name] = {
                "return_of_seeds": returns.mean(axis=1).tolist(),
                "return_ci": bootstrap_interval(returns),
            }
        results.append({"ues": ues, "episodes": len(drawn.complexity), **measured})
        print_row([str(ues), *map(shown, measured.values())])
        print_row(["", *("{:.2f} to {:.2f}".format(*row["return_ci"]) for row in measured.values())])
        if arguments.json:
            arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
