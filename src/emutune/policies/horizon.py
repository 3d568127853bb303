"""Planning over a receding horizon: the exact cost of the step at hand, then a linear programme of expected futures.

Price lookahead takes the links' prices to be the same in all later steps. Here the prices of the next ones come
of a linear programme (HiGHS) that moves the whole fleet, with what it holds now, through the expected steps
(``expected``). With them a dynamic programme over each UE's next steps says what its cache is worth;
beyond the horizon lookahead's table does. The programme is solved anew at each decision.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from emutune.errors import UsageError
from emutune.policies.base import policy_pytree
from emutune.policies.expected import Expectation, link_shares
from emutune.policies.kinds import kind_of
from emutune.policies.lookahead import Lookahead, plan_lookahead, present_step, search_prices
from emutune.policies.worth import Later, LaterPrices, TaskCosts, task_costs, worth_after, worth_before
from emutune.scenario import Scenario
from emutune.step import Plan, Situation
from emutune.world import World, build_world

# More gain nothing: expectations say little about who will wait for what.
STEPS = 3


@policy_pytree
@dataclass(frozen=True)
class Horizon:
    """Decides by a linear programme over the next steps; see ``plan_horizon``.

    Attributes:
        steps: of the horizon, the present one included.
        base: worth of caches beyond the horizon, and how a step's choice is found.
        prices: of later steps, which the programme's take the place of; their sum is kept, since a
            programme of expectations does not know that a step lasts as long as its slowest UE.
    """

    steps: int = field(metadata={"static": True})
    base: Lookahead
    prices: LaterPrices

    def decide(self, world: World, situation: Situation, key: Key[Array, ""]) -> Plan:
        """See ``Policy.decide``."""
        if situation.complexity.ndim > 1:
            return jax.vmap(lambda one: self.decide(world, one, key))(situation)
        return self.base.choose(world, situation, *self.later(world, situation))

    def later(self, world: World, situation: Situation) -> Later:
        """As ``Lookahead.later``, with the programme's prices."""
        shadow = self.base.shadow_per_j(world, situation)
        present = present_step(world, situation)
        last = jnp.minimum(present + self.steps, world.tasks) - 1
        after = self.base.table_of(world, situation, last, shadow)
        shares = self.shares(world, situation, after, shadow)
        kinds = kind_of(world, situation, shadow)

        def before(after: Array, now: tuple[Array, Array]) -> tuple[Array, None]:
            share, step = now
            prices = LaterPrices(share[0], share[1], self.prices.background_s)
            costs = jax.vmap(lambda kind: task_costs(world, kind, prices))(kinds)
            worth = jax.vmap(partial(worth_before, world))(costs, after)
            return jnp.where(step <= last, worth, after), None

        coming = (shares[1:], present + jnp.arange(1, self.steps))
        worth, _ = jax.lax.scan(before, after, coming, reverse=True)
        return worth_after(world, situation, worth[jnp.arange(worth.shape[0]), situation.family])

    def shares(
        self,
        world: World,
        situation: Situation,
        after: Float[Array, "ues families families levels"],
        shadow_per_j: Float[Array, "ues"],
    ) -> Float[Array, "steps 2"]:
        """Prices of uplink and downlink in the coming steps; lookahead's own if the solver fails."""
        models, kinds = world.rules.models, kind_of(world, situation, shadow_per_j)
        background = self.prices.background_s

        def priced(price: float) -> TaskCosts:
            both = LaterPrices(jnp.float32(price), jnp.float32(price), background)
            return jax.vmap(lambda kind: task_costs(world, kind, both))(kinds)

        free, dear = priced(0.0), priced(1.0)
        # Where data may not leave, uploads cost infinitely much at any price.
        barred = jnp.isinf(free.upload)
        upload_delay = jnp.where(barred, 0.0, dear.upload - jnp.where(barred, 0.0, free.upload))
        known = {
            "local": free.local,
            "upload": free.upload,
            "sent": free.per_bit[:, None] * models.layer_bits,
            "allowed": free.allowed,
            "upload_delay": upload_delay,
            "layer_delay": (dear.per_bit - free.per_bit)[:, None] * models.layer_bits,
            "family": situation.family,
            "held_family": jnp.argmax(situation.held, axis=-1),
            "held": jnp.max(situation.held, axis=-1),
            "after": after,
            "stays": world.families.stays,
            "active": world.devices.active.mean,
            "delta": jnp.asarray(models.delta),
            "left": world.tasks - present_step(world, situation),
        }
        own = jnp.stack([self.prices.upload, self.prices.download])
        shape = jax.ShapeDtypeStruct((self.steps, 2), jnp.float32)
        return jax.pure_callback(partial(_solve, self.steps), shape, known, own, vmap_method="sequential")


def plan_horizon(world: World, prices: LaterPrices, *, steps: int = STEPS) -> Horizon:
    """A horizon before whose end prices are the programme's, and after it lookahead's.

    Args:
        world: the world.
        prices: of lookahead, as found by search.
        steps: of the horizon, at least 1; with 1 it decides as lookahead does.

    Raises:
        ValueError: there are no steps.
    """
    if steps < 1:
        raise ValueError(f"steps: a horizon has at least 1 step, got {steps}")
    return Horizon(steps, plan_lookahead(world, prices), prices)


def search_horizon(scenario: Scenario) -> Horizon:
    """``Horizon`` with the best prices of ``Lookahead`` beyond it.

    Raises:
        UsageError: UEs cache several emulators.
    """
    world = build_world(scenario)
    if world.rules.several:
        raise UsageError(
            "horizon: its programme knows caches of one emulator only, and families.cache_gb lets a UE cache several; "
            "use lookahead, or leave families.cache_gb out"
        )
    return plan_horizon(world, search_prices(scenario))


def _solve(steps: int, known: dict[str, Any], own: Any) -> np.ndarray:
    # NumPy only: JAX within a callback can wait for the very thread that it runs on.
    arrays = {name: np.asarray(part) for name, part in known.items()}
    own = np.asarray(own)
    shares = link_shares(Expectation(**arrays), steps)
    if shares is None:
        return np.broadcast_to(own, (steps, 2)).astype(np.float32)
    return (shares * own.sum()).astype(np.float32)
