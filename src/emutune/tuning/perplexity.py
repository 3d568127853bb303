"""What a language model loses on text: the training loss, and perplexity."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from emutune.tuning.text import Blocks

_MASKED_SHARE = 0.15
# 64 MiB in single precision.
_LOGITS_AT_ONCE = 1 << 24
# The exponential of more is no finite double.
_LARGEST_EXPONENT = 700.0


def is_masked(model: PreTrainedModel) -> bool:
    """Whether the model fills masked tokens (an encoder) instead of predicting the next one."""
    return type(model).__name__.endswith("ForMaskedLM")


def token_losses(
    model: PreTrainedModel, tokens: Tensor, *, mask_token: int | None = None, seed: int = 0
) -> Tensor:
    """Negative log-likelihood of every token that the model has to predict, in nats.

    Args:
        model: a causal model predicts each token from those before it; a masked one is shown 85 % of the
            tokens and predicts the others.
        tokens: int64 (batch, length).
        mask_token: of a masked model, the token that stands for the hidden ones.
        seed: of a masked model, what the choice of hidden tokens depends on, beside the shape.

    Returns:
        Tensor (predicted tokens,).
    """
    logits, targets = predictions(model, tokens, mask_token=mask_token, seed=seed)
    return functional.cross_entropy(logits, targets, reduction="none")


def predictions(
    model: PreTrainedModel, tokens: Tensor, *, mask_token: int | None = None, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """What a model says about every token that it has to predict, see ``token_losses``.

    Returns:
        Logits in single precision, (predicted tokens, vocabulary), and the tokens, int64 (predicted tokens,).
    """
    if is_masked(model):
        hidden = _hidden(tokens, seed)
        assert mask_token is not None
        logits = model(input_ids=torch.where(hidden, mask_token, tokens)).logits
        return logits[hidden].float(), tokens[hidden]
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
    return logits.flatten(0, 1).float(), tokens[:, 1:].flatten()


def _hidden(tokens: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.rand(tokens.shape, generator=generator) < _MASKED_SHARE
    # A row without a hidden token would teach nothing.
    hidden[:, 0] |= ~hidden.any(dim=1)
    return hidden.to(tokens.device)


@torch.no_grad()
def perplexity(
    model: PreTrainedModel, blocks: Blocks, *, mask_token: int | None = None, batch: int = 16
) -> float:
    """Exponential of the mean loss per predicted token over all blocks (pseudo-perplexity of a masked model).

    A masked model's value depends on the batch, with which the choice of hidden tokens changes.
    """
    total, count = 0.0, 0
    # A streamed model's parameters are nowhere between two calls.
    device: Any = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    vocabulary = model.config.get_text_config().vocab_size
    batch = rows_at_once(blocks.length, vocabulary, batch)
    with evaluating(model):
        for first in range(0, len(blocks), batch):
            rows = blocks.rows(slice(first, first + batch)).to(device)
            losses = token_losses(model, rows, mask_token=mask_token, seed=first)
            total += float(losses.double().sum())
            count += losses.numel()
    return math.exp(min(total / count, _LARGEST_EXPONENT))


def rows_at_once(length: int, vocabulary: int, most: int) -> int:
    """How many rows of tokens go through a model at once, so that their logits take 64 MiB or those of one row."""
    return max(1, min(most, _LOGITS_AT_ONCE // (length * vocabulary)))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """All of a model in evaluation mode, and every part in its own mode again afterwards."""
    # Parts may be in different modes: an adapter in training on a frozen base.
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
