"""Adapters that were tuned, plugged into their model directory and loaded without emutune."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from directories import TEXT, catalogue_of, generated_text
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from tuning_models import logits, tokens

from emutune.errors import AdapterError, UsageError
from emutune.tuning import plugging as module
from emutune.tuning.adapters import load_adapter, plug_in, save_adapter
from emutune.tuning.catalogue import Catalogue
from emutune.tuning.layers import layer_stack
from emutune.tuning.plugging import plug
from emutune.tuning.trainer import TrainerConfig
from emutune.tuning.tuner import TuneConfig, tune

KINDS = ("layers", "lora", "bottleneck")
TASK = generated_text(seed=7)
TRAINING = TrainerConfig(steps=4, batch=2, learning_rate=3e-3, score_every=2)

# Loads every directory, and says whether it needed emutune to do so.
PLAIN = """
import json, sys
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
tokens = torch.tensor(json.loads(sys.argv[1]))
found, loaded = {}, []
for directory in sys.argv[3:]:
    trusted = {"trust_remote_code": True} if directory.endswith("bottleneck") else {}
    model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True, **trusted)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    with torch.no_grad():
        found[directory] = model(input_ids=tokens).logits
    model.save_pretrained(directory + "-again")
    loaded.append(type(model).__name__)
save_file(found, sys.argv[2])
print(json.dumps([loaded, [name for name in sys.modules if name.partition(".")[0] == "emutune"]]))
"""


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Catalogue]:
    """A model directory, its catalogue, and a tuned adapter of every kind."""
    directory = tmp_path_factory.mktemp(request.param)
    catalogue = catalogue_of(directory, request.param)
    for kind in KINDS:
        config = TuneConfig(adapter=kind, width=4, training=TRAINING)  # type: ignore[arg-type]
        assert tune(catalogue, TASK, config, directory / f"{kind}.safetensors").accepted
    return directory, catalogue


def in_memory(catalogue: Catalogue, adapter: Path) -> torch.Tensor:
    model = catalogue.assemble(catalogue.base())
    plug_in(dict(enumerate(layer_stack(model))), *load_adapter(adapter))
    return logits(model)


def test_tuned_adapters_load_without_emutune(place: tuple[Path, Catalogue]) -> None:
    directory, catalogue = place
    for kind in KINDS:
        adapter = directory / f"{kind}.safetensors"
        plugged = plug(directory / "model", adapter, directory / kind, TASK)
        manifest, _ = load_adapter(adapter)
        assert plugged.after < plugged.before
        assert plugged.after == pytest.approx(manifest.perplexity, rel=1e-4)
    ended = subprocess.run(
        [sys.executable, "-c", PLAIN, json.dumps(tokens().tolist()), "logits.safetensors", *KINDS],
        capture_output=True,
        text=True,
        cwd=directory,
        env=os.environ | {"HF_MODULES_CACHE": str(directory / "modules"), "HF_HUB_OFFLINE": "1"},
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    names, imported = json.loads(ended.stdout.splitlines()[-1])
    assert imported == []
    assert names[2] == names[0] + "WithBottlenecks"
    found, before = load_file(directory / "logits.safetensors"), logits(catalogue.assemble(catalogue.base()))
    for kind in KINDS:
        expected = in_memory(catalogue, directory / f"{kind}.safetensors")
        assert not torch.allclose(expected, before, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found[kind], expected, rtol=1e-4, atol=1e-4)
    for kind in ("layers", "lora"):
        again = AutoModelForCausalLM.from_pretrained(directory / f"{kind}-again")
        torch.testing.assert_close(logits(again), found[kind])
        tokenizer = AutoTokenizer.from_pretrained(directory / kind)
        said = again.generate(
            **tokenizer("the server", return_tensors="pt"), max_new_tokens=4, do_sample=False
        )
        assert tokenizer.decode(said[0]).startswith("the server")


def test_nothing_half_written_stays(
    place: tuple[Path, Catalogue], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, _ = place
    # What was left by a process that was killed is no obstacle.
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "model.safetensors").write_bytes(b"half")

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module, "_add_code", fail)
        with pytest.raises(UsageError, match=r"cannot be written .*No space left"):
            plug(directory / "model", directory / "bottleneck.safetensors", tmp_path / "out", TASK)
    assert not list(tmp_path.iterdir())
    (tmp_path / "out").mkdir()
    plug(directory / "model", directory / "lora.safetensors", tmp_path / "out", TASK)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_worse_or_broken_adapters_are_not_written(place: tuple[Path, Catalogue], tmp_path: Path) -> None:
    directory, _ = place
    manifest, values = load_adapter(directory / "lora.safetensors")
    # Against the direction that made it better, or no number at all.
    for factor in (-10.0, float("nan")):
        adapter = tmp_path / "adapter.safetensors"
        save_adapter(adapter, manifest, {n: factor * v if "lora_B" in n else v for n, v in values.items()})
        with pytest.raises(AdapterError, match="nothing was written"):
            plug(directory / "model", adapter, tmp_path / "out", TASK)
        assert [path.name for path in tmp_path.iterdir()] == ["adapter.safetensors"]


def test_adapter_of_another_model_is_refused(place: tuple[Path, Catalogue], tmp_path: Path) -> None:
    directory, _ = place
    other = tmp_path / "model"
    other.mkdir()
    for file in (directory / "model").iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    weights = load_file(other / "model.safetensors")
    name = next(name for name, weight in weights.items() if weight.ndim == 2)
    save_file(weights | {name: 2 * weights[name]}, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(AdapterError, match="was tuned on the model"):
        plug(other, directory / "lora.safetensors", tmp_path / "out", TASK)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_out_that_is_in_use_is_refused(place: tuple[Path, Catalogue], tmp_path: Path) -> None:
    directory, _ = place
    (tmp_path / "file").write_text(TEXT)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    for name in ("file", "full"):
        with pytest.raises(UsageError, match="is there already"):
            plug(directory / "model", directory / "lora.safetensors", tmp_path / name, TASK)
    assert (tmp_path / "full" / "mine").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full"]
