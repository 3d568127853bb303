"""Compensated rounding changes what a map makes of its inputs less than rounding each weight for itself."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from tuning_models import ARCHITECTURES, LAYERS, tokens, with_layers

from emutune.tuning.compression.compensate import compensate_layers, compensated
from emutune.tuning.compression.quantize import (
    GROUP,
    Bits,
    Grouped,
    QuantizedLinear,
    best_range,
    in_groups,
    nearest_codes,
    quantize_layer,
)
from emutune.tuning.layers import layer_stack
from emutune.tuning.sublayers import weight_of

MIDDLE = range(1, LAYERS - 1)


def correlated(rows: int, width: int) -> Tensor:
    """Inputs of which a few directions make up most."""
    generator = torch.Generator().manual_seed(width)
    mixed = torch.randn(width // 4, width, generator=generator)
    return torch.randn(rows, width // 4, generator=generator) @ mixed + 0.1 * torch.randn(
        rows, width, generator=generator
    )


def effective(found: Grouped, width: int) -> Tensor:
    codes, scale, offset = found
    return (offset.float()[..., None] + codes * scale.float()[..., None]).flatten(1)[:, :width]


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("width", [GROUP, 2 * GROUP, 150])
def test_products_change_less(bits: Bits, width: int) -> None:
    torch.manual_seed(width)
    weight, inputs = torch.randn(40, width), correlated(400, width)
    found = compensated(weight, inputs.T @ inputs, bits)
    assert found[0].dtype == torch.uint8
    assert int(found[0].max()) < 1 << bits
    (nearest,) = quantize_layer(nn.Sequential(linear := nn.Linear(width, 40)), bits)
    linear.weight.data.copy_(weight)
    (nearest,) = quantize_layer(nn.Sequential(linear), bits)
    assert isinstance(nearest, QuantizedLinear)
    before = (inputs @ (nearest.weight - weight).T).norm()
    after = (inputs @ (effective(found, width) - weight).T).norm()
    assert after < 0.6 * before


def test_independent_inputs_of_one_size_leave_nothing_to_compensate() -> None:
    torch.manual_seed(0)
    weight = torch.randn(5, 2 * GROUP)
    codes, scale, offset = compensated(weight, torch.eye(2 * GROUP), 4)
    groups = in_groups(weight)
    wanted, shift = best_range(groups, 4, torch.ones(GROUP))
    assert torch.equal(scale, wanted)
    assert torch.equal(offset, shift)
    assert torch.equal(codes, nearest_codes(groups, scale[..., None], offset[..., None], 4))


def test_one_column_makes_good_for_another_as_well_as_any_codes_could() -> None:
    # Two columns that always say the same: of all codes of the second, that which makes the sum nearest is chosen.
    inputs = torch.zeros(8, GROUP)
    inputs[:, 0] = inputs[:, 1] = torch.linspace(-1, 1, 8)
    torch.manual_seed(1)
    weight = torch.randn(6, GROUP)
    codes, scale, offset = compensated(weight, inputs.T @ inputs, 4)
    step, start = scale.float()[:, 0], offset.float()[:, 0]
    for row, (first, second) in enumerate(weight[:, :2].tolist()):
        own = float(start[row] + codes[row, 0, 0] * step[row])
        sums = [own + float(start[row] + code * step[row]) for code in range(16)]
        best = min(abs(value - first - second) for value in sums)
        # Damping moves a hundredth of the error less than all of it.
        assert abs(sums[int(codes[row, 0, 1])] - first - second) <= best + 0.02 * float(step[row])


@torch.no_grad()
def test_models_stay_nearer_to_themselves(model: PreTrainedModel) -> None:
    calibration, fresh = tokens(32, 24, seed=1), tokens(16, 24, seed=2)
    expected, before = model(input_ids=fresh).logits, copy.deepcopy(model.state_dict())
    errors = []
    for layers in (
        compensate_layers(model, list(MIDDLE), 3, calibration),
        [quantize_layer(layer_stack(model)[index], 3) for index in MIDDLE],
    ):
        rounded = with_layers(model, dict(zip(MIDDLE, layers, strict=True)))
        errors.append(float((rounded(input_ids=fresh).logits - expected).square().mean()))
    assert errors[0] < errors[1]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(model(input_ids=fresh).logits, expected)


def test_what_is_not_rounded_is_shared_and_hooks_are_gone(model: PreTrainedModel) -> None:
    (rounded,) = compensate_layers(model, [2], 4, tokens())
    shared = {id(parameter) for parameter in layer_stack(model)[2].parameters()}
    norms = [p for name, p in rounded.named_parameters() if "norm" in name.lower() or "ln" in name]
    assert norms
    assert all(id(parameter) in shared for parameter in norms)
    for module in itertools.chain(model.modules(), rounded.modules()):
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_at_8_bits_each_weight_is_rounded_for_itself(model: PreTrainedModel) -> None:
    (rounded,) = compensate_layers(model, [2], 8, tokens())
    expected = quantize_layer(layer_stack(model)[2], 8).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in rounded.state_dict().items())


@torch.no_grad()
def test_transposed_maps_are_rounded_as_what_they_compute() -> None:
    model = ARCHITECTURES["gpt2"]()
    (rounded,) = compensate_layers(model, [2], 4, tokens())
    for name, module in rounded.named_modules():
        if isinstance(module, QuantizedLinear):
            whole = weight_of(layer_stack(model)[2].get_submodule(name))
            assert module.weight.shape == whole.shape
            assert float((module.weight - whole).abs().mean()) < 0.2 * float(whole.abs().mean())
