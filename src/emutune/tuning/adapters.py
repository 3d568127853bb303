"""The trainable part: whole layers, LoRA or bottlenecks in the adapter layers, as modules and as a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from emutune.errors import AdapterError
from emutune.files import replacing
from emutune.tuning.adapter_manifest import (
    WIDTH,
    AdapterManifest,
    Kind,
    Shape,
    check_belongs,
    check_kind,
    manifest_in,
    shapes_at,
    unreadable,
)
from emutune.tuning.bottleneck import insert_bottlenecks
from emutune.tuning.layers import empty_copy
from emutune.tuning.sublayers import find_sublayers, linear_maps, widths_of

__all__ = [
    "LORA_SCALE",
    "AdapterManifest",
    "Kind",
    "adapter_form",
    "attach",
    "bottleneck_places",
    "check_belongs",
    "copy_values",
    "load_adapter",
    "merge_lora",
    "plug_in",
    "save_adapter",
    "start_from",
]

# Of its alpha to its rank.
LORA_SCALE = 2


def attach(layers: Mapping[int, nn.Module], kind: Kind, width: int, seed: int = 0) -> dict[str, nn.Parameter]:
    """Put an untrained adapter into layers; they compute what they did before.

    Args:
        layers: the adapter layers by their index in the whole model; changed in place.
        kind: what to train.
        width: rank of LoRA, width of bottlenecks.
        seed: of the random half of LoRA and bottlenecks.

    Returns:
        The parameters to train, in single precision, by ``<index>.<name in the layer>``.
    """
    for layer in layers.values():
        layer.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for layer in layers.values():
            _ATTACH[kind](layer, width)
    trainable = {
        f"{index}.{name}": parameter
        for index, layer in layers.items()
        for name, parameter in layer.named_parameters()
        if parameter.requires_grad
    }
    for parameter in trainable.values():
        parameter.data = parameter.data.float()
    return trainable


def _attach_layer(layer: nn.Module, width: int) -> None:
    layer.requires_grad_(True)


def _attach_lora(layer: nn.Module, width: int) -> None:
    maps = linear_maps(layer)
    transposed = any(isinstance(linear, Conv1D) for linear in maps.values())
    config = LoraConfig(
        r=width, lora_alpha=LORA_SCALE * width, target_modules=list(maps), fan_in_fan_out=transposed
    )
    inject_adapter_in_model(config, layer)


def _attach_bottlenecks(layer: nn.Module, width: int) -> None:
    insert_bottlenecks(layer, bottleneck_places(layer), width)
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(name.rsplit(".", 2)[-2] in ("down", "up"))


_ATTACH = {"layers": _attach_layer, "lora": _attach_lora, "bottleneck": _attach_bottlenecks}


def adapter_form(layers: Mapping[int, nn.Module], kind: Kind) -> dict[str, Shape]:
    """Shapes of an adapter's tensors by their names, as ``attach`` would make them, with ``WIDTH`` for its width.

    Args:
        layers: the adapter layers by their index in the whole model; stay as they are, and need no memory.
        kind: of the adapter.

    Raises:
        ModelError: these layers take no adapter of this kind.
    """

    def shapes(width: int) -> dict[str, Shape]:
        empty = {index: empty_copy(layer) for index, layer in layers.items()}
        return {name: tuple(parameter.shape) for name, parameter in attach(empty, kind, width).items()}

    narrow, wide = shapes(1), shapes(2)
    return {
        name: tuple(
            length if length == wider else WIDTH for length, wider in zip(shape, wide[name], strict=True)
        )
        for name, shape in narrow.items()
    }


def bottleneck_places(layer: nn.Module) -> dict[str, int]:
    """Names and output widths of the projections that bottlenecks come behind."""
    sublayers = find_sublayers(layer)
    maps = linear_maps(layer)
    return {name: widths_of(maps[name])[1] for name in (sublayers.attention_output, sublayers.mlp_output)}


def merge_lora(layer: nn.Module) -> None:
    """Add LoRA's products to the weights, and put the plain linear maps back."""
    for name, module in list(layer.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            parent, _, attribute = name.rpartition(".")
            setattr(layer.get_submodule(parent), attribute, module.get_base_layer())


def save_adapter(path: Path, manifest: AdapterManifest, parameters: Mapping[str, Tensor]) -> None:
    """Write an adapter: safetensors with its manifest in the header.

    Raises:
        AdapterError: the file cannot be written; an earlier adapter is untouched.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in parameters.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as aside:
            save_file(tensors, aside, {"manifest": manifest.model_dump_json()})
    except (OSError, SafetensorError) as error:
        raise AdapterError(
            f"{path}: cannot be written ({error}); free some space or choose another --out"
        ) from error


def load_adapter(path: Path) -> tuple[AdapterManifest, dict[str, Tensor]]:
    """Read an adapter.

    Raises:
        AdapterError: the file is missing, damaged or no adapter.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise unreadable(path, error) from error
    return manifest_in(metadata, path), tensors


def copy_values(parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Copy an adapter's values into the parameters of the same names.

    Raises:
        AdapterError: names or shapes differ.
    """
    _check_shapes({name: tuple(parameter.shape) for name, parameter in parameters.items()}, values)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(values[name])


def _check_shapes(wanted: Mapping[str, Shape], values: Mapping[str, Tensor]) -> None:
    if wanted != {name: tuple(tensor.shape) for name, tensor in values.items()}:
        raise AdapterError("adapter: its tensors are not those of these layers; it is damaged, tune it again")


def start_from(path: Path, wanted: AdapterManifest, parameters: Mapping[str, Tensor]) -> None:
    """Copy the values of an adapter's file into parameters of the same adapter.

    Raises:
        AdapterError: the file is missing or damaged, or holds an adapter of another model, place, kind or width.
    """
    found, values = load_adapter(path)
    check_belongs(found, base=wanted.base, layers=wanted.layers, layer_map=wanted.layer_map)
    check_kind(found, wanted)
    copy_values(parameters, values)


def plug_in(
    layers: Mapping[int, nn.Module],
    manifest: AdapterManifest,
    values: Mapping[str, Tensor],
    form: Mapping[str, Shape] | None = None,
) -> dict[str, Any]:
    """Put a trained adapter into layers; returns its parameters.

    Args:
        layers: of the whole model, by index; those that the adapter changes are changed in place.
        manifest: of the adapter.
        values: its tensors.
        form: see ``adapter_form``, which takes as long as plugging in; found out if not given.

    Raises:
        AdapterError: its tensors are not those that its manifest says; the layers are then as they were.
    """
    changed = {index: layers[index] for index in manifest.layer_map}
    # Before anything as wide as a file says is made.
    form = adapter_form(changed, manifest.kind) if form is None else form
    _check_shapes(shapes_at(form, manifest.width), values)
    parameters = attach(changed, manifest.kind, manifest.width)
    copy_values(parameters, values)
    return parameters
