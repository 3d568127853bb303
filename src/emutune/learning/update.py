"""One training update: collect episodes, estimate advantages, take clipped policy steps (Eq. 17 to 22)."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int, Key

from emutune.learning.advantages import episode_advantages
from emutune.learning.agents import (
    Actors,
    case_log_probability,
    case_logits,
    retention_log_probability,
    retention_means,
)
from emutune.learning.architectures import ARCHITECTURES, Inputs
from emutune.learning.configuration import TrainingConfig
from emutune.learning.hmppo import critic_plan
from emutune.learning.networks import Network
from emutune.learning.rollout import Noise, Trajectory, collect, draw_noise, one_axis
from emutune.learning.slices import SLICES, draw_shares, slice_of
from emutune.step import marginal_charges
from emutune.world import Episode, Summary, World, draw_batch, summarise

# What each critic predicts, of every step, episode and, where credit is marginal, UE.
Rewards = list[Float[Array, "tasks episodes ..."]]


class Parameters(NamedTuple):
    """Everything that is learned."""

    actors: Actors
    critics: list[Network]


class TrainingState(NamedTuple):
    """Where training stands; with the configuration and the world it determines all that follows.

    ``value_centre`` and ``value_scale`` standardise each critic's value targets. They are measured once, on the first
    update's episodes, and stay, so that the critics need not follow a moving unit.
    """

    parameters: Parameters
    optimiser: Any
    key: Key[Array, ""]
    update: Int[Array, ""]
    value_centre: Float[Array, "critics"]
    value_scale: Float[Array, "critics"]


class Samples(NamedTuple):
    """Steps as the losses take them; one leading axis."""

    inputs: Inputs
    at_server: Bool[Array, "samples ues"]
    unclipped: Float[Array, "samples ues"]
    case_log_probability: Float[Array, "samples ues"]
    retention_log_probability: Float[Array, "samples ues"]
    case_advantage: Float[Array, "samples ..."]
    emulator_advantage: Float[Array, "samples ..."]
    targets: list[Float[Array, "samples ..."]]


class Diagnostics(NamedTuple):
    """What tells whether an update was healthy; means over its minibatches."""

    approximate_kl: Float[Array, ""]
    clip_fraction: Float[Array, ""]
    entropy: Float[Array, ""]
    value_loss: Float[Array, ""]
    explained_variance: Float[Array, ""]


class Metrics(NamedTuple):
    """One update's figures: the exploring episodes, the greedy held-out ones, and diagnostics."""

    training: Summary
    evaluation: Summary
    diagnostics: Diagnostics


def empty_metrics(count: int) -> Metrics:
    """Room for the figures of ``count`` updates."""

    def zeros(kind: type[Summary] | type[Diagnostics]) -> Any:
        return kind(*(jnp.zeros(count) for _ in kind._fields))

    return Metrics(zeros(Summary), zeros(Summary), zeros(Diagnostics))


def make_optimiser(config: TrainingConfig) -> optax.GradientTransformation:
    """Adam behind a clip of the gradient's norm; the step size is applied by ``train_update``."""
    return optax.chain(optax.clip_by_global_norm(config.max_gradient_norm), optax.scale_by_adam(eps=1e-5))


def networks_of(parameters: Parameters) -> list[Any]:
    """The parameters that one optimiser and one gradient clip each look after."""
    actors = parameters.actors
    return [actors.case, (actors.emulator, actors.log_std), *parameters.critics]


def parameters_from(networks: list[Any]) -> Parameters:
    """The inverse of ``networks_of``."""
    case, (emulator, log_std), *critics = networks
    return Parameters(Actors(case, emulator, log_std), critics)


def train_update(
    config: TrainingConfig, world: World, held_out: Episode, state: TrainingState, updates: Int[Array, ""]
) -> tuple[TrainingState, Metrics]:
    """One update out of ``updates``; evaluation measures the actors that the update starts from."""
    keys = jax.random.split(jax.random.fold_in(state.key, state.update), 3)
    exploring = draw_batch(keys[0], world, config.environments)
    if config.network == "sized":
        trajectory, rewards = explore(config, world, exploring, keys[1], state.parameters.actors)
        evaluation = _mean_summary(_act_greedily(config, world, held_out, state))
    else:
        trajectory, evaluation = _explore_and_evaluate(config, world, held_out, exploring, keys[1], state)
        rewards = rewards_of(config, world, trajectory)
    if config.teacher == "none":
        state = jax.lax.cond(
            state.update == 0, lambda: standardise_values(config, state, rewards), lambda: state
        )
    samples, explained_variance = _make_samples(config, state, trajectory, rewards)
    rate = config.learning_rate * (1 - state.update / updates)
    networks, optimiser, diagnostics = _epochs(config, state, samples, keys[2], rate)
    new_state = state._replace(
        parameters=parameters_from(networks), optimiser=optimiser, update=state.update + 1
    )
    training = _mean_summary(trajectory)
    kl, clipped, entropy, value_loss = diagnostics.mean((0, 1))
    health = Diagnostics(kl, clipped, entropy, value_loss, explained_variance)
    return new_state, Metrics(training, evaluation, health)


def _mean_summary(trajectory: Trajectory) -> Summary:
    """Means over a batch of complete episodes."""
    return jax.tree.map(jnp.mean, summarise(trajectory.outcome, trajectory.situation.active))


def rewards_of(config: TrainingConfig, world: World, trajectory: Trajectory) -> Rewards:
    """What each critic predicts: the fleet's reward, or what each UE adds to it."""
    every_step = jax.vmap(jax.vmap(marginal_charges, (None, 0, 0)), (None, 0, 0))
    outcome = trajectory.outcome
    return [
        outcome.reward
        if critic.credit == "fleet"
        else -every_step(world.rules, trajectory.situation, outcome.plan)
        for critic in critic_plan(config).critics
    ]


def explore(
    config: TrainingConfig, world: World, episodes: Episode, key: Key[Array, ""], actors: Actors
) -> tuple[Trajectory, Rewards]:
    """Act with noise, and the rewards that critics predict.

    Networks of any size of fleet act in slices of many sizes, some episodes in each; their rewards are in a unit
    that grows from slice to slice, more slowly than transfers do, since policies avoid those where they are dear.
    """
    count = episodes.complexity.shape[0]

    def act(world: World, episodes: Episode, key: Key[Array, ""]) -> tuple[Trajectory, Rewards]:
        noise = draw_noise(key, (world.tasks, episodes.complexity.shape[0], world.ues))
        trajectory = collect(world, config.network, actors, episodes, noise)
        return trajectory, rewards_of(config, world, trajectory)

    slices = slice_count(config, count)
    if slices == 1:
        return act(world, episodes, key)
    draws, noises = jax.random.split(key)
    shares = draw_shares(config, world, slices, draws)
    apart = jax.tree.map(lambda leaf: leaf.reshape(slices, -1, *leaf.shape[1:]), episodes)

    def act_in(share: Array, episodes: Episode, key: Key[Array, ""]) -> tuple[Trajectory, Rewards]:
        trajectory, rewards = act(slice_of(world, share), episodes, key)
        return trajectory, [part * share**0.5 for part in rewards]

    found = jax.vmap(act_in, out_axes=1)(shares, apart, jax.random.split(noises, slices))
    together: tuple[Trajectory, Rewards] = jax.tree.map(
        lambda leaf: leaf.reshape(leaf.shape[0], -1, *leaf.shape[3:]), found
    )
    return together


def slice_count(config: TrainingConfig, episodes: int) -> int:
    """How many slices so many episodes are played in."""
    return math.gcd(episodes, SLICES) if config.network == "sized" else 1


def standardise_values(config: TrainingConfig, state: TrainingState, rewards: Rewards) -> TrainingState:
    """Centre and scale value targets at the mean and spread of the discounted returns to go."""
    to_go = [returns_to_go(config, part) for part in rewards]
    centre = jnp.stack([part.mean() for part in to_go])
    return state._replace(
        value_centre=centre, value_scale=jnp.maximum(jnp.stack([part.std() for part in to_go]), 1e-6)
    )


def returns_to_go(
    config: TrainingConfig, rewards: Float[Array, "tasks episodes ..."]
) -> Float[Array, "tasks episodes ..."]:
    """Discounted rewards from each step on: advantages over critics that expect nothing."""
    return episode_advantages(rewards, jnp.zeros_like(rewards), config.discount, trace_decay=1.0)


def _act_greedily(
    config: TrainingConfig, world: World, episodes: Episode, state: TrainingState
) -> Trajectory:
    silence = jnp.zeros((world.tasks, episodes.complexity.shape[0], world.ues))
    return collect(world, config.network, state.parameters.actors, episodes, Noise(silence, silence))


def _explore_and_evaluate(
    config: TrainingConfig,
    world: World,
    held_out: Episode,
    exploring: Episode,
    key: Key[Array, ""],
    state: TrainingState,
) -> tuple[Trajectory, Summary]:
    """Both in one scan: held-out episodes ride along with zero noise, which is the greedy policy."""
    count = config.environments
    noise = draw_noise(key, (world.tasks, count, world.ues))
    silence = jnp.zeros((world.tasks, held_out.complexity.shape[0], world.ues))
    trajectory = collect(
        world,
        config.network,
        state.parameters.actors,
        jax.tree.map(lambda a, b: jnp.concatenate([a, b]), exploring, held_out),
        Noise(*(jnp.concatenate([part, silence], axis=1) for part in noise)),
    )
    greedy = jax.tree.map(lambda leaf: leaf[:, count:], trajectory)
    return jax.tree.map(lambda leaf: leaf[:, :count], trajectory), _mean_summary(greedy)


def _make_samples(
    config: TrainingConfig, state: TrainingState, trajectory: Trajectory, rewards: Rewards
) -> tuple[Samples, Float[Array, ""]]:
    """Advantages, value targets and old log-probabilities of a batch of episodes."""
    kind, actors, plan = config.network, state.parameters.actors, critic_plan(config)
    inputs, at_server = trajectory.inputs, trajectory.at_server
    slices = slice_count(config, at_server.shape[1])
    advantages, targets = [], []
    units = zip(state.value_centre, state.value_scale, strict=True)
    for critic, network, reward, (centre, scale) in zip(
        plan.critics, state.parameters.critics, rewards, units, strict=True
    ):
        values = centre + scale * critic.value(config, network, inputs, at_server)
        advantage = episode_advantages(reward, values, config.discount, config.trace_decay)
        advantages.append(advantage)
        targets.append((advantage + values - centre) / scale)
    explained = 1 - advantages[0].var() / (targets[0].var() * state.value_scale[0] ** 2 + 1e-8)
    means = retention_means(kind, actors, inputs, at_server)
    samples = Samples(
        inputs=inputs,
        at_server=at_server,
        unclipped=trajectory.unclipped,
        case_log_probability=case_log_probability(case_logits(kind, actors, inputs), at_server),
        retention_log_probability=retention_log_probability(means, actors.log_std, trajectory.unclipped),
        case_advantage=_standardise(advantages[plan.case], slices),
        emulator_advantage=_standardise(advantages[plan.emulator], slices),
        targets=targets,
    )
    return one_axis(samples), explained


def _epochs(
    config: TrainingConfig,
    state: TrainingState,
    samples: Samples,
    key: Key[Array, ""],
    rate: Float[Array, ""],
) -> tuple[list[Any], Any, Float[Array, "epochs minibatches 4"]]:
    """Several passes over shuffled minibatches; samples that do not fill a minibatch sit out a pass."""
    optimiser = make_optimiser(config)
    count = samples.case_advantage.shape[0]
    parts = min(config.minibatches, count)
    size = count // parts

    def minibatch_step(carry: tuple[list[Any], Any], chosen: Int[Array, "size"]) -> Any:
        networks, optimiser_states = carry
        batch = jax.tree.map(lambda leaf: leaf[chosen], samples)
        gradients, diagnostics = jax.grad(_loss, has_aux=True)(networks, config, batch)
        stepped = []
        for network, gradient, memory in zip(networks, gradients, optimiser_states, strict=True):
            # As one vector: Adam costs a handful of kernels, not a handful for each of the leaves.
            vector, to_tree = ravel_pytree(gradient)
            direction, memory = optimiser.update(vector, memory)
            stepped.append((jax.tree.map(lambda p, d: p - rate * d, network, to_tree(direction)), memory))
        return ([network for network, _ in stepped], [memory for _, memory in stepped]), diagnostics

    def epoch(carry: tuple[list[Any], Any], key: Key[Array, ""]) -> Any:
        order = _shuffled(key, count)[: parts * size].reshape(parts, size)
        return jax.lax.scan(minibatch_step, carry, order)

    start = (networks_of(state.parameters), state.optimiser)
    (networks, memory), diagnostics = jax.lax.scan(epoch, start, jax.random.split(key, config.epochs))
    return networks, memory, diagnostics


def _shuffled(key: Key[Array, ""], count: int) -> Int[Array, "count"]:
    """0 to count - 1 in random order.

    Up to 2**16 indices ride in the low bits of the random words that order them: one sort without a
    payload, which is what costs time in ``jax.random.permutation``.
    """
    if count > 2**16:
        return jax.random.permutation(key, count)
    mask = jnp.uint32(2 ** (count - 1).bit_length() - 1)
    words = jax.random.bits(key, (count,), jnp.uint32) & ~mask | jnp.arange(count, dtype=jnp.uint32)
    return (jnp.sort(words) & mask).astype(jnp.int32)


def _loss(
    networks: list[Any], config: TrainingConfig, batch: Samples
) -> tuple[Float[Array, ""], Float[Array, "4"]]:
    """Sum of both clipped objectives, the entropy bonus and the value losses (Eq. 21, 22)."""
    parameters, kind, plan = parameters_from(networks), config.network, critic_plan(config)
    actors, inputs = parameters.actors, batch.inputs
    logits = case_logits(kind, actors, inputs)
    case_change = case_log_probability(logits, batch.at_server) - batch.case_log_probability
    means = retention_means(kind, actors, inputs, batch.at_server)
    retention_change = (
        retention_log_probability(means, actors.log_std, batch.unclipped) - batch.retention_log_probability
    )
    # A UE at the server has no retention to choose: its draw had no effect and gets no credit.
    chosen = ARCHITECTURES[kind].decides_retention(inputs, batch.at_server)
    # Nor does a UE whose case is none to choose.
    case_loss = clipped_loss(case_change, batch.case_advantage, inputs.chooses, config.clip)
    emulator_loss = clipped_loss(retention_change, batch.emulator_advantage, chosen, config.clip)
    case_entropy = (jax.nn.softplus(logits) - logits * jax.nn.sigmoid(logits)).mean()
    entropy = case_entropy + actors.log_std
    value_loss = jnp.asarray(0.0)
    for critic, network, target in zip(plan.critics, parameters.critics, batch.targets, strict=True):
        values = critic.value(config, network, inputs, batch.at_server)
        value_loss += jnp.mean((values - target) ** 2)
    ratio = jnp.exp(case_change)
    diagnostics = jnp.stack(
        [jnp.mean(ratio - 1 - case_change), jnp.mean(jnp.abs(ratio - 1) > config.clip), entropy, value_loss]
    )
    return case_loss + emulator_loss - config.entropy_weight * entropy + value_loss, diagnostics


def clipped_loss(
    log_ratio: Float[Array, "samples ues"], advantage: Float[Array, "samples ..."], weight: Array, clip: float
) -> Float[Array, ""]:
    """The clipped objective of Eq. 21, negated: ratios per UE, averaged over the UEs that count."""
    ratio = jnp.exp(log_ratio)
    shared = advantage if advantage.ndim > 1 else advantage[:, None]
    objective = jnp.minimum(ratio * shared, jnp.clip(ratio, 1 - clip, 1 + clip) * shared)
    return -mean_of(objective, weight)


def mean_of(values: Float[Array, "*batch"], which: Array) -> Float[Array, ""]:
    """Mean over those that count; 0 if none does."""
    return jnp.sum(values * which) / jnp.maximum(jnp.sum(which), 1.0)


def _standardise(
    values: Float[Array, "tasks episodes ..."], slices: int
) -> Float[Array, "tasks episodes ..."]:
    """Mean 0 and spread 1 among the episodes of each slice."""
    apart = values.reshape(values.shape[0], slices, -1)
    centred = apart - apart.mean((0, 2), keepdims=True)
    return (centred / (apart.std((0, 2), keepdims=True) + 1e-8)).reshape(values.shape)
