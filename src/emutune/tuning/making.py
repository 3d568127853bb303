"""The emulators of one recipe, made from the whole model in its catalogue."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from torch import nn
from transformers import PreTrainedModel

from emutune.tuning.catalogue import Catalogue
from emutune.tuning.compression.compensate import compensate_layers
from emutune.tuning.compression.distill import distill, with_middle
from emutune.tuning.compression.layer_drop import importance_order, layer_count, sparing, uniform_layers
from emutune.tuning.compression.prune import prune_layers
from emutune.tuning.layers import layer_stack
from emutune.tuning.manifest import METHODS, Emulator, LayerEntry, Widths
from emutune.tuning.measuring import Measuring
from emutune.tuning.perplexity import perplexity
from emutune.tuning.recipe import Recipe
from emutune.tuning.text import Blocks
from emutune.tuning.trainer import Bookkeeping, Progress, forget

_INFLUENCE_ROWS = 8
_PERPLEXITY_ROWS = 32
# Enough for the moments of some thousand inputs; four times as many round no better.
_ROUNDING_TOKENS = 4096
_WIDTHS_ONLY = (0.25, 0.5, 0.75, 1.0)

_MINUTE_S = 60.0

Report = Callable[[str, Progress | None], None]
Tell = Callable[[str], None]


class _Variant(NamedTuple):
    """The middle of an emulator in the making."""

    kept: list[int]
    layers: list[nn.Module]
    widths: Widths | None


class Maker:
    """Makes the emulators of a recipe, from the whole model in its catalogue.

    Args:
        catalogue: whose whole model is there; gets the emulators.
        recipe: how.
        training, validation: blocks to choose layers, to distil and to round on, and to measure on.
        mask_token: of a masked model.
        report: told the stage, and while training its progress.
        tell: told beforehand how long a stage takes that takes minutes.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        recipe: Recipe,
        training: Blocks,
        validation: Blocks,
        mask_token: int | None,
        report: Report,
        tell: Tell,
    ) -> None:
        self.catalogue, self.recipe, self.report, self.tell = catalogue, recipe, report, tell
        self.training, self.validation = training, validation.first(_PERPLEXITY_ROWS)
        self.mask_token = mask_token
        self.base = catalogue.base()
        self.measuring = Measuring(catalogue, mask_token)
        self.middle = list(catalogue.info.middle)

    def make(self) -> None:
        """Make those that the catalogue lacks.

        Raises:
            ModelError: the model cannot be cut this way.
            CatalogueError: the catalogue cannot be written.
        """
        if self.base.perplexity is None:
            self.report("measuring the whole model", None)
            found = self.measuring.perplexity(self.base.layers, self.validation)
            self.base = self.base.model_copy(update={"perplexity": found})
            self.catalogue.save_emulator(self.base)
        levels = [level for level in self._levels() if self.catalogue.emulator(self._name(level)) is None]
        if not levels:
            forget(self._work())
            return
        if set(self.recipe.methods) <= {"layer_drop"}:
            for level in levels:
                self.report(f"emulator of {level} of {len(self.middle)} layers", None)
                entries = [self.base.layers[index] for index in self._kept(level)]
                self._save(level, entries, self._plain_perplexity(self._around(entries)))
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
        if self.recipe.order == "importance":
            return sorted(self._importance()[: int(level)])
        return sorted({*self.middle} - {*self._spare(count - int(level))})

    def _importance(self) -> tuple[int, ...]:
        if self.catalogue.info.importance is None:
            self.report("measuring importance", None)
            calibration = self.validation.first(_INFLUENCE_ROWS)
            influences = partial(self.measuring.influences, blocks=calibration)
            self.catalogue.save_info(importance=importance_order(self.middle, influences))
        order = self.catalogue.info.importance
        assert order is not None
        return order

    def _spare(self, count: int) -> tuple[int, ...]:
        """The layers that can best be spared, so many; what was found is kept, whatever comes next."""
        if (missing := count - len(self.catalogue.info.spared)) > 0:
            calibration = self.training.spread(-(-self.recipe.calibration_tokens // self.training.length))
            self._tell_minutes(missing, calibration)
            costs = partial(self.measuring.losses_without, blocks=calibration)
            order = sparing(self.middle, costs, self.catalogue.info.spared)
            for number in range(missing):
                self.report(f"choosing layers by the loss, {number + 1} of {missing}", None)
                self.catalogue.save_info(spared=(*self.catalogue.info.spared, next(order)))
        return self.catalogue.info.spared[:count]

    def _tell_minutes(self, missing: int, calibration: Blocks) -> None:
        """Say how long it takes to choose so many layers, by how long one block of text takes."""
        left = [index for index in self.middle if index not in self.catalogue.info.spared]
        started = time.monotonic()
        self.measuring.losses_without(left, calibration.first(1))
        one = time.monotonic() - started
        # Without each layer, half of those that are left run, and the head.
        layer, head = self.base.layers[0].shard.bytes, self.base.outer.bytes
        work = [count * (head + layer * count / 2) for count in range(len(left) - missing + 1, len(left) + 1)]
        self._tell_duration("choosing layers by the loss", one * len(calibration) * sum(work) / work[-1])

    def _tell_duration(self, what: str, seconds: float) -> None:
        if seconds >= _MINUTE_S:
            self.tell(
                f"{what} takes about {seconds / _MINUTE_S:.0f} minutes on this machine as busy as it is now"
            )

    def _around(self, entries: Sequence[LayerEntry]) -> list[LayerEntry]:
        """The adapter layers with the given ones between."""
        whole, info = self.base.layers, self.catalogue.info
        return [*whole[: info.bottom], *entries, *whole[info.middle.stop :]]

    def _plain_perplexity(self, entries: Sequence[LayerEntry]) -> float:
        if len(entries) == len(self.base.layers) and self.base.perplexity is not None:
            return self.base.perplexity
        return self.measuring.perplexity(entries, self.validation)

    def _make_compressed(self, levels: Sequence[float]) -> None:
        full = self.catalogue.assemble(self.base)
        if {"distill", "quantize"} <= {*self.recipe.methods}:
            variants = self._distilled_before(full)
        else:
            variants = self._variants(full, self._together(levels))
            if "distill" in self.recipe.methods:
                self._distill(full, variants)
        if "quantize" in self.recipe.methods:
            self._quantize(full, variants)
        for level in levels:
            kept, layers, widths = variants[level]
            self.report(f"writing the emulator at {self._retention(level):.3g}", None)
            entries = [
                self._entry(full, index, layer, widths) for index, layer in zip(kept, layers, strict=True)
            ]
            model = self.catalogue.cut(full, self._emulator(level, entries))
            self._save(level, entries, perplexity(model, self.validation, mask_token=self.mask_token))
        forget(self._work())

    def _distilled_before(self, full: PreTrainedModel) -> dict[float, _Variant]:
        """The students of the same recipe without rounding, which are made first, so that they learn only once."""
        plain = Maker(
            self.catalogue,
            self.recipe.without("quantize"),
            self.training,
            self.validation,
            self.mask_token,
            self.report,
            self.tell,
        )
        plain.make()
        # A shard that several levels have is one layer, and one of the whole model that model's own.
        layers = {entry.shard: layer_stack(full)[entry.index] for entry in self.base.layers}
        variants = {}
        for level in self._levels():
            emulator = self.catalogue.emulator(plain._name(level))
            assert emulator is not None
            entries = [entry for entry in emulator.layers if entry.index in self.catalogue.info.middle]
            for entry in entries:
                if entry.shard not in layers:
                    layers[entry.shard] = self.catalogue.layer(entry, layer_stack(full)[entry.index])
            kept = list(emulator.kept)
            variants[level] = _Variant(kept, [layers[entry.shard] for entry in entries], entries[0].widths)
        return variants

    def _together(self, levels: Sequence[float]) -> list[float]:
        """The levels that have to be there for some of them to be made, so that these do not depend on which."""
        if "distill" in self.recipe.methods:
            # Students learn together, those of emulators that an interrupted build already wrote too.
            return self._levels()
        if {"layer_drop", "quantize"} <= {*self.recipe.methods}:
            return sorted({*levels, float(len(self.middle))})
        return list(levels)

    def _quantize(self, full: PreTrainedModel, variants: dict[float, _Variant]) -> None:
        """Quantise every layer once, in the deepest of the models that it is part of."""
        tokens = self.training.spread(-(-_ROUNDING_TOKENS // self.training.length)).rows(slice(None))
        done: dict[int, nn.Module] = {}
        for _, variant in sorted(variants.items(), reverse=True):
            todo = [position for position, layer in enumerate(variant.layers) if id(layer) not in done]
            if todo:
                self.report(f"rounding {len(todo)} layers to {self.recipe.bits} bits", None)
                stack = [done.get(id(layer), layer) for layer in variant.layers]
                model = with_middle(full, self.catalogue.info.middle, stack)
                positions = [self.catalogue.info.bottom + position for position in todo]
                rounded = compensate_layers(model, positions, self.recipe.bits, tokens)
                done |= {id(variant.layers[at]): layer for at, layer in zip(todo, rounded, strict=True)}
        for level, variant in variants.items():
            variants[level] = variant._replace(layers=[done[id(layer)] for layer in variant.layers])

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
                self._watch_distillation(),
            ),
            mask_token=self.mask_token,
        )
        for level, layers in zip(students, distilled, strict=True):
            variants[level] = variants[level]._replace(layers=layers)

    def _watch_distillation(self) -> Callable[[Progress], None]:
        """Reports every step, and after the first says how long all take."""
        told = False

        def see(progress: Progress) -> None:
            nonlocal told
            if not told:
                left = self.recipe.distillation.steps - progress.step
                self._tell_duration(
                    f"distilling, {left} more steps,", left * progress.seconds / progress.step
                )
                told = True
            self.report("distilling", progress)

        return see

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
