"""Which linear map of a layer is for what, on every architecture and on layers of no known form."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from tuning_models import HEADS, WIDTH, empty_layers

from emutune.errors import ModelError
from emutune.tuning.layers import layer_stack
from emutune.tuning.sublayers import Sublayers, find_sublayers, linear_maps, weight_of, widths_of

_GATED = Sublayers(
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o_proj",
    ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down_proj",
)
EXPECTED = {
    "gpt2": Sublayers(("attn.c_attn",), "attn.c_proj", ("mlp.c_fc",), "mlp.c_proj"),
    "opt": Sublayers(
        ("self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj"), "self_attn.out_proj", ("fc1",), "fc2"
    ),
    "llama": _GATED,
    "mistral": _GATED,
    "qwen2": _GATED,
    "gpt_neox": Sublayers(
        ("attention.query_key_value",), "attention.dense", ("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h"
    ),
    "bloom": Sublayers(
        ("self_attention.query_key_value",),
        "self_attention.dense",
        ("mlp.dense_h_to_4h",),
        "mlp.dense_4h_to_h",
    ),
    "bert": Sublayers(
        ("attention.self.query", "attention.self.key", "attention.self.value"),
        "attention.output.dense",
        ("intermediate.dense",),
        "output.dense",
    ),
}


def test_every_linear_map_is_found_by_what_it_is_for(architecture: str, model: PreTrainedModel) -> None:
    for layer in layer_stack(model):
        assert find_sublayers(layer) == EXPECTED[architecture]


def test_layers_without_memory_are_as_good(architecture: str, model: PreTrainedModel) -> None:
    assert find_sublayers(empty_layers(model)[0]) == EXPECTED[architecture]


def test_an_mlp_as_narrow_as_the_layer_is_still_told_from_attention() -> None:
    config = GPT2Config(n_layer=1, n_embd=WIDTH, n_head=HEADS, n_inner=WIDTH, vocab_size=11, n_positions=8)
    assert find_sublayers(layer_stack(GPT2LMHeadModel(config))[0]) == EXPECTED["gpt2"]


@pytest.mark.parametrize("linear", [nn.Linear(3, 5), Conv1D(5, 3)])
def test_widths_are_those_of_input_and_output(linear: nn.Module) -> None:
    assert widths_of(linear) == (3, 5)
    inputs = torch.randn(2, 3)
    torch.testing.assert_close(linear(inputs), inputs @ weight_of(linear).T + linear.bias)


def test_maps_come_in_the_order_of_their_definition() -> None:
    layer = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Sequential(Conv1D(4, 3)), nn.Linear(4, 2))
    assert list(linear_maps(layer)) == ["0", "2.0", "3"]


@pytest.mark.parametrize(
    ("layer", "found"),
    [
        (nn.LayerNorm(4), "no linear map"),
        (nn.Linear(4, 4), "4->4"),
        (nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4)), "0 4->8, 1 8->4"),
        (nn.Sequential(nn.Linear(4, 12), nn.Linear(4, 4), nn.Linear(4, 16), nn.Linear(8, 4)), "2 4->16"),
        (nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)), nn.Linear(4, 8), nn.Linear(8, 6)), "5 8->6"),
    ],
    ids=["no map", "one map", "no attention", "fused gate", "other width"],
)
def test_a_layer_of_another_form_is_refused_with_what_was_found(layer: nn.Module, found: str) -> None:
    with pytest.raises(ModelError, match=found):
        find_sublayers(layer)
