"""Plug an adapter into its foundation model and write the result as an ordinary model directory."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from emutune.errors import AdapterError, UsageError
from emutune.tuning import bottleneck
from emutune.tuning.adapters import (
    AdapterManifest,
    bottleneck_places,
    check_belongs,
    load_adapter,
    merge_lora,
    plug_in,
)
from emutune.tuning.checkpoint import Stored
from emutune.tuning.documentation import reference_text
from emutune.tuning.foundation import (
    Foundation,
    base_hash,
    load_model,
    load_tokenizer,
    open_foundation,
    read_tensors,
)
from emutune.tuning.layers import layer_stack, stack_name
from emutune.tuning.peft_directory import check_peft_holds, write_peft
from emutune.tuning.perplexity import is_masked, perplexity
from emutune.tuning.plugged_files import write_directory
from emutune.tuning.text import block_length, pack, split_blocks

Form = Literal["model", "peft"]
FORMS: tuple[Form, ...] = ("model", "peft")

_CODE = '''"""{architecture} with bottleneck adapters, for AutoModel...from_pretrained(..., trust_remote_code=True)."""

from transformers import {architecture}

from .bottleneck import insert_bottlenecks


class {architecture}WithBottlenecks({architecture}):
    def __init__(self, config):
        super().__init__(config)
        for layer, projections in config.bottlenecks["layers"].items():
            insert_bottlenecks(self.get_submodule(layer), projections, config.bottlenecks["width"])
'''


class Plugged(NamedTuple):
    """Perplexity of the whole model on the test text before and after plugging in, as it was written."""

    before: float
    after: float


def plug(
    source: str | Path, adapter: Path, out: Path, text: str | None = None, form: Form = "model"
) -> Plugged:
    """Write a model with an adapter plugged in, once it is known to work.

    Whole layers and LoRA become plain weights. Bottlenecks cannot; a directory with them carries the code
    for them, and loads with ``trust_remote_code=True``.

    Args:
        source: the model directory that the adapter's catalogue was built from, or ``"reference"``.
        adapter: the adapter's file.
        out: a new directory: the model's own files, with the tensors that the adapter changes in their number types.
        text: what to evaluate on; a model that is worse on it than before is not written. Python's
            documentation, which only has to give a finite perplexity, if not given.
        form: a model directory, or with ``peft`` one with the adapter alone, which must be LoRA, in PEFT's form.

    Raises:
        AdapterError: the adapter belongs to another model, makes this one worse, or is none that PEFT can hold.
        UsageError: the directory exists already, or cannot be written.
    """
    out = out.absolute() if out.name in ("", "..") else out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"--out {out}: is there already and not empty; choose another directory")
    manifest, values = load_adapter(adapter)
    if form == "peft":
        check_peft_holds(manifest)
    foundation = open_foundation(source)
    tokenizer, length = (
        load_tokenizer(foundation.directory, foundation.config),
        block_length(foundation.config),
    )
    check_belongs(manifest, base=base_hash(foundation), layers=len(foundation.layers))
    blocks = split_blocks(pack(reference_text() if text is None else text, tokenizer), length)
    model = load_model(foundation)
    before = perplexity(model, blocks["test"], mask_token=tokenizer.mask_token_id)
    layers = {index: layer_stack(model)[index] for index in manifest.layer_map}
    places = {index: bottleneck_places(layer) for index, layer in layers.items()}
    plug_in(layers, manifest, values)
    # What is evaluated is what is written.
    replaced = {} if form == "peft" else _merged(layers, foundation)
    after = perplexity(model, blocks["test"], mask_token=tokenizer.mask_token_id)
    if not math.isfinite(after) or (text is not None and after > before):
        raise AdapterError(
            f"{adapter}: plugged in, perplexity is {after:.4g}, it was {before:.4g} without; nothing was written: tune "
            "it longer or at a higher retention"
        )
    with _writing(out) as aside:
        if form == "peft":
            transposed = any(isinstance(module, Conv1D) for module in model.modules())
            write_peft(aside, manifest, values, stack_name(model), transposed=transposed, base=str(source))
        else:
            write_directory(foundation, replaced, aside)
        if manifest.kind == "bottleneck":
            _add_code(model, manifest, places, aside)
    return Plugged(before, after)


def _merged(
    layers: Mapping[int, nn.Module], foundation: Foundation
) -> dict[tuple[Path, str], dict[str, Tensor]]:
    """The tensors that an adapter changed, plain and rounded to the number types of the model's; see ``_rounded``."""
    for layer in layers.values():
        merge_lora(layer)
    return {
        where: tensors
        for index, layer in layers.items()
        for where, tensors in _rounded(layer, foundation.layers[index]).items()
    }


@torch.no_grad()
def _rounded(layer: nn.Module, stored: Mapping[str, Stored]) -> dict[tuple[Path, str], dict[str, Tensor]]:
    """Round a layer with an adapter to the number types of its files, in place.

    Returns:
        By file and name of each stored tensor that changed, what comes there instead, by name: the bottleneck
        behind a projection comes with the projection's weight, and takes its number type.
    """
    before = read_tensors(stored)
    wrapped = {name for name, module in layer.named_modules() if isinstance(module, bottleneck.Bottleneck)}
    state = layer.state_dict()
    replaced: dict[tuple[Path, str], dict[str, Tensor]] = {}
    for name, where in stored.items():
        owner, _, leaf = name.rpartition(".")
        names = {where.key: name}
        if owner in wrapped:
            prefix, _, stored_leaf = where.key.rpartition(".")
            names = {f"{prefix}.base.{stored_leaf}": f"{owner}.base.{leaf}"}
            if leaf == "weight":
                added = (inner for inner in state if inner.startswith((f"{owner}.down.", f"{owner}.up.")))
                names |= {prefix + inner.removeprefix(owner): inner for inner in added}
        dtype = before[name].dtype
        for inner in names.values():
            state[inner].copy_(state[inner].to(dtype))
        if owner in wrapped or not torch.equal(state[name], before[name].to(state[name].dtype)):
            values = {to: state[inner].to(dtype).contiguous() for to, inner in names.items()}
            replaced[where.path, where.key] = values
    return replaced


@contextmanager
def _writing(out: Path) -> Iterator[Path]:
    """A path beside a directory, that takes its place once the block ends without an error."""
    aside = out.with_name(out.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        yield aside
        if out.exists():
            out.rmdir()
        aside.replace(out)
    except (OSError, SafetensorError) as error:
        raise UsageError(
            f"--out {out}: cannot be written ({error}); free some space or choose another"
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _add_code(
    model: PreTrainedModel, manifest: AdapterManifest, places: dict[int, dict[str, int]], directory: Path
) -> None:
    architecture, stack = type(model).__name__, stack_name(model)
    shutil.copyfile(bottleneck.__file__, directory / "bottleneck.py")
    (directory / "modeling_plugged.py").write_text(_CODE.format(architecture=architecture), "utf-8")
    path = directory / "config.json"
    config = json.loads(path.read_text("utf-8"))
    auto = "AutoModelForMaskedLM" if is_masked(model) else "AutoModelForCausalLM"
    config |= {
        "architectures": [f"{architecture}WithBottlenecks"],
        "auto_map": {auto: f"modeling_plugged.{architecture}WithBottlenecks"},
        "bottlenecks": {
            "width": manifest.width,
            "layers": {f"{stack}.{index}": projections for index, projections in places.items()},
        },
    }
    path.write_text(json.dumps(config, indent=2) + "\n", "utf-8")
