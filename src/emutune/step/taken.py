"""What a step takes each UE under a plan, links and server shared: seconds, joules, perplexity."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from emutune.step.cache import usable_layers
from emutune.step.link import parts
from emutune.step.options import Away, Local
from emutune.step.rules import Rules
from emutune.step.situation import Plan, Situation


class Taken(NamedTuple):
    """Of each UE; 0 for what it does not do.

    Attributes:
        upload_s: seconds of its upload.
        download_s: seconds of its download.
        training_s: seconds of training, wherever.
        joules: of sending, receiving and computing; 0 where energy is off.
        perplexity: of its task.
    """

    upload_s: Float[Array, "*batch ues"]
    download_s: Float[Array, "*batch ues"]
    training_s: Float[Array, "*batch ues"]
    joules: Float[Array, "*batch ues"]
    perplexity: Float[Array, "*batch ues"]

    @property
    def delay_s(self) -> Float[Array, "*batch ues"]:
        """Seconds from the first bit to the end of training (Eq. 8, D13)."""
        return self.upload_s + self.download_s + self.training_s


def take_on_ue(
    rules: Rules, situation: Situation, local: Local, transmissions: Float[Array, "*#batch"] | float
) -> Taken:
    """What training on the UE takes beside so many transmissions, which split a shared link equally (Eq. 5 to 7)."""
    download_s = local.download_s * parts(rules.links, transmissions)
    joules = jnp.zeros_like(download_s)
    if rules.uses_energy:
        joules = rules.receive_w * download_s + situation.compute_w * local.training_s
    nothing = jnp.zeros_like(download_s)
    # Counts of transmissions may be an axis that only the download knows.
    return Taken(*jnp.broadcast_arrays(nothing, download_s, local.training_s, joules, local.perplexity))


def take_at_server(rules: Rules, situation: Situation, away: Away) -> Taken:
    """What training at the server takes; the UE only sends (D14)."""
    nothing = jnp.zeros_like(away.upload_s)
    joules = situation.transmit_power_w * away.upload_s if rules.uses_energy else nothing
    return Taken(away.upload_s, nothing, away.training_s, joules, away.perplexity)


def share(rules: Rules, situation: Situation, plan: Plan, local: Local, away: Away) -> Taken:
    """What a plan takes, from what each UE's choice takes on its own.

    Args:
        rules: of the world.
        situation: of the fleet.
        plan: who does what, over any leading batch axes.
        local: of the plan's layers.
        away: of the plan's number of tasks at the server.
    """
    loads = ~plan.at_server & (local.download_s > 0)
    if rules.multicast:
        local, transmissions = _multicast(rules, situation, plan, local, loads)
    else:
        transmissions = jnp.sum(loads, axis=-1, keepdims=True, dtype=jnp.float32)
    return take(rules, situation, plan.at_server, local, away, transmissions)


def take(
    rules: Rules,
    situation: Situation,
    there: Bool[Array, "*batch ues"],
    local: Local,
    away: Away,
    transmissions: Float[Array, "*#each"],
) -> Taken:
    """What each UE's choice takes, beside so many transmissions on the downlink."""
    sent = take_at_server(rules, situation, away)
    kept = take_on_ue(rules, situation, local, transmissions)
    return Taken(*(jnp.where(there, *both) for both in zip(sent, kept, strict=True)))


def transmission_of(
    rules: Rules, situation: Situation, layers: Int[Array, "*#batch"]
) -> Int[Array, "*batch"]:
    """The number of the transmission that brings each UE's missing layers: the same for the same layers (D17).

    ``layers`` broadcasts against the situation's fields.
    """
    _, rows, levels = rules.models.missing_bits.shape
    held = usable_layers(situation) if rules.models.delta else 0
    return (situation.family * rows + held) * levels + layers


def _multicast(
    rules: Rules, situation: Situation, plan: Plan, local: Local, loads: Bool[Array, "*batch ues"]
) -> tuple[Local, Float[Array, "*batch 1"]]:
    """Downloads as slow as the weakest of those that fetch the same layers; and how many transmissions there are."""
    which = transmission_of(rules, situation, plan.layers)

    def slowest(seconds: Array, which: Array) -> Array:
        return jax.ops.segment_max(seconds, which, rules.models.missing_bits.size).clip(min=0.0)

    alone_s = jnp.where(loads, local.download_s, 0.0)
    each_s = jnp.vectorize(slowest, signature="(u),(u)->(t)")(*jnp.broadcast_arrays(alone_s, which))
    weakest_s = jnp.take_along_axis(each_s, jnp.broadcast_to(which, alone_s.shape), axis=-1)
    transmissions = jnp.sum(each_s > 0, axis=-1, keepdims=True, dtype=jnp.float32)
    return local._replace(download_s=jnp.where(loads, weakest_s, 0.0)), transmissions
