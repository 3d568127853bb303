"""Every UE's choices in one step, with what later steps are worth after each, and what joint choices cost."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from emutune.step import (
    Away,
    Local,
    Plan,
    Rules,
    Situation,
    Taken,
    possible_case,
    possible_levels,
    usable_layers,
)
from emutune.step.charges import delay_cost, own_cost
from emutune.step.options import every_count, every_level
from emutune.step.taken import share

# A choice that does not exist costs more than any that does, and still adds up.
NEVER = 1e6


class Options(NamedTuple):
    """Every UE's choices: to train with k layers, or to upload. Levels and counts are axes before the UEs.

    Attributes:
        rules: of the world.
        situation: as it is known; the gain during a task is not known before it, the previous one stands in for it.
        local: of every level.
        away: of every count of tasks at the server.
        after: expected cost of all later steps once k layers were trained with, ``NEVER`` where that is impossible.
        kept: the same if the cache stays as it is.
        left: the same of an upload: ``kept``, and ``NEVER`` where that is impossible.
        shadow_per_j: what a joule within the budget is worth later, times UEs.
    """

    rules: Rules
    situation: Situation
    local: Local
    away: Away
    after: Float[Array, "levels ues"]
    kept: Float[Array, "ues"]
    left: Float[Array, "ues"]
    shadow_per_j: Float[Array, "ues"]


def list_options(
    rules: Rules,
    situation: Situation,
    kept: Float[Array, "ues"],
    renewed: Float[Array, "levels ues"],
    shadow_per_j: Float[Array, "ues"],
) -> Options:
    """Options of every UE (no batch axes).

    Args:
        rules: of the world.
        situation: of the step.
        kept: expected cost of all later steps if the cache stays as it is.
        renewed: the same if the UE then holds k layers of its task's family.
        shadow_per_j: what a joule within the budget is worth later, times UEs.
    """
    layers, held = jnp.arange(rules.models.most + 1)[:, None], usable_layers(situation)
    low, high = possible_levels(rules, situation)
    possible = ((layers >= low) & (layers <= high)) | ((layers == held) & (held > 0))
    # Without a task there is one choice: no layers.
    idle = jnp.where(layers == 0, kept, NEVER)
    may_leave = possible_case(rules, situation, jnp.ones(held.shape, bool))
    return Options(
        rules,
        situation,
        every_level(rules, situation),
        every_count(rules, situation),
        after=jnp.where(situation.active, jnp.where(possible, renewed, NEVER), idle),
        kept=kept,
        left=jnp.where(may_leave, kept, NEVER),
        shadow_per_j=shadow_per_j,
    )


def priced(options: Options, taken: Taken) -> Float[Array, "*batch ues"]:
    """What each UE's own part of a step costs, and what its joules are missed for later."""
    rules, situation = options.rules, options.situation
    cost = own_cost(rules, situation, taken)
    if "budget" not in rules.terms:
        return cost
    left = jnp.maximum(rules.budget_j - situation.spent_j, 0.0)
    return cost + options.shadow_per_j / left.shape[-1] * jnp.minimum(taken.joules, left)


def at_layers(options: Options, layers: Array) -> Local:
    """What training with these layers takes, over any leading axes."""
    every = jnp.arange(layers.shape[-1])
    return jax.tree.map(lambda table: table[layers, every], options.local)


def joint_cost(options: Options, plan: Plan) -> Float[Array, "*batch"]:
    """Exact cost of joint choices, later steps included."""
    local, away = at_layers(options, plan.layers), at_count(options, plan)
    return cost_of(options, plan, share(options.rules, options.situation, plan, local, away))


def at_count(options: Options, plan: Plan) -> Away:
    """What training at the server takes among as many as a plan sends there, over any leading axes."""
    return jax.tree.map(lambda table: table[jnp.sum(plan.at_server, axis=-1)], options.away)


def cost_of(options: Options, plan: Plan, taken: Taken) -> Float[Array, "*batch"]:
    """Exact cost of joint choices that take so much, later steps included."""
    later = jnp.where(
        plan.at_server, options.left, options.after[plan.layers, jnp.arange(plan.layers.shape[-1])]
    )
    own = jnp.sum(priced(options, taken) + later, axis=-1)
    return own + delay_cost(options.rules, jnp.max(taken.delay_s, axis=-1))
