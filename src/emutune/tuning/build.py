"""Make the emulators of a foundation model, each piece once."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from emutune.errors import ModelError
from emutune.tuning.adapter_manifest import KINDS, Kind, Shape
from emutune.tuning.adapters import adapter_form
from emutune.tuning.agreement import check_agreement, fits_in_memory
from emutune.tuning.base import catalogue_for, save_base
from emutune.tuning.catalogue import Catalogue
from emutune.tuning.compression.distill import DISTILLATION, distill
from emutune.tuning.compression.layer_drop import (
    block_influence,
    importance_order,
    layer_count,
    uniform_layers,
)
from emutune.tuning.compression.prune import prune_layers
from emutune.tuning.compression.quantize import quantize_layer
from emutune.tuning.documentation import REFERENCE, REFERENCE_CODE, reference_text
from emutune.tuning.foundation import (
    Foundation,
    load_tokenizer,
    open_foundation,
    skeleton,
)
from emutune.tuning.inventory import BASE
from emutune.tuning.layers import layer_stack, shorten_config
from emutune.tuning.manifest import METHODS, Emulator, LayerEntry, Method, Order, Widths
from emutune.tuning.perplexity import perplexity
from emutune.tuning.streaming import streamed
from emutune.tuning.text import Blocks, block_length, pack, split_blocks
from emutune.tuning.trainer import Bookkeeping, Progress, TrainerConfig, forget

log = logging.getLogger(__name__)

_INFLUENCE_ROWS = 8
_PERPLEXITY_ROWS = 32
_WIDTHS_ONLY = (0.25, 0.5, 0.75, 1.0)

Report = Callable[[str, Progress | None], None]


class Recipe(BaseModel):
    """How emulators are made.

    Attributes:
        methods: applied in the order layer_drop, prune, distill, quantize. With layer_drop an emulator's
            retention is its share of layers; without, the share of heads and channels that pruning leaves.
        retentions: which to make; all k/n if not given.
        bottom, top: adapter layers at either end.
        width_share: heads and channels that pruning leaves in an emulator that also lost layers.
        bits: of quantised weights.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    methods: tuple[Method, ...] = Field(default=("layer_drop",), min_length=1)
    order: Order = "importance"
    retentions: tuple[float, ...] | None = None
    bottom: int = Field(default=2, ge=0)
    top: int = Field(default=2, ge=0)
    width_share: float = Field(default=0.75, gt=0, le=1)
    bits: Literal[4, 8] = 8
    seed: int = Field(default=0, ge=0)
    distillation: TrainerConfig = DISTILLATION

    @property
    def label(self) -> str:
        """What tells the recipe from others in the same catalogue."""
        words: dict[Method, str] = {
            "layer_drop": f"layer_drop-{self.order}",
            "prune": f"prune-{self.width_share:g}" if "layer_drop" in self.methods else "prune",
            "distill": f"distill-{self.distillation.steps}-{self.seed}{self._distillation_mark}",
            "quantize": f"quantize-{self.bits}",
        }
        return "+".join(text for method, text in words.items() if method in self.methods)

    @property
    def _distillation_mark(self) -> str:
        """Empty if only the steps differ from the default."""
        if self.distillation == DISTILLATION.model_copy(update={"steps": self.distillation.steps}):
            return ""
        return "-" + hashlib.sha256(self.distillation.model_dump_json().encode()).hexdigest()[:8]


def build_catalogue(
    source: str | Path,
    out: Path,
    recipe: Recipe,
    text: str | None = None,
    report: Report = lambda stage, progress: None,
) -> Catalogue:
    """Make the emulators of a model, or those of them that the catalogue lacks.

    The model is compared with the one that ``transformers`` loads, if that fits into the memory. Apart from that,
    unless layers are pruned, distilled or quantised, one layer at a time is in memory.

    Args:
        source: a model directory, or ``"reference"`` or ``"reference-code"``.
        out: the catalogue's directory; what it already has is not made again.
        recipe: how.
        text: what importance, distillation and the manifests' perplexities are measured on; Python's
            documentation if not given, or its library's sources for the model of code.
        report: told the stage, and while training its progress.

    Raises:
        ModelError: the model cannot be cut this way, or is not the one that ``transformers`` loads.
        CatalogueError: the directory holds the catalogue of another model, or cannot be written.
    """
    foundation = open_foundation(source)
    tokenizer = load_tokenizer(foundation.directory, foundation.config)
    _check_layers(foundation, recipe)
    model = REFERENCE_CODE if str(source) == REFERENCE_CODE else REFERENCE
    text = reference_text(model) if text is None else text
    report("hashing the model", None)
    catalogue = catalogue_for(foundation, out, recipe.bottom, recipe.top, text)
    splits = split_blocks(pack(text, tokenizer, out / "work" / "tokens"), block_length(foundation.config))
    if catalogue.emulator(BASE) is None:
        if fits_in_memory(foundation.config):
            report("comparing with transformers", None)
            check_agreement(foundation, catalogue.config, splits["validation"].rows([0]))
        else:
            log.warning("%s: too large for the free memory to be compared with transformers' own", source)
        save_base(foundation, catalogue, recipe.seed)
    catalogue.save_tokenizer(tokenizer)
    if not catalogue.info.adapters:
        catalogue.save_info(adapters=_adapter_forms(catalogue))
    maker = _Maker(catalogue, recipe, splits["train"], splits["validation"], tokenizer.mask_token_id, report)
    maker.make()
    if catalogue.info.recipe != recipe.label:
        catalogue.save_info(recipe=recipe.label)
    return catalogue


class _Variant(NamedTuple):
    """The middle of an emulator in the making."""

    kept: list[int]
    layers: list[nn.Module]
    widths: Widths | None


class _Maker:
    """What the steps of one build share."""

    def __init__(
        self,
        catalogue: Catalogue,
        recipe: Recipe,
        training: Blocks,
        validation: Blocks,
        mask_token: int | None,
        report: Report,
    ) -> None:
        self.catalogue, self.recipe, self.report = catalogue, recipe, report
        self.training, self.validation = training, validation.first(_PERPLEXITY_ROWS)
        self.mask_token = mask_token
        self.base = catalogue.base()
        self.middle = list(catalogue.info.middle)
        self.checked: set[str] = set()

    def make(self) -> None:
        levels = [level for level in self._levels() if self.catalogue.emulator(self._name(level)) is None]
        if not levels:
            forget(self._work())
            return
        if set(self.recipe.methods) <= {"layer_drop"}:
            for level in levels:
                self.report(f"emulator of {level} of {len(self.middle)} layers", None)
                entries = [self.base.layers[index] for index in self._kept(level)]
                self._save(level, entries, self._streamed_perplexity(entries))
        else:
            self._make_compressed(levels)

    def _levels(self) -> list[float]:
        """Layer counts if layers are dropped, shares of width if not."""
        wanted = self.recipe.retentions
        count = len(self.middle)
        if "layer_drop" in self.recipe.methods:
            return sorted({layer_count(value, count) for value in wanted} if wanted else range(1, count + 1))
        if "prune" in self.recipe.methods:
            return sorted(wanted or _WIDTHS_ONLY)
        return [1.0]

    def _retention(self, level: float) -> float:
        return level / len(self.middle) if "layer_drop" in self.recipe.methods else level

    def _name(self, level: float) -> str:
        return f"{self.recipe.label}-{self._retention(level):.4f}"

    def _kept(self, level: float) -> list[int]:
        count = len(self.middle)
        if "layer_drop" not in self.recipe.methods or level == count:
            return self.middle
        if self.recipe.order == "uniform":
            return [self.middle[position] for position in uniform_layers(count, int(level))]
        return sorted(self._importance()[: int(level)])

    def _importance(self) -> tuple[int, ...]:
        if self.catalogue.info.importance is None:
            self.report("measuring importance", None)
            self.catalogue.save_info(importance=importance_order(self.middle, self._influences))
        order = self.catalogue.info.importance
        assert order is not None
        return order

    def _influences(self, middle: Sequence[int]) -> dict[int, float]:
        found: dict[int, float] = {}
        info = self.catalogue.info
        kept = [*range(info.bottom), *middle]

        def watch(position: int, before: Tensor, after: Tensor) -> None:
            found[kept[position]] = block_influence(before, after)

        with self._streamed([self.base.layers[index] for index in kept], watch) as model, torch.no_grad():
            model.base_model(input_ids=self.validation.first(_INFLUENCE_ROWS).rows(slice(None)))
        return found

    def _streamed_perplexity(self, entries: Sequence[LayerEntry]) -> float:
        with self._streamed(self._around(entries)) as model:
            return perplexity(model, self.validation, mask_token=self.mask_token, batch=_INFLUENCE_ROWS)

    def _streamed(
        self, entries: Sequence[LayerEntry], watch: Callable[[int, Tensor, Tensor], None] | None = None
    ) -> Any:
        config = self.catalogue.config
        shorten_config(config.get_text_config(), [entry.index for entry in entries])
        load = self._load
        layers = [partial(load, entry.shard.sha256) for entry in entries]
        return streamed(skeleton(config), partial(load, self.base.outer.sha256), layers, watch=watch)

    def _load(self, sha256: str) -> dict[str, Tensor]:
        """A shard's tensors. Parts are loaded again and again, but nobody else writes: one check is enough."""
        tensors = self.catalogue.load_shard(sha256, check=sha256 not in self.checked)
        self.checked.add(sha256)
        return tensors

    def _around(self, entries: Sequence[LayerEntry]) -> list[LayerEntry]:
        """The adapter layers with the given ones between."""
        whole, info = self.base.layers, self.catalogue.info
        return [*whole[: info.bottom], *entries, *whole[info.middle.stop :]]

    def _make_compressed(self, levels: Sequence[float]) -> None:
        full = self.catalogue.assemble(self.base)
        # Students are distilled together, those of emulators that an interrupted build already wrote too.
        together = self._levels() if "distill" in self.recipe.methods else levels
        variants = self._variants(full, together)
        if "distill" in self.recipe.methods:
            self._distill(full, variants)
        quantised: dict[int, nn.Module] = {}
        for level in levels:
            kept, layers, widths = variants[level]
            self.report(f"writing the emulator at {self._retention(level):.3g}", None)
            if "quantize" in self.recipe.methods:
                for layer in layers:
                    if id(layer) not in quantised:
                        quantised[id(layer)] = quantize_layer(layer, self.recipe.bits)
                layers = [quantised[id(layer)] for layer in layers]
            entries = [
                self._entry(full, index, layer, widths) for index, layer in zip(kept, layers, strict=True)
            ]
            model = self.catalogue.cut(full, self._emulator(level, entries))
            self._save(level, entries, perplexity(model, self.validation, mask_token=self.mask_token))
        forget(self._work())

    def _variants(self, full: PreTrainedModel, levels: Sequence[float]) -> dict[float, _Variant]:
        """What each level keeps; levels of the same width share the pruned layers, too."""
        layers: dict[float, dict[int, nn.Module]] = {1: dict(enumerate(layer_stack(full)))}
        widths: dict[float, Widths | None] = {1: None}
        variants = {}
        for level in levels:
            share = self._width_share(level)
            if share not in layers:
                self.report(f"pruning to {share:.3g} of the width", None)
                tokens = self.training.first(_INFLUENCE_ROWS).rows(slice(None))
                pruned, widths[share] = prune_layers(full, self.middle, share, tokens)
                layers[share] = dict(zip(self.middle, pruned, strict=True))
            kept = self._kept(level)
            variants[level] = _Variant(kept, [layers[share][index] for index in kept], widths[share])
        return variants

    def _width_share(self, level: float) -> float:
        if "prune" not in self.recipe.methods:
            return 1
        return self.recipe.width_share if "layer_drop" in self.recipe.methods else level

    def _distill(self, full: PreTrainedModel, variants: dict[float, _Variant]) -> None:
        whole = list(layer_stack(full))
        # The whole model has nothing to learn from itself.
        students = {
            level: layers
            for level, (kept, layers, _) in variants.items()
            if layers != [whole[index] for index in self.middle]
        }
        if not students:
            return
        batch, seed = self.recipe.distillation.batch, self.recipe.seed
        distilled = distill(
            full,
            self.catalogue.info.middle,
            list(students.values()),
            lambda step: self.training.batch(step, batch, seed),
            self.recipe.distillation.model_copy(update={"seed": seed}),
            Bookkeeping(
                self._work(),
                f"{self.base.base} {self.recipe.label} {sorted(students)}",
                lambda progress: self.report("distilling", progress),
            ),
            mask_token=self.mask_token,
        )
        for level, layers in zip(students, distilled, strict=True):
            variants[level] = variants[level]._replace(layers=layers)

    def _work(self) -> Path:
        return self.catalogue.directory / "work" / self.recipe.label

    def _entry(
        self, full: PreTrainedModel, index: int, layer: nn.Module, widths: Widths | None
    ) -> LayerEntry:
        if layer is layer_stack(full)[index]:
            return self.base.layers[index]
        bits = self.recipe.bits if "quantize" in self.recipe.methods else None
        stored = self.catalogue.load_shard(self.base.layers[index].shard.sha256)
        parameters = {name for name, _ in layer.named_parameters()}
        tensors = {
            # What is not quantised is stored as the model stores it.
            name: tensor.to(stored[name].dtype) if name in parameters else tensor
            for name, tensor in layer.state_dict().items()
        }
        return LayerEntry(index=index, shard=self.catalogue.save_shard(tensors), widths=widths, bits=bits)

    def _save(self, level: float, middle: Sequence[LayerEntry], measured: float) -> None:
        self.catalogue.save_emulator(
            self._emulator(level, middle).model_copy(update={"perplexity": measured})
        )

    def _emulator(self, level: float, middle: Sequence[LayerEntry]) -> Emulator:
        return Emulator(
            base=self.base.base,
            name=self._name(level),
            recipe=self.recipe.label,
            method=tuple(method for method in METHODS if method in self.recipe.methods),
            order=self.recipe.order if "layer_drop" in self.recipe.methods else None,
            retention=self._retention(level),
            kept=tuple(entry.index for entry in middle),
            seed=self.recipe.seed,
            outer=self.base.outer,
            layers=tuple(self._around(middle)),
        )


def _adapter_forms(catalogue: Catalogue) -> dict[Kind, dict[str, Shape]]:
    """What adapters of the model are made of, of each kind that it can take."""
    stack = layer_stack(skeleton(catalogue.config))
    layers = {index: stack[index] for index in catalogue.info.adapter_layers}
    forms: dict[Kind, dict[str, Shape]] = {}
    for kind in KINDS:
        with suppress(ModelError):
            forms[kind] = adapter_form(layers, kind)
    return forms


def _check_layers(foundation: Foundation, recipe: Recipe) -> None:
    needed = recipe.bottom + recipe.top + 1
    if len(foundation.layers) < needed:
        raise ModelError(
            f"{foundation.directory}: has {len(foundation.layers)} layers, but {recipe.bottom} + {recipe.top} adapter "
            f"layers and one between them need {needed}; lower --bottom and --top"
        )
