"""A foundation model in one GGUF file, as llama.cpp writes it: unpacked to an ordinary model directory."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from emutune.errors import ModelError, one_line

SUFFIX = ".gguf"
# What the weights of a file are unpacked to, by the type of its matrices; packed ones to half precision, whose
# rounding of 2^-11 is far below that of any packing.
_PLAIN = {"F32": torch.float32, "F64": torch.float32, "BF16": torch.bfloat16}
_PACKED = torch.float16


def is_gguf(source: str | Path) -> bool:
    """Whether a model's source is a GGUF file, by its name."""
    return str(source).lower().endswith(SUFFIX)


def unpacked(source: str | Path) -> Path:
    """A model directory with what a GGUF file holds: configuration, dequantised weights, tokenizer.

    It lies among the temporary files and is removed when the process ends; a file is unpacked once a process.

    Raises:
        ModelError: the file is missing or damaged, or holds an architecture, a tokenizer or a number type that
            ``transformers`` cannot read from GGUF.
    """
    path = Path(source).absolute()
    try:
        changed = path.stat().st_mtime_ns
    except OSError as error:
        raise ModelError(
            f"{source}: cannot be read: {error.strerror}; give the path of a GGUF file"
        ) from error
    return Path(_unpacked(path, changed).name)


@cache
def _unpacked(path: Path, changed: int) -> tempfile.TemporaryDirectory[str]:
    """The same, for a file as it was at a time."""
    dtype = _number_type(path)
    try:
        model, tokenizer = _loaded(path)
    except Exception as error:  # the readers of many architectures raise whatever they met
        raise ModelError(
            f"{path}: transformers cannot read this GGUF file: {one_line(error)}; give the model directory that the "
            "file was made of, or a GGUF file of another type (F16, Q8_0, Q4_K, ...)"
        ) from error
    folder = tempfile.TemporaryDirectory(prefix="emutune-gguf-")
    try:
        model.to(_holding(model, dtype)).save_pretrained(folder.name)  # type: ignore[arg-type]
        tokenizer.save_pretrained(folder.name)
    except OSError as error:
        folder.cleanup()
        raise ModelError(
            f"{path}: cannot be unpacked to {folder.name}: {error}; free some space there, or set TMPDIR"
        ) from error
    return folder


def _number_type(path: Path) -> torch.dtype:
    """What to unpack to."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ModelError(
            f"{path}: reading a GGUF file needs the package gguf; pip install 'emutune[gguf]'"
        ) from error
    try:
        types = {tensor.tensor_type.name for tensor in GGUFReader(path).tensors if len(tensor.shape) > 1}
    except Exception as error:  # of a damaged file the reader raises whatever it met
        raise ModelError(
            f"{path}: no GGUF file, a damaged one, or one with a number type that the package gguf does not know: "
            f"{one_line(error)}; copy it again, or update gguf"
        ) from error
    return _PLAIN.get(next(iter(types)), _PACKED) if len(types) == 1 else _PACKED


def _loaded(path: Path) -> tuple[PreTrainedModel, Any]:
    where: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True}
    loaded = AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **where)
    fields = loaded.config.to_dict()
    # What is written is plain: transformers would take a directory that says otherwise for a packed one.
    fields.pop("quantization_config", None)
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    config.architectures = [type(loaded).__name__]
    with torch.device("meta"):
        model: PreTrainedModel = type(loaded)(config)
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    return model, AutoTokenizer.from_pretrained(path.parent, **where)


def _holding(model: PreTrainedModel, dtype: torch.dtype) -> torch.dtype:
    """The number type, or single precision if a weight is too large for it."""
    largest = max(float(tensor.abs().max()) for tensor in model.state_dict().values())
    return dtype if largest <= torch.finfo(dtype).max else torch.float32
