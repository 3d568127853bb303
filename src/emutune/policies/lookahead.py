"""Price lookahead: the exact cost of the step at hand plus what each UE's cache is worth later.

The worth of a cache is a dynamic programme over one UE's own future, in which others exist only as
prices: an upload takes a share of its lone seconds off the fleet's time, a download another, and where a
UE caches several emulators each pays a rent for its room (``worth``). The shares are found by search.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from emutune.policies.base import policy_pytree
from emutune.policies.choices import list_options
from emutune.policies.joint import assign
from emutune.policies.kinds import Kind, Kinds, every_kind, kind_of, locate, make_kinds
from emutune.policies.search import EPISODES, Point, ascend, mean_return, patiences_s, scorer
from emutune.policies.worth import Later, LaterPrices, task_costs, worth_after, worth_before
from emutune.scenario import Scenario
from emutune.step import Plan, Situation
from emutune.world import World, build_world

# Beyond so many UEs, 3 to the power of N joint choices take too long.
EXACT_UES = 7
# Shares of the price beyond the budget that a joule within it may be worth.
_SHADOWS = (0.0, 0.1, 0.25, 0.5, 1.0)
# Of keeping an emulator through a step, as shares of what sending it costs.
_RENTS = (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5)
_FEWER_EPISODES = 16


@policy_pytree
@dataclass(frozen=True)
class Lookahead:
    """Decides by ``worth``, a table that ``plan_lookahead`` makes.

    Attributes:
        exact: try all joint choices, or rank UEs; where UEs differ in more than their radio it is neither,
            but ``joint``.
        kinds: of UE, that the table distinguishes.
        worth: expected cost of all steps after one, by step, kind, family of the step's task, and family and
            layers of the emulator held after it (``worth_before``).
    """

    exact: bool = field(metadata={"static": True})
    kinds: Kinds
    worth: Float[Array, "tasks kinds families families levels"]

    def decide(self, world: World, situation: Situation, key: Key[Array, ""]) -> Plan:
        """See ``Policy.decide``."""
        if situation.complexity.ndim > 1:
            return jax.vmap(lambda one: self.decide(world, one, key))(situation)
        return self.choose(world, situation, *self.later(world, situation))

    def choose(
        self,
        world: World,
        situation: Situation,
        kept: Float[Array, "ues"],
        renewed: Float[Array, "levels ues"],
    ) -> Plan:
        """The cheapest joint choice, given what each UE's cache is worth later."""
        options = list_options(world.rules, situation, kept, renewed, self.shadow_per_j(world, situation))
        return assign(options, exact=self.exact, unlike=world.has_devices)

    def later(self, world: World, situation: Situation) -> Later:
        """Worth of the cache as it is, and with every emulator of the task's family."""
        shadow = self.shadow_per_j(world, situation)
        return worth_after(world, situation, self._read(world, situation, shadow))

    def shadow_per_j(self, world: World, situation: Situation) -> Float[Array, "ues"]:
        """What a joule of each UE's budget is worth later, times UEs; 0 where there is no budget.

        A budget with a price beyond it is as strict as the dearest joule that its UE would have to do without:
        among some prices it is the one at which later costs, less the budget's worth, are highest.
        """
        rules, nothing = world.rules, jnp.zeros(situation.spent_j.shape)
        if "budget" not in rules.terms:
            return nothing
        left = jnp.maximum(rules.budget_j - situation.spent_j, 0.0)
        to_go = jnp.maximum(world.tasks * (1 - situation.progress), 1.0)
        values = []
        prices = [-share * rules.over_budget_weight_per_j for share in _SHADOWS]
        for price in prices:
            kept, _ = worth_after(world, situation, self._read(world, situation, nothing + price))
            # This step's part of what is left is not for later.
            values.append(kept - price * left * (1 - 1 / to_go) / world.ues)
        return jnp.asarray(prices)[jnp.argmax(jnp.stack(values), axis=0)]

    def _read(
        self, world: World, situation: Situation, shadow_per_j: Float[Array, "ues"]
    ) -> Float[Array, "ues families levels"]:
        """The table of each UE after this step, by what is held."""
        table = self.table_of(world, situation, present_step(world, situation), shadow_per_j)
        return table[jnp.arange(table.shape[0]), situation.family]

    def table_of(
        self, world: World, situation: Situation, step: Int[Array, ""], shadow_per_j: Float[Array, "ues"]
    ) -> Float[Array, "ues families families levels"]:
        """The table of each UE after a step, by family of that step's task, and what is held after it."""
        table = self.worth[jnp.clip(step, 0, min(world.tasks, self.worth.shape[0]) - 1)]
        corners = locate(self.kinds, kind_of(world, situation, shadow_per_j))
        return reduce(jnp.add, [table[point] * weight[:, None, None, None] for point, weight in corners])


def present_step(world: World, situation: Situation) -> Int[Array, ""]:
    """Which step of the episode is to be decided, from 0."""
    return jnp.round(situation.progress * world.tasks).astype(jnp.int32)


def plan_lookahead(world: World, prices: LaterPrices, *, exact: bool | None = None) -> Lookahead:
    """The lookahead of a world, by a dynamic programme from the last task to the first.

    Args:
        world: the world.
        prices: of later steps.
        exact: try all joint choices; the default does for fleets of up to 7.
    """
    kinds = make_kinds(world)
    worth = jax.vmap(lambda kind: _worth(world, kind, prices))(every_kind(kinds))
    return Lookahead(world.ues <= EXACT_UES if exact is None else exact, kinds, jnp.moveaxis(worth, 0, 1))


def _worth(world: World, kind: Kind, prices: LaterPrices) -> Float[Array, "tasks families families levels"]:
    """Expected cost of all later steps of one UE of a kind; the first axis is the step just served."""
    costs = task_costs(world, kind, prices)
    last = jnp.zeros((costs.local.shape[0], *costs.local.shape))
    _, worth = jax.lax.scan(
        lambda after, _: (worth_before(world, costs, after), after),
        last,
        None,
        length=world.tasks,
        reverse=True,
    )
    return worth


def search_lookahead(scenario: Scenario) -> Lookahead:
    """The best prices of ``Lookahead``."""
    return _plan(build_world(scenario), *search_prices(scenario))


def search_lookaheads(scenario: Scenario, worlds: Sequence[World], episodes: int) -> list[Lookahead]:
    """The best prices in each of some worlds that differ from the scenario's in no shape, compiled once."""
    found = _search_prices(scenario, worlds, episodes)
    return [_plan(world, *prices) for world, prices in zip(worlds, found, strict=True)]


def search_prices(scenario: Scenario) -> LaterPrices:
    """The prices of later steps with which ``Lookahead`` returns most."""
    # Joint choices take a while where devices differ, and returns change smoothly with prices.
    episodes = _FEWER_EPISODES if scenario.has_devices else EPISODES
    return _search_prices(scenario, [build_world(scenario)], episodes)[0]


@jax.jit
def _plan(world: World, *prices: Array) -> Lookahead:
    return plan_lookahead(world, LaterPrices(*prices))


def _search_prices(scenario: Scenario, worlds: Sequence[World], episodes: int) -> list[LaterPrices]:
    begins, grids = _price_grids(scenario, worlds[0])

    def prices_of(point: Sequence[Any]) -> LaterPrices:
        return LaterPrices(**dict(zip(grids, point, strict=True)))

    returned = mean_return(lambda world, *point: plan_lookahead(world, prices_of(point)))
    found = []
    for world in worlds:
        score = scorer(scenario, returned, episodes, world)
        ends = [ascend(score, begin, grids.values()) for begin in begins]
        best = max(ends, key=lambda point: score(*point)) if len(ends) > 1 else ends[0]
        found.append(prices_of([jnp.float32(price) for price in best]))
    return found


def _price_grids(scenario: Scenario, world: World) -> tuple[list[Point], dict[str, Point]]:
    """Where searches of prices begin, and the values of each of ``LaterPrices`` that they try."""
    grid = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2)
    coarse = (0.1, 0.25, 0.5, 0.75, 1.0, 1.5)
    start: Point = (0.5, 0.5)
    grids: dict[str, Point] = {"upload": grid[2:], "download": grid}
    backgrounds = patiences_s(scenario)
    if backgrounds:
        start = (*start, backgrounds[len(backgrounds) // 2])
        grids = {"upload": coarse, "download": coarse, "background_s": (0.0, *backgrounds[:-1])}
    if not world.rules.several:
        return [start], grids
    # Rents and the price of downloads make up for each other: from one beginning the search stays near it.
    return [(*start, rent) for rent in _RENTS[2:7:2]], {**grids, "rent": _RENTS}
