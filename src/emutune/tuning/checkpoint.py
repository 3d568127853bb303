"""Which files and tensors of a model directory ``transformers`` loads, and under which names; no value is read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from emutune.errors import ModelError, one_line

# As safetensors names them; every other type of a weight is a packed or scaled number.
_PLAIN = ("F64", "F32", "F16", "BF16")
# Files of one rank each, which transformers prefers to all others.
_RANK_FILE = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
_ENTRIES = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
_INDEX = ".index.json"
_WEIGHTS = (
    *(
        ".safetensors",
        ".bin",
        ".pt",
        ".pth",
        ".ckpt",
        ".gguf",
        ".h5",
        ".msgpack",
        ".onnx",
        ".onnx_data",
        ".ot",
    ),
    _INDEX,
)


class Stored(NamedTuple):
    """A tensor in a file: where, under which name, of which shape and number type."""

    path: Path
    key: str
    shape: tuple[int, ...]
    dtype: str


def refuse_special(directory: Path) -> None:
    """Refuse a directory whose weights are not the plain tensors that a model computes with.

    Raises:
        ModelError: the model is quantised, has an adapter beside it, lies in files of several ranks, or needs
            code that is not of ``transformers``.
    """
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be understood: {one_line(error)}") from error
    for settings in _quantisations(config):
        raise ModelError(
            f"{path}: quantization_config: the weights are quantised ({_method(settings)}), and emutune reads plain "
            "ones; load the model with transformers, dequantize() it, and save it without quantization_config"
        )
    adapter = directory / "adapter_config.json"
    if adapter.exists():
        raise ModelError(
            f"{adapter}: a PEFT adapter lies beside the model; merge_and_unload it and save "
            "the model alone, or take the file away"
        )
    if any(_RANK_FILE.fullmatch(file.name) for file in directory.glob("shard-*")):
        raise ModelError(
            f"{directory}: holds a distributed checkpoint (shard-*.safetensors); load it with transformers and save it"
        )
    for name in (config.get("architectures") or []) if isinstance(config, dict) else []:
        if not hasattr(transformers, str(name)):
            raise ModelError(
                f"{path}: architectures: {name} is no class of transformers {transformers.__version__}; emutune runs "
                "no code that comes with a model"
            )


def _quantisations(config: Any) -> Iterator[Any]:
    """The settings of quantisation anywhere in a configuration, that of its parts included."""
    if isinstance(config, dict):
        for name, value in config.items():
            if name in ("quantization_config", "compression_config") and value is not None:
                yield value
            else:
                yield from _quantisations(value)


def _method(settings: Any) -> str:
    if not isinstance(settings, dict):
        return "no quant_method given"
    for bits in ("4bit", "8bit"):
        if settings.get(f"load_in_{bits}"):
            return f"bitsandbytes, {bits}"
    return str(settings.get("quant_method") or "no quant_method given")


def weight_entry(directory: Path, config: PreTrainedConfig) -> Path:
    """The file from which ``from_pretrained`` starts: that of all weights, or if there is none, the index of several.

    Raises:
        ModelError: there is neither.
    """
    named = getattr(config, "transformers_weights", None)
    entries = [_inside(directory, name) for name in ([named] if named else _ENTRIES)]
    found = next((path for path in entries if path.is_file()), None)
    if found is None:
        others = sorted(path.name for path in directory.iterdir() if holds_weights(path))
        beside = f" (there is {', '.join(others[:3])})" if others else ""
        raise ModelError(
            f"{entries[0]}: missing{beside}; weights are read from safetensors of that name only: copy the file, or "
            "write it with transformers' save_pretrained"
        )
    return found


def holds_weights(path: Path) -> bool:
    """Whether a file holds weights, of whatever library, or tells where they are."""
    return path.name.endswith(_WEIGHTS)


def weight_files(directory: Path, entry: Path) -> list[Path]:
    """The safetensors files of an entry, in the order in which ``from_pretrained`` reads them.

    Raises:
        ModelError: the index is damaged, or a file is missing or elsewhere.
    """
    if not is_index(entry):
        return [entry]
    try:
        names = sorted(set(json.loads(entry.read_text("utf-8"))["weight_map"].values()))
        paths = [_inside(directory, name) for name in names]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{entry}: damaged ({one_line(error)}); copy it again") from error
    for path in paths:
        if not path.is_file():
            raise ModelError(f"{path}: missing, {entry.name} names it; copy the directory again")
    return paths


def is_index(entry: Path) -> bool:
    """Whether a file tells where the weights are instead of holding them."""
    return entry.name.endswith(_INDEX)


def _inside(directory: Path, name: str) -> Path:
    path = directory / name
    if not path.absolute().is_relative_to(directory.absolute()) or ".." in Path(name).parts:
        raise ModelError(f"{directory}: names a weight file outside, {name}; copy the directory again")
    return path


def stored_tensors(paths: Sequence[Path]) -> dict[str, Stored]:
    """Every tensor of some files by its name there; of a name that several files have, the last one's.

    Raises:
        ModelError: a file is damaged.
    """
    stored: dict[str, Stored] = {}
    for path in paths:
        try:
            with safe_open(path, "pt") as file:
                for key in file.keys():  # noqa: SIM118
                    part = file.get_slice(key)
                    stored[key] = Stored(path, key, tuple(part.get_shape()), part.get_dtype())
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{path}: truncated or damaged ({one_line(error)}); copy it again") from error
    return stored


def placed(stored: Mapping[str, Stored], model: PreTrainedModel) -> dict[str, Stored]:
    """The stored tensors by the name of the model's tensor that ``transformers`` loads each into.

    Tensors that the model has no place for are left out, as they are by ``transformers``.

    Raises:
        ModelError: a tensor has another shape than its place, is quantised, or would be rearranged.
    """
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    places = model.state_dict()
    prefix = model.base_model_prefix
    found: dict[str, Stored] = {}
    for key in sorted(stored):
        name, converted = rename_source_key(key, renamings, converters, prefix, places)
        if name not in places and key in places:
            name, converted = rename_source_key(key, [], [], prefix, places)
        if name in places and name not in found:
            if converted is not None:
                raise ModelError(
                    f"{stored[key].path}: transformers rearranges {key} when it loads it; emutune reads tensors as "
                    "they are stored, and cannot use this architecture"
                )
            _check_fits(stored[key], name, places[name])
            found[name] = stored[key]
    return found


def _check_fits(tensor: Stored, name: str, place: torch.Tensor) -> None:
    if tensor.shape != tuple(place.shape):
        raise ModelError(
            f"{tensor.path}: {tensor.key} is {list(tensor.shape)}, but the configuration makes {name} "
            f"{list(place.shape)}; copy the config.json that belongs to the weights"
        )
    if place.is_floating_point() and tensor.dtype not in _PLAIN:
        raise ModelError(
            f"{tensor.path}: {tensor.key} is stored as {tensor.dtype}, a quantised weight, and config.json does not "
            "say how; save the model as float32, float16 or bfloat16"
        )
