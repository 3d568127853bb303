"""Emulators on disk: one safetensors shard a layer, named by its content; one manifest an emulator.

CATALOGUE/catalogue.json        which model it belongs to, and where the adapter layers are
CATALOGUE/shards/<sha256>.safetensors
CATALOGUE/emulators/<name>.json
CATALOGUE/tokenizer/            as transformers writes it
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from emutune.errors import CatalogueError
from emutune.files import replacing
from emutune.tuning.compression.prune import shrink_layer
from emutune.tuning.compression.quantize import prepare_quantized
from emutune.tuning.foundation import assemble, compute_dtype, load_tensors, load_tokenizer
from emutune.tuning.layers import empty_copy, keep_layers, layer_stack, replace_stack, stack_name
from emutune.tuning.manifest import Emulator, LayerEntry, Shard

BASE = "base"
_PIECE = 1 << 22
Content = TypeVar("Content", bound=BaseModel)


class CatalogueInfo(BaseModel):
    """``catalogue.json``: the model a catalogue belongs to.

    Attributes:
        base: the model's hash.
        config: its transformers configuration.
        layers: how many layers it has.
        bottom, top: how many of them are adapter layers at either end.
        text: SHA-256 of the calibration text.
        importance: the middle layers by falling importance, once measured: the emulator that keeps k of
            them keeps the first k.
        recipe: of the emulators built last.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: Literal["1"] = "1"
    base: str
    config: dict[str, Any]
    layers: int
    bottom: int
    top: int
    text: str
    importance: tuple[int, ...] | None = None
    recipe: str = ""

    @property
    def middle(self) -> range:
        """Indices of the layers between the adapter layers."""
        return range(self.bottom, self.layers - self.top)

    @property
    def adapter_layers(self) -> tuple[int, ...]:
        """Indices of the adapter layers."""
        return tuple(index for index in range(self.layers) if index not in self.middle)


class Catalogue:
    """A catalogue directory; see ``open_catalogue``."""

    def __init__(self, directory: Path, info: CatalogueInfo) -> None:
        self.directory = directory
        self.info = info

    @property
    def config(self) -> PreTrainedConfig:
        """The whole model's configuration."""
        fields = dict(self.info.config)
        config: PreTrainedConfig = AutoConfig.for_model(fields.pop("model_type"), **fields)
        return config

    @property
    def heads(self) -> int:
        """Attention heads of a layer of the whole model."""
        return int(self.config.get_text_config().num_attention_heads)

    def save_info(self, **changes: Any) -> None:
        """Change and write ``catalogue.json``."""
        self.info = self.info.model_copy(update=changes)
        self.directory.mkdir(parents=True, exist_ok=True)
        _write(self.directory / "catalogue.json", self.info)

    def save_tokenizer(self, tokenizer: Any) -> None:
        """Write the model's tokenizer, unless the catalogue has it.

        Raises:
            CatalogueError: it cannot be written.
        """
        folder = self.directory / "tokenizer"
        if folder.is_dir():
            return
        aside = folder.with_name("tokenizer.partial")
        shutil.rmtree(aside, ignore_errors=True)
        try:
            tokenizer.save_pretrained(aside)
            os.replace(aside, folder)
        except Exception as error:  # the tokenizers library has no exception of its own
            shutil.rmtree(aside, ignore_errors=True)
            raise _unwritable(folder, error) from error

    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return load_tokenizer(self.directory / "tokenizer")

    def save_shard(self, tensors: Mapping[str, Tensor]) -> Shard:
        """Write tensors as a shard, unless the catalogue has it.

        Raises:
            CatalogueError: the file cannot be written.
        """
        folder = self.directory / "shards"
        folder.mkdir(parents=True, exist_ok=True)
        aside = folder / f"{os.getpid()}.partial"
        with _writing(aside):
            try:
                save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, aside)
                shard = Shard(sha256=_sha256(aside), bytes=aside.stat().st_size)
                path = self.shard_path(shard.sha256)
                if not path.exists():
                    os.replace(aside, path)
            finally:
                with suppress(OSError):
                    aside.unlink()
        return shard

    def shard_path(self, sha256: str) -> Path:
        """Where a shard is."""
        return self.directory / "shards" / f"{sha256}.safetensors"

    def load_shard(self, sha256: str, *, check: bool = True) -> dict[str, Tensor]:
        """The tensors of a shard, whose content is checked against its name unless the caller just did that.

        Raises:
            CatalogueError: it is missing or damaged.
        """
        path = self.shard_path(sha256)
        try:
            if check and _sha256(path) != sha256:
                raise CatalogueError(
                    f"{path}: damaged, its content has another SHA-256; delete it and build again"
                )
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise CatalogueError(
                f"{path}: missing or damaged ({error}); build the catalogue again"
            ) from error

    def save_emulator(self, emulator: Emulator) -> None:
        """Write a manifest."""
        path = self._manifest(emulator.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, emulator)

    def emulator(self, name: str) -> Emulator | None:
        """The emulator of a name, if the catalogue has it.

        Raises:
            CatalogueError: its manifest is damaged.
        """
        path = self._manifest(name)
        return _read(path, Emulator) if path.exists() else None

    def emulators(self, recipe: str | None = None) -> list[Emulator]:
        """The emulators of a recipe, of the one built last if not given, by rising retention."""
        wanted = self.info.recipe if recipe is None else recipe
        found = [_read(path, Emulator) for path in (self.directory / "emulators").glob("*.json")]
        return sorted(
            (emulator for emulator in found if emulator.recipe == wanted),
            key=lambda emulator: emulator.retention,
        )

    def find(self, retention: float, recipe: str | None = None) -> Emulator:
        """The emulator whose retention is nearest.

        Raises:
            CatalogueError: the retention is outside (0, 1], or there is no emulator of that recipe.
        """
        if not 0 < retention <= 1:
            raise CatalogueError(f"retention: must be above 0 and at most 1, got {retention:g}")
        emulators = self.emulators(recipe)
        if not emulators:
            raise CatalogueError(
                f"{self.directory}: no emulators of recipe {recipe or self.info.recipe!r}; run emutune catalogue build"
            )
        return min(emulators, key=lambda emulator: abs(emulator.retention - retention))

    def base(self) -> Emulator:
        """The whole model as an emulator: retention 1, nothing compressed.

        Raises:
            CatalogueError: the catalogue was never finished.
        """
        emulator = self.emulator(BASE)
        if emulator is None:
            raise CatalogueError(f"{self.directory}: not finished; run emutune catalogue build again")
        return emulator

    def assemble(self, emulator: Emulator, device: str | torch.device = "cpu") -> PreTrainedModel:
        """The emulator as a model of its own, from its shards alone, as a device does it."""

        def prepare(layer: nn.Module, position: int) -> None:
            prepare_layer(layer, emulator.layers[position], self.heads)

        return assemble(
            self.config,
            self.load_shard(emulator.outer.sha256),
            (self.load_shard(layer.shard.sha256) for layer in emulator.layers),
            kept=[layer.index for layer in emulator.layers],
            prepare=prepare,
            device=device,
        )

    def cut(self, full: PreTrainedModel, emulator: Emulator) -> PreTrainedModel:
        """The emulator as a model that shares with the whole one every layer that is not compressed.

        The adapter layers are the whole model's own, so whatever trains them in the emulator has already
        plugged them in.
        """
        whole = {layer.index: layer for layer in self.base().layers}
        model = keep_layers(full, [layer.index for layer in emulator.layers])
        layers = list(layer_stack(model))
        for position, entry in enumerate(emulator.layers):
            if entry.shard != whole[entry.index].shard:
                layers[position] = self._layer(entry, layers[position], full.device)
        replace_stack(model, stack_name(model), layers)
        return model

    def _layer(self, entry: LayerEntry, like: nn.Module, device: torch.device) -> nn.Module:
        layer = empty_copy(like)
        prepare_layer(layer, entry, self.heads)
        load_tensors(
            layer, self.load_shard(entry.shard.sha256), compute_dtype(device), f"layer {entry.index}"
        )
        return layer.requires_grad_(False).to(device).eval()

    def _manifest(self, name: str) -> Path:
        return self.directory / "emulators" / f"{name}.json"


def open_catalogue(directory: str | Path) -> Catalogue:
    """Open a catalogue.

    Raises:
        CatalogueError: there is none, or its description is damaged.
    """
    path = Path(directory) / "catalogue.json"
    if not path.is_file():
        raise CatalogueError(f"{directory}: no catalogue; make one with emutune catalogue build")
    return Catalogue(Path(directory), _read(path, CatalogueInfo))


def prepare_layer(layer: nn.Module, entry: LayerEntry, heads: int) -> None:
    """Give an empty layer of so many attention heads the shapes and modules of a compressed one."""
    if entry.widths is not None:
        shrink_layer(layer, entry.widths, heads)
    if entry.bits is not None:
        prepare_quantized(layer, entry.bits)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()


def _write(path: Path, content: BaseModel) -> None:
    with _writing(path), replacing(path) as aside:
        aside.write_text(content.model_dump_json(indent=1) + "\n", "utf-8")


def _read(path: Path, kind: type[Content]) -> Content:
    try:
        return kind.model_validate_json(path.read_text("utf-8"))
    except (OSError, ValueError, ValidationError) as error:
        raise CatalogueError(
            f"{path}: damaged ({str(error).splitlines()[0]}); build the catalogue again"
        ) from error


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: Exception) -> CatalogueError:
    return CatalogueError(f"{path}: cannot be written ({error}); free some space or choose another --out")
