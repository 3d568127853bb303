"""Foundation models on disk: any local directory in the Hugging Face format, read one layer at a time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from emutune.errors import ModelError
from emutune.tuning.layers import layer_stack, shorten_config, stack_name

REFERENCE = "reference"
_SHIPPED = Path(__file__).parent / "reference_model"
_MASKED = ("ForMaskedLM", "ForPreTraining")
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Foundation:
    """A model directory whose weights are not loaded yet.

    Attributes:
        directory: where it is.
        config: its transformers configuration.
        stack: dotted name of its layer stack, e.g. ``transformer.h``.
        outer: parameters outside the stack: name -> (file, name in that file).
        layers: the same of each layer, with names inside the layer.
    """

    directory: Path
    config: PreTrainedConfig
    stack: str
    outer: Mapping[str, tuple[Path, str]]
    layers: Sequence[Mapping[str, tuple[Path, str]]]

    def units(self) -> Iterator[dict[str, Tensor]]:
        """The tensors outside the stack, then those of each layer, one unit in memory at a time."""
        yield read_tensors(self.outer)
        for layer in self.layers:
            yield read_tensors(layer)


def open_foundation(source: str | Path) -> Foundation:
    """Find every weight of a model directory, without reading one.

    Args:
        source: a directory in the Hugging Face format with safetensors weights, sharded or not, or
            ``"reference"`` for the small model that emutune ships.

    Raises:
        ModelError: the directory, its configuration or a weight is missing or damaged, or the
            architecture is not a stack of layers.
    """
    directory = _SHIPPED if str(source) == REFERENCE else Path(source)
    config = _read_config(directory)
    model = skeleton(config)
    stack = stack_name(model)
    stored = _renamed(_stored_names(directory), model)
    tied = set(model.all_tied_weights_keys)
    outer: dict[str, tuple[Path, str]] = {}
    layers: list[dict[str, tuple[Path, str]]] = [{} for _ in layer_stack(model)]
    for name in model.state_dict():
        if name in tied:
            continue
        where = _find(name, stored, model.base_model_prefix)
        if where is None:
            raise ModelError(
                f"{directory}: the weights lack {name}; copy the directory again, or load and save it once with "
                "the transformers version that wrote it"
            )
        if name.startswith(stack + "."):
            index, _, inner = name.removeprefix(stack + ".").partition(".")
            layers[int(index)][inner] = where
        else:
            outer[name] = where
    return Foundation(directory, config, stack, outer, layers)


def skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a configuration in single precision, its parameters without memory, its buffers real."""
    names = config.architectures or [""]
    factory: Any = AutoModelForMaskedLM if names[0].endswith(_MASKED) else AutoModelForCausalLM
    try:
        with init_empty_weights(include_buffers=False):
            model: PreTrainedModel = factory.from_config(config, dtype=torch.float32)
    except (StrictDataclassError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"config.json: no language model of that configuration: {error}") from error
    return model.eval()


def load_model(foundation: Foundation, device: str | torch.device = "cpu") -> PreTrainedModel:
    """The whole model, in single precision on a CPU and bfloat16 on an accelerator."""
    units = foundation.units()
    return assemble(foundation.config, next(units), units, device=device)


def assemble(
    config: PreTrainedConfig,
    outer: Mapping[str, Tensor],
    layers: Iterator[Mapping[str, Tensor]],
    *,
    kept: Sequence[int] | None = None,
    prepare: Callable[[nn.Module, int], None] | None = None,
    device: str | torch.device = "cpu",
) -> PreTrainedModel:
    """A model from tensors that arrive layer by layer.

    Args:
        config: of the whole model.
        outer: tensors outside the layer stack, by their names in the model.
        layers: tensors of each layer that is kept, bottom first, by their names inside the layer.
        kept: indices of those layers in the whole model; all if not given.
        prepare: gives an empty layer, at its position, the modules and shapes of a compressed one.
        device: where to.

    Raises:
        ModelError: a tensor is missing or has another shape than its place.
    """
    config = type(config).from_dict(config.to_dict())
    if kept is not None:
        shorten_config(config.get_text_config(), kept)
    model = skeleton(config)
    dtype = compute_dtype(device)
    load_tensors(model, outer, dtype, "the tensors outside the layers")
    for position, (layer, tensors) in enumerate(zip(layer_stack(model), layers, strict=True)):
        if prepare is not None:
            prepare(layer, position)
        load_tensors(layer, tensors, dtype, f"layer {position}")
    model.tie_weights()
    lacking = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if lacking:
        raise ModelError(f"the weights lack {', '.join(lacking[:3])}; build or copy them again")
    model.requires_grad_(False)
    model.to(torch.device(device))  # type: ignore[arg-type]
    return model.eval()


def compute_dtype(device: str | torch.device) -> torch.dtype:
    """What to compute with: single precision on a CPU, bfloat16 on an accelerator."""
    return torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16


def load_tokenizer(directory: str | Path) -> Any:
    """The tokenizer of a model directory.

    Raises:
        ModelError: there is none, or it has no vocabulary.
    """
    directory = _SHIPPED if str(directory) == REFERENCE else Path(directory)
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        tokens = tokenizer("the", add_special_tokens=False)["input_ids"]
    except Exception as error:  # the many loaders behind AutoTokenizer raise whatever they meet
        raise ModelError(
            f"{directory}: no tokenizer can be loaded ({_first_line(error)}); save one there with "
            "tokenizer.save_pretrained"
        ) from error
    if not tokens or len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise ModelError(
            f"{directory}: the tokenizer has no vocabulary; save the one that the model was trained with"
        )
    return tokenizer


def base_hash(foundation: Foundation) -> str:
    """Identity of a model: SHA-256 over its architecture and every weight, in hexadecimal."""
    return combine_digests(foundation.config, (unit_digest(unit) for unit in foundation.units()))


def combine_digests(config: PreTrainedConfig, units: Iterator[str] | Sequence[str]) -> str:
    """The base hash from the digests of the units."""
    return hashlib.sha256("\n".join([config.model_type, *units]).encode()).hexdigest()


def unit_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and values of some tensors, in hexadecimal."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_tensors(where: Mapping[str, tuple[Path, str]]) -> dict[str, Tensor]:
    """Tensors from safetensors files; they are mapped, not read, and let go of with the last reference.

    Raises:
        ModelError: a file is missing or truncated.
    """
    tensors: dict[str, Tensor] = {}
    for path in sorted({path for path, _ in where.values()}):
        try:
            # Opened anew for every unit: a file kept open keeps all of its pages.
            with safe_open(path, "pt") as file:
                tensors |= {name: file.get_tensor(key) for name, (at, key) in where.items() if at == path}
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{path}: missing or damaged ({error}); copy it again") from error
    return tensors


def load_tensors(module: nn.Module, tensors: Mapping[str, Tensor], dtype: torch.dtype, what: str) -> None:
    """Put tensors into the places of their names; those that are missing stay without memory.

    Raises:
        ModelError: a tensor has another shape than its place; the message names ``what``.
    """
    # Scales of quantised weights are buffers and keep their type.
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    cast = {
        name: tensor.to(dtype) if tensor.is_floating_point() and name in parameters else tensor
        for name, tensor in tensors.items()
    }
    try:
        module.load_state_dict(cast, strict=False, assign=True)
    except RuntimeError as error:
        raise ModelError(f"{what}: do not fit the configuration: {_first_line(error)}") from error


def _read_config(directory: Path) -> PreTrainedConfig:
    if not (directory / "config.json").is_file():
        raise ModelError(
            f"{directory}: no config.json; give a model directory as transformers' save_pretrained writes it"
        )
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(directory, local_files_only=True)
    except Exception as error:
        raise ModelError(
            f"{directory / 'config.json'}: cannot be understood: {_first_line(error)}"
        ) from error
    return config


def _stored_names(directory: Path) -> dict[str, Path]:
    index = directory / _INDEX
    if index.is_file():
        try:
            files = json.loads(index.read_text("utf-8"))["weight_map"]
            paths = {directory / Path(name).name for name in files.values()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{index}: damaged ({error}); copy it again") from error
    else:
        paths = {directory / "model.safetensors"}
    stored: dict[str, Path] = {}
    for path in sorted(paths):
        if not path.is_file():
            raise ModelError(
                f"{path}: missing; weights are read from safetensors only: copy the file, or write it with "
                "transformers' save_pretrained"
            )
        try:
            with safe_open(path, "pt") as file:
                stored |= dict.fromkeys(file.keys(), path)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{path}: truncated or damaged ({error}); copy it again") from error
    return stored


def _renamed(stored: Mapping[str, Path], model: PreTrainedModel) -> dict[str, tuple[Path, str]]:
    """Where each tensor is, by the name in its file and by the one that transformers gives it when it loads."""
    renamings = [rule for rule in get_model_conversion_mapping(model) if isinstance(rule, WeightRenaming)]
    renamed: dict[str, tuple[Path, str]] = {}
    for key, path in stored.items():
        name = key
        for rule in renamings:
            name, _ = rule.rename_source_key(name)
        renamed[name] = (path, key)
    return renamed | {key: (path, key) for key, path in stored.items()}


def _find(name: str, stored: Mapping[str, tuple[Path, str]], prefix: str) -> tuple[Path, str] | None:
    """Where a parameter is: checkpoints name it with or without the base model's prefix."""
    candidates = (name, name.removeprefix(prefix + "."), f"{prefix}.{name}")
    return next((stored[candidate] for candidate in candidates if candidate in stored), None)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
