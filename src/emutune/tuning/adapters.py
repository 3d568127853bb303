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
from emutune.tuning.adapter_manifest import AdapterManifest, Kind, check_belongs, manifest_in, unreadable
from emutune.tuning.bottleneck import insert_bottlenecks
from emutune.tuning.sublayers import find_sublayers, linear_maps, widths_of

__all__ = [
    "AdapterManifest",
    "Kind",
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

_LORA_SCALE = 2


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
        r=width, lora_alpha=_LORA_SCALE * width, target_modules=list(maps), fan_in_fan_out=transposed
    )
    inject_adapter_in_model(config, layer)


def _attach_bottlenecks(layer: nn.Module, width: int) -> None:
    insert_bottlenecks(layer, bottleneck_places(layer), width)
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(name.rsplit(".", 2)[-2] in ("down", "up"))


_ATTACH = {"layers": _attach_layer, "lora": _attach_lora, "bottleneck": _attach_bottlenecks}


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
    if {name: tensor.shape for name, tensor in parameters.items()} != {n: t.shape for n, t in values.items()}:
        raise AdapterError("adapter: its tensors are not those of these layers; it is damaged, tune it again")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(values[name])


def start_from(path: Path, wanted: AdapterManifest, parameters: Mapping[str, Tensor]) -> None:
    """Copy the values of an adapter's file into parameters of the same adapter.

    Raises:
        AdapterError: the file is missing or damaged, or holds an adapter of another model, place, kind or width.
    """
    found, values = load_adapter(path)
    check_belongs(found, base=wanted.base, layers=wanted.layers, layer_map=wanted.layer_map)
    if (found.kind, found.width) != (wanted.kind, wanted.width):
        raise AdapterError(
            f"{path}: holds an adapter of kind {found.kind} and width {found.width}, not {wanted.kind} and "
            f"{wanted.width}; ask for the same, or choose another file"
        )
    copy_values(parameters, values)


def plug_in(
    layers: Mapping[int, nn.Module], manifest: AdapterManifest, values: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Put a trained adapter into layers; returns its parameters."""
    parameters = attach({index: layers[index] for index in manifest.layer_map}, manifest.kind, manifest.width)
    copy_values(parameters, values)
    return parameters
