"""Pruned layers compute what masked ones do, keep what matters, get smaller, and survive a file."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from tuning_models import ARCHITECTURES, HEADS, WIDTH, empty_layers, logits, stored_bytes, tokens, with_layers

from emutune.errors import ModelError, UsageError
from emutune.tuning.compression.prune import Widths, prune_layers, shrink_layer
from emutune.tuning.layers import layer_stack
from emutune.tuning.perplexity import is_masked
from emutune.tuning.sublayers import find_sublayers, weight_of

INDICES = (1, 2, 4)


def output_weights(layer: nn.Module) -> tuple[Tensor, Tensor]:
    sublayers = find_sublayers(layer)
    attention, mlp = (
        layer.get_submodule(name) for name in (sublayers.attention_output, sublayers.mlp_output)
    )
    return weight_of(attention), weight_of(mlp)


def kept_columns(whole: Tensor, pruned: Tensor) -> Tensor:
    """Where the columns of a pruned weight stood in the whole one."""
    same = (whole[:, :, None] == pruned[:, None, :]).all(dim=0)
    assert (same.sum(dim=0) == 1).all()
    return same.any(dim=1)


@torch.no_grad()
def masked(layer: nn.Module, pruned: nn.Module) -> nn.Module:
    copied = copy.deepcopy(layer)
    for weight, left in zip(output_weights(copied), output_weights(pruned), strict=True):
        weight[:, ~kept_columns(weight, left)] = 0
    return copied


@pytest.mark.parametrize("share", [0.2, 0.5, 0.75])
def test_pruned_layers_compute_what_masked_ones_do(model: PreTrainedModel, share: float) -> None:
    layers, _ = prune_layers(model, INDICES, share, tokens(10))
    with_masks = {
        index: masked(layer_stack(model)[index], layer) for index, layer in zip(INDICES, layers, strict=True)
    }
    expected = logits(with_layers(model, with_masks))
    found = logits(with_layers(model, dict(zip(INDICES, layers, strict=True))))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert (expected - logits(model)).norm() > 0.05 * expected.norm()


def test_widths_are_rounded_and_groups_stay_whole(architecture: str, model: PreTrainedModel) -> None:
    kept_heads = {"bloom": HEADS}
    _, half = prune_layers(model, INDICES, 0.5, tokens())
    assert half.heads == kept_heads.get(architecture, HEADS // 2)
    _, least = prune_layers(model, INDICES, 0.001, tokens())
    grouped = 2 if architecture in ("llama", "qwen2") else 1
    assert least == Widths(heads=kept_heads.get(architecture, grouped), channels=1)


def test_bytes_and_parameters_fall(architecture: str, model: PreTrainedModel) -> None:
    whole = [layer_stack(model)[index] for index in INDICES]
    layers, _ = prune_layers(model, INDICES, 0.5, tokens())
    expected = 0.7 if architecture == "bloom" else 0.52
    assert stored_bytes(*layers) < expected * stored_bytes(*whole)
    counts = [sum(p.numel() for layer in group for p in layer.parameters()) for group in (layers, whole)]
    assert counts[0] < expected * counts[1]


def test_keeping_all_changes_nothing(model: PreTrainedModel) -> None:
    layers, widths = prune_layers(model, INDICES, 1.0, tokens())
    assert widths.heads == HEADS
    assert torch.equal(logits(with_layers(model, dict(zip(INDICES, layers, strict=True)))), logits(model))


def test_the_model_stays_as_it_is_and_shares_nothing(model: PreTrainedModel) -> None:
    model.train()
    before = copy.deepcopy(model.state_dict())
    layers, _ = prune_layers(model, INDICES, 0.5, tokens())
    with torch.no_grad():
        for layer in layers:
            for parameter in layer.parameters():
                parameter.zero_()
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert all(module.training for module in model.modules())
    assert not any(module._forward_pre_hooks for layer in layers for module in layer.modules())


def test_a_pruned_layer_survives_a_file(model: PreTrainedModel, tmp_path: Path) -> None:
    layers, widths = prune_layers(model, INDICES, 0.5, tokens())
    loaded = {}
    for index, layer in zip(INDICES, layers, strict=True):
        save_file(layer.state_dict(), tmp_path / "layer.safetensors")
        loaded[index] = empty_layers(model)[index]
        shrink_layer(loaded[index], Widths.model_validate_json(widths.model_dump_json()), HEADS)
        loaded[index].load_state_dict(load_file(tmp_path / "layer.safetensors"), assign=True)
    expected = logits(with_layers(model, dict(zip(INDICES, layers, strict=True))))
    assert torch.equal(logits(with_layers(model, loaded)), expected)


def test_a_pruned_model_writes_the_same_with_and_without_a_cache(model: PreTrainedModel) -> None:
    if is_masked(model):
        pytest.skip("an encoder does not write")
    layers, _ = prune_layers(model, INDICES, 0.5, tokens())
    pruned = with_layers(model, dict(zip(INDICES, layers, strict=True)))
    request = {"input_ids": tokens(), "attention_mask": torch.ones_like(tokens()), "do_sample": False}
    written = [pruned.generate(**request, max_new_tokens=6, use_cache=cached) for cached in (False, True)]
    assert torch.equal(*written)


def test_gradients_flow_through_a_pruned_layer(model: PreTrainedModel) -> None:
    layers, _ = prune_layers(model, INDICES, 0.5, tokens())
    with_layers(model, dict(zip(INDICES, layers, strict=True)))(
        input_ids=tokens()
    ).logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for layer in layers for p in layer.parameters())


@torch.no_grad()
def test_the_heads_and_channels_that_matter_stay() -> None:
    model = ARCHITECTURES["gpt2"]()
    layer = layer_stack(model)[2]
    attention, mlp = output_weights(layer)
    head, channels = 2, torch.tensor([5, 17, 40])
    width = WIDTH // HEADS
    attention[:, head * width : (head + 1) * width] *= 30
    mlp[:, channels] *= 1000
    (pruned,), _ = prune_layers(model, [2], 1 / HEADS, tokens())
    left_attention, left_mlp = output_weights(pruned)
    assert torch.equal(left_attention, attention[:, head * width : (head + 1) * width])
    assert kept_columns(mlp, left_mlp)[channels].all()


@torch.no_grad()
def test_a_channel_that_is_always_silent_goes_first() -> None:
    model = ARCHITECTURES["opt"]()
    layer = layer_stack(model)[3]
    layer.fc1.weight[7] = 0
    layer.fc1.bias[7] = -1
    layer.fc2.weight[:, 7] *= 1000
    (pruned,), _ = prune_layers(model, [3], 0.75, tokens())
    assert not kept_columns(layer.fc2.weight, pruned.fc2.weight)[7]


def test_a_model_in_half_precision_is_pruned_in_it(model: PreTrainedModel) -> None:
    layers, _ = prune_layers(model.bfloat16(), INDICES, 0.5, tokens())
    assert {parameter.dtype for layer in layers for parameter in layer.parameters()} == {torch.bfloat16}
    assert logits(with_layers(model, dict(zip(INDICES, layers, strict=True)))).isfinite().all()


@pytest.mark.parametrize("share", [0.0, -0.5, 1.01, float("nan")])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(UsageError, match="share"):
        prune_layers(ARCHITECTURES["opt"](), INDICES, share, tokens())


def test_no_layer_is_refused() -> None:
    with pytest.raises(UsageError, match="indices"):
        prune_layers(ARCHITECTURES["opt"](), [], 0.5, tokens())


def test_a_layer_whose_channels_depend_on_each_other_is_refused() -> None:
    model = ARCHITECTURES["gpt2"]()
    layer_stack(model)[1].mlp.act = nn.Softmax(dim=-1)
    with pytest.raises(ModelError, match="layer 1: GPT2Block"):
        prune_layers(model, [1], 0.5, tokens())
