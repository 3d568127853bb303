"""A model in one GGUF file is the model that transformers reads from it; what cannot be read is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from directories import TEXT, recipe, tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from emutune.errors import ModelError
from emutune.tuning.build import build_catalogue
from emutune.tuning.foundation import load_model, load_tokenizer, open_foundation

gguf = pytest.importorskip("gguf")

WIDTH, HEADS, CHANNELS, LAYERS = 32, 4, 64, 4
_MAPS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write(path: Path, *, architecture: str = "llama", packed: str = "F16") -> Path:
    """A tiny Llama with random weights as a GGUF file, its matrices of a number type."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    for add, value in (
        (writer.add_block_count, LAYERS),
        (writer.add_context_length, 64),
        (writer.add_embedding_length, WIDTH),
        (writer.add_feed_forward_length, CHANNELS),
        (writer.add_head_count, HEADS),
        (writer.add_head_count_kv, HEADS),
        (writer.add_layer_norm_rms_eps, 1e-5),
        (writer.add_rope_freq_base, 10000.0),
    ):
        add(value)
    _write_vocabulary(writer)
    kind = gguf.GGMLQuantizationType[packed]
    for name, weight in _weights().items():
        matrix = weight.ndim == 2 and packed != "F32"
        writer.add_tensor(
            name, gguf.quantize(weight, kind) if matrix else weight, raw_dtype=kind if matrix else None
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _write_vocabulary(writer: Any) -> None:
    made = tokenizer()
    vocabulary = made.get_vocab()
    names = sorted(vocabulary, key=lambda name: vocabulary[name])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(names)
    writer.add_token_types([3 if name in made.all_special_tokens else 1 for name in names])
    writer.add_token_merges(_merges(made))
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)


def _merges(made: Any) -> list[str]:
    return [" ".join(merge) for merge in json.loads(made.backend_tokenizer.to_str())["model"]["merges"]]


def _weights() -> dict[str, Any]:
    config = LlamaConfig(
        vocab_size=len(tokenizer()),
        hidden_size=WIDTH,
        intermediate_size=CHANNELS,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        initializer_range=0.2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    state = LlamaForCausalLM(config).state_dict()
    found = {
        "token_embd.weight": state["model.embed_tokens.weight"],
        "output_norm.weight": state["model.norm.weight"],
    }
    for index in range(LAYERS):
        for name, written in _MAPS.items():
            found[f"blk.{index}.{written}.weight"] = state[f"model.layers.{index}.{name}.weight"]
    return {name: tensor.numpy().astype(np.float32) for name, tensor in found.items()}


@torch.no_grad()
@pytest.mark.parametrize(("packed", "error"), [("F32", 0.0), ("F16", 0.0), ("Q8_0", 5e-3)])
def test_it_is_the_model_that_transformers_reads(packed: str, error: float, tmp_path: Path) -> None:
    path = write(tmp_path / "tiny.gguf", packed=packed)
    foundation = open_foundation(path)
    tokens = torch.arange(20)[None]
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)(
        tokens
    ).logits
    found = load_model(foundation)(tokens).logits
    assert float((found - expected).abs().max() / expected.abs().max()) <= error
    stored = {tensor.dtype for layer in foundation.layers for tensor in layer.values()}
    assert stored == {"F32" if packed == "F32" else "F16"}
    written = load_tokenizer(foundation.directory, foundation.config)
    assert written(TEXT)["input_ids"] == tokenizer()(TEXT)["input_ids"]


def test_a_catalogue_is_built_from_it(tmp_path: Path) -> None:
    path = write(tmp_path / "tiny.GGUF", packed="Q8_0")
    catalogue = build_catalogue(path, tmp_path / "catalogue", recipe("layer_drop"), TEXT)
    assert [emulator.retention for emulator in catalogue.emulators()] == [0.5, 1.0]
    assert "quantization_config" not in catalogue.info.config
    assert catalogue.info.config["architectures"] == ["LlamaForCausalLM"]


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"missing.gguf: cannot be read: No such file"):
        open_foundation(tmp_path / "missing.gguf")
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ModelError, match=r"damaged.gguf: no GGUF file, a damaged one") as caught:
        open_foundation(damaged)
    assert "\n" not in str(caught.value)
    unknown = write(tmp_path / "unknown.gguf", architecture="clip")
    with pytest.raises(ModelError, match=r"unknown.gguf: transformers cannot read this GGUF file: .*clip"):
        open_foundation(unknown)


def test_a_number_type_that_nobody_unpacks(tmp_path: Path) -> None:
    path = write(tmp_path / "tiny.gguf", packed="Q8_0")
    content = path.read_bytes()
    # Behind a tensor's name and widths stands its type; 8 is Q8_0, 99 is none.
    name = b"blk.0.ffn_up.weight"
    at = content.index(name) + len(name) + 4 + 2 * 8
    assert content[at : at + 4] == (8).to_bytes(4, "little")
    path.write_bytes(content[:at] + (99).to_bytes(4, "little") + content[at + 4 :])
    with pytest.raises(ModelError, match=r"a number type that the package gguf does not know: .*99"):
        open_foundation(path)
