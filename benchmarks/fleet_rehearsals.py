"""Shipped worlds as fleets of real processes: how far predictions are from what is measured, and whether policies
come out in the simulator's order.

    python benchmarks/fleet_rehearsals.py worlds [--worlds private,urban] --json worlds.json
    python benchmarks/fleet_rehearsals.py order [--worlds families --seeds 3] --json order.json

``worlds``: every world, `random` and `lookahead`. Median errors in percent: of a step's delay against what was
predicted before it, and against what the simulator charges at the links that were drawn; of bytes, joules and
perplexity over leases. ``order``: best_fixed, count_table, lookahead and a learned policy (guided, trained in the
world's own scenario) on the same tasks and links, some seeds: whether costs are in the order of the simulator's on the
same draws (two that the simulator has within 1 % of each other count as either), and how far they are from them.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

WORLDS = ("paper", "families", "delta", "edge-compute", "private", "urban", "trace", "city", "reference")
ORDERED = ("families", "edge-compute", "private")
POLICIES = ("best_fixed", "count_table", "lookahead")
ALIKE = 0.01


def rehearsal_of(work, world, devices, steps, seed):
    """A world made ready, with the catalogues of the shipped models that it has room for."""
    from emutune.fleet.rehearsal import rehearse, shipped_catalogues

    catalogues = shipped_catalogues(world, work / "catalogues")
    return rehearse(world, work / f"{world}-{seed}", catalogues, devices, steps, seed)


def run(rehearsal, policy, name=None):
    """What a policy's fleet came to; an earlier run goes on."""
    from emutune.fleet.local import run_local_fleet
    from emutune.fleet.rehearsal import figures_of

    began = time.perf_counter()
    config, members = rehearsal.prepare(policy)
    run_local_fleet(rehearsal.fleet_file(policy), config, members, rehearsal.catalogues, policy)
    found = figures_of(rehearsal, policy)
    print(
        f"{rehearsal.scenario.name} {name or policy}: cost {found['cost']:.3f}, predicted "
        f"{found['predicted_cost']:.3f}, "
        f"simulated {found['simulated_cost']:.3f}, {time.perf_counter() - began:.0f} s",
        flush=True,
    )
    return found


def worlds(work, names=WORLDS, devices=4, steps=10):
    """Median errors by world, over both policies."""
    from emutune.fleet.comparison import deviations, medians

    found = {}
    for world in names:
        rehearsal = rehearsal_of(work, world, devices, steps, 0)
        parts, drawn = [], []
        for policy in ("random", "lookahead"):
            run(rehearsal, policy)
            rows = rows_of(rehearsal, policy)
            parts.append(deviations(rows))
            drawn += drawn_errors(rehearsal, rows)
        errors = medians(parts)
        found[world] = {
            "delay_error_percent": errors.delay_percent,
            "drawn_delay_error_percent": statistics.median(drawn) if drawn else None,
            "bytes_error_percent": errors.bytes_percent,
            "energy_error_percent": errors.energy_percent,
            "perplexity_error_percent": errors.perplexity_percent,
            "steps": errors.steps,
            "leases": errors.evaluations,
        }
        print(world, json.dumps(found[world]), flush=True)
    return {"worlds": found}


def rows_of(rehearsal, policy):
    from emutune.fleet.config import LEDGER, load_fleet
    from emutune.fleet.ledger import Ledger

    with Ledger(load_fleet(rehearsal.fleet_file(policy)).server.directory / LEDGER) as ledger:
        return ledger.comparison()


def drawn_errors(rehearsal, rows):
    """Of each step's delay against the simulator's at the links that it was shaped to, in percent."""
    from emutune.fleet.comparison import error_percent

    found = []
    for _, leases in itertools.groupby(rows, lambda row: row.step):
        leases = list(leases)
        drawn = [
            (8 * row.predicted_bytes / row.rate_bps * rehearsal.time_scale if row.rate_bps else 0.0)
            + row.predicted_training_s
            for row in leases
        ]
        measured = [row.measured_delay_s for row in leases]
        if None not in measured:
            found.append(error_percent(max(drawn), max(measured)))
    return [value for value in found if value is not None]


def order(work, names=ORDERED, devices=4, steps=10, seeds=3):
    """Costs by world, seed and policy beside the simulator's."""
    found = {}
    for world in names:
        costs = {}
        for seed in range(seeds):
            rehearsal = rehearsal_of(work, world, devices, steps, seed)
            learned = trained(work, rehearsal, world)
            for policy in (*POLICIES, learned):
                name = policy if policy in POLICIES else "learned"
                figures = run(rehearsal, policy, name)
                costs.setdefault(name, []).append((figures["cost"], figures["simulated_cost"]))
        found[world] = summary(costs)
        print(world, json.dumps(found[world]), flush=True)
    return {"order": found}


def trained(work, rehearsal, world):
    """The directory of a policy that was learned in a world's scenario, once for all seeds."""
    out = work / f"learned-{world}"
    if not out.exists():
        command = "from emutune.cli.main import run; run()"
        scenario = str(rehearsal.root / "scenario.toml")
        subprocess.run(
            [sys.executable, "-c", command, "train", scenario, "--settings", "guided", "--out", str(out)],
            check=True,
        )
    return str(out)


def summary(costs):
    """Over the seeds together: mean costs, whether they are in order, and their errors."""
    means = {
        name: [statistics.mean(part) for part in zip(*rows, strict=True)] for name, rows in costs.items()
    }
    agree = all(
        (one[0] - two[0]) * (one[1] - two[1]) > 0 or abs(one[1] - two[1]) <= ALIKE * max(one[1], two[1])
        for one, two in itertools.combinations(means.values(), 2)
    )
    errors = [abs(cost - simulated) / simulated * 100 for rows in costs.values() for cost, simulated in rows]
    return {
        "agree": agree,
        "cost_error_percent": statistics.median(errors),
        "worst_cost_error_percent": max(errors),
        "costs": {name: {"measured": pair[0], "simulated": pair[1]} for name, pair in means.items()},
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("part", choices=("worlds", "order"))
    parser.add_argument("--worlds", type=lambda text: text.split(","))
    parser.add_argument("--devices", type=int, default=4)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path("runs/rehearsals"), help="kept, so that it goes on")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    shape = {"devices": chosen.devices, "steps": chosen.steps}
    if chosen.part == "worlds":
        figures = worlds(chosen.work, chosen.worlds or WORLDS, **shape)
    else:
        figures = order(chosen.work, chosen.worlds or ORDERED, **shape, seeds=chosen.seeds)
    if chosen.json:
        chosen.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
