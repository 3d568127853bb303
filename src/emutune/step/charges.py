"""What a plan costs in a situation: the one definition of a step's cost (Eq. 12, D13 to D16).

The simulator reads it at the true draws, planners at the gains that they know, credit with and without a UE, and a
fleet to predict.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from emutune.step.options import at_server, on_ue
from emutune.step.rules import Rules
from emutune.step.situation import Plan, Situation
from emutune.step.taken import Taken, share
from emutune.step.terms import BY_NAME


class Charge(NamedTuple):
    """What a plan costs, in units of reward, positive.

    Attributes:
        terms: of the whole fleet, by name; the step's delay is one of them.
        taken: seconds, joules and perplexity of each UE.
        delay_s: of the step, as long as its slowest UE takes.
        total: sum of the terms, the negative of the reward.
    """

    terms: dict[str, Float[Array, "*batch"]]
    taken: Taken
    delay_s: Float[Array, "*batch"]
    total: Float[Array, "*batch"]


def charge(rules: Rules, situation: Situation, plan: Plan) -> Charge:
    """The charge of a possible plan, over any leading batch axes of the plan.

    Args:
        rules: of the world.
        situation: of the fleet, at the gains that are charged.
        plan: that ``possible_plan`` leaves as it is.
    """
    count = jnp.sum(plan.at_server, axis=-1, keepdims=True, dtype=jnp.float32)
    local, away = on_ue(rules, situation, plan.layers), at_server(rules, situation, count)
    taken = share(rules, situation, plan, local, away)
    terms = {name: jnp.sum(part, axis=-1) for name, part in own_terms(rules, situation, taken).items()}
    delay_s = jnp.max(taken.delay_s, axis=-1)
    terms["delay"] = delay_cost(rules, delay_s)
    return Charge(terms, taken, delay_s, sum(terms.values(), start=jnp.zeros_like(delay_s)))


def own_terms(rules: Rules, situation: Situation, taken: Taken) -> dict[str, Float[Array, "*batch ues"]]:
    """Every term that a UE has of its own, by name."""
    return {name: BY_NAME[name].cost(rules, situation, taken) for name in rules.terms}


def own_cost(rules: Rules, situation: Situation, taken: Taken) -> Float[Array, "*batch ues"]:
    """The sum of a UE's own terms."""
    return sum(own_terms(rules, situation, taken).values(), start=jnp.zeros(()))


def delay_cost(rules: Rules, delay_s: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """What seconds of a step's delay cost."""
    return -rules.delay_weight_per_s * delay_s


def marginal_charges(rules: Rules, situation: Situation, plan: Plan) -> Float[Array, "ues"]:
    """What each UE adds: the charge less the charge if it did nothing (no batch axes).

    The mean over tasks still counts the UE, so that its own perplexity is all that it adds to that term.
    """
    ues = plan.layers.shape[-1]
    idle = jnp.eye(ues, dtype=bool)
    others = Plan(plan.at_server & ~idle, jnp.where(idle, 0, plan.layers))
    return charge(rules, situation, plan).total - charge(rules, situation, others).total
