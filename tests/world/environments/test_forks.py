"""Environments in processes that are forked or spawned: they work, or say at once what would."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(), reason="no fork on this platform"
)

BEGIN = """
import multiprocessing, sys, warnings
import gymnasium, numpy as np, emutune
warnings.simplefilter("ignore")
ID, SMALL = "emutune/Orchestration-v0", ("fleet.ues=2", "fleet.tasks=3")

def play(seed):
    env = gymnasium.make(ID, overrides=SMALL)
    total, done = env.reset(seed=seed)[0].sum(), False
    env.action_space.seed(seed)
    while not done:
        _, reward, done, *_ = env.step(env.action_space.sample())
        total += reward
    return float(total)

def make_async(**kwargs):
    return gymnasium.make_vec(ID, num_envs=2, vectorization_mode="async", overrides=SMALL, **kwargs)

def refusal(call, *arguments):
    try:
        return f"no refusal: {call(*arguments)}"
    except emutune.errors.UsageError as error:
        assert "\\n" not in str(error), error
        assert 'context="spawn"' in str(error), error
        return "refused"
"""


def run(program: str) -> list[str]:
    """What a program prints, in an interpreter where JAX has not begun; it must end by itself."""
    ended = subprocess.run(
        [sys.executable, "-c", BEGIN + program],
        env=os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.splitlines()


@pytest.mark.slow
def test_forked_workers_play_where_jax_is_not_yet_in_use() -> None:
    printed = run("""
envs = make_async()
first, _ = envs.reset(seed=3)
for _ in range(4):
    envs.step(envs.action_space.sample())
envs.close()
with multiprocessing.get_context("fork").Pool(2) as pool:
    played = pool.map(play, [3, 4])
print(np.array_equal(first, gymnasium.make_vec(ID, num_envs=2, overrides=SMALL).reset(seed=3)[0]))
print(played == [play(3), play(4)])
""")
    assert printed == ["True", "True"]


def test_workers_forked_beside_jax_refuse_at_once() -> None:
    printed = run("""
import jax.numpy
jax.numpy.arange(3).sum()
fork = multiprocessing.get_context("fork")
env = gymnasium.make(ID, overrides=SMALL)
env.reset(seed=0)

def go_on(_):
    return env.step(env.action_space.sample())

def evaluate(_):
    from emutune.scenario import load_scenario
    from emutune.study.evaluate import held_out_episodes
    return held_out_episodes(load_scenario("paper"), 2)

with fork.Pool(1) as pool:
    for call in (play, go_on, evaluate):
        print(refusal(pool.map, call, [0]))
pair = make_async()
print(refusal(pair.reset))
pair.close(terminate=True)
print(play(3) == play(3))
""")
    assert printed == ["refused"] * 4 + ["True"]


@pytest.mark.slow
def test_spawned_workers_play_beside_jax() -> None:
    printed = run("""
expected = gymnasium.make_vec(ID, num_envs=2, overrides=SMALL).reset(seed=3)[0]
for context in ("spawn", "forkserver"):
    envs = make_async(vector_kwargs={"context": context})
    print(np.array_equal(envs.reset(seed=3)[0], expected))
    envs.close()
""")
    assert printed == ["True", "True"]
