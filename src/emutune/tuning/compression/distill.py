"""Teach the layers that stay what the layers that went used to do."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from emutune.tuning.head_loss import taught_loss
from emutune.tuning.layers import keep_layers, layer_stack, replace_stack, stack_name, view
from emutune.tuning.trainer import Bookkeeping, TrainerConfig, train

HIDDEN_WEIGHT = 30.0
DISTILLATION = TrainerConfig(
    steps=400, batch=8, learning_rate=3e-4, final_rate_share=0.0, weight_decay=0.0, save_every_s=20.0
)

# Fewer, larger steps teach less than more, smaller ones of the same budget.
_LEAST_STEPS = 150
_BLOCK = 256


def budgeted(tokens: int) -> TrainerConfig:
    """How to distil on at most so many tokens, in blocks of 256: in 150 steps or more, of one to eight blocks each."""
    blocks = max(1, tokens // _BLOCK)
    batch = max(1, min(DISTILLATION.batch, blocks // _LEAST_STEPS))
    return DISTILLATION.model_copy(update={"batch": batch, "steps": blocks // batch})


def distill(
    full: PreTrainedModel,
    middle: range,
    students: Sequence[Sequence[nn.Module]],
    batch: Callable[[int], Tensor],
    config: TrainerConfig = DISTILLATION,
    kept: Bookkeeping = Bookkeeping(),  # noqa: B008 (frozen)
    *,
    mask_token: int | None = None,
) -> list[list[nn.Module]]:
    """Train short stacks towards the stack they stand for, all of them in one run.

    Each step trains one of them, drawn at random, with the cross-entropy of its predictions against those of the whole
    model, plus ``HIDDEN_WEIGHT * mean(((t - s) / rms(t))**2)`` on the hidden states s and t after the short and the
    whole stack: what the whole model says of a text teaches more than the text. A layer that belongs to several stacks
    stays one layer, so nested emulators stay nested.

    Args:
        full: the whole model, the teacher; stays as it is.
        middle: indices of the layers that the short stacks replace.
        students: the layers of each short stack, bottom first.
        batch: tokens (rows, length) of a step.
        config: how to train.
        kept: where the training is kept, and who is told of it.
        mask_token: of a masked language model.

    Returns:
        New layers in place of the students'.
    """
    copies: dict[int, nn.Module] = {}
    for layer in (layer for student in students for layer in student):
        if id(layer) not in copies:
            copies[id(layer)] = copy.deepcopy(layer).requires_grad_(True)
    distilled = [[copies[id(layer)] for layer in student] for student in students]
    models = [with_middle(full, middle, layers) for layers in distilled]
    teacher = view(full)
    losses = [taught_loss(model, teacher, mask_token) for model in models]

    def loss(tokens: Tensor, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
        choice = int(torch.randint(len(models), (), generator=generator))
        student_end = middle.start + len(distilled[choice]) - 1
        with (
            _output_of(teacher, middle.stop - 1) as taught,
            _output_of(models[choice], student_end) as learned,
        ):
            predicted = losses[choice](tokens, step)
        return predicted + HIDDEN_WEIGHT * hidden_distance(taught[0], learned[0])

    trainable = {
        f"{number}.{name}": parameter
        for number, layer in enumerate(copies.values())
        for name, parameter in layer.named_parameters()
    }
    train(trainable, loss, batch, config, kept)
    for layer in copies.values():
        layer.requires_grad_(False)
    return distilled


def hidden_distance(taught: Tensor, learned: Tensor) -> Tensor:
    """mean(((t - s) / rms(t))**2) with rms over the width of each token; scalar from (rows, length, width)."""
    scale = taught.square().mean(dim=-1, keepdim=True).sqrt()
    return ((taught - learned) / scale).square().mean()


def with_middle(full: PreTrainedModel, middle: range, layers: Sequence[nn.Module]) -> PreTrainedModel:
    """A model with other layers, no more of them, in the middle; shares the rest with the given one."""
    count = len(layer_stack(full))
    ends = [*range(middle.start), *range(middle.stop, count)]
    # As many of the model's own layers as there will be new ones, so that the configuration counts them.
    model = keep_layers(full, sorted([*ends, *middle[: len(layers)]]))
    own = list(layer_stack(model))
    replace_stack(
        model, stack_name(model), [*own[: middle.start], *layers, *own[middle.start + len(layers) :]]
    )
    return model


@contextmanager
def _output_of(model: PreTrainedModel, position: int) -> Iterator[list[Tensor]]:
    """Collects the hidden states that leave a layer."""
    seen: list[Tensor] = []

    def see(_: nn.Module, __: object, output: Tensor | tuple[Tensor, ...]) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    handle = layer_stack(model)[position].register_forward_hook(see)
    try:
        yield seen
    finally:
        handle.remove()
