"""Guided lookahead: the exact cost of the step at hand plus a learned worth of each UE's cache.

The worth starts as that of price lookahead and learns what that leaves out: how busy the fleet is, how far
the UE stands, how long the episode lasts. What is learned is the difference, by regression on what each UE
adds to the fleet's cost (``credit``) after each decision of the policy learned so far. A share of it is
kept that served best on validation episodes; none is kept if none did, so it cannot end below where it began.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from emutune.errors import UsageError
from emutune.learning.configuration import GuidedConfig, Settings
from emutune.learning.descent import descend
from emutune.learning.learner import Record, wanted_teacher
from emutune.learning.networks import Network, PerUe, create_network, set_outputs
from emutune.learning.rollout import one_axis
from emutune.policies import LaterPrices, Lookahead, Policy, Step, plan_lookahead, play, policy_pytree
from emutune.policies.worth import Later
from emutune.scenario import Scenario
from emutune.step import Plan, Situation, marginal_charges
from emutune.step.models import look_up
from emutune.world import World, build_world, cached_retention, draw_episode, features_of, ue_features
from emutune.world.draws import Draw, key_of
from emutune.world.features import other_retention, progress_feature

# Worth of the task's family: constant, linear, quadratic in the retention; of another: the same; of nothing.
_COEFFICIENTS = 7
_SHARES = (0.15, 0.3, 0.6, 1.0)


@policy_pytree
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

    def decide(self, world: World, situation: Situation, key: Key[Array, ""]) -> Plan:
        """See ``Policy.decide``."""
        if situation.complexity.ndim > 1:
            return jax.vmap(lambda one: self.decide(world, one, key))(situation)
        kept, renewed = self.base.later(world, situation)
        more_kept, more_renewed = self._corrections(world, situation)
        kept, renewed = kept + self.share * more_kept, renewed + self.share * more_renewed
        noise = self.exploration * jax.random.normal(key, (2, *kept.shape))
        return self.base.choose(world, situation, kept + noise[0], renewed + noise[1])

    def _corrections(self, world: World, situation: Situation) -> Later:
        """What the network adds to the worth of the cache as it is, and with every emulator."""
        models = world.rules.models
        coefficients = self.scale * correction_coefficients(world, self.network, situation)
        layers = jnp.arange(models.most + 1)[:, None]
        levels = layers / jnp.broadcast_to(look_up(models.layers, situation.family), situation.family.shape)
        return (
            correction(coefficients, *_held(world, situation)),
            correction(coefficients, levels, jnp.zeros_like(levels)),
        )


def correction_coefficients(
    world: World, network: Network, situation: Situation
) -> Float[Array, "*batch ues 7"]:
    """The network's outputs for a batch of situations."""
    features, active = ue_features(world, situation), situation.active
    waits = (cached_retention(world, situation) <= 0) & active
    waiting = jnp.sum(waits, axis=-1) / jnp.maximum(jnp.sum(active, axis=-1), 1)
    context = jnp.stack([progress_feature(situation), waiting], axis=-1)
    return set_outputs(network, features, context)


def correction(
    coefficients: Float[Array, "*#batch 7"], usable: Float[Array, "*batch"], other: Float[Array, "*batch"]
) -> Float[Array, "*batch"]:
    """What is added to the worth of holding a retention of the task's family, or of another, or nothing."""
    a, b, c, d, e, f, nothing = jnp.moveaxis(coefficients, -1, 0)
    of_task = a + (b + c * usable) * usable
    of_other = d + (e + f * other) * other
    return jnp.where(usable > 0, of_task, jnp.where(other > 0, of_other, nothing))


def _held(world: World, situation: Situation) -> tuple[PerUe, PerUe]:
    """Retention held of the task's family, and the largest of another."""
    return cached_retention(world, situation), other_retention(world, situation)


class Samples(NamedTuple):
    """What regression sees: states, what was held after the decision, and what each UE then added."""

    situation: Situation
    usable: PerUe
    other: PerUe
    missing: PerUe


def begin_guided(base: Lookahead, world: World, width: int, seed: int) -> Guided:
    """Guided lookahead before it has learned: decides as its base does."""
    network = create_network(
        np.random.default_rng(seed),
        features=len(features_of(world)),
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
    noise = config.exploration * -world.rules.perplexity_weight * 20.0 / world.ues
    loud = replace(policy, exploration=noise)
    keys = jax.random.split(episode_key, config.episodes_for(world.ues, world.tasks))
    samples, _ = jax.vmap(lambda key: _play(world, loud, key))(keys)
    samples = one_axis(samples)
    scale = samples.missing.std()
    steps, count = jnp.arange(config.fits), samples.usable.shape[0]

    def batch(step: Int[Array, ""]) -> Int[Array, "batch"]:
        return jax.random.randint(jax.random.fold_in(fit_key, step), (config.batch,), 0, count)

    def loss(network: Network, batch: Samples) -> Float[Array, ""]:
        coefficients = correction_coefficients(world, network, batch.situation)
        predicted = correction(coefficients, batch.usable, batch.other)
        return jnp.mean((predicted - batch.missing / scale) ** 2)

    return descend(loss, network, samples, jax.vmap(batch)(steps), config.learning_rate), scale


def _play(world: World, policy: Guided, key: Key[Array, ""]) -> tuple[Samples, Float[Array, "tasks"]]:
    """One episode: samples of every step, and the rewards."""

    def watch(step: Step) -> tuple[Any, ...]:
        # What the base thinks of the cache after the step, whatever was decided.
        worth, _ = policy.base.later(world, step.after)
        added = marginal_charges(world.rules, step.true, step.outcome.plan)
        return step.known, *_held(world, step.after), worth, added, step.outcome.reward

    episode, noise = draw_episode(key, world), key_of(key, Draw.DECISIONS)
    known, usable, other, worth, added, rewards = play(world, policy, episode, noise, watch)
    to_go = jnp.flip(jnp.cumsum(jnp.flip(added, 0), axis=0), 0) - added
    return Samples(known, usable, other, to_go - worth), rewards


class GuidedLearner:
    """``Learner`` of corrections, by the round; it records what the best policy so far returns on validation."""

    settings: ClassVar[type[Settings]] = GuidedConfig
    programs: ClassVar[tuple[Any, ...]] = (validate, learn_round)

    def __init__(self, scenario: Scenario, config: GuidedConfig, seed: int) -> None:
        self._config, self._seed, self._world = config, seed, build_world(scenario)
        self.length = config.rounds
        self.steps_each = config.episodes_for(self._world.ues, self._world.tasks) * self._world.tasks

    def template(self) -> GuidedState:
        """See ``Learner``."""
        price = jnp.asarray(0.0)
        shapes = jax.eval_shape(lambda world: plan_lookahead(world, LaterPrices(price, price)), self._world)
        return self._before(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes))

    def start(self, teacher: Policy | None) -> GuidedState:
        """See ``Learner``."""
        base = wanted_teacher(self._config, teacher)
        if not isinstance(base, Lookahead):
            raise UsageError(f"teacher: guided lookahead corrects a lookahead, got a {type(base).__name__}")
        return self._before(base)

    def _before(self, base: Lookahead) -> GuidedState:
        best = begin_guided(base, self._world, self._config.width, self._seed)
        return GuidedState(best, jnp.asarray(-jnp.inf), best.network, jnp.zeros((), jnp.int32))

    def done(self, state: GuidedState) -> int:
        """See ``Learner``."""
        return int(state.round)

    def advance(self, state: GuidedState) -> tuple[GuidedState, list[Record]]:
        """See ``Learner``: collect, fit, and keep what serves best."""
        world, done = self._world, self.done(state)
        best, best_return, count = state.best, state.best_return, self._config.validation_for(world.ues)
        if done == 0:
            best_return = validate(world, best, count)
        key = jax.random.fold_in(jax.random.key(self._seed), done)
        network, scale = learn_round(self._config, world, best, state.network, key)
        for share in _SHARES:
            candidate = replace(best, network=network, scale=scale, share=jnp.asarray(share))
            value = validate(world, candidate, count)
            if value > best_return:
                best, best_return = candidate, value
        record = {"steps": (done + 1) * self.steps_each, "validation_return": float(best_return)}
        after = GuidedState(best, best_return, network, state.round + 1)
        return after, [{**record, "share": float(best.share)}]

    def policy(self, state: GuidedState) -> Guided:
        """See ``Learner``."""
        return jax.device_put(state.best, jax.devices()[0])
