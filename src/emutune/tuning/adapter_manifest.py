"""What an adapter belongs to, as the header of its file says, read without its tensors, and so without torch."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError, safe_open

from emutune.errors import AdapterError

Kind = Literal["layers", "lora", "bottleneck"]
KINDS: tuple[Kind, ...] = ("layers", "lora", "bottleneck")
Shape = tuple[int, ...]
Finite = Annotated[float, Field(allow_inf_nan=False)]
# In the shape of an adapter's tensor: as many as the adapter is wide.
WIDTH = 0
# Adapters are trained and kept in single precision.
_NUMBERS, _NUMBER_BYTES = "F32", 4


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
    perplexity_before: Finite | None = None
    perplexity: Finite | None = None


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


def manifest_in(metadata: object, path: Path | str) -> AdapterManifest:
    """The manifest in the metadata of a file.

    Raises:
        AdapterError: there is none, or it is damaged.
    """
    text = metadata.get("manifest") if isinstance(metadata, Mapping) else None
    try:
        return AdapterManifest.model_validate_json(text if isinstance(text, str) else "{}")
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
            f"adapter: was tuned on the model {_plain(manifest.base)}, this one is {base[:12]}; plug it into the model "
            "whose catalogue it was tuned in"
        )
    elsewhere = layer_map is not None and manifest.layer_map != layer_map
    if manifest.layers != layers or elsewhere or not {*manifest.layer_map} <= {*range(layers)}:
        here = "any" if layer_map is None else list(layer_map)
        raise AdapterError(
            f"adapter: changes layers {reprlib.repr([*manifest.layer_map])} of {reprlib.repr(manifest.layers)}, here "
            f"the adapter layers are {here} of {layers}; tune it again in this catalogue"
        )


def check_kind(manifest: AdapterManifest, wanted: AdapterManifest) -> None:
    """Refuse an adapter of another kind or width.

    Raises:
        AdapterError: it is one; the message says of which.
    """
    if (manifest.kind, manifest.width) != (wanted.kind, wanted.width):
        raise AdapterError(
            f"adapter: the file holds an adapter of kind {manifest.kind} and width {reprlib.repr(manifest.width)}, not "
            f"{wanted.kind} and {wanted.width}; ask for the same, or choose another file"
        )


def shapes_at(form: Mapping[str, Shape], width: int) -> dict[str, Shape]:
    """The shapes of an adapter's tensors at a width, from those in which ``WIDTH`` stands for it."""
    return {
        name: tuple(width if length == WIDTH else length for length in shape) for name, shape in form.items()
    }


@dataclass(frozen=True)
class Asked:
    """The adapter that somebody waits for.

    Attributes:
        manifest: what its own must say, but for the perplexities.
        shapes: of its tensors, in single precision, by their names.
    """

    manifest: AdapterManifest
    shapes: Mapping[str, Shape]

    @property
    def bytes(self) -> int:
        """Size of its tensors."""
        return sum(_NUMBER_BYTES * math.prod(shape) for shape in self.shapes.values())

    def check(self, header: Mapping[str, Any]) -> None:
        """Refuse a safetensors file by its header, before any of its tensors is read.

        Raises:
            AdapterError: it holds another adapter; the message names what differs.
        """
        found, wanted = manifest_in(header.get("__metadata__"), "adapter"), self.manifest
        check_belongs(found, base=wanted.base, layers=wanted.layers, layer_map=wanted.layer_map)
        check_kind(found, wanted)
        if (found.emulator, found.retention) != (wanted.emulator, wanted.retention):
            raise AdapterError(
                f"adapter: was tuned at emulator {_plain(found.emulator)} of retention {found.retention:g}, not "
                f"{wanted.emulator} of {wanted.retention:g}; tune it at the one that was leased"
            )
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        for name in (*self.shapes, *(tensors.keys() - self.shapes.keys())):
            self._check_tensor(name, tensors.get(name))

    def _check_tensor(self, name: str, entry: object) -> None:
        found = (entry.get("dtype"), entry.get("shape")) if isinstance(entry, Mapping) else None
        asked = (_NUMBERS, list(self.shapes[name])) if name in self.shapes else None
        if found != asked:
            raise AdapterError(
                f"adapter: tensor {_plain(name, 80)} is {_described(found)}, asked for was {_described(asked)}; tune "
                "it again in this catalogue"
            )


def _described(tensor: tuple[object, object] | None) -> str:
    """Number type and shape of a tensor, however long a file says they are."""
    return "none" if tensor is None else ascii(f"{reprlib.repr(tensor[0])} {reprlib.repr(tensor[1])}")[1:-1]


def _plain(text: str, most: int = 12) -> str:
    """The beginning of what a file says, in one printable line."""
    return ascii(text[:most])[1:-1]
