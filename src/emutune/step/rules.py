"""A scenario's numbers that a step is computed with, in SI units; what is off is neutral."""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from emutune.scenario import Scenario
from emutune.step.link import Links, build_links
from emutune.step.models import Models, build_models


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rules:
    """What a step is computed with.

    Which features are on is static, so that what is off is no part of a program; every number is traced, so that one
    compiled program serves any of them with as many levels.

    Attributes:
        terms: names of the cost terms that are on, in the order of ``emutune.step.terms``.
        trains_in_time: whether training takes time; without the section computation it takes none.
        uses_energy: whether joules are counted.
        limits_memory: whether a UE's memory limits the emulators that it can hold.
        multicast: whether those that fetch the same layers share one transmission (D17).
        several: whether a UE caches several emulators, as many as ``cache_bits`` hold.
        server_tflops: speed of the server, which all tasks there share.
        receive_w: power that receiving takes.
        weight_per_j: of a joule, negative; the next three are of joules beyond a budget (D14).
        perplexity_weight: omega_p, negative.
        delay_weight_per_s: omega_d, negative.
        retention_bounds: the smallest and the largest retention that may be asked for.
        hold_tolerance: how far from a held emulator's retention a wish may be and still mean that one (D9).
    """

    terms: tuple[str, ...] = field(metadata={"static": True})
    trains_in_time: bool = field(metadata={"static": True})
    uses_energy: bool = field(metadata={"static": True})
    limits_memory: bool = field(metadata={"static": True})
    multicast: bool = field(metadata={"static": True})
    several: bool = field(metadata={"static": True})
    models: Models
    links: Links
    server_tflops: Float[Array, ""]
    receive_w: Float[Array, ""]
    weight_per_j: Float[Array, ""]
    budget_j: Float[Array, ""]
    over_budget_weight_per_j: Float[Array, ""]
    cache_bits: Float[Array, ""]
    complexity_weight: Float[Array, ""]
    complexity_as_printed: Bool[Array, ""]
    perplexity_weight: Float[Array, ""]
    delay_weight_per_s: Float[Array, ""]
    retention_bounds: Float[Array, "2"]
    hold_tolerance: Float[Array, ""]


def build_rules(scenario: Scenario, dtype: DTypeLike = jnp.float32) -> Rules:
    """The rules of a scenario; bounds want them in double precision (``jnp.float64``, inside ``jax.enable_x64``)."""
    # Terms read rules.
    from emutune.step.terms import TERMS

    def real(value: float | list[float]) -> Array:
        return jnp.asarray(value, dtype)

    quality, reward = scenario.quality, scenario.reward
    computation, energy, cache_gb = scenario.computation, scenario.energy, scenario.cache_gb
    return Rules(
        terms=tuple(term.NAME for term in TERMS if term.is_on(scenario)),
        trains_in_time=computation is not None,
        uses_energy=energy is not None,
        limits_memory=scenario.memory is not None,
        multicast=scenario.download is not None and scenario.download.multicast,
        several=cache_gb is not None,
        models=build_models(scenario, dtype),
        links=build_links(scenario, dtype),
        server_tflops=real(computation.server_tflops if computation else float("inf")),
        receive_w=real(energy.receive_w if energy else 0.0),
        weight_per_j=real(energy.weight_per_j if energy else 0.0),
        budget_j=real((energy.budget_j if energy else None) or float("inf")),
        over_budget_weight_per_j=real((energy.over_budget_weight_per_j if energy else None) or 0.0),
        cache_bits=real(8e9 * (cache_gb or 0.0)),
        complexity_weight=real(quality.complexity_weight),
        complexity_as_printed=jnp.asarray(quality.complexity_factor == "as_printed"),
        perplexity_weight=real(reward.perplexity_weight),
        delay_weight_per_s=real(reward.delay_weight_per_min / 60),
        retention_bounds=real([scenario.retention.min, scenario.retention.max]),
        hold_tolerance=real(scenario.retention.hold_tolerance),
    )


def complexity_factor(rules: Rules, complexity: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """The factor g(c) by which complexity scales perplexity: rising, or as printed (D2)."""
    weight = rules.complexity_weight
    return (complexity + weight) / jnp.where(rules.complexity_as_printed, complexity, weight)
