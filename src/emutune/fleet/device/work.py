"""What a device computes: an emulator made of its shards alone, an adapter in it, and how good both are.

Importing this needs torch; the rest of the device does without.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from transformers import PreTrainedModel

from emutune.errors import CatalogueError, CheckpointError, DataError
from emutune.fleet.device.emulators import model_folder
from emutune.fleet.device.files import hash_file, write_durably
from emutune.fleet.protocol import Perplexity, Seconds, Sha256, Training
from emutune.fleet.training import trainer_config
from emutune.tuning.adapters import (
    attach,
    copy_values,
    save_adapter,
    start_from,
)
from emutune.tuning.catalogue import Catalogue, open_catalogue
from emutune.tuning.head_loss import training_loss
from emutune.tuning.layers import layer_stack
from emutune.tuning.manifest import Emulator
from emutune.tuning.perplexity import perplexity
from emutune.tuning.text import Blocks, block_length, fitting_block, task_blocks
from emutune.tuning.trainer import Bookkeeping, Progress, train

ADAPTER = "adapter.safetensors"
_MADE = "made.json"
# Enough for three digits, and a report does not keep a step waiting.
_BLOCKS_OF_A_REPORT = 32


class Made(BaseModel):
    """An adapter that was trained.

    Attributes:
        sha256: of its file.
        before, after: perplexity of the emulator on the held-back text, before and after training.
        training_s: wall time of the training steps, over all attempts.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    sha256: Sha256
    before: Perplexity
    after: Perplexity
    training_s: Seconds


def train_adapter(
    cache: Path,
    manifest: dict[str, Any],
    text: Path,
    training: Training,
    directory: Path,
    start: Path | None = None,
    report: Callable[[Progress], None] | None = None,
) -> Made:
    """Train an adapter in an emulator and keep it in a directory.

    The same call after an interruption goes on where it was, and comes to the same adapter; once the adapter is
    there, it returns at once.

    Args:
        cache: directory of a ``Cache``.
        manifest: of the emulator, as JSON.
        text: the task's file; of what training needs of it eight of ten blocks train, one chooses the state, one is
            measured.
        training: how to train.
        directory: where the adapter and everything on the way to it are kept.
        start: the adapter to start from.
        report: told of the progress after every step; what it raises ends the training.

    Raises:
        AdapterError: the adapter to start from does not fit.
        CatalogueError: the emulator is not of this model, or a shard is damaged.
        DataError: the text is too short.
    """
    made = _read_made(directory)
    if made is not None:
        return made
    catalogue, emulator = _opened(cache, manifest)
    tokenizer, model = catalogue.tokenizer(), catalogue.assemble(emulator)
    block = fitting_block(catalogue.config, training.block)
    splits = task_blocks(text, tokenizer, block, training.steps * training.batch, directory / "tokens")
    described = catalogue.adapter_manifest(emulator, training.adapter, training.width)
    stack = layer_stack(model)
    layers = {
        entry.index: stack[position]
        for position, entry in enumerate(emulator.layers)
        if entry.index in described.layer_map
    }
    parameters = attach(layers, described.kind, described.width, training.seed)
    if start is not None:
        start_from(start, described, parameters)
    before = perplexity(model, splits["test"], mask_token=tokenizer.mask_token_id)
    progress = _train(model, parameters, splits, training, directory, tokenizer.mask_token_id, report)
    save_adapter(directory / ADAPTER, described, parameters)
    made = Made(
        sha256=hash_file(directory / ADAPTER)[0],
        before=before,
        after=perplexity(model, splits["test"], mask_token=tokenizer.mask_token_id),
        training_s=progress.seconds,
    )
    write_durably(directory / _MADE, made.model_dump_json())
    return made


def perplexity_ratio(cache: Path, manifest: dict[str, Any], text: Path) -> float | None:
    """Perplexity of an emulator on a task's text, over that on the calibration text.

    Args:
        cache: directory of a ``Cache``.
        manifest: of the emulator, as JSON.
        text: the task's file, of whose held-back blocks a few from all over are measured.

    Returns:
        The ratio, or None if the calibration text was never measured or the task's is too short.

    Raises:
        CatalogueError: the emulator is not of this model, or a shard is damaged.
    """
    catalogue, emulator = _opened(cache, manifest)
    if emulator.perplexity is None:
        return None
    tokenizer = catalogue.tokenizer()
    try:
        blocks = task_blocks(text, tokenizer, block_length(catalogue.config), trained=0)["test"]
    except DataError:
        return None
    model = catalogue.assemble(emulator)
    measured = perplexity(model, blocks.spread(_BLOCKS_OF_A_REPORT), mask_token=tokenizer.mask_token_id)
    return measured / emulator.perplexity


def _opened(cache: Path, manifest: dict[str, Any]) -> tuple[Catalogue, Emulator]:
    try:
        emulator = Emulator.model_validate(manifest)
    except ValidationError as error:
        first = error.errors()[0]
        raise CatalogueError(f"emulator.{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    home = model_folder(cache, emulator.base)
    if not home.is_dir():
        raise CatalogueError(
            f"emulator {emulator.name}: is of the model {emulator.base[:12]}, which the fleet does not serve"
        )
    catalogue = open_catalogue(home, cache / "shards")
    indices = {entry.index for entry in emulator.layers}
    if not indices.issuperset(catalogue.info.adapter_layers):
        raise CatalogueError(f"emulator {emulator.name}: lacks some of the adapter layers")
    return catalogue, emulator


def _train(
    model: PreTrainedModel,
    parameters: Any,
    splits: Any,
    training: Training,
    directory: Path,
    mask_token: int | None,
    report: Callable[[Progress], None] | None,
) -> Progress:
    blocks: Blocks = splits["train"]
    config = trainer_config(training)
    untouched = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    def attempt() -> Progress:
        return train(
            parameters,
            training_loss(model, mask_token),
            lambda number: blocks.batch(number, config.batch, config.seed),
            config,
            Bookkeeping(directory / "training", training.model_dump_json(), report),
            score=lambda: perplexity(model, splits["validation"], mask_token=mask_token),
        )

    try:
        return attempt()
    except CheckpointError:
        if not (directory / "training").exists():
            raise
    # A checkpoint that a power cut damaged costs the training so far, and no more.
    shutil.rmtree(directory / "training")
    copy_values(parameters, untouched)
    return attempt()


def _read_made(directory: Path) -> Made | None:
    try:
        made = Made.model_validate_json((directory / _MADE).read_text("utf-8"))
        return made if hash_file(directory / ADAPTER)[0] == made.sha256 else None
    except (OSError, ValueError):
        return None
