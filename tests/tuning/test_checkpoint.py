"""What a directory holds is what transformers would load of it, or is refused with the reason, in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from directories import TEXT, built, catalogue_of, model_directory, recipe
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel
from tuning_models import LAYERS, logits

from emutune.errors import ModelError
from emutune.tuning.build import build_catalogue
from emutune.tuning.foundation import load_model, open_foundation
from emutune.tuning.perplexity import perplexity
from emutune.tuning.text import block_length, pack, split_blocks

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
HEADS = {
    "gpt2": ("lm_head.weight", "transformer.wte.weight"),
    "qwen2": ("lm_head.weight", "model.embed_tokens.weight"),
    "bert": ("cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
}


def change_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_weights(directory: Path, **changes: torch.Tensor | None) -> None:
    """Add, change or, if None, remove tensors; their names have colons for points."""
    path = directory / WEIGHTS
    tensors: dict[str, Any] = load_file(path) | {n.replace(":", "."): v for n, v in changes.items()}
    save_file(
        {name: tensor for name, tensor in tensors.items() if tensor is not None}, path, {"format": "pt"}
    )


def named(name: str) -> str:
    return name.replace(".", ":")


def of_transformers(directory: Path) -> PreTrainedModel:
    masked = "ForMaskedLM" in (directory / "config.json").read_text()
    factory = AutoModelForMaskedLM if masked else AutoModelForCausalLM
    return factory.from_pretrained(directory, dtype=torch.float32).eval()


def check_same(directory: Path) -> torch.Tensor:
    """Logits of the model, which are those of transformers' model, to the bit."""
    found = logits(load_model(open_foundation(directory)))
    assert torch.equal(found, logits(of_transformers(directory)))
    return found


@pytest.mark.parametrize("architecture", HEADS)
def test_head_of_its_own_under_a_tied_flag_is_used(architecture: str, tmp_path: Path) -> None:
    source = model_directory(tmp_path / "model", architecture)
    head, embedding = HEADS[architecture]
    tied = check_same(source)
    other = torch.randn(load_file(source / WEIGHTS)[embedding].shape)
    change_weights(source, **{named(head): other})
    own = check_same(source)
    assert not torch.allclose(own, tied)
    catalogue = build_catalogue(source, tmp_path / "catalogue", recipe(retentions=(0.5, 1.0)), TEXT)
    assert torch.equal(logits(catalogue.assemble(catalogue.base())), own)
    assert catalogue.emulators()[1].perplexity == pytest.approx(_perplexity(catalogue), rel=1e-5)


def _perplexity(catalogue: Any) -> float:
    tokenizer = catalogue.tokenizer()
    blocks = split_blocks(pack(TEXT, tokenizer), block_length(catalogue.config))["validation"].first(32)
    model = catalogue.assemble(catalogue.base())
    return perplexity(model, blocks, mask_token=tokenizer.mask_token_id, batch=8)


@pytest.mark.parametrize("architecture", HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_head_stored_twice_stays_tied(architecture: str, dtype: torch.dtype, tmp_path: Path) -> None:
    source = model_directory(tmp_path, architecture)
    head, embedding = HEADS[architecture]
    rounded = load_file(source / WEIGHTS)[embedding].bfloat16()
    change_weights(source, **{named(embedding): rounded.float(), named(head): rounded.to(dtype)})
    check_same(source)
    assert head not in open_foundation(source).outer


@pytest.mark.parametrize("architecture", HEADS)
def test_embedding_stored_as_the_head_alone_is_found(architecture: str, tmp_path: Path) -> None:
    source = model_directory(tmp_path, architecture)
    head, embedding = HEADS[architecture]
    change_weights(source, **{named(head): load_file(source / WEIGHTS)[embedding], named(embedding): None})
    check_same(source)


def test_whole_file_comes_before_an_index(tmp_path: Path) -> None:
    source = model_directory(tmp_path, shard_size="20KB")
    for shard in source.glob("model-*.safetensors"):
        save_file({name: 1.5 * tensor for name, tensor in load_file(shard).items()}, shard, {"format": "pt"})
    sharded = check_same(source)
    built("gpt2").save_pretrained(tmp_path / "whole")
    (tmp_path / "whole" / WEIGHTS).rename(source / WEIGHTS)
    assert (source / INDEX).exists()
    assert not torch.allclose(check_same(source), sharded)


def test_shards_are_read_where_the_index_says(tmp_path: Path) -> None:
    source = model_directory(tmp_path, shard_size="60KB")
    index = json.loads((source / INDEX).read_text())
    (source / "parts").mkdir()
    for name in set(index["weight_map"].values()):
        (source / name).rename(source / "parts" / name)
    index["weight_map"] = {key: f"parts/{name}" for key, name in index["weight_map"].items()}
    (source / INDEX).write_text(json.dumps(index))
    check_same(source)
    index["weight_map"] = dict.fromkeys(index["weight_map"], "../elsewhere.safetensors")
    (source / INDEX).write_text(json.dumps(index))
    with pytest.raises(ModelError, match="outside"):
        open_foundation(source)


def test_files_that_transformers_passes_by_are_passed_by(tmp_path: Path) -> None:
    source = model_directory(tmp_path)
    before = check_same(source)
    tensors = {name: 2 * tensor for name, tensor in load_file(source / WEIGHTS).items()}
    save_file(tensors, source / "model.fp16.safetensors", {"format": "pt"})
    torch.save(tensors, source / "pytorch_model.bin")
    # What the model has no place for, such as a layer too many, transformers leaves out.
    change_weights(source, **{f"transformer:h:{LAYERS}:ln_1:bias": torch.ones(32)})
    assert torch.equal(check_same(source), before)


@pytest.mark.parametrize("name", ["model.fp16.safetensors", "pytorch_model.bin", "model-q4.gguf"])
def test_other_files_of_weights_are_named(name: str, tmp_path: Path) -> None:
    source = model_directory(tmp_path)
    (source / WEIGHTS).rename(source / name)
    with pytest.raises(ModelError, match=rf"model\.safetensors: missing \(there is {name}\)"):
        open_foundation(source)


def test_weights_of_another_name_are_those_of_the_configuration(tmp_path: Path) -> None:
    source = model_directory(tmp_path)
    tensors = {name: 2 * tensor for name, tensor in load_file(source / WEIGHTS).items()}
    save_file(tensors, source / "other.safetensors", {"format": "pt"})
    change_config(source, transformers_weights="other.safetensors")
    check_same(source)


QUANTISED = {
    "fp8": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "bitsandbytes, 4bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "bitsandbytes, 8bit": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    **{name: {"quant_method": name} for name in ("gptq", "awq", "compressed-tensors", "mxfp4", "a-new-one")},
    "no quant_method given": {},
}


@pytest.mark.parametrize("place", ["quantization_config", "compression_config", "text_config"])
@pytest.mark.parametrize("method", QUANTISED)
def test_quantised_models_are_refused_by_method(method: str, place: str, tmp_path: Path) -> None:
    source = model_directory(tmp_path)
    settings = QUANTISED[method]
    change_config(
        source, **{place: {"quantization_config": settings} if place == "text_config" else settings}
    )
    # A configuration that transformers itself could not read is no reason to say something else.
    change_config(source, model_type="no such")
    with pytest.raises(ModelError) as refused:
        open_foundation(source)
    assert f"the weights are quantised ({method})" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_no_quantisation_is_none(tmp_path: Path) -> None:
    source = model_directory(tmp_path)
    change_config(source, quantization_config=None)
    open_foundation(source)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.uint8])
def test_quantised_weights_that_no_configuration_names_are_refused(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    source = model_directory(tmp_path)
    name = "transformer.h.1.mlp.c_fc.weight"
    change_weights(source, **{named(name): load_file(source / WEIGHTS)[name].to(dtype)})
    with pytest.raises(ModelError, match=rf"{name} is stored as .*, a quantised weight"):
        open_foundation(source)


def test_adapter_beside_the_model_is_refused(tmp_path: Path) -> None:
    source = model_directory(tmp_path)
    (source / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"adapter_config\.json: a PEFT adapter .*merge_and_unload"):
        open_foundation(source)


def test_files_of_several_ranks_are_refused(tmp_path: Path) -> None:
    source = model_directory(tmp_path)
    (source / "shard-00000-model-00001-of-00001.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="distributed checkpoint"):
        open_foundation(source)


def test_model_with_code_of_its_own_is_refused(tmp_path: Path) -> None:
    source = model_directory(tmp_path)
    change_config(source, architectures=["GPT2LMHeadModelWithBottlenecks"])
    with pytest.raises(ModelError, match="GPT2LMHeadModelWithBottlenecks is no class of transformers"):
        open_foundation(source)
    change_config(source, architectures=None, model_type="mine", auto_map={"AutoConfig": "mine.Config"})
    with pytest.raises(ModelError, match=r"config\.json: cannot be understood"):
        open_foundation(source)


def test_a_librarys_message_is_one_whole_line(tmp_path: Path) -> None:
    source = model_directory(tmp_path)
    change_config(source, n_embd="wide")
    with pytest.raises(ModelError) as refused:
        open_foundation(source)
    assert "\n" not in str(refused.value)
    assert "wide" in str(refused.value)


def test_emulators_keep_the_number_types_of_their_layers(tmp_path: Path) -> None:
    source = model_directory(tmp_path / "model")
    name = "transformer.h.2.ln_1.weight"
    # The first tensor of a layer's shard says nothing about the others.
    change_weights(source, **{named("transformer.h.2.attn.c_attn.bias"): torch.zeros(96).bfloat16()})
    catalogue = catalogue_of(tmp_path, made=recipe("prune", retentions=(0.5,)))
    entry = next(layer for layer in catalogue.emulators()[0].layers if layer.index == 2)
    shard = catalogue.load_shard(entry.shard.sha256)
    assert shard["ln_1.weight"].dtype == load_file(source / WEIGHTS)[name].dtype == torch.float32
    assert shard["attn.c_attn.bias"].dtype == torch.bfloat16
