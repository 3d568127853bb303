"""Weight-only quantisation of a layer's linear maps to 8 or 4 bits, in plain torch operations.

torchao needs another package for 4 bits, and handles neither GPT-2's transposed maps nor training through
its own. This runs wherever torch does.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from emutune.errors import ModelError, UsageError
from emutune.tuning.sublayers import linear_maps, weight_of, widths_of

Bits = Literal[4, 8]

# Inputs that share a scale and an offset at 4 bits.
GROUP = 64
_LARGEST_BYTE = 127
_LARGEST_NIBBLE = 15
# A row or group of equal weights has no range to divide by; this is half precision's smallest number.
_SMALLEST_SCALE = 2.0**-24


class QuantizedLinear(nn.Module):
    """A frozen linear map that keeps its weight in 8 or 4 bits, and dequantises it whenever it is used.

    8 bits: symmetric, with a single-precision scale per output. 4 bits: two to a byte, with a half-precision
    scale and offset for every 64 inputs; the last ones are filled up.

    Args:
        inputs: width of the input.
        outputs: width of the output.
        bits: 8 or 4.
        bias: whether there is one.
        dtype: of the bias, and of the weight when looked at.
        device: where to leave it empty.

    Raises:
        UsageError: another number of bits.
    """

    packed: Tensor
    scale: Tensor
    offset: Tensor | None
    bias: nn.Parameter | None

    def __init__(
        self,
        inputs: int,
        outputs: int,
        bits: Bits,
        *,
        bias: bool = True,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if bits not in (4, 8):
            raise UsageError(f"bits: must be 4 or 8, got {bits}")
        self.in_features, self.out_features, self.bits = inputs, outputs, bits
        self.dtype = dtype or torch.get_default_dtype()
        groups = -(-inputs // GROUP)
        if bits == 8:
            self.register_buffer("packed", torch.empty(outputs, inputs, dtype=torch.int8, device=device))
            self.register_buffer("scale", torch.empty(outputs, 1, dtype=torch.float32, device=device))
            self.register_buffer("offset", None)
        else:
            packed = torch.empty(outputs, groups * GROUP // 2, dtype=torch.uint8, device=device)
            self.register_buffer("packed", packed)
            self.register_buffer("scale", torch.empty(outputs, groups, dtype=torch.float16, device=device))
            self.register_buffer("offset", torch.empty(outputs, groups, dtype=torch.float16, device=device))
        empty = torch.empty(outputs, dtype=self.dtype, device=device) if bias else None
        self.bias = None if empty is None else nn.Parameter(empty, requires_grad=False)

    @property
    def weight(self) -> Tensor:
        """The weight as it takes effect, (outputs, inputs), dequantised anew; some models look at it."""
        return self.dequantized(self.dtype)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight as it takes effect, (outputs, inputs)."""
        if self.offset is None:
            return (self.packed * self.scale).to(dtype)
        nibbles = torch.stack((self.packed & _LARGEST_NIBBLE, self.packed >> 4), dim=-1)
        grouped = nibbles.view(self.out_features, -1, GROUP)
        weight = torch.addcmul(self.offset.float()[..., None], grouped.float(), self.scale.float()[..., None])
        return weight.flatten(1)[:, : self.in_features].to(dtype)

    def forward(self, inputs: Tensor) -> Tensor:
        """Apply the map to inputs (..., inputs)."""
        product: Tensor = _Product.apply(inputs, self)  # type: ignore[no-untyped-call]
        return product if self.bias is None else product + self.bias

    def extra_repr(self) -> str:
        """What printing a model shows of the map."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}"


class _Product(torch.autograd.Function):
    """Inputs times dequantised weight; keeps only the packed one, and dequantises again on the way back."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, linear: QuantizedLinear) -> Tensor:
        ctx.linear = linear
        return functional.linear(inputs, linear.dequantized(inputs.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return gradient @ ctx.linear.dequantized(gradient.dtype), None


def quantize_layer(layer: nn.Module, bits: Bits) -> nn.Module:
    """A layer with its linear maps in 8 or 4 bits, which shares its other parameters with the given one.

    Raises:
        UsageError: another number of bits.
        ModelError: the layer has no linear map.
    """
    shared = {id(tensor): tensor for tensor in (*layer.parameters(), *layer.buffers())}
    quantized = copy.deepcopy(layer, shared)
    _replace(quantized, lambda linear: _quantize(linear, bits))
    return quantized


def prepare_quantized(layer: nn.Module, bits: Bits) -> None:
    """Put empty quantised maps into a layer, for a quantised layer's state dict to be assigned to it.

    Args:
        layer: a whole or shrunk layer, on any device (also meta).
        bits: those of the quantised layer.

    Raises:
        UsageError: another number of bits.
        ModelError: the layer has no linear map.
    """
    _replace(layer, lambda linear: _empty(linear, bits))


def _replace(layer: nn.Module, replacement: Callable[[nn.Module], QuantizedLinear]) -> None:
    maps = linear_maps(layer)
    if not maps:
        raise ModelError(
            f"{type(layer).__name__}: has no linear map to quantise; perhaps it is quantised already"
        )
    for name, linear in maps.items():
        layer.set_submodule(name, replacement(linear))


def _empty(linear: nn.Module, bits: Bits) -> QuantizedLinear:
    inputs, outputs = widths_of(linear)
    weight = weight_of(linear)
    bias = linear.bias is not None
    return QuantizedLinear(inputs, outputs, bits, bias=bias, dtype=weight.dtype, device=weight.device)


@torch.no_grad()
def _quantize(linear: nn.Module, bits: Bits) -> QuantizedLinear:
    quantized = _empty(linear, bits)
    # The results take the order in memory of what they are computed from, and files want the usual one.
    weight = weight_of(linear).float().contiguous()
    if bits == 8:
        quantized.packed, quantized.scale = _to_bytes(weight)
    else:
        quantized.packed, quantized.scale, quantized.offset = _to_nibbles(weight)
    if quantized.bias is not None:
        quantized.bias.copy_(linear.get_parameter("bias"))
    return quantized.train(linear.training)


def _to_bytes(weight: Tensor) -> tuple[Tensor, Tensor]:
    scale = (weight.abs().amax(dim=1, keepdim=True) / _LARGEST_BYTE).clamp_min(_SMALLEST_SCALE)
    return (weight / scale).round().to(torch.int8), scale


def _to_nibbles(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # Copies of the last column fill the last group up without widening its range.
    filled = functional.pad(weight, (0, -weight.shape[1] % GROUP), mode="replicate")
    groups = filled.view(len(weight), -1, GROUP)  # (outputs, groups, 64)
    lowest, highest = groups.aminmax(dim=2)
    scale = ((highest - lowest) / _LARGEST_NIBBLE).clamp_min(_SMALLEST_SCALE).half()
    offset = lowest.half()
    steps = (groups - offset.float()[..., None]) / scale.float()[..., None]
    nibbles = steps.round().clamp(0, _LARGEST_NIBBLE).to(torch.uint8).flatten(1)
    return nibbles[:, 0::2] | nibbles[:, 1::2] << 4, scale, offset
