"""A model read layer by layer is the model that transformers loads; a damaged directory is refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from directories import built, model_directory, tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel
from tuning_models import LAYERS, logits

from emutune.errors import ModelError
from emutune.tuning.foundation import base_hash, load_model, load_tokenizer, open_foundation

INDEX = "model.safetensors.index.json"


def expected_logits(directory: Path, architecture: str) -> torch.Tensor:
    factory = AutoModelForMaskedLM if architecture == "bert" else AutoModelForCausalLM
    return logits(factory.from_pretrained(directory, dtype=torch.float32).eval())


def rewrite(directory: Path, names: dict[str, str]) -> None:
    """Store tensors under other names; those with an empty one go."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    renamed = {names.get(name, name): tensor for name, tensor in tensors.items()}
    save_file({name: tensor for name, tensor in renamed.items() if name}, path, {"format": "pt"})


@pytest.mark.parametrize("shard_size", ["1GB", "20KB"])
def test_model_is_that_of_transformers(architecture: str, shard_size: str, tmp_path: Path) -> None:
    model_directory(tmp_path, architecture, shard_size)
    assert (tmp_path / INDEX).exists() == (shard_size == "20KB")
    model = load_model(open_foundation(tmp_path))
    assert torch.equal(logits(model), expected_logits(tmp_path, architecture))
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.training


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single(dtype: torch.dtype, tmp_path: Path) -> None:
    built("llama").to(dtype).save_pretrained(tmp_path)
    assert torch.equal(logits(load_model(open_foundation(tmp_path))), expected_logits(tmp_path, "llama"))


def test_names_without_the_base_models_prefix_are_found(tmp_path: Path) -> None:
    model_directory(tmp_path)
    expected = expected_logits(tmp_path, "gpt2")
    names = load_file(tmp_path / "model.safetensors")
    rewrite(tmp_path, {name: name.removeprefix("transformer.") for name in names})
    assert torch.equal(logits(load_model(open_foundation(tmp_path))), expected)


def test_old_names_of_norms_are_found(tmp_path: Path) -> None:
    model_directory(tmp_path, "bert")
    expected = expected_logits(tmp_path, "bert")
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    names = {}
    for name in load_file(tmp_path / "model.safetensors"):
        for new, before in old.items():
            if name.endswith(new):
                names[name] = name.replace(new, before)
    assert len(names) >= 2 * LAYERS
    rewrite(tmp_path, names)
    assert torch.equal(logits(load_model(open_foundation(tmp_path))), expected)


@pytest.mark.parametrize(("architecture", "tied"), [("gpt2", True), ("llama", False)])
def test_untied_heads_are_read_and_tied_ones_shared(architecture: str, tied: bool, tmp_path: Path) -> None:
    foundation = open_foundation(model_directory(tmp_path, architecture))
    assert ("lm_head.weight" in foundation.outer) != tied
    model: PreTrainedModel = load_model(foundation)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert (head.weight is embedding.weight) == tied


def test_hash_is_that_of_the_weights(tmp_path: Path) -> None:
    whole, sharded = tmp_path / "whole", tmp_path / "sharded"
    before = base_hash(open_foundation(model_directory(whole)))
    assert base_hash(open_foundation(model_directory(sharded, shard_size="20KB"))) == before
    tensors = load_file(whole / "model.safetensors")
    tensors["transformer.h.3.ln_1.bias"][0] += 1
    save_file(tensors, whole / "model.safetensors", {"format": "pt"})
    assert base_hash(open_foundation(whole)) != before


def test_directory_without_a_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json"):
        open_foundation(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json: cannot be understood"):
        open_foundation(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "resnet", "architectures": None},
        {"n_head": 5},
        {"n_embd": "wide"},
        {"model_type": "no such"},
    ],
)
def test_configuration_that_describes_no_language_model_is_refused(
    changes: dict[str, object], tmp_path: Path
) -> None:
    path = model_directory(tmp_path) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ModelError, match=r"config\.json"):
        open_foundation(tmp_path)


def test_directory_without_safetensors_is_refused(tmp_path: Path) -> None:
    path = model_directory(tmp_path) / "model.safetensors"
    path.rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"model\.safetensors: missing"):
        open_foundation(tmp_path)


@pytest.mark.parametrize("left", [0, 5, 2000, -1])
def test_truncated_weights_are_refused(left: int, tmp_path: Path) -> None:
    path = model_directory(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(ModelError, match=r"model\.safetensors: truncated or damaged"):
        open_foundation(tmp_path)


def test_missing_shard_is_refused(tmp_path: Path) -> None:
    model_directory(tmp_path, shard_size="20KB")
    lost = sorted(tmp_path.glob("*.safetensors"))[7]
    lost.unlink()
    with pytest.raises(ModelError, match=f"{lost.name}: missing"):
        open_foundation(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'])
def test_damaged_index_is_refused(content: str, tmp_path: Path) -> None:
    (model_directory(tmp_path, shard_size="20KB") / INDEX).write_text(content)
    with pytest.raises(ModelError, match=r"index\.json: damaged"):
        open_foundation(tmp_path)


def test_shard_that_goes_while_reading_is_refused(tmp_path: Path) -> None:
    foundation = open_foundation(model_directory(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model\.safetensors: missing or damaged"):
        load_model(foundation)


def test_missing_tensor_is_refused(tmp_path: Path) -> None:
    rewrite(model_directory(tmp_path), {"transformer.h.2.mlp.c_fc.bias": ""})
    with pytest.raises(ModelError, match=r"the weights lack transformer\.h\.2\.mlp\.c_fc\.bias"):
        open_foundation(tmp_path)


def test_tensor_of_another_shape_is_refused(tmp_path: Path) -> None:
    path = model_directory(tmp_path) / "model.safetensors"
    tensors = load_file(path)
    tensors["transformer.h.2.ln_1.bias"] = torch.zeros(5)
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ModelError, match=r"h\.2\.ln_1\.bias is \[5\], but the configuration makes .* \[32\]"):
        open_foundation(tmp_path)


def test_tokenizer_is_read(tmp_path: Path) -> None:
    loaded = load_tokenizer(model_directory(tmp_path), built("gpt2").config)
    assert loaded("the emulator")["input_ids"] == tokenizer()("the emulator")["input_ids"]
    assert loaded.mask_token_id == tokenizer().mask_token_id


def test_directory_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    built("gpt2").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="tokenizer"):
        load_tokenizer(tmp_path, built("gpt2").config)
    tokenizer().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="tokenizer"):
        load_tokenizer(tmp_path, built("gpt2").config)


def test_tokenizer_without_a_vocabulary_is_refused(tmp_path: Path) -> None:
    path = model_directory(tmp_path) / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"] |= {"vocab": {}, "merges": []}
    path.write_text(json.dumps(content))
    with pytest.raises(ModelError, match=f"{tmp_path}: .*tokenizer"):
        load_tokenizer(tmp_path, built("gpt2").config)
    shutil.rmtree(tmp_path)
    with pytest.raises(ModelError, match="tokenizer"):
        load_tokenizer(tmp_path, built("gpt2").config)
