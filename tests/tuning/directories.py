"""Tiny model directories, their text, and catalogues built from them."""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from tuning_models import ARCHITECTURES

from emutune.tuning.build import Recipe, build_catalogue
from emutune.tuning.catalogue import Catalogue
from emutune.tuning.reference import build_tokenizer

WORDS = (
    *("the", "server", "sends", "an", "emulator", "to", "every", "device", "over", "radio", "and", "waits"),
    *(
        "model",
        "layers",
        "stay",
        "small",
        "while",
        "adapters",
        "learn",
        "from",
        "text",
        "that",
        "never",
        "leaves",
    ),
)
VOCABULARY = 320
ENDS = {"bottom": 1, "top": 1}


@cache
def generated_text(words: int = 2400, seed: int = 0) -> str:
    """Sentences of random words, which a model can learn something about."""
    generator = random.Random(seed)
    chosen = [generator.choice(WORDS) for _ in range(words)]
    lines = [" ".join(chosen[first : first + 12]) for first in range(0, words, 12)]
    return ".\n".join(lines)


TEXT = generated_text()


@cache
def tokenizer() -> Any:
    """A byte-level tokenizer with a mask."""
    made = build_tokenizer(TEXT, vocabulary=300)
    made.add_special_tokens({"mask_token": "<mask>"})
    return made


def model_directory(directory: Path, architecture: str = "gpt2", shard_size: str = "1GB") -> Path:
    """A directory as ``save_pretrained`` writes it."""
    built(architecture).save_pretrained(directory, max_shard_size=shard_size)
    tokenizer().save_pretrained(directory)
    return directory


def built(architecture: str) -> PreTrainedModel:
    """The tiny model of an architecture, with room for the tokenizer's vocabulary."""
    return ARCHITECTURES[architecture](VOCABULARY)


def recipe(*methods: Any, **changes: Any) -> Recipe:
    """A recipe with one adapter layer at either end."""
    return Recipe(methods=methods or ("layer_drop",), **ENDS | changes)


def catalogue_of(
    directory: Path, architecture: str = "gpt2", made: Recipe | None = None, name: str = "catalogue"
) -> Catalogue:
    """A catalogue of that name and, beside it, the model directory it was built from."""
    source = directory / "model"
    if not source.exists():
        model_directory(source, architecture)
    return build_catalogue(source, directory / name, made or recipe(), text=TEXT)
