"""Adapters change nothing before training, are one object in emulator and model, and know where they belong."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel
from tuning_models import LAYERS, MASK_TOKEN, logits, tokens

from emutune.errors import AdapterError
from emutune.tuning import adapters as module
from emutune.tuning.adapter_manifest import shapes_at
from emutune.tuning.adapters import (
    AdapterManifest,
    Kind,
    adapter_form,
    attach,
    check_belongs,
    copy_values,
    load_adapter,
    merge_lora,
    plug_in,
    save_adapter,
)
from emutune.tuning.bottleneck import Bottleneck
from emutune.tuning.head_loss import training_loss
from emutune.tuning.layers import keep_layers, layer_stack

KINDS: tuple[Kind, ...] = ("layers", "lora", "bottleneck")
LAYER_MAP = (0, 5)
KEPT = (0, 2, 5)


def adapter_layers(model: PreTrainedModel) -> dict[int, nn.Module]:
    return {index: layer_stack(model)[index] for index in LAYER_MAP}


def manifest(kind: Kind = "lora", width: int = 3) -> AdapterManifest:
    return AdapterManifest(
        base="a" * 64,
        layers=LAYERS,
        layer_map=LAYER_MAP,
        kind=kind,
        width=width,
        retention=0.5,
        emulator="layer_drop-importance-0.5000",
    )


def trained(model: PreTrainedModel, kind: Kind) -> dict[str, nn.Parameter]:
    """A trained adapter: every number of it is another than before."""
    parameters = attach(adapter_layers(model), kind, 3)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return parameters


@pytest.mark.parametrize("kind", KINDS)
def test_attaching_changes_nothing(kind: Kind, model: PreTrainedModel) -> None:
    model.requires_grad_(False)
    before = logits(model)
    parameters = attach(adapter_layers(model), kind, 3)
    assert torch.equal(logits(model), before)
    assert parameters
    assert {int(name.partition(".")[0]) for name in parameters} == set(LAYER_MAP)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {id(parameter) for parameter in parameters.values()} == {id(parameter) for parameter in trainable}


@pytest.mark.parametrize("kind", KINDS)
def test_training_in_the_emulator_is_plugging_in(kind: Kind, model: PreTrainedModel) -> None:
    model.requires_grad_(False)
    parameters = attach(adapter_layers(model), kind, 3)
    emulator = keep_layers(model, KEPT)
    before, before_small = logits(model), logits(emulator)
    loss = training_loss(emulator, MASK_TOKEN)
    optimizer = torch.optim.SGD(parameters.values(), lr=0.1)
    for step in range(2):
        optimizer.zero_grad()
        loss(tokens(), step).backward()
        optimizer.step()
    assert not torch.allclose(logits(emulator), before_small)
    assert not torch.allclose(logits(model), before)
    # The layers of the emulator are the model's own.
    assert torch.equal(logits(keep_layers(model, KEPT)), logits(emulator))


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_gets_a_gradient(kind: Kind, model: PreTrainedModel) -> None:
    model.requires_grad_(False)
    parameters = trained(model, kind)
    training_loss(model, MASK_TOKEN)(tokens(), 0).backward()
    # A bias of keys alone cannot change what attention looks at.
    lost = [name for name, p in parameters.items() if p.grad is None or not p.grad.any()]
    assert all("bias" in name for name in lost)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_adapter_plugs_in_elsewhere(kind: Kind, model: PreTrainedModel, tmp_path: Path) -> None:
    model.requires_grad_(False)
    other = copy.deepcopy(model)
    parameters = trained(model, kind)
    save_adapter(tmp_path / "new" / "adapter.safetensors", manifest(kind), parameters)
    found, values = load_adapter(tmp_path / "new" / "adapter.safetensors")
    assert found == manifest(kind)
    assert values.keys() == parameters.keys()
    plugged = plug_in(adapter_layers(other), found, values)
    assert plugged.keys() == parameters.keys()
    assert torch.equal(logits(other), logits(model))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [1, 2, 7])
def test_the_form_says_what_attaching_makes(kind: Kind, width: int, model: PreTrainedModel) -> None:
    layers = adapter_layers(model)
    before = {index: set(layer.state_dict()) for index, layer in layers.items()}
    form = adapter_form(layers, kind)
    assert {index: set(layer.state_dict()) for index, layer in layers.items()} == before
    made = {name: tuple(parameter.shape) for name, parameter in attach(layers, kind, width).items()}
    assert shapes_at(form, width) == made


@pytest.mark.parametrize(("kind", "width"), [("lora", 10**12), ("bottleneck", 10**12), ("layers", 0)])
def test_nothing_is_made_of_what_a_manifest_says_but_the_tensors_do_not(
    kind: Kind, width: int, model: PreTrainedModel
) -> None:
    layers = adapter_layers(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(AdapterError, match="not those of these layers"):
        plug_in(layers, manifest(kind, width), {"0.weight": torch.zeros(3)})
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_seed_decides_the_random_half(model: PreTrainedModel) -> None:
    def values(seed: int) -> list[torch.Tensor]:
        return list(attach(adapter_layers(copy.deepcopy(model)), "lora", 3, seed).values())

    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, second, third = values(1), values(1), values(2)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, first, second))
    assert not all(map(torch.equal, first, third))


def test_merged_lora_is_the_injected_one(model: PreTrainedModel) -> None:
    model.requires_grad_(False)
    names = set(model.state_dict())
    before = logits(model)
    trained(model, "lora")
    expected = logits(model)
    assert not torch.allclose(expected, before, rtol=1e-3, atol=1e-3)
    for layer in adapter_layers(model).values():
        merge_lora(layer)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    assert not any(isinstance(inner, LoraLayer) for inner in model.modules())
    assert set(model.state_dict()) == names


def test_bottlenecks_add_a_residual() -> None:
    base = nn.Linear(6, 4)
    block = Bottleneck(base, 4, 3)
    inputs = torch.randn(2, 6)
    assert torch.equal(block(inputs), base(inputs))
    assert block.weight is base.weight
    nn.init.normal_(block.up.weight)
    outputs = base(inputs)
    expected = outputs + nn.functional.gelu(outputs @ block.down.weight.T) @ block.up.weight.T
    torch.testing.assert_close(block(inputs), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base": "b" * 64}, "tuned on the model aaaaaaaaaaaa, this one is bbbbbbbbbbbb"),
        ({"layers": 7}, r"layers \[0, 5\] of 6, here the adapter layers are \[0, 5\] of 7"),
        ({"layer_map": (0, 1)}, r"here the adapter layers are \[0, 1\] of 6"),
        ({"layers": 5, "layer_map": None}, "any of 5"),
        ({"layer_map": None, "layers": 7}, "here the adapter layers are any of 7"),
    ],
)
def test_adapter_of_another_place_is_refused(changes: dict, message: str) -> None:
    here = {"base": "a" * 64, "layers": LAYERS, "layer_map": LAYER_MAP}
    check_belongs(manifest(), **here)
    with pytest.raises(AdapterError, match=message):
        check_belongs(manifest(), **here | changes)


def test_layers_that_no_model_has_are_refused() -> None:
    for layer_map in ((0, 6), (-1,), (10**12,)):
        beyond = manifest().model_copy(update={"layer_map": layer_map})
        with pytest.raises(AdapterError, match="here the adapter layers are any of 6"):
            check_belongs(beyond, base="a" * 64, layers=LAYERS)


def test_values_of_another_kind_or_width_are_refused(model: PreTrainedModel) -> None:
    values = {name: p.detach().clone() for name, p in trained(copy.deepcopy(model), "lora").items()}
    parameters = attach(adapter_layers(copy.deepcopy(model)), "lora", 3)
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    copied = dict(values)
    copied.popitem()
    for wrong in (copied, {name: value[..., :1] for name, value in values.items()}):
        with pytest.raises(AdapterError, match="damaged"):
            copy_values(parameters, wrong)
    assert all(torch.equal(parameter, before[name]) for name, parameter in parameters.items())
    with pytest.raises(AdapterError, match="not those of these layers"):
        copy_values(attach(adapter_layers(copy.deepcopy(model)), "bottleneck", 3), values)


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    path = tmp_path / "adapter.safetensors"
    save_adapter(path, manifest(), {"0.a": torch.ones(50), "5.a": torch.ones(50)})
    return path


def test_damaged_file_is_refused(stored: Path) -> None:
    content = stored.read_bytes()
    for left in (0, 7, 40, len(content) - 1):
        stored.write_bytes(content[:left])
        with pytest.raises(AdapterError, match=r"adapter\.safetensors: missing or damaged"):
            load_adapter(stored)


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"none\.safetensors: missing"):
        load_adapter(tmp_path / "none.safetensors")
    with pytest.raises(AdapterError, match="missing or damaged"):
        load_adapter(tmp_path)


@pytest.mark.parametrize(
    "metadata", [None, {}, {"format": "pt"}, {"manifest": "{"}, {"manifest": "{}"}, {"manifest": "[]"}]
)
def test_plain_safetensors_file_is_refused(metadata: dict[str, str] | None, stored: Path) -> None:
    save_file(load_file(stored), stored, metadata)
    with pytest.raises(AdapterError, match="is no adapter of emutune"):
        load_adapter(stored)


def test_file_that_cannot_be_written_leaves_the_earlier_one(
    stored: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = stored.read_bytes()

    def fill_disk(_: object, path: Path, __: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save_file", fill_disk)
    with pytest.raises(AdapterError, match="cannot be written"):
        save_adapter(stored, manifest(), {"0.a": torch.zeros(50)})
    assert stored.read_bytes() == before
    assert list(stored.parent.iterdir()) == [stored]
