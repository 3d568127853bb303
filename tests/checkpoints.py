"""What tests of training share."""

from __future__ import annotations

from pathlib import Path

from safetensors.numpy import load_file


def assert_same_bits(one: Path, other: Path) -> None:
    """Every array equal to the last bit; the order of a safetensors header is not fixed."""
    arrays, others = load_file(one), load_file(other)
    assert arrays.keys() == others.keys()
    assert all(arrays[name].tobytes() == others[name].tobytes() for name in arrays)
