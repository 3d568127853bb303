"""Which critic serves which agent: what tells HMPPO and IPPO apart (sec. V-B, VI-B).

Both train the same two actors with the same clipped objective. HMPPO has one critic for both; IPPO
gives each agent its own, on its own state.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Array, Float

from emutune.learning.architectures import ARCHITECTURES, Inputs
from emutune.learning.configuration import TrainingConfig
from emutune.learning.networks import Features, Network, Which
from emutune.world import World

Predicted = Literal["fleet", "marginal"]
View = Callable[[Inputs, Which], Features]


class Critic(NamedTuple):
    """What one critic sees, how many features of each UE that is more than those of s1, and what it predicts.

    With ``"fleet"`` credit that is the fleet's return, else what each UE adds to it.
    """

    view: View
    more_features: int
    credit: Predicted

    def value(
        self, config: TrainingConfig, network: Network, inputs: Inputs, at_server: Which
    ) -> Float[Array, "..."]:
        """Its output, in standardised units of return; per UE if credit is."""
        architecture, seen = ARCHITECTURES[config.network], self.view(inputs, at_server)
        output = architecture.outputs if self.credit == "marginal" else architecture.value
        return output(network, seen, inputs.context)

    def create(self, generator: np.random.Generator, config: TrainingConfig, world: World) -> Network:
        """Its network before training."""
        architecture = ARCHITECTURES[config.network]
        seen = architecture.input_count(world) + self.more_features
        head = "ue" if self.credit == "marginal" else "value"
        return architecture.create(generator, world.ues, seen, config.width, head, 1.0)


class CriticPlan(NamedTuple):
    """The critics, and which of them gives each agent's advantages its baseline."""

    critics: tuple[Critic, ...]
    case: int
    emulator: int


def critic_plan(config: TrainingConfig) -> CriticPlan:
    """The critics of a configuration.

    The critic of Eq. 22 sees a1 inside s2. As agent 1's baseline it cancels agent 1's own credit, so by
    default the one critic sees s1 alone; ``baseline="as_printed"`` keeps the printed input. Mixed credit
    takes a critic for each of the two things that are predicted.
    """
    see = ARCHITECTURES[config.network]
    of_case: Predicted = "marginal" if config.credit == "marginal" else "fleet"
    of_emulator: Predicted = "fleet" if config.credit == "fleet" else "marginal"
    if config.algorithm == "ippo":
        own = Critic(see.view_s1, 0, of_case), Critic(see.view_s2, see.more_in_s2, of_emulator)
        return CriticPlan(own, case=0, emulator=1)
    view, more = (see.view_both, 1) if config.baseline == "as_printed" else (see.view_s1, 0)
    critics = tuple(Critic(view, more, credit) for credit in dict.fromkeys((of_case, of_emulator)))
    return CriticPlan(critics, case=0, emulator=len(critics) - 1)
