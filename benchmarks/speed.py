"""Steps per second of training, of the world alone, and of a peer on the same environment.

    python benchmarks/speed.py --json speed.json [--peer]

Compilation is left out: every program runs once before it is timed. ``--peer`` needs the ``bench`` extra.
"""

import argparse
import json
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from emutune.cli.main import _prepare_jax

STEPS = 300_000
REPEATS = 3


def timed(action):
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def training_seconds(scenario, config, seeds):
    """Wall-clock seconds of a whole run, checkpoints and metrics included; median of repeats."""
    from emutune.learning.training import train_seeds

    times = []
    for repeat in range(REPEATS + 1):
        with tempfile.TemporaryDirectory() as directory:
            seconds = timed(lambda: train_seeds(scenario, config, range(seeds), Path(directory)))
        if repeat:
            times.append(seconds)
    return statistics.median(times)


def world_steps_per_s(scenario, episodes=2048, repeats=5):
    """The random policy in the simulator, one batch at a time on each device."""
    import jax

    from emutune.policies import Random
    from emutune.study.evaluate import _draw, _episode_keys, _run_batch
    from emutune.world import build_world

    world = build_world(scenario)
    play = jax.jit(lambda world, keys: _run_batch(world, Random(), _draw(world, keys), keys)[0].sum())
    arguments = [
        jax.device_put((world, _episode_keys(index, episodes)), device)
        for index, device in enumerate(jax.devices())
    ]

    def run(batch):
        for _ in range(repeats):
            play(*batch).block_until_ready()

    with ThreadPoolExecutor(len(arguments)) as pool:
        list(pool.map(run, arguments))
        seconds = statistics.median(timed(lambda: list(pool.map(run, arguments))) for _ in range(REPEATS))
    return len(arguments) * repeats * episodes * scenario.fleet.tasks / seconds


def peer(scenario, environments=16):
    """Stable-Baselines3's PPO on the same Gymnasium environment: steps/s, and mean held-out return."""
    import gymnasium
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.evaluation import evaluate_policy

    from emutune.world.environments import BoxAction

    def make():
        return BoxAction(gymnasium.make("emutune/Orchestration-v0", scenario=scenario))

    model = PPO("MlpPolicy", make_vec_env(make, environments), n_steps=50, batch_size=200, n_epochs=4, seed=0)
    seconds = timed(lambda: model.learn(STEPS))
    returns, _ = evaluate_policy(model, make_vec_env(make, 1, seed=1), n_eval_episodes=16)
    return STEPS / seconds, float(returns)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--peer", action="store_true")
    arguments = parser.parse_args()
    _prepare_jax()
    from emutune.learning.configuration import TrainingConfig
    from emutune.scenario import load_scenario

    scenario = load_scenario("paper")
    flat = TrainingConfig(network="flat", width=64, steps=STEPS)
    figures = {
        "train_flat_1_seed_seconds": training_seconds(scenario, flat, 1),
        "train_flat_8_seeds_steps_per_s": 8 * STEPS / training_seconds(scenario, flat, 8),
        "train_set_steps_per_s": 2 * STEPS / training_seconds(scenario, TrainingConfig(steps=STEPS), 2),
        "world_steps_per_s": world_steps_per_s(scenario),
    }
    if arguments.peer:
        figures["sb3_steps_per_s"], figures["sb3_return"] = peer(scenario)
    for name, value in figures.items():
        print(f"{name} {value:.4g}")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
