"""Gradient descent on samples that are there: the one loop of imitation and of regression."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import optax
from jaxtyping import Array, Float, Int

Parameters = TypeVar("Parameters")
Samples = TypeVar("Samples")


def descend(
    loss: Callable[[Parameters, Samples], Float[Array, ""]],
    start: Parameters,
    samples: Samples,
    batches: Int[Array, "steps batch"],
    rate: float,
) -> Parameters:
    """Adam on batches of samples; its step falls linearly to zero.

    Args:
        loss: of parameters and a batch.
        start: parameters to begin with.
        samples: one along the first axis of every array.
        batches: which of them each step sees.
        rate: of the first step.
    """
    optimiser = optax.adam(optax.linear_schedule(rate, 0.0, batches.shape[0]))

    def step(
        carry: tuple[Parameters, Any], chosen: Int[Array, "batch"]
    ) -> tuple[tuple[Parameters, Any], None]:
        parameters, memory = carry
        slope = jax.grad(loss)(parameters, jax.tree.map(lambda leaf: leaf[chosen], samples))
        change, memory = optimiser.update(slope, memory)
        return (optax.apply_updates(parameters, change), memory), None

    (parameters, _), _ = jax.lax.scan(step, (start, optimiser.init(start)), batches)
    return parameters
