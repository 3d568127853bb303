"""What an episode came to, in the units of the paper's figures."""

from __future__ import annotations

from typing import NamedTuple

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


def summarise(outcome: Outcome, active: Bool[Array, "tasks *episodes ues"]) -> Summary:
    """The summary of whole episodes; the first axis of everything is the steps.

    Args:
        outcome: of every step.
        active: who had a task.
    """
    taken = outcome.charge.taken
    tasks = jnp.maximum(jnp.sum(active, axis=(0, -1)), 1e-9)
    return Summary(
        episode_return=jnp.sum(outcome.reward, axis=0),
        delay_min=jnp.sum(outcome.charge.delay_s, axis=0) / 60,
        perplexity=jnp.sum(taken.perplexity, axis=(0, -1)) / tasks,
        changes_per_ue=jnp.sum(jnp.mean(outcome.switched, axis=-1), axis=0),
        server_share=jnp.sum(outcome.plan.at_server, axis=(0, -1)) / tasks,
        energy_kj=jnp.sum(jnp.mean(taken.joules, axis=-1), axis=0) / 1e3,
    )
