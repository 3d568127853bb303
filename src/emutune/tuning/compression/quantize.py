"""Weight-only quantisation of a layer's linear maps to 8, 4 or 3 bits, in plain torch operations.

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

Bits = Literal[3, 4, 8]
# Codes, uint8 (outputs, groups, 64), with the scale and the offset of each group, half precision (outputs, groups).
Grouped = tuple[Tensor, Tensor, Tensor]
Rounding = Callable[[str, nn.Module], Grouped]

# Inputs that share a scale and an offset below 8 bits.
GROUP = 64
_LARGEST_BYTE = 127
# Shares of a group's range that are tried; what lies outside is clamped.
_SHRUNK = tuple(1 - step / 40 for step in range(13))
# A row or group of equal weights has no range to divide by; this is half precision's smallest number.
_SMALLEST_SCALE = 2.0**-24


class QuantizedLinear(nn.Module):
    """A frozen linear map that keeps its weight in 8, 4 or 3 bits, and dequantises it whenever it is used.

    8 bits: symmetric, with a single-precision scale per output. Below: a group of 64 inputs lies bit by bit, 8 bytes
    for each, with a half-precision scale and offset; the last group is filled up.

    Args:
        inputs: width of the input.
        outputs: width of the output.
        bits: 8, 4 or 3.
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
        if bits not in (3, 4, 8):
            raise UsageError(f"bits: must be 3, 4 or 8, got {bits}")
        self.in_features, self.out_features, self.bits = inputs, outputs, bits
        self.dtype = dtype or torch.get_default_dtype()
        groups = -(-inputs // GROUP)
        if bits == 8:
            self.register_buffer("packed", torch.empty(outputs, inputs, dtype=torch.int8, device=device))
            self.register_buffer("scale", torch.empty(outputs, 1, dtype=torch.float32, device=device))
            self.register_buffer("offset", None)
        else:
            packed = torch.empty(outputs, groups * GROUP * bits // 8, dtype=torch.uint8, device=device)
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
        grouped = _unpacked(self.packed, self.bits).view(self.out_features, -1, GROUP)
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


def quantize_layer(layer: nn.Module, bits: Bits, rounding: Rounding | None = None) -> nn.Module:
    """A layer with its linear maps in 8, 4 or 3 bits, which shares its other parameters with the given one.

    Args:
        layer: the layer.
        bits: how many.
        rounding: below 8 bits, the codes of a linear map, of which it is told the name; each weight's nearest ones if
            not given.

    Raises:
        UsageError: another number of bits.
        ModelError: the layer has no linear map.
    """
    shared = {id(tensor): tensor for tensor in (*layer.parameters(), *layer.buffers())}
    quantized = copy.deepcopy(layer, shared)
    nearest: Rounding = lambda _, linear: _nearest(weight_of(linear).float(), bits)  # noqa: E731
    _replace(quantized, lambda name, linear: _quantize(name, linear, bits, rounding or nearest))
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
    _replace(layer, lambda _, linear: _empty(linear, bits))


def _replace(layer: nn.Module, replacement: Callable[[str, nn.Module], QuantizedLinear]) -> None:
    maps = linear_maps(layer)
    if not maps:
        raise ModelError(
            f"{type(layer).__name__}: has no linear map to quantise; perhaps it is quantised already"
        )
    for name, linear in maps.items():
        layer.set_submodule(name, replacement(name, linear))


def _empty(linear: nn.Module, bits: Bits) -> QuantizedLinear:
    inputs, outputs = widths_of(linear)
    weight = weight_of(linear)
    bias = linear.bias is not None
    return QuantizedLinear(inputs, outputs, bits, bias=bias, dtype=weight.dtype, device=weight.device)


@torch.no_grad()
def _quantize(name: str, linear: nn.Module, bits: Bits, rounding: Rounding) -> QuantizedLinear:
    quantized = _empty(linear, bits)
    if bits == 8:
        # The results take the order in memory of what they are computed from, and files want the usual one.
        quantized.packed, quantized.scale = _to_bytes(weight_of(linear).float().contiguous())
    else:
        codes, quantized.scale, quantized.offset = rounding(name, linear)
        quantized.packed = _packed(codes.flatten(1), bits)
    if quantized.bias is not None:
        quantized.bias.copy_(linear.get_parameter("bias"))
    return quantized.train(linear.training)


def _to_bytes(weight: Tensor) -> tuple[Tensor, Tensor]:
    scale = (weight.abs().amax(dim=1, keepdim=True) / _LARGEST_BYTE).clamp_min(_SMALLEST_SCALE)
    return (weight / scale).round().to(torch.int8), scale


def largest_code(bits: Bits) -> int:
    """The largest code of so many bits."""
    return (1 << bits) - 1


def in_groups(weight: Tensor) -> Tensor:
    """A weight (outputs, inputs) as (outputs, groups, 64).

    Copies of the last column fill the last group up without widening its range.
    """
    filled = functional.pad(weight, (0, -weight.shape[1] % GROUP), mode="replicate")
    return filled.contiguous().view(len(weight), -1, GROUP)


def _nearest(weight: Tensor, bits: Bits) -> Grouped:
    groups = in_groups(weight)
    lowest, highest = groups.aminmax(dim=-1)
    scale, offset = _grid(lowest, highest, bits)
    return nearest_codes(groups, scale[..., None], offset[..., None], bits), scale, offset


def nearest_codes(weight: Tensor, scale: Tensor, offset: Tensor, bits: Bits) -> Tensor:
    """The codes nearest to some weights."""
    steps = (weight - offset.float()) / scale.float()
    return steps.round().clamp(0, largest_code(bits)).to(torch.uint8)


def best_range(groups: Tensor, bits: Bits, costs: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and offset of each group, of those tried, under which rounding to nearest costs least.

    Args:
        groups: weights, (..., 64).
        bits: of a code.
        costs: of a squared error in each column, (64,).

    Returns:
        Half-precision scales and offsets, (...).
    """
    lowest, highest = groups.aminmax(dim=-1)
    tried = [_grid(share * lowest, share * highest, bits) for share in _SHRUNK]
    errors = []
    for scale, offset in tried:
        scales, offsets = scale.float()[..., None], offset.float()[..., None]
        rounded = offsets + scales * nearest_codes(groups, scales, offsets, bits)
        errors.append(((rounded - groups).square() * costs).sum(dim=-1))
    best = torch.stack(errors).argmin(dim=0, keepdim=True)
    scale, offset = (torch.stack(values).gather(0, best)[0] for values in zip(*tried, strict=True))
    return scale, offset


def _grid(lowest: Tensor, highest: Tensor, bits: Bits) -> tuple[Tensor, Tensor]:
    scale = ((highest - lowest) / largest_code(bits)).clamp_min(_SMALLEST_SCALE)
    return scale.half(), lowest.half()


def _packed(codes: Tensor, bits: int) -> Tensor:
    """Codes (outputs, inputs) as bytes, the lowest bits first: 8 codes in as many bytes as a code has bits."""
    eight = codes.to(torch.int64).view(len(codes), -1, 8)
    words = (eight << _shifts(bits, 8, codes)).sum(dim=-1, keepdim=True)
    return (words >> _shifts(8, bits, codes) & 0xFF).to(torch.uint8).flatten(1)


def _unpacked(packed: Tensor, bits: int) -> Tensor:
    """The codes in some bytes, (outputs, inputs)."""
    if bits == 4:
        return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(1)
    words = (packed.view(len(packed), -1, bits).int() << _shifts(8, bits, packed).int()).sum(
        dim=-1, keepdim=True, dtype=torch.int32
    )
    return (words >> _shifts(bits, 8, packed).int() & largest_code(bits)).flatten(1)  # type: ignore[arg-type]


def _shifts(bits: int, count: int, like: Tensor) -> Tensor:
    return torch.arange(0, bits * count, bits, device=like.device)
