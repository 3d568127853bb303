"""The training loss of a model with a frozen head, without ever holding the logits of a whole batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from emutune.tuning.perplexity import evaluating, is_masked, predictions, token_losses

_PIECE_TOKENS = 256


def training_loss(model: PreTrainedModel, mask_token: int | None = None) -> Callable[[Tensor, int], Tensor]:
    """The mean loss per predicted token of a batch at a step, as a function.

    A causal model whose logits are its frozen head applied to its last hidden states is asked for those,
    and the head is applied in pieces; its logits would take more memory than all layers of an emulator.
    """
    if not is_masked(model) and _head_is_last(model):
        head = model.get_output_embeddings()

        def by_pieces(tokens: Tensor, step: int) -> Tensor:
            hidden = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state[:, :-1]
            loss: Tensor = _HeadLoss.apply(hidden.flatten(0, 1), tokens[:, 1:].flatten(), head)  # type: ignore[no-untyped-call]
            return loss

        return by_pieces
    return lambda tokens, step: token_losses(model, tokens, mask_token=mask_token, seed=step).mean()


def taught_loss(
    model: PreTrainedModel, teacher: PreTrainedModel, mask_token: int | None = None
) -> Callable[[Tensor, int], Tensor]:
    """The cross-entropy of what a model predicts against what its teacher does, mean over tokens, as a function.

    Both have the same frozen head, which is applied in pieces as in ``training_loss``.
    """
    if not is_masked(model) and _head_is_last(model):
        head = model.get_output_embeddings()

        def by_pieces(tokens: Tensor, step: int) -> Tensor:
            hidden = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state[:, :-1]
            with torch.no_grad():
                taught = teacher.base_model(input_ids=tokens, use_cache=False).last_hidden_state[:, :-1]
            loss: Tensor = _HeadLoss.apply(hidden.flatten(0, 1), taught.flatten(0, 1), head)  # type: ignore[no-untyped-call]
            return loss

        return by_pieces

    def whole(tokens: Tensor, step: int) -> Tensor:
        logits, _ = predictions(model, tokens, mask_token=mask_token, seed=step)
        with torch.no_grad():
            taught, _ = predictions(teacher, tokens, mask_token=mask_token, seed=step)
        return functional.cross_entropy(logits, taught.softmax(dim=-1))

    return whole


@torch.no_grad()
def _head_is_last(model: PreTrainedModel) -> bool:
    """Whether the logits are the frozen head's output and nothing else, such as a cap or a scale."""
    head = model.get_output_embeddings()
    if head is None or any(parameter.requires_grad for parameter in head.parameters()):
        return False
    tokens = torch.arange(4, device=model.device)[None]
    with evaluating(model):
        logits = model(input_ids=tokens, use_cache=False).logits
        expected = head(model.base_model(input_ids=tokens, use_cache=False).last_hidden_state)
    return bool(torch.equal(logits, expected))


class _HeadLoss(torch.autograd.Function):
    """Mean cross-entropy of ``head(hidden)``; the gradient is made on the way forward, piece by piece.

    Targets are tokens, or the hidden states of a teacher, whose predictions are the targets then.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, head: nn.Module) -> Tensor:
        total = torch.zeros((), device=hidden.device)
        gradient = torch.empty_like(hidden)
        for piece, target, into in zip(
            hidden.split(_PIECE_TOKENS),
            targets.split(_PIECE_TOKENS),
            gradient.split(_PIECE_TOKENS),
            strict=True,
        ):
            if target.is_floating_point():
                target = head(target).float().softmax(dim=-1)
            with torch.enable_grad():
                leaf = piece.detach().requires_grad_()
                loss = functional.cross_entropy(head(leaf).float(), target, reduction="sum")
                into.copy_(torch.autograd.grad(loss, leaf)[0])
            total += loss.detach()
        ctx.save_for_backward(gradient.div_(len(targets)))
        return total / len(targets)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * outer[0], None, None
