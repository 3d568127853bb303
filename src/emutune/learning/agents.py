"""The two agents: how each acts, and the learned policy made of both.

Agent 1 decides z from s1; agent 2 decides E from s2, which holds agent 1's action (sec. IV-A, B).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from emutune.learning.architectures import ARCHITECTURES, Inputs
from emutune.learning.configuration import NetworkKind, TrainingConfig
from emutune.learning.networks import Network, PerUe, Which
from emutune.policies import policy_pytree
from emutune.step import Plan, Situation, plan_of_wish, possible_case
from emutune.world import World, cached_retention


class Actors(NamedTuple):
    """Parameters of both actors; the standard deviation of E is shared by all UEs."""

    case: Network
    emulator: Network
    log_std: Float[Array, ""]


def case_logits(kind: NetworkKind, actors: Actors, inputs: Inputs) -> PerUe:
    """Log-odds of training at the server."""
    return ARCHITECTURES[kind].outputs(actors.case, inputs.features, inputs.context)


def retention_means(kind: NetworkKind, actors: Actors, inputs: Inputs, at_server: Which) -> PerUe:
    """Means of the unclipped retention, in units where the bounds are -1 and 1."""
    architecture = ARCHITECTURES[kind]
    return architecture.outputs(actors.emulator, architecture.view_s2(inputs, at_server), inputs.context)


def wish_of(
    kind: NetworkKind, world: World, situation: Situation, at_server: Which, unclipped: PerUe
) -> Plan:
    """The plan that the agents' actions come to."""
    wanted, usable = to_retention(world, unclipped), cached_retention(world, situation)
    return plan_of_wish(
        world.rules, situation, at_server, ARCHITECTURES[kind].wanted_retention(wanted, usable)
    )


def to_retention(world: World, unclipped: PerUe) -> PerUe:
    """Clip an agent's continuous action to [-1, 1] and map it to the retention bounds."""
    low, high = world.rules.retention_bounds
    return low + (high - low) * (jnp.clip(unclipped, -1.0, 1.0) + 1) / 2


def from_retention(world: World, retention: PerUe) -> PerUe:
    """What ``to_retention`` maps to a retention, from -1 to 1."""
    low, high = world.rules.retention_bounds
    return jnp.clip(2 * (retention - low) / jnp.maximum(high - low, 1e-6) - 1, -1.0, 1.0)


def case_log_probability(logits: PerUe, at_server: Which) -> PerUe:
    """Log-probability of each UE's case."""
    return jax.nn.log_sigmoid(jnp.where(at_server, logits, -logits))


def retention_log_probability(means: PerUe, log_std: Float[Array, ""], unclipped: PerUe) -> PerUe:
    """Log-density of each UE's unclipped retention."""
    scores = (unclipped - means) * jnp.exp(-log_std)
    return -0.5 * scores**2 - log_std - 0.5 * math.log(2 * math.pi)


@policy_pytree
@dataclass(frozen=True)
class LearnedPolicy:
    """What training yields: decides greedily, the likelier case and the mean retention."""

    kind: NetworkKind = field(metadata={"static": True})
    actors: Actors

    def decide(self, world: World, situation: Situation, key: Key[Array, ""]) -> Plan:
        """See ``Policy.decide``."""
        inputs = ARCHITECTURES[self.kind].inputs(world, situation)
        wanted = case_logits(self.kind, self.actors, inputs) > 0
        # Agent 2 sees agent 1's wishes as far as they are possible.
        at_server = possible_case(world.rules, situation, wanted)
        means = retention_means(self.kind, self.actors, inputs, at_server)
        return wish_of(self.kind, world, situation, at_server, means)


def create_actors(generator: np.random.Generator, config: TrainingConfig, world: World) -> Actors:
    """Actors before training: cases near a coin flip, retentions near the middle of the bounds."""
    architecture = ARCHITECTURES[config.network]
    seen = architecture.input_count(world)
    case, emulator = (
        architecture.create(generator, world.ues, features, config.width, "ue", 0.01)
        for features in (seen, seen + architecture.more_in_s2)
    )
    return Actors(case, emulator, jnp.asarray(math.log(config.initial_std), jnp.float32))
