"""Which critic serves which agent: what tells HMPPO and IPPO apart (sec. V-B, VI-B).

Both train the same two actors with the same clipped objective. HMPPO has one critic for both; IPPO
gives each agent its own, on its own state.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

from jaxtyping import Array, Bool, Float

from emutune.learning.agents import Inputs, more_in_s2, view_both, view_s1, view_s2
from emutune.learning.configuration import TrainingConfig

Predicted = Literal["fleet", "marginal"]
View = Callable[[Inputs, Bool[Array, "*batch ues"]], Float[Array, "*batch ues features"]]


class Critic(NamedTuple):
    """What one critic sees, how many features of each UE that is more than those of s1, and what it predicts.

    With ``"fleet"`` credit that is the fleet's return, else what each UE adds to it.
    """

    view: View
    more_features: int
    credit: Predicted


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
    of_case: Predicted = "marginal" if config.credit == "marginal" else "fleet"
    of_emulator: Predicted = "fleet" if config.credit == "fleet" else "marginal"
    if config.algorithm == "ippo":
        own = Critic(view_s1, 0, of_case), Critic(view_s2, more_in_s2(config.network), of_emulator)
        return CriticPlan(own, case=0, emulator=1)
    view, more = (view_both, 1) if config.baseline == "as_printed" else (view_s1, 0)
    critics = tuple(Critic(view, more, credit) for credit in dict.fromkeys((of_case, of_emulator)))
    return CriticPlan(critics, case=0, emulator=len(critics) - 1)
