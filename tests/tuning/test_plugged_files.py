"""A plugged-in directory is the one that was given, but for the tensors that the adapter changed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from directories import TEXT, model_directory
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_checkpoint import HEADS, change_weights, named, of_transformers
from tuning_models import LAYERS, logits

from emutune.tuning.adapters import AdapterManifest, attach, load_adapter, plug_in, save_adapter
from emutune.tuning.foundation import base_hash, load_model, open_foundation
from emutune.tuning.layers import layer_stack
from emutune.tuning.plugging import plug

GENERATION = {"eos_token_id": [2, 7], "pad_token_id": 0, "do_sample": True, "temperature": 0.6, "top_p": 0.9}
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(autouse=True)
def short_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("emutune.tuning.plugging.reference_text", lambda: TEXT)


def adapter_for(source: Path, kind: Any, path: Path) -> None:
    """Writes a random adapter of the outermost layers of a model."""
    foundation = open_foundation(source)
    outermost = (0, LAYERS - 1)
    stack = layer_stack(load_model(foundation))
    parameters = attach({index: stack[index] for index in outermost}, kind, 0 if kind == "layers" else 4)
    torch.manual_seed(1)
    values = {n: p.detach() + 0.02 * torch.randn(p.shape) for n, p in parameters.items()}
    manifest = AdapterManifest(
        base=base_hash(foundation),
        layers=LAYERS,
        layer_map=outermost,
        kind=kind,
        width=0 if kind == "layers" else 4,
        retention=0.5,
        emulator="tested",
    )
    save_adapter(path, manifest, values)


def plugged(source: Path, kind: str, tmp_path: Path) -> Path:
    adapter_for(source, kind, tmp_path / "a.safetensors")
    plug(source, tmp_path / "a.safetensors", tmp_path / "out")
    return tmp_path / "out"


def stored(directory: Path) -> dict[str, torch.Tensor]:
    return {n: t for path in sorted(directory.glob("*.safetensors")) for n, t in load_file(path).items()}


@pytest.mark.parametrize("kind", ["layers", "lora"])
def test_all_other_files_are_those_that_were_given(kind: str, tmp_path: Path) -> None:
    source = model_directory(tmp_path / "model")
    given = {
        "generation_config.json": json.dumps(GENERATION),
        "chat_template.jinja": "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}",
        "LICENSE": "yours",
        "additional_chat_templates/tools.jinja": "{{ tools }}",
    }
    (source / "additional_chat_templates").mkdir()
    for name, text in given.items():
        (source / name).write_text(text)
    # Weights that transformers passes by would be those of another model.
    for name in ("pytorch_model.bin", "model.fp16.safetensors", INDEX):
        (source / name).write_text("old")
    (source / ".cache").mkdir()
    out = plugged(source, kind, tmp_path)
    names = {os.fspath(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    assert names == {"config.json", "tokenizer.json", "tokenizer_config.json", WEIGHTS, *given}
    for name in names - {WEIGHTS}:
        assert (out / name).read_bytes() == (source / name).read_bytes()
    assert of_transformers(out).generation_config.eos_token_id == [2, 7]


@pytest.mark.parametrize("kind", ["layers", "lora", "bottleneck"])
@pytest.mark.parametrize("shard_size", ["1GB", "20KB"])
def test_every_tensor_keeps_its_type_and_most_their_bits(kind: str, shard_size: str, tmp_path: Path) -> None:
    source = model_directory(tmp_path / "model", shard_size=shard_size)
    for path in source.glob("*.safetensors"):
        mixed = {n: t.bfloat16() if "wte" in n or "h.0.mlp" in n else t for n, t in load_file(path).items()}
        mixed |= {n: t.double() + 1e-12 for n, t in mixed.items() if "h.0.ln_1" in n}
        # The model has no place for it, but whoever gave it has.
        save_file(mixed | {f"extra.{len(mixed)}": torch.arange(3)}, path, {"format": "pt", "mine": "yes"})
    before = stored(source)
    out = plugged(source, kind, tmp_path)
    after = stored(out)
    plain = {
        n.replace("c_proj.base.", "c_proj."): t
        for n, t in after.items()
        if ".down." not in n and ".up." not in n
    }
    assert {n: t.dtype for n, t in plain.items()} == {n: t.dtype for n, t in before.items()}
    changed = {name for name in before if not torch.equal(before[name], plain[name])}
    outermost = {name for name in before if ".h.0." in name or f".h.{LAYERS - 1}." in name}
    maps = {name for name in outermost if name.endswith("weight") and "ln_" not in name}
    assert changed == {"layers": outermost, "lora": maps, "bottleneck": set()}[kind]
    added = {name: tensor.dtype for name, tensor in after.items() if ".down." in name or ".up." in name}
    assert len(added) == (16 if kind == "bottleneck" else 0)
    for name, dtype in added.items():
        assert dtype == (torch.bfloat16 if ".h.0.mlp" in name else torch.float32)
    with safe_open(next(out.glob("*.safetensors")), "pt") as file:
        assert file.metadata() == {"format": "pt", "mine": "yes"}


@pytest.mark.parametrize("kind", ["lora", "bottleneck"])
def test_index_names_what_the_shards_hold(kind: str, tmp_path: Path) -> None:
    source = model_directory(tmp_path / "model", shard_size="20KB")
    out = plugged(source, kind, tmp_path)
    index = json.loads((out / INDEX).read_text())
    held = {n: path.name for path in out.glob("*.safetensors") for n in load_file(path)}
    assert index["weight_map"] == held
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in stored(out).values())


def test_names_in_the_file_stay(tmp_path: Path) -> None:
    source = model_directory(tmp_path / "model")
    names = load_file(source / WEIGHTS)
    bare = {name.removeprefix("transformer."): tensor for name, tensor in names.items()}
    save_file(bare, source / WEIGHTS, {"format": "pt"})
    assert stored(plugged(source, "layers", tmp_path)).keys() == bare.keys()


@pytest.mark.parametrize("architecture", HEADS)
def test_head_of_its_own_is_kept(architecture: str, tmp_path: Path) -> None:
    source = model_directory(tmp_path / "model", architecture)
    head, embedding = HEADS[architecture]
    other = 0.2 * torch.randn(load_file(source / WEIGHTS)[embedding].shape)
    change_weights(source, **{named(head): other})
    out = plugged(source, "layers", tmp_path)
    assert torch.equal(stored(out)[head], other)
    model = load_model(open_foundation(source))
    plug_in(dict(enumerate(layer_stack(model))), *load_adapter(tmp_path / "a.safetensors"))
    torch.testing.assert_close(logits(of_transformers(out)), logits(model), rtol=1e-5, atol=1e-5)


def test_directory_inside_the_models_own(tmp_path: Path) -> None:
    source = model_directory(tmp_path)
    adapter_for(source, "lora", source / "a.safetensors")
    plug(source, source / "a.safetensors", source / "tuned")
    assert (source / "tuned" / WEIGHTS).exists()
    assert not (source / "tuned" / "a.safetensors").exists()
    assert not (source / "tuned" / "tuned").exists()
