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
from typing import Any

import torch
from pydantic import BaseModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from emutune.errors import CatalogueError
from emutune.files import replacing
from emutune.tuning.compression.prune import shrink_layer
from emutune.tuning.compression.quantize import prepare_quantized
from emutune.tuning.foundation import assemble, compute_dtype, load_tensors, load_tokenizer
from emutune.tuning.inventory import BASE, CatalogueInfo, Inventory, read_info
from emutune.tuning.layers import empty_copy, keep_layers, layer_stack, replace_stack, stack_name
from emutune.tuning.manifest import Emulator, LayerEntry, Shard

__all__ = ["BASE", "Catalogue", "CatalogueInfo", "open_catalogue", "prepare_layer"]

_PIECE = 1 << 22


class Catalogue(Inventory):
    """A catalogue directory, with all that needs torch; see ``open_catalogue``."""

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
        return load_tokenizer(self.directory / "tokenizer", self.config)

    def save_shard(self, tensors: Mapping[str, Tensor]) -> Shard:
        """Write tensors as a shard, unless the catalogue has it.

        Raises:
            CatalogueError: the file cannot be written.
        """
        folder = self.shards
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
        path = self.manifest_path(emulator.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, emulator)

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
                layers[position] = self.layer(entry, layers[position])
        replace_stack(model, stack_name(model), layers)
        return model

    def layer(self, entry: LayerEntry, like: nn.Module) -> nn.Module:
        """A layer of an emulator, where the layer of the whole model is that it stands for."""
        layer, device = empty_copy(like), next(like.parameters()).device
        prepare_layer(layer, entry, self.heads)
        tensors, what = self.load_shard(entry.shard.sha256), f"layer {entry.index}"
        load_tensors(layer, tensors, compute_dtype(device), what)
        return layer.requires_grad_(False).to(device).eval()


def open_catalogue(directory: str | Path, shards: Path | None = None) -> Catalogue:
    """Open a catalogue.

    Args:
        directory: where it is.
        shards: the folder of its shards, if that is elsewhere.

    Raises:
        CatalogueError: there is none, or its description is damaged.
    """
    return Catalogue(Path(directory), read_info(directory), shards)


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


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: Exception) -> CatalogueError:
    return CatalogueError(f"{path}: cannot be written ({error}); free some space or choose another --out")
