"""Write a model directory again, with other tensors in some places and everything else as it was."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from emutune.tuning.checkpoint import holds_weights, is_index, weight_files
from emutune.tuning.foundation import Foundation

# What transformers reads from folders in a model directory.
_FOLDERS = ("additional_chat_templates", "custom_generate")

Replaced = Mapping[tuple[Path, str], Mapping[str, Tensor]]


def write_directory(foundation: Foundation, replaced: Replaced, out: Path) -> None:
    """Copy a model directory; of its weights only those that ``transformers`` loads, which are the replaced ones.

    Args:
        foundation: the model.
        replaced: by file and name of a stored tensor, what is stored in its place, by name.
        out: a directory that does not exist.

    Raises:
        OSError: it cannot be written.
        SafetensorError: the same of a file of weights.
    """
    out.mkdir(parents=True)
    directory = foundation.directory
    for path in directory.iterdir():
        if path.is_dir() and path.name in _FOLDERS:
            shutil.copytree(path, out / path.name, copy_function=shutil.copyfile)
        elif path.is_file() and not holds_weights(path) and not path.name.startswith("."):
            shutil.copyfile(path, out / path.name)
    for path in weight_files(directory, foundation.entry):
        _write_weights(path, replaced, _under(out, path, directory))
    if is_index(foundation.entry):
        _write_index(foundation, replaced, out)


def _under(out: Path, path: Path, directory: Path) -> Path:
    there = out / path.relative_to(directory)
    there.parent.mkdir(parents=True, exist_ok=True)
    return there


def _write_weights(path: Path, replaced: Replaced, out: Path) -> None:
    if all(file != path for file, _ in replaced):
        shutil.copyfile(path, out)
        return
    with safe_open(path, "pt") as file:
        tensors: dict[str, Tensor] = {}
        for key in file.keys():  # noqa: SIM118
            tensors |= replaced.get((path, key)) or {key: file.get_tensor(key)}
        save_file(tensors, out, file.metadata())


def _write_index(foundation: Foundation, replaced: Replaced, out: Path) -> None:
    index = json.loads(foundation.entry.read_text("utf-8"))
    for (path, key), tensors in replaced.items():
        if tensors.keys() == {key}:
            continue
        index["weight_map"].pop(key, None)
        index["weight_map"] |= dict.fromkeys(tensors, path.relative_to(foundation.directory).as_posix())
        if "total_size" in index.get("metadata", {}):
            with safe_open(path, "pt") as file:
                index["metadata"]["total_size"] -= file.get_tensor(key).nbytes
            index["metadata"]["total_size"] += sum(tensor.nbytes for tensor in tensors.values())
    text = json.dumps(index, indent=2) + "\n"
    _under(out, foundation.entry, foundation.directory).write_text(text, "utf-8")
