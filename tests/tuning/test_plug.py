"""A plugged-in adapter is an ordinary model directory, for every kind of adapter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from directories import TEXT, catalogue_of
from peft import PeftModel
from transformers import AutoModelForCausalLM

from emutune.errors import AdapterError, UsageError
from emutune.tuning.adapters import AdapterManifest, attach, load_adapter, plug_in, save_adapter
from emutune.tuning.catalogue import Catalogue
from emutune.tuning.foundation import load_model, open_foundation
from emutune.tuning.layers import layer_stack
from emutune.tuning.plugging import plug

TOKENS = torch.arange(24).reshape(2, 12) + 5
KINDS = ("layers", "lora", "bottleneck")


@pytest.fixture(autouse=True)
def short_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's whole documentation is much for a tokenizer of 300 tokens."""
    monkeypatch.setattr("emutune.tuning.plugging.reference_text", lambda: TEXT)


def saved(catalogue: Catalogue, model: Path, path: Path, kind: str, spread: float) -> torch.Tensor:
    """Writes an adapter with random values; returns the logits of the model with it plugged in."""
    info = catalogue.info
    width = 0 if kind == "layers" else 4
    full = load_model(open_foundation(model))
    layers = {index: layer_stack(full)[index] for index in info.adapter_layers}
    parameters = attach(layers, kind, width)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    values = {
        name: parameter.detach() + spread * torch.randn(parameter.shape, generator=generator)
        for name, parameter in parameters.items()
    }
    manifest = AdapterManifest(
        base=info.base,
        layers=info.layers,
        layer_map=info.adapter_layers,
        kind=kind,  # type: ignore[arg-type]
        width=width,
        retention=0.5,
        emulator="tested",
    )
    save_adapter(path, manifest, values)
    again = load_model(open_foundation(model))
    plug_in(dict(enumerate(layer_stack(again))), manifest, values)
    with torch.no_grad():
        return again(input_ids=TOKENS).logits


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Catalogue]:
    directory = tmp_path_factory.mktemp("plug")
    catalogue = catalogue_of(directory, request.param)
    return directory / "model", catalogue


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spread", [0.0, 0.02])
def test_directory_holds_the_plugged_in_model(
    built: tuple[Path, Catalogue],
    kind: str,
    spread: float,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path_factory.getbasetemp() / "modules")
    )
    model, catalogue = built
    expected = saved(catalogue, model, tmp_path / "a.safetensors", kind, spread)
    # Code is imported under its directory's name, and once.
    out = tmp_path / f"{catalogue.config.model_type}-{kind}-{spread:g}".replace(".", "")
    plug(model, tmp_path / "a.safetensors", out)
    loaded = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=kind == "bottleneck")
    with torch.no_grad():
        logits = loaded.eval()(input_ids=TOKENS).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    if spread == 0:
        with torch.no_grad():
            plain = load_model(open_foundation(model))(input_ids=TOKENS).logits
        torch.testing.assert_close(logits, plain, rtol=1e-4, atol=1e-4)
    assert loaded.generate(TOKENS, max_new_tokens=3, do_sample=False).shape == (2, 15)


def test_a_worse_model_is_not_written(built: tuple[Path, Catalogue], tmp_path: Path) -> None:
    model, catalogue = built
    # The random Llama is so bad that random changes do not make it worse.
    spread = 3.0 if catalogue.config.model_type == "gpt2" else float("nan")
    saved(catalogue, model, tmp_path / "a.safetensors", "layers", spread)
    with pytest.raises(AdapterError, match="nothing was written"):
        plug(model, tmp_path / "a.safetensors", tmp_path / "out", TEXT)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_refusals(built: tuple[Path, Catalogue], tmp_path: Path) -> None:
    model, catalogue = built
    adapter = tmp_path / "a.safetensors"
    saved(catalogue, model, adapter, "lora", 0.0)
    with pytest.raises(UsageError, match="not empty"):
        plug(model, adapter, model, TEXT)
    with pytest.raises(AdapterError, match="was tuned on the model"):
        plug("reference", adapter, tmp_path / "out", TEXT)
    assert not (tmp_path / "out").exists()


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_peft_loads_lora_onto_the_whole_model(built: tuple[Path, Catalogue], tmp_path: Path) -> None:
    model, catalogue = built
    expected = saved(catalogue, model, tmp_path / "adapter.safetensors", "lora", 0.02)
    plug(model, tmp_path / "adapter.safetensors", tmp_path / "out", form="peft")
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    untouched = whole(input_ids=TOKENS).logits
    loaded = PeftModel.from_pretrained(whole, str(tmp_path / "out")).eval()
    found = loaded(input_ids=TOKENS).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, untouched, rtol=1e-3, atol=1e-3)
    changed = {name for name, _ in loaded.named_parameters() if "lora_" in name}
    assert len(changed) == len(load_adapter(tmp_path / "adapter.safetensors")[1])


@pytest.mark.parametrize("kind", ["layers", "bottleneck"])
def test_what_peft_cannot_hold_is_refused(built: tuple[Path, Catalogue], kind: str, tmp_path: Path) -> None:
    model, catalogue = built
    saved(catalogue, model, tmp_path / "adapter.safetensors", kind, 0.02)
    with pytest.raises(
        AdapterError, match=f"is of kind {kind}, which PEFT cannot hold; tune with --adapter lora"
    ):
        plug(model, tmp_path / "adapter.safetensors", tmp_path / "out", form="peft")
    assert not (tmp_path / "out").exists()
