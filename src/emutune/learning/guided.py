"""Guided lookahead: the exact cost of the step at hand plus a learned worth of each UE's cache.

The worth starts as that of price lookahead and learns what that leaves out: how busy the fleet is, how far
the UE stands, how long the episode lasts. What is learned is the difference, by regression on what each UE
adds to the fleet's cost (``credit``) after each decision of the policy learned so far. A share of it is
kept that served best on validation episodes; none is kept if none did, so it cannot end below where it began.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key

from emutune.learning.configuration import GuidedConfig
from emutune.learning.credit import marginal_costs
from emutune.learning.networks import Network, create_network, set_outputs
from emutune.learning.rollout import one_axis
from emutune.policies import LaterPrices, Lookahead, plan_lookahead, register_policy
from emutune.scenario import Scenario
from emutune.world import (
    Action,
    Cache,
    Observation,
    Task,
    World,
    all_tasks,
    build_world,
    draw_episode,
    empty_cache,
    feature_count,
    observe_task,
    progress_feature,
    serve,
    ue_features,
)
from emutune.world.observation import other_retention
from emutune.world.parameters import layers_of
from emutune.world.possible import mean_over_tasks

# Worth of the task's family: constant, linear, quadratic in the retention; of another: the same; of nothing.
_COEFFICIENTS = 7
_SHARES = (0.15, 0.3, 0.6, 1.0)


@register_policy
@dataclass(frozen=True)
class Guided:
    """Lookahead whose worth of caches is corrected by a network.

    Attributes:
        base: the lookahead that is corrected.
        network: from features of a UE, pooled over the fleet, to coefficients of the correction.
        share: how much of the correction counts.
        scale: unit of the network's outputs, in units of reward.
        exploration: standard deviation of noise on worths, in units of reward; 0 decides greedily.
    """

    base: Lookahead
    network: Network
    share: Float[Array, ""]
    scale: Float[Array, ""]
    exploration: Float[Array, ""]

    def decide(self, world: World, observation: Observation, key: Key[Array, ""]) -> Action:
        """See ``Policy.decide``."""
        if observation.complexity.ndim > 1:
            return jax.vmap(lambda one: self.decide(world, one, key))(observation)
        kept, renewed = self.base.later(world, observation)
        more_kept, more_renewed = self._corrections(world, observation)
        kept, renewed = kept + self.share * more_kept, renewed + self.share * more_renewed
        noise = self.exploration * jax.random.normal(key, (2, *kept.shape))
        return self.base.choose(world, observation, kept + noise[0], renewed + noise[1][:, None])

    def _corrections(
        self, world: World, observation: Observation
    ) -> tuple[Float[Array, "ues"], Float[Array, "ues levels"]]:
        """What the network adds to the worth of the cache as it is, and of every emulator."""
        coefficients = self.scale * correction_coefficients(world, self.network, observation)
        usable, other = _held(observation)
        levels = (
            jnp.arange(self.base.most + 1)
            / jnp.broadcast_to(layers_of(world, observation.family), usable.shape)[:, None]
        )
        nothing = jnp.zeros_like(levels)
        return (
            correction(coefficients, usable, other),
            correction(coefficients[:, None], levels, nothing),
        )


def correction_coefficients(
    world: World, network: Network, observation: Observation
) -> Float[Array, "*batch ues 7"]:
    """The network's outputs for a batch of observations."""
    features = ue_features(world, observation)
    waiting = mean_over_tasks(observation.active, jnp.asarray(observation.cached_retention <= 0, jnp.float32))
    context = jnp.stack([progress_feature(observation), waiting], axis=-1)
    return set_outputs(network, features, context)


def correction(
    coefficients: Float[Array, "*#batch 7"], usable: Float[Array, "*batch"], other: Float[Array, "*batch"]
) -> Float[Array, "*batch"]:
    """What is added to the worth of holding a retention of the task's family, or of another, or nothing."""
    a, b, c, d, e, f, nothing = jnp.moveaxis(coefficients, -1, 0)
    of_task = a + (b + c * usable) * usable
    of_other = d + (e + f * other) * other
    return jnp.where(usable > 0, of_task, jnp.where(other > 0, of_other, nothing))


def _held(observation: Observation) -> tuple[Float[Array, "*batch ues"], Float[Array, "*batch ues"]]:
    """Retention held of the task's family, and the largest of another."""
    return observation.cached_retention, other_retention(observation)


class Samples(NamedTuple):
    """What regression sees: states, what was held after the decision, and what each UE then added."""

    observation: Observation
    usable: Float[Array, "*batch ues"]
    other: Float[Array, "*batch ues"]
    missing: Float[Array, "*batch ues"]


def begin_guided(base: Lookahead, world: World, width: int, seed: int) -> Guided:
    """Guided lookahead before it has learned: decides as its base does."""
    features = feature_count(world)
    network = create_network(
        np.random.default_rng(seed),
        "set",
        ues=world.ues,
        features=features,
        context=2,
        width=width,
        head="ue",
        head_gain=0.01,
        outputs=_COEFFICIENTS,
    )
    zero = jnp.asarray(0.0)
    return Guided(base, network, zero, jnp.asarray(1.0), zero)


class GuidedState(NamedTuple):
    """Where learning stands; with the configuration and the world it determines all that follows.

    Attributes:
        best: the policy that served best on validation episodes.
        best_return: what it returned there.
        network: as learned last, whether it served better or not.
        round: how many are over.
    """

    best: Guided
    best_return: Float[Array, ""]
    network: Network
    round: Int[Array, ""]


def begin_learning(base: Lookahead, world: World, config: GuidedConfig, seed: int) -> GuidedState:
    """The state before the first round."""
    best = begin_guided(base, world, config.width, seed)
    return GuidedState(best, jnp.asarray(-jnp.inf), best.network, jnp.zeros((), jnp.int32))


def guided_template(scenario: Scenario, config: GuidedConfig) -> GuidedState:
    """A state of the shapes that learning has in a scenario, with nothing in it."""
    world = build_world(scenario)
    price = jnp.asarray(0.0)
    prices = LaterPrices(price, price, price if scenario.computation else None)
    shapes = jax.eval_shape(lambda world: plan_lookahead(scenario, world, prices), world)
    base = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return begin_learning(base, world, config, 0)


def next_round(config: GuidedConfig, world: World, state: GuidedState, seed: int) -> GuidedState:
    """Collect, fit, and keep what serves best; a function of its arguments alone."""
    best, best_return, count = state.best, state.best_return, config.validation_for(world.ues)
    if int(state.round) == 0:
        best_return = validate(world, best, count)
    key = jax.random.fold_in(jax.random.key(seed), int(state.round))
    network, scale = learn_round(config, world, best, state.network, key)
    for share in _SHARES:
        candidate = replace(best, network=network, scale=scale, share=jnp.asarray(share))
        value = validate(world, candidate, count)
        if value > best_return:
            best, best_return = candidate, value
    return GuidedState(best, best_return, network, state.round + 1)


@partial(jax.jit, static_argnums=2)
def validate(world: World, policy: Guided, count: int) -> Float[Array, ""]:
    """Mean return on validation episodes, the same for all seeds."""
    keys = jax.random.split(jax.random.key(0x7A11DA7F), count)
    _, rewards = jax.vmap(lambda key: _play(world, policy, key))(keys)
    return rewards.sum(1).mean()


@partial(jax.jit, static_argnums=0)
def learn_round(
    config: GuidedConfig, world: World, policy: Guided, network: Network, key: Key[Array, ""]
) -> tuple[Network, Float[Array, ""]]:
    """Collect episodes with a policy and fit the network to what its base's worth leaves out."""
    episode_key, fit_key = jax.random.split(key)
    noise = config.exploration * -world.perplexity_weight * 20.0 / world.ues
    loud = replace(policy, exploration=noise)
    keys = jax.random.split(episode_key, config.episodes_for(world.ues, world.tasks))
    samples, _ = jax.vmap(lambda key: _play(world, loud, key))(keys)
    samples = one_axis(samples)
    scale = samples.missing.std()
    network = _fit(config, world, network, samples, scale, fit_key)
    return network, scale


def _fit(
    config: GuidedConfig,
    world: World,
    network: Network,
    samples: Samples,
    scale: Float[Array, ""],
    key: Key[Array, ""],
) -> Network:
    optimiser = optax.adam(config.learning_rate)
    count = samples.usable.shape[0]

    def loss(network: Network, batch: Samples) -> Float[Array, ""]:
        coefficients = correction_coefficients(world, network, batch.observation)
        predicted = correction(coefficients, batch.usable, batch.other)
        return jnp.mean((predicted - batch.missing / scale) ** 2)

    def fit(
        carry: tuple[Network, optax.OptState], step: Int[Array, ""]
    ) -> tuple[tuple[Network, optax.OptState], None]:
        network, memory = carry
        chosen = jax.random.randint(jax.random.fold_in(key, step), (config.batch,), 0, count)
        gradient = jax.grad(loss)(network, jax.tree.map(lambda leaf: leaf[chosen], samples))
        change, memory = optimiser.update(gradient, memory)
        slower = 1 - step / config.fits
        network = jax.tree.map(lambda weight, part: weight + slower * part, network, change)
        return (network, memory), None

    (network, _), _ = jax.lax.scan(fit, (network, optimiser.init(network)), jnp.arange(config.fits))
    return network


def _play(world: World, policy: Guided, key: Key[Array, ""]) -> tuple[Samples, Float[Array, "tasks"]]:
    """One episode: samples of every step, and the rewards."""
    episode = draw_episode(key, world)

    def act(cache: Cache, now: tuple[Int[Array, ""], Task]) -> tuple[Cache, tuple[Any, ...]]:
        step, task = now
        observation = observe_task(world, cache, task, step)
        action = policy.decide(world, observation, jax.random.fold_in(key, step))
        after, outcome = serve(world, cache, task, action)
        usable, other = _held(observe_task(world, after, task, step))
        # What the base thinks of the cache after the step, whatever was decided.
        worth, _ = policy.base.later(world, observe_task(world, after, task, step))
        added = marginal_costs(world, cache, task, outcome)
        return after, (observation, usable, other, worth, added, outcome.reward)

    steps = (jnp.arange(world.tasks), all_tasks(episode))
    _, (observation, usable, other, worth, added, rewards) = jax.lax.scan(act, empty_cache(world), steps)
    to_go = jnp.flip(jnp.cumsum(jnp.flip(added, 0), axis=0), 0) - added
    return Samples(observation, usable, other, to_go - worth), rewards


# What is compiled anew for every scenario and configuration.
PROGRAMS = (validate, learn_round)
