"""Return, delay and changes of every policy against the certified bound, N = 6 to 9, ten seeds each.

python benchmarks/quality.py --json quality.json
"""

import argparse
import json
from pathlib import Path

from emutune.cli.jax_setup import prepare_jax

SIZES = (6, 7, 8, 9)
POLICIES = ("random", "all_server", "best_fixed", "ippo", "hmppo", "hmppo_flat", "hmppo_as_printed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/quality"))
    parser.add_argument("--seeds", type=int, default=10)
    arguments = parser.parse_args()
    prepare_jax(arguments.seeds)
    from emutune.scenario import load_scenario
    from emutune.study.comparison import Effort, compare

    results = []
    print("N policy return over_bound_% worst_seed_% delay/random changes/UE")
    for ues in SIZES:
        figures = compare(
            load_scenario("paper", [f"fleet.ues={ues}"]),
            POLICIES,
            Effort(arguments.seeds),
            directory=arguments.out / str(ues),
        )
        results.append(figures)
        for name, row in figures["policies"].items():
            print(
                f"{ues} {name} {row['return_mean']:.2f} {row['cost_over_bound_percent']:.2f} "
                f"{row['worst_seed_cost_over_bound_percent']:.2f} {row['delay_ratio_to_random']:.3f} "
                f"{row['changes_per_ue']:.2f}",
                flush=True,
            )
        if arguments.json:
            arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
