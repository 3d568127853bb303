"""The network architectures, a class each: what their networks see, and how retentions are wished for.

``set`` networks are shared by all UEs and see a mean over them beside each one; ``flat`` ones see all features at once.
``ranked`` ones are set networks that also see where each UE stands among those that wait, and ``sized`` ones are ranked
and see what the links cost a fleet of their size.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from emutune.learning.configuration import NetworkKind
from emutune.learning.networks import (
    Context,
    Features,
    Network,
    PerUe,
    Which,
    create_flat_network,
    create_network,
    flat_outputs,
    set_outputs,
    set_value,
)
from emutune.step import Situation, downlink_bps, uplink_bps
from emutune.step.charges import delay_cost
from emutune.step.link import parts
from emutune.step.models import look_up
from emutune.step.options import chooses_case, whole_training_s
from emutune.world import World, cached_retention, features_of, ue_features
from emutune.world.features import S1, feature_index, progress_feature

_COMPLEXITY, _CACHED = feature_index("complexity"), feature_index("cached_retention")
# Features of s1, the paper's state; what more a world has follows them.
_PAPERS = len(S1)


class Times(NamedTuple):
    """Of each UE, in units of the largest emulator's download at the fleet's middle distance, alone on the link.

    Attributes:
        up: of its upload and of training at the server.
        down: of the largest emulator's download.
        here: of training with the largest emulator.
    """

    up: PerUe
    down: PerUe
    here: PerUe


class Inputs(NamedTuple):
    """Network inputs of a batch of states.

    Attributes:
        features: s1 of every UE, and what more an architecture sees.
        context: shared by all UEs.
        chooses: whose case is a choice at all.
        active: who has a task.
        times: of architectures that rank UEs; empty for others.
    """

    features: Features
    context: Context
    chooses: Which
    active: Which
    times: Times | tuple[()]


class SetNetworks:
    """One network for all UEs, and the mean over them."""

    kind: NetworkKind = "set"
    context_size = 1
    # How many features s2 has more than s1.
    more_in_s2 = -1

    def input_count(self, world: World) -> int:
        """Features of each UE in s1."""
        return len(features_of(world))

    def inputs(
        self,
        world: World,
        situation: Situation,
        features: Features | None = None,
        context: Context | None = None,
    ) -> Inputs:
        """A batch of situations, as the networks take it.

        Args:
            world: the world.
            situation: what is known.
            features: ``ue_features`` of the situation, if they are known already.
            context: ``self.context`` of the situation, if it is known already.
        """
        features = ue_features(world, situation) if features is None else features
        context = self.context(world, situation) if context is None else context
        chooses = chooses_case(world.rules, situation)
        seen, times = self.see(world, situation, features, chooses)
        return Inputs(seen, context, chooses, situation.active, times)

    def context(self, world: World, situation: Situation) -> Context:
        """What all UEs share: the progress."""
        return progress_feature(situation)[..., None]

    def see(
        self, world: World, situation: Situation, features: Features, chooses: Which
    ) -> tuple[Float[Array, "*batch ues seen"], Times | tuple[()]]:
        """Features, and what more is seen."""
        return features, ()

    def view_s1(self, inputs: Inputs, at_server: Which) -> Features:
        """What agent 1 sees: gain, complexity, data, cached retention, and what more the world has."""
        return inputs.features

    def view_s2(self, inputs: Inputs, at_server: Which) -> Features:
        """What agent 2 sees: cached retention, a1, complexity, and what more the world has."""
        cached, complexity = inputs.features[..., _CACHED], inputs.features[..., _COMPLEXITY]
        own = jnp.stack([cached, signed(at_server), complexity], axis=-1)
        return jnp.concatenate([own, inputs.features[..., _PAPERS:]], axis=-1)

    def view_both(self, inputs: Inputs, at_server: Which) -> Features:
        """{s1; s2}, the critic's input as printed (Eq. 22), each feature once."""
        return jnp.concatenate([inputs.features, signed(at_server)[..., None]], axis=-1)

    def wanted_retention(self, wanted: PerUe, usable: PerUe) -> PerUe:
        """The retention that agent 2 wants, of what its network says and what is held."""
        return wanted

    def decides_retention(self, inputs: Inputs, at_server: Which) -> PerUe:
        """1 where agent 2's draw has an effect: on the UE."""
        return (1.0 - at_server) * inputs.active

    def outputs(self, network: Network, features: Features, context: Context) -> PerUe:
        """One output per UE."""
        return set_outputs(network, features, context)[..., 0]

    def value(self, network: Network, features: Features, context: Context) -> Float[Array, "*batch"]:
        """One output for all UEs together: a state's value."""
        return set_value(network, features, context)

    def create(
        self, generator: np.random.Generator, ues: int, features: int, width: int, head: str, gain: float
    ) -> Network:
        """A network before training; see ``create_network``."""
        return create_network(
            generator, features=features, context=self.context_size, width=width, head=head, head_gain=gain
        )


class FlatNetworks(SetNetworks):
    """All features at once, of a fixed number of UEs."""

    kind: NetworkKind = "flat"

    def outputs(self, network: Network, features: Features, context: Context) -> PerUe:
        """One output per UE."""
        return flat_outputs(network, features, context)

    def value(self, network: Network, features: Features, context: Context) -> Float[Array, "*batch"]:
        """One output for all UEs together."""
        return flat_outputs(network, features, context)[..., 0]

    def create(
        self, generator: np.random.Generator, ues: int, features: int, width: int, head: str, gain: float
    ) -> Network:
        """A network before training; see ``create_flat_network``."""
        outputs = ues if head == "ue" else 1
        return create_flat_network(generator, ues * features + self.context_size, width, outputs, gain)


class RankedNetworks(SetNetworks):
    """UEs see their rank by upload time among those that wait, and keep usable emulators.

    UEs in the same state must do different things where links are shared. A network that all UEs share can
    tell them apart by rank: the first waits for the fastest upload. Where training takes time, those that
    hold something rank as well, and the first is the one that an upload saves most time.
    """

    kind: NetworkKind = "ranked"
    more_in_s2 = 0

    def input_count(self, world: World) -> int:
        """Features of each UE in s1: who waits, how many do, a UE's rank among them, and its times."""
        return super().input_count(world) + 3 + (3 if world.rules.trains_in_time else 2)

    def sharers(self, world: World) -> float:
        """How many share links and server where a UE's times are told."""
        return 1.0

    def times(self, world: World, situation: Situation) -> Times:
        """The times of each UE, as if so many shared links and server."""
        rules, sharers = world.rules, self.sharers(world)
        models, links = rules.models, rules.links
        whole_bits = look_up(models.whole_bits, situation.family)
        largest = rules.retention_bounds[1]
        up_s = situation.data_bits / uplink_bps(links, situation.transmit_power_w, situation.gain, sharers)
        down_s = largest * whole_bits / downlink_bps(links, situation.downlink_gain)
        tflop = look_up(models.whole_tflop_per_bit, situation.family) * situation.data_bits
        unit_s = sharers * _unit_s(world)
        return Times(
            up=(up_s + sharers * tflop / rules.server_tflops) / unit_s,
            down=parts(links, sharers) * down_s / unit_s,
            here=largest * whole_training_s(rules, situation) / unit_s,
        )

    def rank_feature(self, world: World, rank: Array) -> Array:
        """A rank among N UEs, from -1 to 1."""
        return 2.0 / world.ues * rank - 1

    def see(
        self, world: World, situation: Situation, features: Features, chooses: Which
    ) -> tuple[Float[Array, "*batch ues seen"], Times]:
        """Features, who waits, how many do, a UE's rank among them, and its times."""
        held, times = cached_retention(world, situation), self.times(world, situation)
        waits = (held <= 0) & situation.active
        ranks, key, seen = waits, times.up, jnp.stack(times[:2], axis=-1)
        if world.rules.trains_in_time:
            # What is held is trained with as it is; else the largest is taken to be fetched.
            share = held / world.rules.retention_bounds[1]
            key = key - jnp.where(waits, times.down + times.here, share * times.here)
            # Devices' speeds spread over decades, and so would the times.
            ranks, seen = jnp.ones_like(waits), jnp.log1p(jnp.stack(times, axis=-1))
        ranks = ranks & chooses
        lone = jnp.where(ranks, key, jnp.inf)
        faster = lone[..., None, :] < lone[..., :, None]
        count = waits.sum(-1, keepdims=True) * jnp.ones_like(lone)
        rank = self.rank_feature(world, jnp.where(ranks, faster.sum(-1), world.ues))
        more = jnp.stack([signed(waits), 2.0 / world.ues * count - 1, rank], axis=-1)
        return jnp.concatenate([features, more, seen], axis=-1), times

    def view_s2(self, inputs: Inputs, at_server: Which) -> Features:
        """What agent 2 sees: that of set networks, and what can be fetched while others upload."""
        seen = super().view_s2(inputs, at_server)
        return jnp.concatenate([seen, self._fitting_share(inputs, at_server)[..., None]], axis=-1)

    def sharing(self, count: Array, ues: int) -> Array:
        """By how much times grow when so many of a fleet share."""
        return count

    def _fitting_share(self, inputs: Inputs, at_server: Which) -> PerUe:
        """Share of the largest emulator that arrives before the slowest upload does, from 0 to 2.

        So much of the downlink costs nothing, since both links run at the same time.
        """
        assert inputs.times
        up, down, here = inputs.times
        fetches = ~at_server & (inputs.features[..., _CACHED] <= 0) & inputs.active
        downloads, uploads = (
            self.sharing(part.sum(-1, keepdims=True), at_server.shape[-1]) for part in (fetches, at_server)
        )
        slowest = uploads * jnp.where(at_server, up, 0.0).max(-1, keepdims=True)
        # Training with what arrives takes a time that grows with it as well.
        takes = jnp.where(downloads > 0, downloads, 1) * down + here
        return jnp.where(uploads > 0, jnp.minimum(slowest / takes, 2.0), 2.0)

    def wanted_retention(self, wanted: PerUe, usable: PerUe) -> PerUe:
        """A usable emulator is kept as it is."""
        return jnp.where(usable > 0, usable, wanted)

    def decides_retention(self, inputs: Inputs, at_server: Which) -> PerUe:
        """1 where agent 2's draw has an effect: on the UE, with nothing usable held."""
        return super().decides_retention(inputs, at_server) * (inputs.features[..., _CACHED] <= 0)


class SizedNetworks(RankedNetworks):
    """Networks for fleets of any size: all UEs share what there is, and the networks see what that costs."""

    kind: NetworkKind = "sized"
    context_size = 2

    def sharers(self, world: World) -> float:
        """All UEs."""
        return float(world.ues)

    def context(self, world: World, situation: Situation) -> Context:
        """The progress, and how dear the links are to the fleet."""
        progress = progress_feature(situation)
        dearness = jnp.broadcast_to(jnp.log(links_price(world)), progress.shape)
        return jnp.stack([progress, dearness / 2], axis=-1)

    def rank_feature(self, world: World, rank: Array) -> Array:
        """In the middle of its place: the first of 8 stands for the first 32 of 256."""
        return 2.0 / world.ues * jnp.minimum(rank + 0.5, world.ues) - 1

    def sharing(self, count: Array, ues: int) -> Array:
        """Times are those of all UEs' sharing: what counts is which share of them does."""
        return count / ues


ARCHITECTURES: dict[NetworkKind, SetNetworks] = {
    one.kind: one for one in (SetNetworks(), FlatNetworks(), RankedNetworks(), SizedNetworks())
}


def links_price(world: World) -> Float[Array, ""]:
    """Cost of everybody's downloading the largest emulator, over that of ten units of perplexity."""
    everybody_s = parts(world.rules.links, float(world.ues)) * _unit_s(world)
    return delay_cost(world.rules, everybody_s) / (-10 * world.rules.perplexity_weight)


def signed(at_server: Which) -> PerUe:
    """1 for yes and -1 for no."""
    return jnp.where(at_server, 1.0, -1.0)


def _unit_s(world: World) -> Float[Array, ""]:
    """Seconds of the largest emulator's download at the fleet's middle distance, alone on the link."""
    largest = world.rules.retention_bounds[1] * world.rules.models.whole_bits[0]
    return largest / downlink_bps(world.rules.links, world.radio.middle_gain)
