"""The two agents: what each sees, how each acts, and the learned policy made of both.

Agent 1 decides z from s1; agent 2 decides E from s2, which holds agent 1's action (sec. IV-A, B).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key

from emutune.learning.configuration import NetworkKind, TrainingConfig
from emutune.learning.networks import Network, create_network, ue_outputs, value_output
from emutune.policies import register_policy
from emutune.world import Action, Observation, World, feature_count, progress_feature, ue_features


class Actors(NamedTuple):
    """Parameters of both actors; the standard deviation of E is shared by all UEs."""

    case: Network
    emulator: Network
    log_std: Float[Array, ""]


class Inputs(NamedTuple):
    """Network inputs of a batch of states: s1 of every UE, and the context shared by all."""

    features: Float[Array, "*batch ues features"]
    context: Float[Array, "*batch 1"]


def network_inputs(world: World, observation: Observation) -> Inputs:
    """Features of a batch of observations, as every network takes them."""
    return Inputs(ue_features(world, observation), progress_feature(observation)[..., None])


def view_s1(inputs: Inputs, at_server: Bool[Array, "*batch ues"]) -> Float[Array, "*batch ues features"]:
    """What agent 1 sees: gain, complexity, data, cached retention, and what there is of families."""
    return inputs.features


def view_s2(inputs: Inputs, at_server: Bool[Array, "*batch ues"]) -> Float[Array, "*batch ues features"]:
    """What agent 2 sees: cached retention, a1, complexity, and what there is of families."""
    cached, complexity = inputs.features[..., 3], inputs.features[..., 1]
    own = jnp.stack([cached, _signed(at_server), complexity], axis=-1)
    return jnp.concatenate([own, inputs.features[..., 4:]], axis=-1) if inputs.features.shape[-1] > 4 else own


def view_both(inputs: Inputs, at_server: Bool[Array, "*batch ues"]) -> Float[Array, "*batch ues features"]:
    """{s1; s2}, the critic's input as printed (Eq. 22), each feature once."""
    return jnp.concatenate([inputs.features, _signed(at_server)[..., None]], axis=-1)


def case_logits(kind: NetworkKind, actors: Actors, inputs: Inputs) -> Float[Array, "*batch ues"]:
    """Log-odds of training at the server."""
    return ue_outputs(kind, actors.case, inputs.features, inputs.context)


def retention_means(
    kind: NetworkKind, actors: Actors, inputs: Inputs, at_server: Bool[Array, "*batch ues"]
) -> Float[Array, "*batch ues"]:
    """Means of the unclipped retention, in units where the bounds are -1 and 1."""
    return ue_outputs(kind, actors.emulator, view_s2(inputs, at_server), inputs.context)


def to_retention(world: World, unclipped: Float[Array, "*batch ues"]) -> Float[Array, "*batch ues"]:
    """Clip an agent's continuous action to [-1, 1] and map it to the retention bounds."""
    low, high = world.retention_bounds
    return low + (high - low) * (jnp.clip(unclipped, -1.0, 1.0) + 1) / 2


def case_log_probability(
    logits: Float[Array, "*batch ues"], at_server: Bool[Array, "*batch ues"]
) -> Float[Array, "*batch ues"]:
    """Log-probability of each UE's case."""
    return jax.nn.log_sigmoid(jnp.where(at_server, logits, -logits))


def retention_log_probability(
    means: Float[Array, "*batch ues"], log_std: Float[Array, ""], unclipped: Float[Array, "*batch ues"]
) -> Float[Array, "*batch ues"]:
    """Log-density of each UE's unclipped retention."""
    scores = (unclipped - means) * jnp.exp(-log_std)
    return -0.5 * scores**2 - log_std - 0.5 * math.log(2 * math.pi)


@register_policy
@dataclass(frozen=True)
class LearnedPolicy:
    """What training yields: decides greedily, the likelier case and the mean retention."""

    kind: NetworkKind = field(metadata={"static": True})
    actors: Actors

    def decide(self, world: World, observation: Observation, key: Key[Array, ""]) -> Action:
        """See ``Policy.decide``."""
        inputs = network_inputs(world, observation)
        at_server = case_logits(self.kind, self.actors, inputs) > 0
        return Action(
            at_server, to_retention(world, retention_means(self.kind, self.actors, inputs, at_server))
        )


def create_actors(generator: np.random.Generator, config: TrainingConfig, world: World) -> Actors:
    """Actors before training: cases near a coin flip, retentions near the middle of the bounds."""
    seen = feature_count(world)
    case, emulator = (
        _create(generator, config, world.ues, features, "ue", 0.01) for features in (seen, seen - 1)
    )
    return Actors(case, emulator, jnp.asarray(math.log(config.initial_std), jnp.float32))


def create_critic(generator: np.random.Generator, config: TrainingConfig, ues: int, features: int) -> Network:
    """A critic before training."""
    return _create(generator, config, ues, features, "value", 1.0)


def critic_value(
    kind: NetworkKind, critic: Network, features: Float[Array, "*batch ues features"], inputs: Inputs
) -> Float[Array, "*batch"]:
    """A critic's output on one of the views, in standardised units of return."""
    return value_output(kind, critic, features, inputs.context)


def _create(
    generator: np.random.Generator, config: TrainingConfig, ues: int, features: int, head: str, gain: float
) -> Network:
    return create_network(
        generator,
        config.network,
        ues=ues,
        features=features,
        context=1,
        width=config.width,
        head=head,
        head_gain=gain,
    )


def _signed(at_server: Bool[Array, "*batch ues"]) -> Float[Array, "*batch ues"]:
    return jnp.where(at_server, 1.0, -1.0)
