"""What an episode came to, in the units of the paper's figures."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from emutune.world.dynamics import Outcome


class Summary(NamedTuple):
    """One value per episode.

    Perplexity and the share at the server are means over tasks. ``energy_kj`` is what a UE spends in an
    episode, as the mean over UEs; 0 where energy is off.
    """

    episode_return: Float[Array, "*episodes"]
    delay_min: Float[Array, "*episodes"]
    perplexity: Float[Array, "*episodes"]
    changes_per_ue: Float[Array, "*episodes"]
    server_share: Float[Array, "*episodes"]
    energy_kj: Float[Array, "*episodes"]


class StepSums(NamedTuple):
    """What a summary keeps of a step: sums over UEs, or of ``changes`` and ``joules`` the mean."""

    reward: Float[Array, "*steps"]
    delay_s: Float[Array, "*steps"]
    perplexity: Float[Array, "*steps"]
    changes: Float[Array, "*steps"]
    at_server: Float[Array, "*steps"]
    joules: Float[Array, "*steps"]
    tasks: Float[Array, "*steps"]


def sum_step(outcome: Outcome, active: Bool[Array, "*steps ues"]) -> StepSums:
    """Of steps, given who had a task."""
    taken = outcome.charge.taken
    return StepSums(
        reward=outcome.reward,
        delay_s=outcome.charge.delay_s,
        perplexity=jnp.sum(taken.perplexity, axis=-1),
        changes=jnp.mean(outcome.switched, axis=-1, dtype=jnp.float32),
        at_server=jnp.sum(outcome.plan.at_server, axis=-1, dtype=jnp.float32),
        joules=jnp.mean(taken.joules, axis=-1),
        tasks=jnp.sum(active, axis=-1, dtype=jnp.float32),
    )


def summarise(outcome: Outcome, active: Bool[Array, "tasks *episodes ues"]) -> Summary:
    """The summary of whole episodes; the first axis of everything is the steps.

    Args:
        outcome: of every step.
        active: who had a task.
    """
    return add_up(sum_step(outcome, active))


def add_up(steps: StepSums) -> Summary:
    """The summary of whole episodes from their steps, along the first axis."""
    whole = jax.tree.map(lambda part: jnp.sum(part, axis=0), steps)
    tasks = jnp.maximum(whole.tasks, 1e-9)
    return Summary(
        episode_return=whole.reward,
        delay_min=whole.delay_s / 60,
        perplexity=whole.perplexity / tasks,
        changes_per_ue=whole.changes,
        server_share=whole.at_server / tasks,
        energy_kj=whole.joules / 1e3,
    )
