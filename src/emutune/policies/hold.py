"""Hold what is usable; where nothing is, toss a coin between the server and one retention."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from emutune.policies.base import policy_pytree
from emutune.policies.search import Point, ascend, levels_of, mean_return, patiences_s, scorer
from emutune.scenario import Scenario
from emutune.step import Plan, Situation, plan_of_wish
from emutune.step.options import whole_training_s
from emutune.world import World, cached_retention


@policy_pytree
@dataclass(frozen=True)
class Hold:
    """A UE that holds an emulator of its task's family uses it.

    Attributes:
        server_share: how likely a UE without one goes to the server; else it downloads.
        retention: what it downloads then.
        patience_s: training that would take longer than this on the UE goes to the server; without limit if not
            given, as where training takes no time.
    """

    server_share: Float[Array, ""]
    retention: Float[Array, ""]
    patience_s: Float[Array, ""] | float = float("inf")

    def decide(self, world: World, situation: Situation, key: Key[Array, ""]) -> Plan:
        """See ``Policy.decide``."""
        held = cached_retention(world, situation)
        usable = held > 0
        tossed = jax.random.bernoulli(key, self.server_share, held.shape)
        wanted = jnp.where(usable, held, self.retention)
        slow = whole_training_s(world.rules, situation) * wanted > self.patience_s
        return plan_of_wish(world.rules, situation, (tossed & ~usable) | slow, wanted)


def search_hold(scenario: Scenario) -> Hold:
    """The best coin, retention and patience of ``Hold``."""
    shares = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    levels, patience = levels_of(scenario), patiences_s(scenario)
    grids = (shares, levels, *([patience] if patience else []))
    score = scorer(scenario, mean_return(lambda world, *point: Hold(*point)))
    # From several limits: between letting the fast train and letting everybody there is a valley.
    begins: list[Point] = [(0.5, levels[-1], limit) for limit in patience[len(patience) // 2 :: 3]]
    begins = begins or [(0.5, levels[-1])]
    best = max((ascend(score, begin, grids) for begin in begins), key=lambda point: score(*point))
    return Hold(*(jnp.float32(value) for value in best))
