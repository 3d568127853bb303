"""What each setting of the learner is worth: one change at a time, ten seeds each.

python benchmarks/ablation.py --ues 9 --json ablation.json
python benchmarks/ablation.py --scenario families --settings hmppo_taught --ues 8 --seeds 3 --json ablation.json
"""

import argparse
import json
import tempfile
from pathlib import Path

from emutune.cli.jax_setup import prepare_jax

PAPER = (
    {},
    {"discount": 0.99},
    {"entropy_weight": 1e-3},
    {"initial_std": 0.3},
    {"trace_decay": 0.9},
    {"learning_rate": 2e-3},
    {"epochs": 2},
    {"width": 16},
    {"baseline": "as_printed"},
    {"network": "flat"},
)
# What is kept where several models make orchestration matter.
FAMILIES = (
    {},
    {"teacher": "none", "learning_rate": 7e-4, "initial_std": 0.2, "entropy_weight": 1e-3},
    {"credit": "marginal"},
    {"credit": "fleet"},
    {"entropy_weight": 1e-2},
    {"network": "set"},
    {"algorithm": "ippo"},
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--scenario", default="paper")
    parser.add_argument("--settings", default="hmppo")
    parser.add_argument("--ues", type=int, default=9)
    parser.add_argument("--seeds", type=int, default=10)
    arguments = parser.parse_args()
    prepare_jax(arguments.seeds)
    from emutune.bounds import certified_bounds
    from emutune.learning.teachers import teacher_of
    from emutune.learning.training import train_seeds
    from emutune.scenario import load_scenario
    from emutune.study.comparison import training_config
    from emutune.study.evaluate import evaluate_policy, held_out_episodes

    scenario = load_scenario(arguments.scenario, [f"fleet.ues={arguments.ues}"])
    episodes = held_out_episodes(scenario, 64)
    bound = certified_bounds(scenario, episodes).mean()
    results = []
    print("| change | mean over bound % | worst seed % | seeds within 0.5 % |\n|---|---|---|---|")
    base = training_config(arguments.settings)
    for change in FAMILIES if arguments.settings == "hmppo_taught" else PAPER:
        with tempfile.TemporaryDirectory() as directory:
            # Validated anew: some defaults depend on the network.
            config = type(base)(**{**base.model_dump(exclude_unset=True), **change})
            teacher = teacher_of(config, scenario)
            policies = train_seeds(scenario, config, range(arguments.seeds), Path(directory), teacher=teacher)
        over = [
            100 * (evaluate_policy(scenario, policy, episodes).episode_return.mean() / bound - 1)
            for policy in policies
        ]
        within = sum(cost <= 0.5 for cost in over)
        label = ", ".join(f"`{name} = {value}`" for name, value in change.items()) or "none"
        print(f"| {label} | {sum(over) / len(over):.2f} | {max(over):.2f} | {within} |", flush=True)
        results.append({"change": change, "cost_over_bound_percent": over})
        if arguments.json:
            arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
