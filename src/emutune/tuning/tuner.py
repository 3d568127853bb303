"""Tune an adapter against an emulator, and judge it plugged into the whole model."""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from emutune.tuning.adapters import (
    AdapterManifest,
    Kind,
    attach,
    copy_values,
    save_adapter,
    start_from,
)
from emutune.tuning.catalogue import BASE, Catalogue
from emutune.tuning.doubts import doubt, misled, warn_misled
from emutune.tuning.head_loss import training_loss
from emutune.tuning.layers import layer_stack
from emutune.tuning.manifest import Emulator
from emutune.tuning.perplexity import perplexity
from emutune.tuning.text import Blocks, block_length, pack, split_blocks
from emutune.tuning.trainer import CHECKPOINT, Bookkeeping, Progress, TrainerConfig, train

log = logging.getLogger(__name__)

Where = Literal["device", "server"]
ServerModel = Literal["full", "cached"]


class AdapterTraining(BaseModel):
    """How an adapter is trained against an emulator.

    Attributes:
        recipe: of the emulator; the one built last if not given.
        adapter: what to train.
        width: rank of LoRA, width of bottlenecks.
        block: tokens in a block of text; 256, or what the model has positions for, if not given.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    recipe: str | None = None
    adapter: Kind = "layers"
    width: int = Field(default=8, ge=1)
    block: int | None = Field(default=None, ge=8)
    training: TrainerConfig = TrainerConfig()


class TuneConfig(AdapterTraining):
    """What to tune and how.

    Attributes:
        retention: of the emulator to train against.
        where: a device has the emulator alone; the server trains against the whole model (Eq. 9, D12), or
            with ``server_model = "cached"`` against the emulator that the device has.
    """

    retention: float = 0.5
    where: Where = "device"
    server_model: ServerModel = "full"


@dataclass(frozen=True)
class TuneResult:
    """What tuning came to.

    Attributes:
        accepted: whether the plugged-in model got better on the validation text.
        before, after: perplexity of the whole model on the test text, without the adapter that was tuned
            and with the one that is in service now.
        emulator_before, emulator_after: the same of the emulator.
        plugged_validation: plugged-in perplexity on the validation text, by step.
    """

    accepted: bool
    before: float
    after: float
    emulator_before: float
    emulator_after: float
    retention: float
    plugged_validation: dict[int, float]
    steps: int
    tokens_per_s: float
    trainable: int


def tune(
    catalogue: Catalogue,
    text: str,
    config: TuneConfig,
    out: Path,
    *,
    device: str | torch.device = "cpu",
    report: Callable[[Progress], None] | None = None,
) -> TuneResult:
    """Tune an adapter and write it, if the model with it plugged in is better than before.

    An adapter at ``out`` is where training starts, and stays if the new one is not better. A run that was
    stopped goes on where it was.

    Args:
        catalogue: the emulators of the model.
        text: the task's text; eight of ten blocks train, one chooses and accepts, one is reported.
        config: what to tune.
        out: the adapter's file.
        device: where to compute.
        report: told of the training's progress.

    Raises:
        AdapterError: the adapter at ``out`` belongs to another model or is of another kind.
        CatalogueError: there is no such emulator, or a shard is damaged.
        DataError: the text is too short.
        ModelError: the tokenizer does not fit the model.
        UsageError: a block has more tokens than the model positions.
    """
    tokenizer, length = catalogue.tokenizer(), block_length(catalogue.config, config.block)
    emulator = chosen_emulator(catalogue, config)
    work = out.with_name(out.name + ".training")
    splits = split_blocks(pack(text, tokenizer, work / "tokens"), length)
    full = catalogue.assemble(catalogue.base(), device)
    bench = Bench(catalogue, full, emulator, splits, tokenizer.mask_token_id)
    manifest = catalogue.adapter_manifest(emulator, config.adapter, config.width)
    parameters = attach(adapter_layers(catalogue, full), manifest.kind, manifest.width, config.training.seed)
    before = _start_from(out, manifest, parameters)
    # Whoever was stopped after the adapter was written starts from that one, and anew.
    checkpoint = work / (before or "first")[:16]
    purpose = f"{manifest.model_dump_json()} {_digest(text, before)}"
    result = bench.train(parameters, config.training, checkpoint, purpose, report)
    if result.accepted:
        measured = {"perplexity_before": result.before, "perplexity": result.after}
        save_adapter(out, manifest.model_copy(update=measured), parameters)
    for finished in work.glob(f"*/{CHECKPOINT}"):
        shutil.rmtree(finished.parent)
    return result


def chosen_emulator(catalogue: Catalogue, config: TuneConfig) -> Emulator:
    """What a configuration trains against: the server has the whole model."""
    if config.where == "server" and config.server_model == "full":
        return catalogue.base()
    return catalogue.find(config.retention, config.recipe)


def adapter_layers(catalogue: Catalogue, full: PreTrainedModel) -> dict[int, nn.Module]:
    """The adapter layers of the whole model, by index."""
    stack = layer_stack(full)
    return {index: stack[index] for index in catalogue.info.adapter_layers}


class Bench:
    """A whole model, an emulator that shares its adapter layers, and a task's text."""

    def __init__(
        self,
        catalogue: Catalogue,
        full: PreTrainedModel,
        emulator: Emulator,
        splits: Mapping[Any, Blocks],
        mask_token: int | None,
    ) -> None:
        self.catalogue, self.full, self.emulator = catalogue, full, emulator
        self.splits, self.mask_token = splits, mask_token

    def train(
        self,
        parameters: Mapping[str, nn.Parameter],
        config: TrainerConfig,
        directory: Path | None,
        purpose: str,
        report: Callable[[Progress], None] | None = None,
    ) -> TuneResult:
        """Train the adapter's parameters against the emulator; the plugged-in perplexity chooses among states."""
        model = self.catalogue.cut(self.full, self.emulator)
        device = self.full.device
        loss = training_loss(model, self.mask_token)
        untouched = {name: parameter.detach().clone() for name, parameter in parameters.items()}

        def under_autocast(tokens: Tensor, step: int) -> Tensor:
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type != "cpu"):
                return loss(tokens.to(device), step)

        if (why := doubt(self.emulator, self.catalogue.base())) is not None:
            log.warning("%s", why)
        before, emulator_before = self.measure(self.full), self.measure(model)
        progress = train(
            parameters,
            under_autocast,
            lambda number: self.splits["train"].batch(number, config.batch, config.seed),
            config,
            Bookkeeping(directory, purpose, report),
            score=lambda: self.measure(self.full, "validation"),
        )
        if self.emulator.name != BASE and misled(progress.losses, progress.scores):
            warn_misled(self.emulator, progress.scores)
        accepted = progress.best_step > 0
        if not accepted:
            copy_values(parameters, untouched)
        return TuneResult(
            accepted=accepted,
            before=before,
            after=self.measure(self.full),
            emulator_before=emulator_before,
            emulator_after=self.measure(model),
            retention=self.emulator.retention,
            plugged_validation=progress.scores,
            steps=progress.step,
            tokens_per_s=progress.tokens_per_s,
            trainable=sum(parameter.numel() for parameter in parameters.values()),
        )

    def measure(self, model: PreTrainedModel, split: str = "test") -> float:
        """Perplexity of a model on one of the task's splits."""
        return perplexity(model, self.splits[split], mask_token=self.mask_token)


def _start_from(out: Path, manifest: AdapterManifest, parameters: Mapping[str, nn.Parameter]) -> str:
    """Start from the adapter in service, if there is one; says which."""
    if not out.exists():
        return ""
    start_from(out, manifest, parameters)
    return hashlib.sha256(out.read_bytes()).hexdigest()


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
