"""Tiny models with random weights, one of each architecture that the tuning room is tested on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from emutune.tuning.layers import layer_stack, replace_stack, stack_name, view

LAYERS = 6
WIDTH = 32
HEADS = 4
VOCABULARY = 97
POSITIONS = 64
MASK_TOKEN = 3

# So wide that every layer, and every head of it, changes what the model says.
_SPREAD = 0.2
_ROTARY = {
    "num_hidden_layers": LAYERS,
    "hidden_size": WIDTH,
    "num_attention_heads": HEADS,
    "intermediate_size": 2 * WIDTH,
    "max_position_embeddings": POSITIONS,
}


def _built(architecture: type[PreTrainedModel], config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model = architecture(config)
    with torch.no_grad():
        for parameter in model.parameters():
            # Biases and norms start at constants, which would hide a bias that is lost or cut wrongly.
            if parameter.ndim == 1:
                parameter.add_(_SPREAD * torch.randn_like(parameter))
    return model.eval()


def _common(vocabulary: int) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary,
        "initializer_range": _SPREAD,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }


def tokens(rows: int = 3, length: int = 12, seed: int = 0) -> torch.Tensor:
    """Random tokens, none of them special: int64 (rows, length)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(MASK_TOKEN + 1, VOCABULARY, (rows, length), generator=generator)


ARCHITECTURES: dict[str, Callable[..., PreTrainedModel]] = {
    "gpt2": lambda vocabulary=VOCABULARY: _built(
        GPT2LMHeadModel,
        GPT2Config(n_layer=LAYERS, n_embd=WIDTH, n_head=HEADS, n_positions=POSITIONS, **_common(vocabulary)),
    ),
    "opt": lambda vocabulary=VOCABULARY: _built(
        OPTForCausalLM,
        OPTConfig(
            num_hidden_layers=LAYERS,
            hidden_size=WIDTH,
            word_embed_proj_dim=WIDTH,
            num_attention_heads=HEADS,
            ffn_dim=2 * WIDTH,
            max_position_embeddings=POSITIONS,
            init_std=_SPREAD,
            **_common(vocabulary),
        ),
    ),
    "llama": lambda vocabulary=VOCABULARY: _built(
        LlamaForCausalLM,
        LlamaConfig(num_key_value_heads=2, tie_word_embeddings=False, **_ROTARY, **_common(vocabulary)),
    ),
    "mistral": lambda vocabulary=VOCABULARY: _built(
        MistralForCausalLM, MistralConfig(num_key_value_heads=HEADS, **_ROTARY, **_common(vocabulary))
    ),
    "qwen2": lambda vocabulary=VOCABULARY: _built(
        Qwen2ForCausalLM,
        Qwen2Config(num_key_value_heads=2, tie_word_embeddings=True, **_ROTARY, **_common(vocabulary)),
    ),
    "gpt_neox": lambda vocabulary=VOCABULARY: _built(
        GPTNeoXForCausalLM, GPTNeoXConfig(**_ROTARY, **_common(vocabulary))
    ),
    "bloom": lambda vocabulary=VOCABULARY: _built(
        BloomForCausalLM, BloomConfig(n_layer=LAYERS, hidden_size=WIDTH, n_head=HEADS, **_common(vocabulary))
    ),
    "bert": lambda vocabulary=VOCABULARY: _built(
        BertForMaskedLM, BertConfig(**_ROTARY, **_common(vocabulary))
    ),
}


def empty_layers(model: PreTrainedModel) -> torch.nn.ModuleList:
    """The layers as a loader builds them: from the configuration, without memory."""
    with torch.device("meta"):
        return layer_stack(type(model)(model.config)).eval()


def with_layers(model: PreTrainedModel, layers: Mapping[int, torch.nn.Module]) -> PreTrainedModel:
    """A view of a model in which some layers are replaced."""
    changed = view(model)
    stack = [layers.get(index, layer) for index, layer in enumerate(layer_stack(changed))]
    replace_stack(changed, stack_name(changed), stack)
    return changed


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    """What a model says about the random tokens: (rows, length, vocabulary)."""
    return model(input_ids=tokens()).logits


def stored_bytes(*modules: torch.nn.Module) -> int:
    """Bytes of the state dicts."""
    return sum(tensor.nbytes for module in modules for tensor in module.state_dict().values())
