"""Episodes of a policy, step by step: the one roll-out that measuring, imitating and guiding share."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key

from emutune.policies.base import Policy
from emutune.step import Situation
from emutune.world import Carried, Episode, Outcome, World, nothing_carried, serve, situation_at
from emutune.world.dynamics import during

Watched = TypeVar("Watched")


class Step(NamedTuple):
    """One step that was played.

    Attributes:
        known: before it was decided.
        true: the same at the gains that held, which it was charged at.
        after: the known situation with what is carried on from it.
        outcome: what it did.
    """

    known: Situation
    true: Situation
    after: Situation
    outcome: Outcome


def play(
    world: World, policy: Policy, episode: Episode, key: Key[Array, ""], watch: Callable[[Step], Watched]
) -> Watched:
    """Play one episode.

    Args:
        world: the world.
        policy: what decides.
        episode: its draws.
        key: the policy's own randomness; each step has a part of it.
        watch: what is kept of each step.

    Returns:
        What was watched, with a leading axis of steps.
    """

    def act(carried: Carried, now: Int[Array, ""]) -> tuple[Carried, Watched]:
        known = situation_at(world, episode, now, carried)
        plan = policy.decide(world, known, jax.random.fold_in(key, now))
        true = during(episode, now, known)
        carried, outcome = serve(world, true, plan)
        return carried, watch(Step(known, true, known._replace(**carried._asdict()), outcome))

    _, watched = jax.lax.scan(act, nothing_carried(world), jnp.arange(world.tasks))
    return watched
