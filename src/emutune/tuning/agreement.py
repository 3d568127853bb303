"""Whether the model that emutune assembles is the one that ``transformers`` loads."""

from __future__ import annotations

from functools import partial

import psutil
import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from emutune.errors import ModelError, one_line
from emutune.tuning.foundation import Foundation, auto_class, read_tensors, skeleton
from emutune.tuning.streaming import streamed

# Of the largest logit. Both compute in single precision, which on the reference model is 6e-7 from double; its weights
# rounded to bfloat16 are 6e-3 from themselves.
_TOLERANCE = 1e-4
# transformers' copy, and as much again for its loading and for the part of ours that is in memory.
_COPIES = 2


def fits_in_memory(config: PreTrainedConfig) -> bool:
    """Whether twice the model in single precision is less than the memory that is free now."""
    size = sum(4 * parameter.numel() for parameter in skeleton(config).parameters())
    return _COPIES * size < psutil.virtual_memory().available


@torch.no_grad()
def check_agreement(foundation: Foundation, config: PreTrainedConfig, tokens: Tensor) -> None:
    """Compare a model as emutune assembles it, a layer at a time, with the one that ``from_pretrained`` loads.

    Args:
        foundation: where emutune found the weights.
        config: with which it assembles them.
        tokens: a block of text, int64 (1, length).

    Raises:
        ModelError: they are not the same model: another weight, or other logits on the block.
    """
    layers = [partial(read_tensors, layer) for layer in foundation.layers]
    with streamed(skeleton(config), partial(read_tensors, foundation.outer), layers) as model:
        ours = model(input_ids=tokens).logits
    loaded = _loaded(foundation)
    theirs = loaded(input_ids=tokens).logits
    largest = float(theirs.abs().max())
    difference = float((ours - theirs).abs().max()) / largest
    weight = _differing_weight(foundation, loaded)
    # A difference that is no number is one, too.
    if weight is not None or not difference <= _TOLERANCE:
        what = f"{weight} is another" if weight else "no weight differs, but its computation does"
        raise ModelError(
            f"{foundation.directory}: emutune and transformers make different models of it: {what}; on "
            f"{tokens.numel()} tokens the logits are {difference:.2g} of the largest apart, and {_TOLERANCE:g} is "
            "allowed; load and save the model once with transformers, and report this"
        )


def _loaded(foundation: Foundation) -> PreTrainedModel:
    try:
        loaded: PreTrainedModel = auto_class(foundation.config).from_pretrained(
            foundation.directory, dtype=torch.float32, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # an architecture raises whatever it met
        raise ModelError(f"{foundation.directory}: transformers cannot load it: {one_line(error)}") from error
    return loaded.eval()


def _differing_weight(foundation: Foundation, loaded: PreTrainedModel) -> str | None:
    """The first weight of which ``transformers`` has another value."""
    state = loaded.state_dict()
    prefixes = ["", *(f"{foundation.stack}.{index}." for index in range(len(foundation.layers)))]
    for prefix, unit in zip(prefixes, foundation.units(), strict=True):
        for name, tensor in unit.items():
            found = state.get(prefix + name)
            if found is None or not torch.equal(found, tensor.to(found.dtype)):
                return prefix + name
    return None
