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
from emutune.policies.prices import whole_training_s
from emutune.world import (
    Action,
    Observation,
    World,
    chooses_case,
    feature_count,
    possible_case,
    progress_feature,
    ue_features,
)
from emutune.world.ergodic import spectral_nats
from emutune.world.observation import downlink_gain
from emutune.world.parameters import bits_of
from emutune.world.radio import middle_gain


class Actors(NamedTuple):
    """Parameters of both actors; the standard deviation of E is shared by all UEs."""

    case: Network
    emulator: Network
    log_std: Float[Array, ""]


class Inputs(NamedTuple):
    """Network inputs of a batch of states: s1 of every UE, and the context shared by all.

    ``lone`` holds, for ranked networks, the time of each UE's upload and of the largest emulator's download,
    alone on the link and in units of the latter at the fleet's middle distance. Where training takes time
    the first includes training at the server, and a third is that of training with the largest emulator.
    For networks of any size of fleet all UEs share the links and the server instead.
    ``chooses`` says whose case is a choice at all, and ``active`` who has a task; None where all.
    """

    features: Float[Array, "*batch ues features"]
    context: Float[Array, "*batch context"]
    lone: Float[Array, "*batch ues times"] | None = None
    chooses: Bool[Array, "*batch ues"] | None = None
    active: Bool[Array, "*batch ues"] | None = None


def network_inputs(
    kind: NetworkKind,
    world: World,
    observation: Observation,
    features: Float[Array, "*batch ues features"] | None = None,
    context: Float[Array, "*batch context"] | None = None,
) -> Inputs:
    """A batch of observations, as every network takes it.

    Args:
        kind: of the networks.
        world: the world.
        observation: what is known.
        features: ``ue_features`` of the observation, if they are known already.
        context: ``fleet_context`` of the observation, if it is known already.
    """
    known = ue_features(world, observation) if features is None else features
    return Inputs(
        with_ranks(kind, world, observation, known),
        fleet_context(kind, world, observation) if context is None else context,
        lone_times(kind, world, observation),
        chooses_case(world, observation.family, observation.device, observation.active),
        observation.active,
    )


def fleet_context(
    kind: NetworkKind, world: World, observation: Observation
) -> Float[Array, "*batch context"]:
    """What all UEs share: the progress and, for networks of any size of fleet, how dear the links are to it."""
    progress = progress_feature(observation)
    if kind != "sized":
        return progress[..., None]
    dearness = jnp.broadcast_to(jnp.log(links_price(world)), progress.shape)
    return jnp.stack([progress, dearness / 2], axis=-1)


def context_count(kind: NetworkKind) -> int:
    """Entries of ``fleet_context``."""
    return 2 if kind == "sized" else 1


def links_price(world: World) -> Float[Array, ""]:
    """Cost of everybody's downloading the largest emulator, over that of ten units of perplexity."""
    delay = world.delay_weight_per_s * world.ues * _unit_s(world)
    return delay / (10 * world.perplexity_weight)


def possible_cases(
    world: World, observation: Observation, at_server: Bool[Array, "*batch ues"]
) -> Bool[Array, "*batch ues"]:
    """Agent 1's wishes as far as they are possible; agent 2 sees these."""
    return possible_case(world, observation.family, observation.device, observation.active, at_server)


def lone_times(
    kind: NetworkKind, world: World, observation: Observation
) -> Float[Array, "*batch ues times"] | None:
    """``Inputs.lone``."""
    if not sees_ranks(kind):
        return None
    sharers = world.ues if kind == "sized" else 1
    largest = world.retention_bounds[1] * bits_of(world, observation.family)
    up = _sending_s(
        world,
        observation.data_bits,
        world.uplink_bandwidth_hz / sharers,
        observation.transmit_power_w * observation.previous_gain,
    )
    down = sharers * _sending_s(
        world, largest, world.downlink_bandwidth_hz, world.downlink_power_w * downlink_gain(observation)
    )
    unit = sharers * _unit_s(world)
    whole = whole_training_s(world, observation)
    if whole is None:
        return jnp.stack([up, down], axis=-1) / unit
    here = world.retention_bounds[1] * whole[0]
    return jnp.stack([up + sharers * whole[1], down, here], axis=-1) / unit


def _unit_s(world: World) -> Float[Array, ""]:
    """Seconds of the largest emulator's download at the fleet's middle distance, alone on the link."""
    return _sending_s(
        world,
        world.retention_bounds[1] * world.model_bits,
        world.downlink_bandwidth_hz,
        world.downlink_power_w * middle_gain(world),
    )


def _sending_s(world: World, bits: Array, hz: Array, received_w: Array) -> Array:
    nats = spectral_nats(received_w / (world.noise_w_per_hz * hz), world.ergodic_rate)
    return bits / (hz * nats * (1 / math.log(2)))


def input_count(kind: NetworkKind, world: World) -> int:
    """Features of each UE that networks of a kind take."""
    times = 2 if world.devices.computation is None else 3
    return feature_count(world) + (3 + times if sees_ranks(kind) else 0)


def more_in_s2(kind: NetworkKind) -> int:
    """How many features s2 has more than s1."""
    return 0 if sees_ranks(kind) else -1


def sees_ranks(kind: NetworkKind) -> bool:
    """Whether UEs see where they stand among others, and keep usable emulators."""
    return kind in ("ranked", "sized")


def with_ranks(
    kind: NetworkKind,
    world: World,
    observation: Observation,
    features: Float[Array, "*batch ues features"],
) -> Float[Array, "*batch ues more"]:
    """Features and, for ranked networks, who waits, how many do, a UE's rank among them, and lone times.

    UEs in the same state must do different things where links are shared. A network that all UEs share can
    tell them apart by rank: the first waits for the fastest upload. Where training takes time, those that
    hold something rank as well, and the first is the one that an upload saves most time.
    """
    if not sees_ranks(kind):
        return features
    waits = observation.cached_retention <= 0
    waits = waits if observation.active is None else waits & observation.active
    lone = lone_times(kind, world, observation)
    assert lone is not None
    ranks, key = waits, lone[..., 0]
    if lone.shape[-1] == 3:
        ranks = jnp.ones_like(waits)
        # What is held is trained with as it is; else the largest is taken to be fetched.
        share = observation.cached_retention / world.retention_bounds[1]
        key = key - jnp.where(waits, lone[..., 1] + lone[..., 2], share * lone[..., 2])
    chooses = chooses_case(world, observation.family, observation.device, observation.active)
    ranks = ranks if chooses is None else ranks & chooses
    lone_s = jnp.where(ranks, key, jnp.inf)
    faster = lone_s[..., None, :] < lone_s[..., :, None]
    count = waits.sum(-1, keepdims=True) * jnp.ones_like(lone_s)
    rank = jnp.where(ranks, faster.sum(-1), world.ues)
    spread = 2.0 / world.ues
    if kind == "sized":
        # In the middle of its place: the first of 8 stands for the first 32 of 256.
        rank = jnp.minimum(rank + 0.5, world.ues)
    more = jnp.stack([_signed(waits), spread * count - 1, spread * rank - 1], axis=-1)
    return jnp.concatenate([features, more, _moderate(lone)], axis=-1)


def _moderate(lone: Float[Array, "*batch ues times"]) -> Float[Array, "*batch ues times"]:
    """Lone times as features; where devices' speeds spread over decades, so would the times."""
    return lone if lone.shape[-1] == 2 else jnp.log1p(lone)


def wanted_retention(
    kind: NetworkKind,
    world: World,
    unclipped: Float[Array, "*batch ues"],
    usable: Float[Array, "*batch ues"],
) -> Float[Array, "*batch ues"]:
    """The retention that agent 2 wants; ranked networks keep a usable emulator as it is."""
    wanted = to_retention(world, unclipped)
    return jnp.where(usable > 0, usable, wanted) if sees_ranks(kind) else wanted


def decides_retention(
    kind: NetworkKind, inputs: Inputs, at_server: Bool[Array, "*batch ues"]
) -> Float[Array, "*batch ues"]:
    """1 where agent 2's draw had an effect: on the UE, and for ranked networks with nothing usable held."""
    local = 1.0 - at_server
    if inputs.active is not None:
        local = local * inputs.active
    return local * (inputs.features[..., 3] <= 0) if sees_ranks(kind) else local


def view_s1(inputs: Inputs, at_server: Bool[Array, "*batch ues"]) -> Float[Array, "*batch ues features"]:
    """What agent 1 sees: gain, complexity, data, cached retention, and what there is of families."""
    return inputs.features


def view_s2(inputs: Inputs, at_server: Bool[Array, "*batch ues"]) -> Float[Array, "*batch ues features"]:
    """What agent 2 sees: cached retention, a1, complexity, and what there is of families."""
    cached, complexity = inputs.features[..., 3], inputs.features[..., 1]
    own = jnp.stack([cached, _signed(at_server), complexity], axis=-1)
    if inputs.features.shape[-1] == 4:
        return own
    seen = jnp.concatenate([own, inputs.features[..., 4:]], axis=-1)
    if inputs.lone is None:
        return seen
    return jnp.concatenate([seen, _fitting_share(inputs, at_server)[..., None]], axis=-1)


def _fitting_share(inputs: Inputs, at_server: Bool[Array, "*batch ues"]) -> Float[Array, "*batch ues"]:
    """Share of the largest emulator that arrives before the slowest upload does, from 0 to 2.

    So much of the downlink costs nothing, since both links run at the same time.
    """
    assert inputs.lone is not None
    up, down = inputs.lone[..., 0], inputs.lone[..., 1]
    fetches = ~at_server & (inputs.features[..., 3] <= 0)
    fetches = fetches if inputs.active is None else fetches & inputs.active
    downloads = fetches.sum(-1, keepdims=True)
    uploads = at_server.sum(-1, keepdims=True)
    if inputs.context.shape[-1] == context_count("sized"):
        # Times are those of all UEs' sharing: what counts is which share of them does.
        downloads, uploads = (count / at_server.shape[-1] for count in (downloads, uploads))
    slowest = uploads * jnp.where(at_server, up, 0.0).max(-1, keepdims=True)
    takes = jnp.where(downloads > 0, downloads, 1) * down
    if inputs.lone.shape[-1] == 3:
        # Training with what arrives takes a time that grows with it as well.
        takes = takes + inputs.lone[..., 2]
    share = slowest / takes
    return jnp.where(uploads > 0, jnp.minimum(share, 2.0), 2.0)


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


def from_retention(world: World, retention: Float[Array, "*batch ues"]) -> Float[Array, "*batch ues"]:
    """What ``to_retention`` maps to a retention, from -1 to 1."""
    low, high = world.retention_bounds
    return jnp.clip(2 * (retention - low) / jnp.maximum(high - low, 1e-6) - 1, -1.0, 1.0)


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
        inputs = network_inputs(self.kind, world, observation)
        at_server = possible_cases(world, observation, case_logits(self.kind, self.actors, inputs) > 0)
        means = retention_means(self.kind, self.actors, inputs, at_server)
        return Action(at_server, wanted_retention(self.kind, world, means, observation.cached_retention))


def create_actors(generator: np.random.Generator, config: TrainingConfig, world: World) -> Actors:
    """Actors before training: cases near a coin flip, retentions near the middle of the bounds."""
    seen = input_count(config.network, world)
    case, emulator = (
        _create(generator, config, world.ues, features, "ue", 0.01)
        for features in (seen, seen + more_in_s2(config.network))
    )
    return Actors(case, emulator, jnp.asarray(math.log(config.initial_std), jnp.float32))


def create_critic(
    generator: np.random.Generator, config: TrainingConfig, ues: int, features: int, *, marginal: bool
) -> Network:
    """A critic before training; it values every UE on its own where credit is marginal."""
    return _create(generator, config, ues, features, "ue" if marginal else "value", 1.0)


def critic_value(
    kind: NetworkKind,
    critic: Network,
    features: Float[Array, "*batch ues features"],
    inputs: Inputs,
    *,
    marginal: bool,
) -> Float[Array, "..."]:
    """A critic's output on one of the views, in standardised units of return; per UE if credit is."""
    output = ue_outputs if marginal else value_output
    return output(kind, critic, features, inputs.context)


def _create(
    generator: np.random.Generator, config: TrainingConfig, ues: int, features: int, head: str, gain: float
) -> Network:
    return create_network(
        generator,
        config.network,
        ues=ues,
        features=features,
        context=context_count(config.network),
        width=config.width,
        head=head,
        head_gain=gain,
    )


def _signed(at_server: Bool[Array, "*batch ues"]) -> Float[Array, "*batch ues"]:
    return jnp.where(at_server, 1.0, -1.0)
