"""A tiny problem to train on, and a caller that writes its result and then forgets the checkpoint."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from emutune.tuning.trainer import Bookkeeping, Progress, TrainerConfig, forget, train

VOCABULARY, WIDTH, LENGTH, BATCH = 11, 6, 5, 4
CONFIG = TrainerConfig(steps=12, learning_rate=0.02, warmup_share=0.2, gradient_norm=0.3, score_every=3)
# Each token is the one before plus three.
ROWS = (torch.arange(64)[:, None] + 3 * torch.arange(LENGTH)) % VOCABULARY


def build() -> dict[str, nn.Parameter]:
    """A network that predicts the next token from the one before, with weights and biases."""
    shapes = {
        "embedding": (VOCABULARY, WIDTH),
        "hidden.weight": (WIDTH, WIDTH),
        "hidden.bias": (WIDTH,),
        "head": (VOCABULARY, WIDTH),
    }
    generator = torch.Generator().manual_seed(1)
    return {name: nn.Parameter(torch.randn(shape, generator=generator) / 2) for name, shape in shapes.items()}


def batch(number: int) -> Tensor:
    """Four rows."""
    return ROWS[torch.arange(number * BATCH, (number + 1) * BATCH) % len(ROWS)]


def loss(parameters: dict[str, nn.Parameter], tokens: Tensor, step: int) -> Tensor:
    """Cross-entropy, with dropout of its own for every step."""
    torch.manual_seed(step)
    hidden = functional.embedding(tokens[:, :-1], parameters["embedding"])
    hidden = functional.linear(hidden, parameters["hidden.weight"], parameters["hidden.bias"]).tanh()
    logits = functional.dropout(hidden, 0.1 if step else 0.0) @ parameters["head"].T
    return functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def main(result: str, pause_s: float) -> None:
    """Train with a checkpoint after every step, write the weights, remove the checkpoint."""
    parameters, out = build(), Path(result)

    def report(_: Progress) -> None:
        time.sleep(pause_s)

    progress = train(
        parameters,
        lambda tokens, step: loss(parameters, tokens, step),
        batch,
        CONFIG.model_copy(update={"save_every_s": 0.0}),
        Bookkeeping(out.parent, report=report),
    )
    weights = {name: parameter.detach() for name, parameter in parameters.items()}
    save_file(weights, out, {"losses": repr(progress.losses)})
    forget(out.parent)
