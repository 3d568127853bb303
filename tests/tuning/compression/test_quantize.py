"""Quantised maps are as near as their bits allow, as small, carry exact gradients, and survive a file."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from tuning_models import HEADS, LAYERS, empty_layers, logits, stored_bytes, tokens, with_layers

from emutune.errors import ModelError, UsageError
from emutune.tuning.compression.prune import prune_layers, shrink_layer
from emutune.tuning.compression.quantize import (
    GROUP,
    Bits,
    QuantizedLinear,
    prepare_quantized,
    quantize_layer,
)
from emutune.tuning.layers import layer_stack
from emutune.tuning.sublayers import weight_of

MIDDLE = range(1, LAYERS - 1)
HALF_ROUNDING = 2.0**-11
widths = st.integers(1, 3 * GROUP)
bits_of = st.sampled_from([3, 4, 8])


def linear_map(inputs: int, outputs: int, *, transposed: bool = False, spread: float = 1.0) -> nn.Module:
    torch.manual_seed(inputs * 1009 + outputs)
    linear = Conv1D(outputs, inputs) if transposed else nn.Linear(inputs, outputs)
    nn.init.normal_(linear.weight, mean=0.3 * spread, std=spread)
    nn.init.normal_(linear.bias)
    return linear


def quantized_map(linear: nn.Module, bits: Bits) -> QuantizedLinear:
    (quantized,) = quantize_layer(nn.Sequential(linear), bits)
    assert isinstance(quantized, QuantizedLinear)
    return quantized


def step_of_every_weight(quantized: QuantizedLinear) -> Tensor:
    scale = quantized.scale.float()
    return scale if quantized.bits == 8 else scale.repeat_interleave(GROUP, dim=1)[:, : quantized.in_features]


@settings(max_examples=60)
@given(widths, widths, bits_of, st.booleans(), st.sampled_from([1e-3, 1.0, 50.0]))
def test_no_weight_is_off_by_more_than_half_a_step(
    inputs: int, outputs: int, bits: Bits, transposed: bool, spread: float
) -> None:
    linear = linear_map(inputs, outputs, transposed=transposed, spread=spread)
    weight = weight_of(linear)
    quantized = quantized_map(linear, bits)
    assert quantized.weight.shape == weight.shape
    rounding = 0 if bits == 8 else 2 * HALF_ROUNDING * weight.abs().max()
    allowed = step_of_every_weight(quantized) * 0.5001 + rounding + 2.0**-24
    assert ((weight - quantized.weight).abs() <= allowed).all()


@settings(max_examples=40)
@given(widths, widths, bits_of, st.booleans(), st.sampled_from([torch.float32, torch.bfloat16]))
def test_result_and_gradient_are_those_of_the_dequantised_map(
    inputs: int, outputs: int, bits: Bits, transposed: bool, dtype: torch.dtype
) -> None:
    quantized = quantized_map(linear_map(inputs, outputs, transposed=transposed).to(dtype), bits)
    assert quantized.weight.dtype == dtype
    given_to, dense_given = (torch.randn(2, 3, inputs, dtype=dtype) for _ in range(2))
    dense_given.copy_(given_to)
    result = quantized(given_to.requires_grad_())
    dense = functional.linear(dense_given.requires_grad_(), quantized.weight) + quantized.bias
    assert result.dtype == dtype
    assert torch.equal(result, dense)
    gradient = torch.randn_like(result)
    result.backward(gradient)
    dense.backward(gradient)
    torch.testing.assert_close(given_to.grad, dense_given.grad)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_rows_of_equal_weights_are_kept(bits: Bits) -> None:
    linear = nn.Linear(70, 3)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([0.0, 0.25, -2.0])[:, None].expand(3, 70))
    torch.testing.assert_close(quantized_map(linear, bits).weight, linear.weight.detach(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("bits", "share"), [(8, 0.26), (4, 0.142), (3, 0.111)])
def test_stored_bytes_fall(bits: Bits, share: float) -> None:
    linear = linear_map(512, 256)
    quantized = quantized_map(linear, bits)
    assert stored_bytes(quantized) < share * stored_bytes(linear) + 4 * 256
    assert sum(t.nbytes for t in (*quantized.buffers(), *quantized.parameters())) == stored_bytes(quantized)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_training_through_a_quantised_map_keeps_no_dense_weight(bits: Bits) -> None:
    quantized = quantized_map(linear_map(96, 80), bits)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = quantized(torch.randn(5, 96, requires_grad=True))
    result.sum().backward()
    assert not kept
    assert not any(parameter.requires_grad for parameter in quantized.parameters())


@pytest.mark.parametrize(("bits", "allowed"), [(8, 0.04), (4, 0.5), (3, 1.0)])
def test_a_model_with_quantised_layers_says_nearly_the_same(
    model: PreTrainedModel, bits: Bits, allowed: float
) -> None:
    before = copy.deepcopy(model.state_dict())
    stack = layer_stack(model)
    quantized = {index: quantize_layer(stack[index], bits) for index in MIDDLE}
    expected = logits(model)
    found = logits(with_layers(model, quantized))
    assert 0 < (found - expected).norm() < allowed * expected.norm()
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert stored_bytes(*quantized.values()) < 0.32 * stored_bytes(*(stack[index] for index in MIDDLE))


def test_other_parameters_are_shared(model: PreTrainedModel) -> None:
    layer = layer_stack(model)[1]
    quantized = dict(quantize_layer(layer, 8).named_parameters())
    whole = dict(layer.named_parameters())
    norms = [name for name in quantized if "norm" in name.lower() or "ln_" in name]
    assert norms
    assert all(quantized[name] is whole[name] for name in norms)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_an_adapter_learns_through_quantised_layers(model: PreTrainedModel, bits: Bits) -> None:
    stack = layer_stack(model)
    model.requires_grad_(False)
    stack[0].requires_grad_(True)
    tuned = with_layers(model, {index: quantize_layer(stack[index], bits) for index in MIDDLE})
    tuned(input_ids=tokens()).logits.square().mean().backward()
    assert all(parameter.grad is not None for parameter in stack[0].parameters())


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("pruned", [False, True], ids=["whole", "pruned"])
def test_a_quantised_layer_survives_a_file(
    model: PreTrainedModel, tmp_path: Path, bits: Bits, pruned: bool
) -> None:
    layer, left = layer_stack(model)[2], None
    if pruned:
        (layer,), left = prune_layers(model, [2], 0.5, tokens())
    quantized = quantize_layer(layer, bits)
    save_file(quantized.state_dict(), tmp_path / "layer.safetensors")
    loaded = empty_layers(model)[2]
    if left is not None:
        shrink_layer(loaded, left, HEADS)
    prepare_quantized(loaded, bits)
    loaded.load_state_dict(load_file(tmp_path / "layer.safetensors"), assign=True)
    expected = logits(with_layers(model, {2: quantized}))
    assert torch.equal(logits(with_layers(model, {2: loaded})), expected)
    assert stored_bytes(quantized) < 0.4 * stored_bytes(layer)


def test_another_number_of_bits_is_refused() -> None:
    with pytest.raises(UsageError, match="bits"):
        quantize_layer(nn.Sequential(nn.Linear(2, 2)), 5)  # type: ignore[arg-type]


def test_a_layer_that_is_quantised_already_is_refused() -> None:
    with pytest.raises(ModelError, match="already"):
        quantize_layer(quantize_layer(nn.Sequential(nn.Linear(2, 2)), 8), 4)
