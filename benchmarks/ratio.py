"""Speed of this checkout by ratio to another one, measured in turns on the same machine.

    git worktree add ../before 89bf258
    python benchmarks/ratio.py ../before --json ratio.json

Each round runs both checkouts in processes of their own, and the next round the other one first; a figure is the median
over rounds of (before / now) for seconds, so that more than 1 is faster. Seconds are those of the processor: what else
runs on the machine counts less.
"""

import argparse
import inspect
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WORLDS = ("paper", "families", "urban")
HERE = Path(__file__).resolve().parents[1]
REPEATS = 5


def processor_seconds(action):
    started = time.process_time()
    action()
    return time.process_time() - started


def quickest(action):
    """The least of some repetitions: what disturbs only adds."""
    action()
    return min(processor_seconds(action) for _ in range(REPEATS))


def world(name):
    """The random policy in the simulator, draws of episodes included, as in ``speed.py``; and measuring all figures."""
    import jax

    from emutune.policies import Random
    from emutune.scenario import load_scenario
    from emutune.study.evaluate import evaluate_policy, held_out_episodes
    from emutune.world import build_world

    try:
        from emutune.policies.measure import draw_episodes, run_episodes
    except ImportError:  # where they were before
        from emutune.study.evaluate import draw_episodes, run_episodes

    scenario = load_scenario(name)
    numbers, episodes = build_world(scenario), held_out_episodes(scenario, 2048)
    play = jax.jit(
        lambda world, stream: run_episodes(world, Random(), draw_episodes(world, stream, 2048))[0].sum()
    )
    return {
        "world": quickest(lambda: play(numbers, 3).block_until_ready()),
        "evaluate": quickest(lambda: evaluate_policy(scenario, Random(), episodes)),
    }


def train(name):
    """Updates of HMPPO, checkpoints included; the first run compiles."""
    from emutune.learning.configuration import TrainingConfig
    from emutune.learning.training import train_seeds
    from emutune.scenario import load_scenario

    scenario, config = load_scenario(name), TrainingConfig(steps=100_000)

    def run():
        with tempfile.TemporaryDirectory() as directory:
            train_seeds(scenario, config, range(1), Path(directory))

    return {"train": quickest(run)}


def lookahead(name):
    """Decisions of a planned lookahead, and compiling one."""
    import jax
    import jax.numpy as jnp

    from emutune.policies import LaterPrices, plan_lookahead
    from emutune.scenario import load_scenario
    from emutune.world import build_world, observe, reset

    scenario = load_scenario(name)
    numbers, prices = build_world(scenario), LaterPrices(jnp.float32(0.5), jnp.float32(0.5))
    # Before the step had a room of its own, a plan asked for the scenario as well.
    known = {"scenario": scenario, "world": numbers, "prices": prices}
    wanted = inspect.signature(plan_lookahead).parameters
    planned = plan_lookahead(**{key: value for key, value in known.items() if key in wanted})
    states = jax.vmap(reset, (0, None))(jax.random.split(jax.random.key(0), 256), numbers)
    seen = jax.vmap(observe, (None, 0))(numbers, states)
    decide = jax.jit(jax.vmap(lambda one: planned.decide(numbers, one, jax.random.key(0))))
    compiling = processor_seconds(lambda: decide.lower(seen).compile())
    return {
        "lookahead_compile": compiling,
        "lookahead_decision": quickest(lambda: jax.block_until_ready(decide(seen))),
    }


MEASURES = {measure.__name__: measure for measure in (world, train, lookahead)}


def measured(checkout, measure, name):
    """The seconds of a checkout, in a process of its own that keeps no compiled programs."""
    # One thread: what waits for work burns the processor's time too.
    flags = "--xla_cpu_multi_thread_eigen=false"
    environment = {**os.environ, "PYTHONPATH": str(checkout / "src"), "XLA_FLAGS": flags}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    command = [sys.executable, __file__, str(checkout), "--one", measure, name]
    shown = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if shown.returncode:
        raise SystemExit(f"{checkout}: {measure} in {name} failed:\n{shown.stderr}")
    return json.loads(shown.stdout)


def compare(before, measures, names, rounds):
    ratios = {}
    for measure in measures:
        for name in names:
            taken = {before: [], HERE: []}
            for turn in range(rounds):
                for checkout in (before, HERE)[:: -1 if turn % 2 else 1]:
                    taken[checkout].append(measured(checkout, measure, name))
            for figure in taken[HERE][0]:
                each = [
                    old[figure] / new[figure] for old, new in zip(taken[before], taken[HERE], strict=True)
                ]
                ratios[f"{name}.{figure}"] = statistics.median(each)
                spread = f"{min(each):.3f} to {max(each):.3f}"
                print(f"{name}.{figure}: {statistics.median(each):.3f} ({spread})", flush=True)
    return ratios


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("before", type=Path, help="the other checkout")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--worlds", default=",".join(WORLDS))
    parser.add_argument("--measures", default=",".join(MEASURES))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        measure, name = arguments.one
        print(json.dumps(MEASURES[measure](name)))
        return
    ratios = compare(
        arguments.before.resolve(),
        arguments.measures.split(","),
        arguments.worlds.split(","),
        arguments.rounds,
    )
    if arguments.json:
        arguments.json.write_text(json.dumps(ratios, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
