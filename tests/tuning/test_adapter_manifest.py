"""Whose an adapter is, read from its header alone; what is no adapter is refused as when it is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from emutune.errors import AdapterError
from emutune.tuning.adapter_manifest import AdapterManifest, read_manifest
from emutune.tuning.adapters import load_adapter, save_adapter

MANIFEST = AdapterManifest(
    base="b" * 64,
    layers=6,
    layer_map=(0, 5),
    kind="lora",
    width=4,
    retention=0.5,
    emulator="noise",
    perplexity=3.25,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_manifest_is_read_as_it_was_saved(tmp_path: Path, dtype: torch.dtype) -> None:
    path = tmp_path / "adapter.safetensors"
    save_adapter(path, MANIFEST, {"0.weight": torch.zeros(4, 8, dtype=dtype)})
    assert read_manifest(path) == load_adapter(path)[0] == MANIFEST


def test_what_is_no_adapter_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "adapter.safetensors"
    save_adapter(path, MANIFEST, {"0.weight": torch.zeros(4, 8)})
    whole = path.read_bytes()
    files = {
        "missing": None,
        "cut": whole[:-1],
        "longer": whole + b"0",
        "text": b"no safetensors",
        "nothing": b"",
    }
    for name, content in files.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        for reader in (read_manifest, load_adapter):
            with pytest.raises(AdapterError, match="missing or damaged"):
                reader(tmp_path / name)
    for name, metadata in {
        "none": None,
        "other": {"manifest": '{"base": "b"}'},
        "half": {"manifest": "{"},
    }.items():
        save_file({"weight": torch.zeros(1)}, tmp_path / name, metadata)
        for reader in (read_manifest, load_adapter):
            with pytest.raises(AdapterError, match="is no adapter"):
                reader(tmp_path / name)
