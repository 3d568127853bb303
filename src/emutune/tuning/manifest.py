"""What an emulator is made of, as its manifest on disk says, and what a device that has one lacks of another."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Method = Literal["layer_drop", "prune", "distill", "quantize"]
METHODS: tuple[Method, ...] = ("layer_drop", "prune", "distill", "quantize")
Order = Literal["loss", "importance", "uniform"]


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Shard(_Frozen):
    """A safetensors file of the catalogue."""

    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    bytes: int = Field(ge=1)


class Widths(_Frozen):
    """What pruning leaves of a layer."""

    heads: int = Field(ge=1, description="query heads")
    channels: int = Field(ge=1, description="of the MLP")


class LayerEntry(_Frozen):
    """One layer of an emulator: which layer of the whole model it stands for, and how it was compressed."""

    index: int = Field(ge=0)
    shard: Shard
    widths: Widths | None = None
    bits: Literal[3, 4, 8] | None = None


class Emulator(_Frozen):
    """The manifest of one emulator, with the adapter layers around it.

    Attributes:
        base: hash of the model it was made of.
        recipe: how it was made, the same for all retentions of a build.
        retention: k/n, the share of the n layers between the adapter layers that is kept; of an emulator
            that only lost width, the share of heads and channels that is kept.
        kept: indices in the whole model of the k layers between the adapter layers.
        outer: embeddings, final norm and head.
        layers: adapter layers and kept layers, bottom first.
        perplexity: of the emulator as it is, on the calibration text; None if it was not measured.
    """

    format_version: Literal["1"] = "1"
    base: str
    name: str
    recipe: str
    method: tuple[Method, ...]
    order: Order | None
    retention: float = Field(gt=0, le=1)
    kept: tuple[int, ...]
    seed: int
    outer: Shard
    layers: tuple[LayerEntry, ...]
    perplexity: float | None = None

    @property
    def shards(self) -> dict[str, int]:
        """Bytes of each distinct shard, by its SHA-256."""
        return {shard.sha256: shard.bytes for shard in (self.outer, *(layer.shard for layer in self.layers))}

    @property
    def bytes(self) -> int:
        """Size of all shards."""
        return sum(self.shards.values())


def missing(have: Emulator | None, want: Emulator) -> dict[str, int]:
    """The shards to send to a device that has one emulator and wants another: bytes by SHA-256."""
    held = set() if have is None else set(have.shards)
    return {sha256: size for sha256, size in want.shards.items() if sha256 not in held}
