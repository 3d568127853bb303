"""Speed of training, of the world alone, of the command, and of a peer on the same environment.

    python benchmarks/speed.py --json speed.json

Every figure is measured in a process of its own, one after the other. Compilation is left out of the
``train_*`` and other ``*_per_s`` figures: every program runs once before it is timed. The peer is PPO of
Stable-Baselines3 on the Gymnasium environment; it is left out if the ``bench`` extra is not installed.
"""

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from emutune.cli.jax_setup import prepare_jax

STEPS = 300_000
REPEATS = 5
COMMAND = [sys.executable, "-c", "from emutune.cli.main import run; run()"]


def timed(action):
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def training_seconds(seeds, **settings):
    """Wall-clock seconds of whole runs, checkpoints and metrics included."""
    prepare_jax(seeds)
    from emutune.learning.configuration import TrainingConfig
    from emutune.learning.training import train_seeds
    from emutune.scenario import load_scenario

    scenario, config = load_scenario("paper"), TrainingConfig(steps=STEPS, **settings)

    def run():
        with tempfile.TemporaryDirectory() as directory:
            return timed(lambda: train_seeds(scenario, config, range(seeds), Path(directory)))

    run()
    return statistics.median(run() for _ in range(REPEATS))


def train_flat_1_seed():
    return {"train_flat_1_seed_seconds": training_seconds(1, network="flat")}


def train_flat_8_seeds():
    return {"train_flat_8_seeds_steps_per_s": 8 * STEPS / training_seconds(8, network="flat")}


def train_set():
    return {"train_set_steps_per_s": STEPS / training_seconds(1)}


def train_set_8_seeds():
    return {"train_set_8_seeds_steps_per_s": 8 * STEPS / training_seconds(8)}


def world(episodes=2048, repeats=5):
    """The random policy in the simulator, one batch at a time on each device."""
    prepare_jax(sys.maxsize)
    import jax

    from emutune.policies import Random
    from emutune.policies.measure import draw_episodes, run_episodes
    from emutune.scenario import load_scenario
    from emutune.world import build_world

    scenario = load_scenario("paper")
    numbers = build_world(scenario)
    play = jax.jit(
        lambda world, stream: run_episodes(
            world, Random(), draw_episodes(world, stream, episodes)
        ).episode_return.sum()
    )
    batches = [jax.device_put((numbers, index), device) for index, device in enumerate(jax.devices())]

    def run(batch):
        for _ in range(repeats):
            play(*batch).block_until_ready()

    with ThreadPoolExecutor(len(batches)) as pool:
        list(pool.map(run, batches))
        seconds = statistics.median(timed(lambda: list(pool.map(run, batches))) for _ in range(REPEATS))
    return {"world_steps_per_s": len(batches) * repeats * episodes * scenario.fleet.tasks / seconds}


def fleet_sizes(sizes=(6, 64, 1024, 10_000)):
    """The random policy in fleets of many sizes, on one device: draws of episodes included."""
    prepare_jax()
    import jax

    from emutune.policies import Random
    from emutune.policies.measure import draw_episodes, run_episodes
    from emutune.scenario import load_scenario
    from emutune.world import build_world

    @partial(jax.jit, static_argnums=2)
    def play(world, stream, episodes):
        return run_episodes(world, Random(), draw_episodes(world, stream, episodes)).episode_return.sum()

    def rate(scenario):
        numbers, episodes = build_world(scenario), max(1, 12_288 // scenario.fleet.ues)
        play(numbers, 0, episodes).block_until_ready()
        seconds = (timed(lambda: play(numbers, 1, episodes).block_until_ready()) for _ in range(REPEATS))
        return episodes * scenario.fleet.tasks / statistics.median(seconds)

    return {
        f"{name}_n{ues}_steps_per_s": rate(load_scenario(name, [f"fleet.ues={ues}"]))
        for name in ("paper", "urban")
        for ues in sizes
    }


def large_bound(ues=256):
    """Seconds that the bound of one episode of a large fleet takes."""
    prepare_jax()
    import jax

    from emutune.bounds import certified_bounds
    from emutune.scenario import load_scenario
    from emutune.study.evaluate import held_out_episodes

    def seconds(scenario):
        drawn = held_out_episodes(scenario, 5)
        first, later = (
            jax.tree.map(lambda part, cut=cut: part[cut], drawn) for cut in (slice(1), slice(1, 5))
        )
        certified_bounds(scenario, first, method="prices")
        return timed(lambda: certified_bounds(scenario, later, method="prices")) / 4

    return {
        f"{name}_n{ues}_bound_seconds": seconds(load_scenario(name, [f"fleet.ues={ues}"]))
        for name in ("families", "city")
    }


def large_decisions(ues=256):
    """Milliseconds of one decision for a large fleet: planned, planned with a learned worth, by a network."""
    import jax.numpy as jnp
    import numpy as np

    from emutune.learning.agents import LearnedPolicy, create_actors
    from emutune.learning.guided import begin_guided
    from emutune.policies import LaterPrices, plan_lookahead
    from emutune.scenario import load_scenario
    from emutune.study.comparison import SIZED
    from emutune.study.evaluate import decision_time_ms
    from emutune.world import build_world

    figures = {}
    for name in ("families", "city"):
        scenario = load_scenario(name, [f"fleet.ues={ues}"])
        world = build_world(scenario)
        planned = plan_lookahead(world, LaterPrices(jnp.float32(0.5), jnp.float32(0.5)))
        # Weights do not change how long it takes.
        actors = create_actors(np.random.default_rng(0), SIZED, world)
        policies = {
            "lookahead": planned,
            "guided": begin_guided(planned, world, 32, 0),
            "hmppo_sized": LearnedPolicy("sized", actors),
        }
        for policy, decides in policies.items():
            figures[f"{name}_n{ues}_{policy}_ms"] = decision_time_ms(scenario, decides)
    return figures


def command():
    """From shell to result: the help, and a ``train`` whose program the cache already holds."""

    def train():
        with tempfile.TemporaryDirectory() as directory:
            arguments = ["train", "paper", "--out", directory]
            return timed(lambda: subprocess.run([*COMMAND, *arguments], check=True, capture_output=True))

    def show_help():
        return timed(lambda: subprocess.run([*COMMAND, "--help"], check=True, capture_output=True))

    train()
    show_help()
    return {
        "help_seconds": statistics.median(show_help() for _ in range(REPEATS)),
        "second_train_seconds": statistics.median(train() for _ in range(REPEATS)),
    }


def peer(environments=16):
    """Stable-Baselines3's PPO on the same Gymnasium environment: steps/s, and mean held-out return."""
    import gymnasium
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.evaluation import evaluate_policy

    from emutune.world.environments import BoxAction

    def make():
        return BoxAction(gymnasium.make("emutune/Orchestration-v0", scenario="paper"))

    model = PPO("MlpPolicy", make_vec_env(make, environments), n_steps=50, batch_size=200, n_epochs=4, seed=0)
    seconds = timed(lambda: model.learn(STEPS))
    returns, _ = evaluate_policy(model, make_vec_env(make, 1, seed=1), n_eval_episodes=16)
    return {"sb3_steps_per_s": STEPS / seconds, "sb3_return": float(returns)}


MEASURES = (
    train_flat_1_seed,
    train_flat_8_seeds,
    train_set,
    train_set_8_seeds,
    world,
    fleet_sizes,
    large_bound,
    large_decisions,
    command,
    peer,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", choices=[measure.__name__ for measure in MEASURES], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        measure = next(measure for measure in MEASURES if measure.__name__ == arguments.only)
        print(json.dumps(measure()))
        return
    figures: dict[str, float] = {}
    for measure in MEASURES:
        if measure is peer and importlib.util.find_spec("stable_baselines3") is None:
            print("sb3_* left out: pip install torch==2.13.0 and emutune[bench]", file=sys.stderr)
            continue
        alone = [sys.executable, __file__, "--only", measure.__name__]
        output = subprocess.run(alone, check=True, stdout=subprocess.PIPE, text=True).stdout
        measured = json.loads(output.splitlines()[-1])
        for name, value in measured.items():
            print(f"{name} {value:.4g}", flush=True)
        figures |= measured
        if arguments.json:
            arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
