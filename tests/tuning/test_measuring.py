"""What a build measures in one pass is what models of their own lose."""

from __future__ import annotations

from pathlib import Path

import pytest
from directories import TEXT, catalogue_of, tokenizer
from tuning_models import LAYERS

from emutune.tuning.layers import keep_layers
from emutune.tuning.measuring import Measuring
from emutune.tuning.perplexity import token_losses
from emutune.tuning.text import Blocks, block_length, pack, split_blocks


def calibration(config: object) -> Blocks:
    return split_blocks(pack(TEXT, tokenizer()), block_length(config))["train"].first(10)


def test_losses_without_each_layer_are_those_of_models_without_it(architecture: str, tmp_path: Path) -> None:
    catalogue = catalogue_of(tmp_path, architecture)
    blocks, mask = calibration(catalogue.config), tokenizer().mask_token_id
    middle = [1, 2, 4]
    found = Measuring(catalogue, mask).losses_without(middle, blocks)
    full = catalogue.assemble(catalogue.base())
    for index in middle:
        cut = keep_layers(full, [layer for layer in (0, *middle, LAYERS - 1) if layer != index])
        # Hidden tokens of a masked model are drawn for each of the passes, of at most eight rows.
        parts = enumerate(blocks.rows(slice(None)).split(8))
        losses = [token_losses(cut, rows, mask_token=mask, seed=number) for number, rows in parts]
        expected = sum(float(part.double().sum()) for part in losses) / sum(part.numel() for part in losses)
        assert found[index] == pytest.approx(expected, rel=1e-5)


def test_another_layer_is_dropped_only_where_it_costs_least(tmp_path: Path) -> None:
    catalogue = catalogue_of(tmp_path, "llama")
    measuring = Measuring(catalogue, None)
    blocks = split_blocks(pack(TEXT, tokenizer()), block_length(catalogue.config))["train"].spread(16)
    left = list(catalogue.info.middle)
    for dropped in catalogue.info.spared:
        losses = measuring.losses_without(left, blocks)
        assert losses[dropped] == min(losses.values())
        left.remove(dropped)
    assert len(left) == 1
