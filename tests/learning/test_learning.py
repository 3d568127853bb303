"""Advantages and losses by hand, ratio one, exact resumption, and a world that is learned."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints import assert_same_bits
from emutune.errors import CheckpointError
from emutune.learning import checkpoint, ppo, training
from emutune.learning.advantages import episode_advantages
from emutune.learning.agents import case_log_probability, retention_log_probability
from emutune.learning.configuration import GuidedConfig, TrainingConfig
from emutune.learning.networks import create_network, set_outputs, set_value
from emutune.learning.update import clipped_loss
from emutune.scenario import load_scenario
from emutune.study.evaluate import evaluate_policy, held_out_episodes
from emutune.world import build_world

SHORT = TrainingConfig(steps=400, environments=2, minibatches=2, evaluation_episodes=2)
SMALL = ["fleet.ues=2", "fleet.tasks=4"]


def test_advantages_by_hand():
    rewards = jnp.array([[1.0], [2.0], [3.0]])
    values = jnp.array([[0.5], [1.0], [2.0]])
    # errors: 1 + .9*1 - .5 = 1.4;  2 + .9*2 - 1 = 2.8;  3 - 2 = 1; decay .9 * .5 = .45
    expected = [[1.4 + 0.45 * (2.8 + 0.45 * 1)], [2.8 + 0.45 * 1], [1.0]]
    np.testing.assert_allclose(episode_advantages(rewards, values, 0.9, 0.5), expected, rtol=1e-6)


def test_clipped_loss_by_hand():
    log_ratio = jnp.log(jnp.array([[1.5, 0.5], [1.5, 0.9]]))
    advantage = jnp.array([2.0, -1.0])
    weight = jnp.array([[1.0, 1.0], [1.0, 0.0]])
    # min(1.5*2, 1.2*2) = 2.4; min(.5*2, .8*2) = 1; min(-1.5, -1.2) = -1.5; the last does not count
    np.testing.assert_allclose(
        clipped_loss(log_ratio, advantage, weight, 0.2), -(2.4 + 1 - 1.5) / 3, rtol=1e-6
    )


def test_log_probabilities_by_hand():
    logits, cases = jnp.array([0.0, 2.0]), jnp.array([True, False])
    expected = [math.log(0.5), math.log(1 - 1 / (1 + math.exp(-2)))]
    np.testing.assert_allclose(case_log_probability(logits, cases), expected, rtol=1e-6)
    density = retention_log_probability(jnp.zeros(1), jnp.log(0.5), jnp.array([0.25]))
    np.testing.assert_allclose(density, -0.125 - math.log(0.5) - 0.5 * math.log(2 * math.pi), rtol=1e-5)


def test_set_networks_treat_ues_alike():
    generator = np.random.default_rng(0)
    features, context = jnp.asarray(generator.normal(size=(5, 3)), jnp.float32), jnp.ones(1)
    order = jnp.array([3, 1, 4, 0, 2])
    for head, output in (("ue", set_outputs), ("value", set_value)):
        network = create_network(generator, features=3, context=1, width=8, head=head, head_gain=1.0)
        plain, shuffled = (output(network, rows, context) for rows in (features, features[order]))
        np.testing.assert_allclose(shuffled, plain[order] if head == "ue" else plain, atol=1e-6)


def test_nothing_has_moved_at_the_first_step():
    scenario = load_scenario("paper", SMALL)
    config = SHORT.model_copy(update={"epochs": 1, "minibatches": 1, "trace_decay": 1.0})
    world = build_world(scenario)
    state = ppo.initial_state(config, world, 0)
    silent = state.parameters._replace(critics=jax.tree.map(jnp.zeros_like, state.parameters.critics))
    rows, again = (
        ppo.run_updates(
            config, world, state._replace(parameters=silent, key=key), jnp.asarray(1), jnp.asarray(10)
        )[1]
        for key in (state.key, jax.random.key(9))
    )
    assert float(rows.diagnostics.clip_fraction[0]) == 0
    assert float(rows.diagnostics.approximate_kl[0]) == pytest.approx(0, abs=1e-6)
    # Critics that say nothing are off by the spread of what comes, which is their unit.
    assert float(rows.diagnostics.value_loss[0]) == pytest.approx(len(silent.critics), rel=1e-4)
    # What is measured is what the actors do without noise on episodes that are the same for all.
    assert rows.evaluation.episode_return[0] == again.evaluation.episode_return[0]
    assert rows.training.episode_return[0] != again.training.episode_return[0]


@pytest.mark.parametrize("algorithm", ["hmppo", pytest.param("ippo", marks=pytest.mark.slow)])
def test_a_resumed_run_has_the_same_bits(tmp_path, monkeypatch, algorithm):
    scenario = load_scenario("paper", SMALL)
    # No other test's: how long a chunk is is no part of what a program is kept by.
    config = SHORT.model_copy(update={"algorithm": algorithm, "clip": 0.25})
    monkeypatch.setattr(ppo, "CHUNK", 7)
    training.train_seed(scenario, config, 3, tmp_path / "whole")

    calls = []

    def interrupt(steps):
        calls.append(steps)
        if len(calls) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        training.train_seed(scenario, config, 3, tmp_path / "cut", progress=interrupt)
    training.train_seed(scenario, config, 3, tmp_path / "cut")
    whole, cut = (tmp_path / name / "checkpoint.safetensors" for name in ("whole", "cut"))
    assert_same_bits(whole, cut)
    lines = [
        [
            {**json.loads(line), "steps_per_s": 0}
            for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        ]
        for name in ("whole", "cut")
    ]
    assert lines[0] == lines[1]
    assert len(lines[0]) == 50


def keep(path, header):
    """A checkpoint of a run that has not begun."""
    checkpoint.save_checkpoint(path, header, training.learner_of(header).template())


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    scenario, path = load_scenario("paper", SMALL), tmp_path / "checkpoint.safetensors"
    keep(path, checkpoint.CheckpointHeader(scenario, SHORT, 0))
    other = load_scenario("paper", [*SMALL, "radio.uplink_bandwidth_hz=2e5"])
    with pytest.raises(CheckpointError, match="belongs to another scenario: radio"):
        training.train_seed(other, SHORT, 0, tmp_path)
    with pytest.raises(CheckpointError, match="training algorithm"):
        training.train_seed(scenario, SHORT.model_copy(update={"algorithm": "ippo"}), 0, tmp_path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="damaged"):
        training.load_policy(path)


def test_a_checkpoint_of_another_format_version_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "FORMAT_VERSION", "0")
        keep(path, checkpoint.CheckpointHeader(load_scenario("paper", SMALL), SHORT, 0))
    with pytest.raises(CheckpointError, match="format_version is '0', this emutune reads '1'"):
        training.load_policy(path)


@pytest.mark.parametrize("change", [lambda leaves: leaves[:-1], lambda leaves: [leaves[0][1:], *leaves[1:]],
                                    lambda leaves: [leaves[0] > 0, *leaves[1:]]],
                         ids=["fewer", "shape", "kind"])  # fmt: skip
@pytest.mark.parametrize("name", ["hmppo", "guided"])
def test_a_run_of_a_version_that_learned_other_arrays_is_refused_as_that(tmp_path, name, change):
    scenario = load_scenario("paper", SMALL)
    header = checkpoint.CheckpointHeader(scenario, {"hmppo": SHORT, "guided": GuidedConfig(width=4)}[name], 0)
    path, learner = tmp_path / "checkpoint.safetensors", training.learner_of(header)
    leaves = jax.tree.leaves(learner.template())
    checkpoint.save_checkpoint(path, header, leaves)
    policy, found = training.load_policy(path)
    assert found == header
    assert jax.tree.structure(policy) == jax.tree.structure(learner.policy(learner.template()))
    checkpoint.save_checkpoint(path, header, change(leaves))
    with pytest.raises(CheckpointError) as raised:
        training.load_policy(path)
    assert str(raised.value) == (
        f"{path}: was written by another version of emutune, whose {name} runs hold other arrays; "
        "use that version, or train again with another --out"
    )


def test_networks_are_kept_as_they_always_were():
    """What is kept of a run, so that those of earlier versions load: change it, and they do not."""
    config = TrainingConfig(width=4)
    state = ppo.initial_state(config, build_world(load_scenario("paper", SMALL)), 0)
    shapes = [list(leaf.shape) for leaf in jax.tree.leaves(state)]

    def network(features, outputs_of_each):
        first, second = [[features, 4], [features + 1, 4], [4]], [[4, 4], [4, 4], [4]]
        return [*first, *second, [4 * outputs_of_each, 1], [4, 1], [1]]

    networks = [*network(4, 1), *network(3, 1), [], *network(4, 0)]
    sizes = [
        sum(math.prod(shape) for shape in part)
        for part in (network(4, 1), [*network(3, 1), []], network(4, 0))
    ]
    memories = [part for size in sizes for part in ([], [size], [size])]
    assert shapes == [*networks, *memories, [], [], [1], [1]]


def test_a_sweep_keeps_the_programs_of_one_training(tmp_path):
    scenario = load_scenario("paper", SMALL)
    for number, rate in enumerate((1e-3, 2e-3)):
        config = SHORT.model_copy(update={"learning_rate": rate, "steps": 10})
        training.train_seed(scenario, config, 0, tmp_path / str(number))
    assert ppo.run_updates._cache_size() == 1


def test_a_small_fleet_learns_to_hold(tmp_path):
    scenario = load_scenario("paper", ["fleet.ues=3", "fleet.tasks=20"])
    config = TrainingConfig(steps=40_000, environments=20)
    policy = training.train_seed(scenario, config, 0, tmp_path)
    figures = evaluate_policy(scenario, policy, held_out_episodes(scenario, 16))
    assert figures.changes_per_ue.mean() < 1.5
    assert figures.server_share.mean() < 0.2
