"""Make the emulators of a foundation model, each piece once."""

from __future__ import annotations

import logging
from contextlib import suppress
from pathlib import Path

from emutune.errors import ModelError
from emutune.tuning.adapter_manifest import KINDS, Kind, Shape
from emutune.tuning.adapters import adapter_form
from emutune.tuning.agreement import check_agreement, fits_in_memory
from emutune.tuning.base import catalogue_for, save_base
from emutune.tuning.catalogue import Catalogue
from emutune.tuning.documentation import REFERENCE, REFERENCE_CODE, reference_text
from emutune.tuning.doubts import warn_of
from emutune.tuning.foundation import (
    Foundation,
    load_tokenizer,
    open_foundation,
    skeleton,
)
from emutune.tuning.frontier import save_ladder
from emutune.tuning.inventory import BASE
from emutune.tuning.layers import layer_stack
from emutune.tuning.making import Maker, Report, Tell
from emutune.tuning.recipe import Recipe
from emutune.tuning.text import block_length, pack, split_blocks

__all__ = ["Recipe", "build_catalogue"]

log = logging.getLogger(__name__)


def build_catalogue(
    source: str | Path,
    out: Path,
    recipe: Recipe,
    text: str | None = None,
    report: Report = lambda stage, progress: None,
    tell: Tell = log.info,
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
        tell: told beforehand how long a stage takes that takes minutes.

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
    for made in recipe.made:
        mask_token = tokenizer.mask_token_id
        Maker(catalogue, made, splits["train"], splits["validation"], mask_token, report, tell).make()
    if recipe.frontier:
        save_ladder(catalogue)
    if catalogue.info.recipe != recipe.label:
        catalogue.save_info(recipe=recipe.label)
    warn_of(catalogue, recipe.label)
    return catalogue


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
