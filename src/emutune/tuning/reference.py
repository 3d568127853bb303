"""The small foundation models that emutune ships, and how they are trained from Python's own documentation and code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from emutune.tuning.documentation import REFERENCE, REFERENCE_CODE, reference_text
from emutune.tuning.layers import keep_layers
from emutune.tuning.perplexity import perplexity, token_losses
from emutune.tuning.text import Blocks, pack, split_blocks
from emutune.tuning.trainer import Bookkeeping, Progress, TrainerConfig, forget, train

BLOCK = 256
_VOCABULARY = 4096
_LAYERS = 12
_WIDTH = 128
_END = "<|endoftext|>"
# A large model tolerates the loss of layers; one of three million parameters has to learn it. So some of the
# middle layers are skipped in every step (LayerDrop: Fan, Grave and Joulin, ICLR 2020).
_ALWAYS_KEPT = 2
_SKIP_PROBABILITY = 0.05

REFERENCE_TRAINING = TrainerConfig(
    steps=2200, batch=8, learning_rate=2e-3, weight_decay=0.1, final_rate_share=0.02, score_every=300
)


# Of code there is more, and it is more alike.
TRAININGS = {
    REFERENCE: REFERENCE_TRAINING,
    REFERENCE_CODE: REFERENCE_TRAINING.model_copy(update={"steps": 1200}),
}
_LAYERS_OF = {REFERENCE: _LAYERS, REFERENCE_CODE: 10}


def build_tokenizer(text: str, vocabulary: int = _VOCABULARY) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=_END, bos_token=_END)


def build_model(seed: int = 0, model: str = REFERENCE) -> GPT2LMHeadModel:
    """An untrained reference model: GPT-2's architecture of width 128.

    The model of English has 12 layers and 2.9 million parameters, that of code 10 and 2.5 million.
    """
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=_VOCABULARY,
        n_positions=BLOCK,
        n_embd=_WIDTH,
        n_layer=_LAYERS_OF[model],
        n_head=4,
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=0.05,
        embd_pdrop=0.05,
        attn_pdrop=0.0,
    )
    return GPT2LMHeadModel(config)


class TrainedReference(NamedTuple):
    """How the training went, and the perplexity on text that was held back from it, as the model is stored."""

    progress: Progress
    perplexity: float


def train_reference(
    directory: Path,
    config: TrainerConfig = REFERENCE_TRAINING,
    report: Callable[[Progress], None] | None = None,
    model: str = REFERENCE,
) -> TrainedReference:
    """Train a reference model and write it to a directory in the transformers format, in half precision.

    Raises:
        CheckpointError: the directory cannot be written, or holds the checkpoint of another run.
    """
    text = reference_text(model)
    tokenizer = build_tokenizer(text)
    splits = split_blocks(pack(text, tokenizer), BLOCK)
    network = build_model(config.seed, model)
    layers = _LAYERS_OF[model]

    def loss(tokens: Tensor, step: int) -> Tensor:
        torch.manual_seed(config.seed * 1_000_003 + step)
        return token_losses(
            keep_layers(network, _some_layers(config.seed, step, layers)).train(), tokens
        ).mean()

    progress = train(
        dict(network.named_parameters()),
        loss,
        _batches(splits["train"], config),
        config,
        Bookkeeping(directory, f"{model} model", report),
        score=lambda: perplexity(network, splits["validation"]),
    )
    half = network.eval().half()
    half.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    forget(directory)
    return TrainedReference(progress, perplexity(half.float(), splits["test"]))


def _batches(blocks: Blocks, config: TrainerConfig) -> Callable[[int], Tensor]:
    return lambda number: blocks.batch(number, config.batch, config.seed)


def _some_layers(seed: int, step: int, layers: int = _LAYERS) -> list[int]:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    skipped = torch.rand(layers, generator=generator) < _SKIP_PROBABILITY
    fixed: Any = {*range(_ALWAYS_KEPT), *range(layers - _ALWAYS_KEPT, layers)}
    return [index for index in range(layers) if index in fixed or not skipped[index]]
