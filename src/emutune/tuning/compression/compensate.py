"""Rounding of linear maps in which later weights make good for the errors of earlier ones, in plain torch operations.

Frantar, Ashkboos, Hoefler and Alistarh, "GPTQ: accurate post-training quantization for generative pre-trained
transformers", ICLR 2023. The libraries that do this today expect a GPU, and bring packed formats of their own that
neither hold GPT-2's transposed maps nor take part in training; the method is these few lines over our own format.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from emutune.tuning.compression.quantize import (
    GROUP,
    Bits,
    Grouped,
    best_range,
    in_groups,
    nearest_codes,
    quantize_layer,
)
from emutune.tuning.layers import layer_stack, view
from emutune.tuning.perplexity import is_masked
from emutune.tuning.sublayers import linear_maps, weight_of

# Of the mean of the moments' diagonal, added to it: what GPTQ adds so that they can be inverted.
_DAMPING = 0.01


@torch.no_grad()
def compensate_layers(
    model: PreTrainedModel, indices: Sequence[int], bits: Bits, tokens: Tensor
) -> list[nn.Module]:
    """Copies of some layers of a model with their linear maps rounded, so that their outputs change least.

    The layers are rounded bottom first, each on what those below it, already rounded, make of the tokens.

    Args:
        model: the model; stays as it is, and shares with the copies what is not rounded.
        indices: which layers, rising.
        bits: 8, 4 or 3; at 8, where rounding costs next to nothing, each weight is rounded for itself.
        tokens: int64 (rows, length), all of which go through the model at once.

    Raises:
        ModelError: a layer has no linear map.
    """
    stack = layer_stack(model)
    if bits == 8:
        return [quantize_layer(stack[index], bits) for index in indices]
    # Hooks are set on a second model, so that a failure leaves nothing behind on the first.
    watched = view(model).train(False)
    rounded: dict[int, nn.Module] = {}
    for index in indices:
        _round_when_run(layer_stack(watched)[index], stack[index], bits, rounded, index)
    # Each layer runs twice, and a cache would remember both.
    watched.base_model(
        input_ids=tokens.to(model.device), **({} if is_masked(model) else {"use_cache": False})
    )
    return [rounded[index] for index in indices]


def _round_when_run(
    layer: nn.Module, original: nn.Module, bits: Bits, rounded: dict[int, nn.Module], index: int
) -> None:
    moments: dict[str, Tensor] = {}
    for name, linear in linear_maps(layer).items():

        def add(_: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
            inputs = args[0].detach().flatten(0, -2).float()
            moments[name] = moments.get(name, 0) + inputs.T @ inputs

        linear.register_forward_pre_hook(add)

    def replace(_: nn.Module, args: Any, kwargs: Any, __: Any) -> Any:
        rounded[index] = quantize_layer(
            original, bits, lambda name, linear: compensated(weight_of(linear), moments[name], bits)
        )
        moments.clear()
        return rounded[index](*args, **kwargs)

    layer.register_forward_hook(replace, with_kwargs=True)


def compensated(weight: Tensor, moments: Tensor, bits: Bits) -> Grouped:
    """Round a weight column by column, and move the columns that are not rounded yet against the error.

    Args:
        weight: (outputs, inputs).
        moments: of the inputs, X^T X, (inputs, inputs).
        bits: of a code, below 8.

    Returns:
        Codes, uint8 (outputs, groups, 64), and half-precision scales and offsets, (outputs, groups).
    """
    left = in_groups(weight.float()).flatten(1)
    factor = _inverse_factor(moments, left.shape[1])
    found: list[Grouped] = []
    for first in range(0, left.shape[1], GROUP):
        behind = first + GROUP
        inside = factor[first:behind, first:behind]
        # What an error costs once the columns behind it have made good for what they can.
        scale, offset = best_range(left[:, first:behind], bits, inside.diagonal() ** -2)
        codes, errors = _round_group(left[:, first:behind], inside, scale, offset, bits)
        left[:, behind:] -= errors @ factor[first:behind, behind:]
        found.append((codes, scale, offset))
    codes, scales, offsets = (torch.stack(parts, dim=1) for parts in zip(*found, strict=True))
    return codes, scales, offsets


def _inverse_factor(moments: Tensor, width: int) -> Tensor:
    """The upper factor U of the inverse of the damped moments, U^T U, filled up to a width."""
    filling = width - len(moments)
    damped = functional.pad(moments.float(), (0, filling, 0, filling))
    diagonal = damped.diagonal()
    diagonal += _DAMPING * moments.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True)


def _round_group(
    weight: Tensor, factor: Tensor, scale: Tensor, offset: Tensor, bits: Bits
) -> tuple[Tensor, Tensor]:
    """Codes of a group's columns, and for the columns behind it the errors, in the factor's units."""
    weight = weight.clone()
    codes, errors = torch.empty_like(weight, dtype=torch.uint8), torch.empty_like(weight)
    scales, offsets = scale.float(), offset.float()
    for column in range(GROUP):
        found = nearest_codes(weight[:, column], scales, offsets, bits)
        codes[:, column] = found
        errors[:, column] = (weight[:, column] - (offsets + found * scales)) / factor[column, column]
        weight[:, column + 1 :] -= errors[:, column, None] * factor[column, column + 1 :]
    return codes, errors
