"""What each UE could do now, and what it would take: levels, seconds, joules, perplexity.

Training on the UE is described alone on the downlink, and training at the server for a number of tasks there;
``charge`` says what sharing makes of both.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from emutune.step.cache import usable_layers
from emutune.step.link import downlink_bps, uplink_bps
from emutune.step.models import look_up, missing_bits
from emutune.step.rules import Rules, complexity_factor
from emutune.step.situation import Plan, Situation


class Local(NamedTuple):
    """Training on the UE with some layers.

    Attributes:
        perplexity: of the task.
        download_s: seconds that sending what is missing takes, alone on the downlink; 0 where nothing is.
        training_s: seconds of training.
    """

    perplexity: Float[Array, "*batch"]
    download_s: Float[Array, "*batch"]
    training_s: Float[Array, "*batch"]


class Away(NamedTuple):
    """Training at the server among so many tasks that are there.

    Attributes:
        perplexity: of the task.
        upload_s: seconds of its upload.
        training_s: seconds of training after that.
    """

    perplexity: Float[Array, "*batch"]
    upload_s: Float[Array, "*batch"]
    training_s: Float[Array, "*batch"]


def on_ue(rules: Rules, situation: Situation, layers: Int[Array, "*batch"]) -> Local:
    """What training with so many layers takes each UE; ``layers`` broadcasts against the situation's fields.

    With 0 layers nothing is done, and takes nothing.
    """
    models, family = rules.models, situation.family
    bits = missing_bits(models, family, usable_layers(situation), layers)
    perplexity = look_up(models.perplexity, family, layers)
    training_s = jnp.zeros_like(bits)
    if rules.trains_in_time:
        training_s = look_up(models.tflop_per_bit, family, layers) * situation.data_bits / situation.tflops
    return Local(
        perplexity * complexity_factor(rules, situation.complexity),
        bits / downlink_bps(rules.links, situation.downlink_gain),
        training_s,
    )


def at_server(rules: Rules, situation: Situation, sharers: Float[Array, "*#batch"]) -> Away:
    """What training at the server takes when so many tasks are there; ``sharers`` broadcasts against the fields."""
    models, family = rules.models, situation.family
    rate = uplink_bps(rules.links, situation.transmit_power_w, situation.gain, sharers)
    upload_s = situation.data_bits / rate
    training_s = jnp.zeros_like(upload_s)
    if rules.trains_in_time:
        tflop = look_up(models.whole_tflop_per_bit, family) * situation.data_bits
        training_s = tflop * jnp.maximum(sharers, 1.0) / rules.server_tflops
    perplexity = look_up(models.whole_perplexity, family) * complexity_factor(rules, situation.complexity)
    return Away(jnp.broadcast_to(perplexity, upload_s.shape), upload_s, training_s)


def every_level(rules: Rules, situation: Situation) -> Local:
    """``on_ue`` for every level, along a first axis before the UEs (no batch axes)."""
    return on_ue(rules, situation, jnp.arange(rules.models.most + 1)[:, None])


def every_count(rules: Rules, situation: Situation) -> Away:
    """``at_server`` for every number of tasks there, from 0, along a first axis before the UEs (no batch axes)."""
    return at_server(rules, situation, jnp.arange(situation.data_bits.shape[-1] + 1.0)[:, None])


def possible_levels(
    rules: Rules, situation: Situation
) -> tuple[Int[Array, "*batch ues"], Int[Array, "*batch ues"]]:
    """Fewest and most layers of an emulator that each UE can hold for its task's family.

    The most is less than the fewest where not even the smallest emulator fits.
    """
    models, family = rules.models, situation.family
    low, high = (jnp.broadcast_to(look_up(part, family), family.shape) for part in (models.low, models.high))
    if not rules.limits_memory:
        return low, high
    # An emulator that fills the memory fits: the guard absorbs the rounding of both sizes.
    fits = look_up(models.memory_bits, family) <= situation.memory_bits[..., None] * (1 + 1e-6)
    return low, jnp.minimum(high, jnp.sum(fits, axis=-1, dtype=jnp.int32) - 1)


def possible_case(
    rules: Rules, situation: Situation, wanted: Bool[Array, "*batch ues"]
) -> Bool[Array, "*batch ues"]:
    """Which UEs train at the server after all.

    Data that may not leave are trained on where they are; where no emulator fits, the server trains; a UE
    without a task does neither.
    """
    low, high = possible_levels(rules, situation)
    return ((wanted & ~situation.private) | (high < low)) & situation.active


def chooses_case(rules: Rules, situation: Situation) -> Bool[Array, "*batch ues"]:
    """Where either case is possible."""
    yes, no = (
        possible_case(rules, situation, jnp.full(situation.active.shape, wish)) for wish in (True, False)
    )
    return yes & ~no


def possible_plan(rules: Rules, situation: Situation, plan: Plan) -> Plan:
    """The nearest plan that is possible; a UE without a task does nothing."""
    there = possible_case(rules, situation, plan.at_server)
    low, high = possible_levels(rules, situation)
    layers = jnp.clip(plan.layers, low, high)
    return Plan(there, jnp.where(there | ~situation.active, 0, layers))


def plan_of_wish(
    rules: Rules,
    situation: Situation,
    wanted: Bool[Array, "*batch ues"],
    retention: Float[Array, "*batch ues"],
) -> Plan:
    """The plan that a wish for a retention comes to: the nearest level, or the held one (D9, D15).

    This is where a retention becomes whole layers; wishes come from outside, and from agents whose actions are
    continuous.
    """
    whole = look_up(rules.models.layers, situation.family)
    held = usable_layers(situation)
    near = (held > 0) & (jnp.abs(retention - held / whole) < rules.hold_tolerance)
    return Plan(wanted, jnp.where(near, held, jnp.round(retention * whole).astype(jnp.int32)))


def whole_training_s(rules: Rules, situation: Situation) -> Float[Array, "*batch ues"]:
    """Seconds of training each task with the whole model on the UE."""
    if not rules.trains_in_time:
        return jnp.zeros(situation.data_bits.shape)
    tflop = look_up(rules.models.whole_tflop_per_bit, situation.family) * situation.data_bits
    return tflop / situation.tflops
