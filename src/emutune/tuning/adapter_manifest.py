"""What an adapter belongs to, as the header of its file says, read without its tensors, and so without torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError, safe_open

from emutune.errors import AdapterError

Kind = Literal["layers", "lora", "bottleneck"]


class AdapterManifest(BaseModel):
    """What an adapter belongs to and how it came about.

    Attributes:
        base: hash of the whole model.
        layers: how many layers that has.
        layer_map: indices in it of the layers that the adapter changes.
        width: rank of LoRA, width of bottlenecks; 0 for whole layers.
        retention: of the emulator it was tuned at; 1 for the whole model.
        emulator: that emulator's recipe.
        perplexity_before, perplexity: of the plugged-in model on held-back text.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: Literal["1"] = "1"
    base: str
    layers: int
    layer_map: tuple[int, ...]
    kind: Kind
    width: int = Field(ge=0)
    retention: float = Field(gt=0, le=1)
    emulator: str
    perplexity_before: float | None = None
    perplexity: float | None = None


def read_manifest(path: Path) -> AdapterManifest:
    """The manifest of an adapter's file, whose length and header agree.

    Raises:
        AdapterError: the file is missing, damaged or no adapter.
    """
    try:
        with safe_open(path, "np") as file:
            metadata = file.metadata()
    except (OSError, SafetensorError) as error:
        raise unreadable(path, error) from error
    return manifest_in(metadata, path)


def manifest_in(metadata: Mapping[str, str] | None, path: Path) -> AdapterManifest:
    """The manifest in the metadata of a file.

    Raises:
        AdapterError: there is none, or it is damaged.
    """
    try:
        return AdapterManifest.model_validate_json((metadata or {}).get("manifest", "{}"))
    except ValueError as error:
        raise AdapterError(f"{path}: is no adapter of emutune, or a damaged one; tune it again") from error


def unreadable(path: Path, error: Exception) -> AdapterError:
    """What to raise where a file cannot be read."""
    return AdapterError(f"{path}: missing or damaged ({error}); tune it again")


def check_belongs(
    manifest: AdapterManifest, *, base: str, layers: int, layer_map: tuple[int, ...] | None = None
) -> None:
    """Refuse an adapter of another model or other layers.

    Raises:
        AdapterError: it belongs elsewhere; the message says in what it differs.
    """
    if manifest.base != base:
        raise AdapterError(
            f"adapter: was tuned on the model {manifest.base[:12]}, this one is {base[:12]}; plug it into the model "
            "whose catalogue it was tuned in"
        )
    if manifest.layers != layers or (layer_map is not None and manifest.layer_map != layer_map):
        here = "any" if layer_map is None else list(layer_map)
        raise AdapterError(
            f"adapter: changes layers {list(manifest.layer_map)} of {manifest.layers}, here the adapter layers are "
            f"{here} of {layers}; tune it again in this catalogue"
        )
