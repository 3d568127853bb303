"""What a build measures on calibration text, one layer of the model in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from emutune.tuning.catalogue import Catalogue
from emutune.tuning.compression.layer_drop import block_influence
from emutune.tuning.foundation import assemble, skeleton
from emutune.tuning.layers import layer_stack, shorten_config
from emutune.tuning.manifest import LayerEntry
from emutune.tuning.perplexity import perplexity, rows_at_once, token_losses
from emutune.tuning.streaming import Watch, streamed
from emutune.tuning.text import Blocks

_ROWS = 8


class Measuring:
    """Measurements of a model that lies in a catalogue.

    Args:
        catalogue: whose whole model is there.
        mask_token: of a masked model.
    """

    def __init__(self, catalogue: Catalogue, mask_token: int | None) -> None:
        self.catalogue, self.mask_token = catalogue, mask_token
        self.whole = catalogue.base()
        self._checked: set[str] = set()

    def perplexity(self, entries: Sequence[LayerEntry], blocks: Blocks) -> float:
        """Of the model that some layers of the whole one make."""
        with self._streamed(entries) as model:
            return perplexity(model, blocks, mask_token=self.mask_token, batch=_ROWS)

    @torch.no_grad()
    def influences(self, middle: Sequence[int], blocks: Blocks) -> dict[int, float]:
        """The block influence of some layers of the middle, while only these are in the model."""
        found: dict[int, float] = {}
        kept = [*range(self.catalogue.info.bottom), *middle]

        def watch(position: int, before: Tensor, after: Tensor, again: object) -> None:
            found[kept[position]] = block_influence(before, after)

        with self._streamed([self.whole.layers[index] for index in kept], watch) as model:
            model.base_model(input_ids=blocks.rows(slice(None)))
        return found

    @torch.no_grad()
    def losses_without(self, middle: Sequence[int], blocks: Blocks) -> dict[int, float]:
        """The mean loss per token without each of some layers of the middle, while only these are in the model.

        All are measured in one pass: behind each layer, the hidden states that skipped it go on beside the others.
        """
        totals, counts = dict.fromkeys(middle, 0.0), dict.fromkeys(middle, 0)
        vocabulary = self.catalogue.config.get_text_config().vocab_size
        rows = blocks.rows(slice(None))
        for number, some in enumerate(rows.split(rows_at_once(blocks.length, vocabulary, _ROWS))):
            for index, losses in self._skipping(middle, some, number):
                totals[index] += float(losses.double().sum())
                counts[index] += losses.numel()
        return {index: totals[index] / counts[index] for index in middle}

    def _skipping(self, middle: Sequence[int], tokens: Tensor, seed: int) -> Iterator[tuple[int, Tensor]]:
        info = self.catalogue.info
        kept = [*range(info.bottom), *middle, *range(info.middle.stop, info.layers)]
        skipped: dict[int, Tensor] = {}

        def watch(position: int, before: Tensor, after: Tensor, again: Callable[[Tensor], Tensor]) -> None:
            for index, hidden in skipped.items():
                skipped[index] = again(hidden)
            if kept[position] in info.middle:
                skipped[kept[position]] = before

        losses = partial(token_losses, tokens=tokens, mask_token=self.mask_token, seed=seed)
        with self._streamed([self.whole.layers[index] for index in kept], watch) as model:
            # The loss, not the hidden states alone: a masked model is shown the same tokens below.
            losses(model)
        for index, hidden in skipped.items():
            with _leaving(self._ends, hidden) as model:
                yield index, losses(model)

    @cached_property
    def _ends(self) -> PreTrainedModel:
        """What lies around the layers, with one of them between since there must be one."""
        outer, first = self._load(self.whole.outer.sha256), self._load(self.whole.layers[0].shard.sha256)
        return assemble(self.catalogue.config, outer, iter([first]), kept=[0])

    def _streamed(self, entries: Sequence[LayerEntry], watch: Watch | None = None) -> Any:
        config = self.catalogue.config
        shorten_config(config.get_text_config(), [entry.index for entry in entries])
        layers = [partial(self._load, entry.shard.sha256) for entry in entries]
        return streamed(skeleton(config), partial(self._load, self.whole.outer.sha256), layers, watch=watch)

    def _load(self, sha256: str) -> Mapping[str, Tensor]:
        """A shard's tensors. Parts are loaded again and again, but nobody else writes: one check is enough."""
        tensors = self.catalogue.load_shard(sha256, check=sha256 not in self._checked)
        self._checked.add(sha256)
        return tensors


@contextmanager
def _leaving(model: PreTrainedModel, hidden: Tensor) -> Iterator[PreTrainedModel]:
    """A model whose layers end with given hidden states, whatever they are given."""

    def replace(_: object, __: object, output: Any) -> Any:
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handle = layer_stack(model)[-1].register_forward_hook(replace)
    try:
        yield model
    finally:
        handle.remove()
