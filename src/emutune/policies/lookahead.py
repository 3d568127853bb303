"""Price lookahead: the exact cost of the step at hand plus what each UE's cache is worth later.

The worth of a cache is a dynamic programme over one UE's own future, in which others exist only as
prices: an upload takes a share of its lone seconds off the fleet's time, a download another, and where a
UE caches several emulators each pays a rent for its room (``worth``). The shares are found by search.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import reduce

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from emutune.policies.assignment import assign_by_rank, assign_exactly, list_choices
from emutune.policies.base import register_policy
from emutune.policies.joint import assign_jointly, improve, list_options
from emutune.policies.kinds import Kind, Kinds, every_kind, locate, make_kinds
from emutune.policies.prices import step_prices
from emutune.policies.worth import (
    LaterPrices,
    held_by,
    task_costs,
    worth_before,
    worth_of_kept,
    worth_of_renewed,
)
from emutune.scenario import Scenario
from emutune.world import Action, Observation, World
from emutune.world.parameters import layers_of

# Beyond so many UEs, 3 to the power of N joint choices take too long.
EXACT_UES = 7
# Shares of the price beyond the budget that a joule within it may be worth.
_SHADOWS = (0.0, 0.1, 0.25, 0.5, 1.0)


@register_policy
@dataclass(frozen=True)
class Lookahead:
    """Decides by ``worth``, a table that ``plan_lookahead`` makes.

    Attributes:
        most: layers of the largest emulator of any family.
        exact: try all joint choices, or rank UEs; where UEs differ in more than their radio it is neither,
            but ``joint``.
        kinds: of UE, that the table distinguishes.
        worth: expected cost of all steps after one, by step, kind, family of the step's task, and family and
            layers of the emulator held after it (``worth_before``).
    """

    most: int = field(metadata={"static": True})
    exact: bool = field(metadata={"static": True})
    kinds: Kinds
    worth: Float[Array, "tasks kinds families families levels"]

    @property
    def log_gains(self) -> Float[Array, "gains"]:
        """At which logarithms of the channel gain the table stands, rising."""
        return self.kinds.log_gains

    def decide(self, world: World, observation: Observation, key: Key[Array, ""]) -> Action:
        """See ``Policy.decide``."""
        if observation.complexity.ndim > 1:
            return jax.vmap(lambda one: self.decide(world, one, key))(observation)
        return self.choose(world, observation, *self.later(world, observation))

    def choose(
        self,
        world: World,
        observation: Observation,
        kept: Float[Array, "ues"],
        renewed: Float[Array, "ues levels"],
    ) -> Action:
        """The cheapest joint choice, given what each UE's cache is worth later."""
        prices = step_prices(world, observation, self.most)
        if jax.tree.leaves(world.devices):
            shadow = self.shadow_per_j(world, observation)
            chosen = assign_jointly(list_options(world, observation, prices, kept, renewed, shadow))
        elif self.exact:
            chosen = assign_exactly(world, observation, prices, list_choices(prices, kept, renewed))
        else:
            ranked = assign_by_rank(world, observation, prices, list_choices(prices, kept, renewed))
            options = list_options(world, observation, prices, kept, renewed, None)
            chosen, _ = improve(options, ranked)
        return Action(chosen.uploads, chosen.layers / layers_of(world, observation.family))

    def later(
        self, world: World, observation: Observation
    ) -> tuple[Float[Array, "ues"], Float[Array, "ues levels"]]:
        """Worth of the cache as it is, and of every emulator of the task's family."""
        own = self._read(world, observation, self.shadow_per_j(world, observation))
        return worth_of_kept(world, observation, own), worth_of_renewed(world, observation, own)

    def shadow_per_j(self, world: World, observation: Observation) -> Float[Array, "ues"] | None:
        """What a joule of each UE's budget is worth later, times UEs; None where there is no budget.

        A budget with a price beyond it is as strict as the dearest joule that its UE would have to do without:
        among some prices it is the one at which later costs, less the budget's worth, are highest.
        """
        energy = world.devices.energy
        if energy is None or observation.spent_j is None or energy.over_budget_weight_per_j is None:
            return None
        assert energy.budget_j is not None
        left = jnp.maximum(energy.budget_j - observation.spent_j, 0.0)
        to_go = jnp.maximum(world.tasks * (1 - observation.progress), 1.0)
        values = []
        prices = [-share * energy.over_budget_weight_per_j for share in _SHADOWS]
        for price in prices:
            shadow = jnp.broadcast_to(price, left.shape)
            kept = worth_of_kept(world, observation, self._read(world, observation, shadow))
            # This step's part of what is left is not for later.
            values.append(kept - price * left * (1 - 1 / to_go) / world.ues)
        return jnp.asarray(prices)[jnp.argmax(jnp.stack(values), axis=0)]

    def _read(
        self, world: World, observation: Observation, shadow_per_j: Float[Array, "ues"] | None
    ) -> Float[Array, "ues families levels"]:
        """The table of each UE after this step, by what is held."""
        family, _, _ = held_by(world, observation)
        table = self.table_of(world, observation, present_step(world, observation), shadow_per_j)
        return table[jnp.arange(family.shape[0]), family]

    def table_of(
        self,
        world: World,
        observation: Observation,
        step: Int[Array, ""],
        shadow_per_j: Float[Array, "ues"] | None,
    ) -> Float[Array, "ues families families levels"]:
        """The table of each UE after a step, by family of that step's task, and what is held after it."""
        table = self.worth[jnp.clip(step, 0, min(world.tasks, self.worth.shape[0]) - 1)]
        parts = [
            table[point] * weight[:, None, None, None]
            for point, weight in locate(self.kinds, world, observation, shadow_per_j)
        ]
        return reduce(jnp.add, parts)


def present_step(world: World, observation: Observation) -> Int[Array, ""]:
    """Which step of the episode is to be decided, from 0."""
    return jnp.round(observation.progress * world.tasks).astype(jnp.int32)


def plan_lookahead(
    scenario: Scenario,
    world: World,
    prices: LaterPrices,
    *,
    exact: bool | None = None,
) -> Lookahead:
    """The lookahead of a world, by a dynamic programme from the last task to the first.

    Args:
        scenario: says how many levels there are.
        world: the same as arrays.
        prices: of later steps.
        exact: try all joint choices; the default does for fleets of up to 7.
    """
    most = max(model.most for model in scenario.models)
    exact = scenario.fleet.ues <= EXACT_UES if exact is None else exact
    kinds = make_kinds(world)
    worth = jax.vmap(lambda kind: _worth(world, most, Kind(**kind), prices))(vars(every_kind(kinds)))
    return Lookahead(most, exact, kinds, jnp.moveaxis(worth, 0, 1))


def _worth(
    world: World, most: int, kind: Kind, prices: LaterPrices
) -> Float[Array, "tasks families families levels"]:
    """Expected cost of all later steps of one UE of a kind; the first axis is the step just served."""
    costs = task_costs(world, most, kind, prices)
    last = jnp.zeros((costs.local.shape[0], *costs.local.shape))
    _, worth = jax.lax.scan(
        lambda after, _: (worth_before(world, costs, after), after),
        last,
        None,
        length=world.tasks,
        reverse=True,
    )
    return worth
