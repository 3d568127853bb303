"""From a text file to blocks of tokens: read, tokenised once, packed, memory-mapped."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from emutune.errors import DataError, UsageError
from emutune.files import replacing
from emutune.tuning.foundation import positions

Split = Literal["train", "validation", "test"]
# Every tenth block is held back for choosing and accepting, the next one for reporting.
_FOLDS = 10
_BLOCK = 256
_PIECE_CHARACTERS = 1 << 20
# Tokenizers join runs of white space, so a cut next to another white space could change tokens.
_LINE_END = re.compile(r"(?<=\S)\n(?=\S)")


def read_text(path: Path) -> str:
    """A text file as a string.

    Raises:
        DataError: it is missing, unreadable, not UTF-8, or empty.
    """
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: not UTF-8 text (byte {error.start} cannot be decoded); convert it to UTF-8"
        ) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    if not text.strip():
        raise DataError(f"{path}: holds no text; give a file with the text to tune on")
    return text


def pack(text: str, tokenizer: Any, cache: Path | None = None) -> np.ndarray[Any, np.dtype[np.integer[Any]]]:
    """All tokens of a text in a row, as the smallest unsigned type that holds the vocabulary.

    Args:
        text: the text; long ones are tokenised in pieces of about a mebibyte, cut between lines.
        tokenizer: a transformers tokenizer.
        cache: where token files are kept; the array is then memory-mapped from there.

    Raises:
        DataError: the cache cannot be written.
    """
    # Numbers of tokens may have gaps, so their count says too little.
    dtype = np.uint16 if max(tokenizer.get_vocab().values()) < 1 << 16 else np.uint32
    if cache is None:
        return _tokens(text, tokenizer, dtype)
    key = hashlib.sha256(hashlib.sha256(_definition(tokenizer)).digest() + text.encode()).hexdigest()
    path = cache / f"{key[:32]}.npy"
    # A file that something else cut short is written anew.
    with suppress(OSError, ValueError, EOFError):
        return _mapped(path)
    tokens = _tokens(text, tokenizer, dtype)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with replacing(path) as aside, aside.open("wb") as file:
            np.save(file, tokens)
        return _mapped(path)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be written ({error}); free some space or choose another cache"
        ) from error


def _definition(tokenizer: Any) -> bytes:
    # Tokenizers of one vocabulary can differ in what they merge or lower.
    backend = getattr(tokenizer, "backend_tokenizer", None)
    described = repr(sorted(tokenizer.get_vocab().items())) if backend is None else backend.to_str()
    return f"{type(tokenizer).__name__} {described}".encode()


def _mapped(path: Path) -> np.ndarray[Any, np.dtype[np.integer[Any]]]:
    mapped: np.ndarray[Any, np.dtype[np.integer[Any]]] = np.load(path, mmap_mode="r", allow_pickle=False)
    return mapped


def _tokens(text: str, tokenizer: Any, dtype: Any) -> np.ndarray[Any, np.dtype[np.integer[Any]]]:
    pieces = [
        np.array(tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"], dtype)
        for piece in _pieces(text)
    ]
    return np.concatenate(pieces)


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while start < len(text):
        line_end = _LINE_END.search(text, start + _PIECE_CHARACTERS)
        end = len(text) if line_end is None else line_end.end()
        yield text[start:end]
        start = end


@dataclass(frozen=True)
class Blocks:
    """Packed text in blocks of equal length, the unit of training and of perplexity.

    Attributes:
        tokens: array (tokens,), possibly memory-mapped.
        length: tokens in a block.
        numbers: which blocks of the text belong to this split, array (blocks,).
    """

    tokens: np.ndarray[Any, Any]
    length: int
    numbers: np.ndarray[Any, Any]

    def __len__(self) -> int:
        return len(self.numbers)

    def rows(self, positions: Any) -> torch.Tensor:
        """Blocks by their position in the split: int64 tensor (positions, length)."""
        rows = [
            self.tokens[number * self.length : (number + 1) * self.length]
            for number in self.numbers[positions]
        ]
        return torch.from_numpy(np.stack(rows).astype(np.int64))

    def first(self, count: int) -> Blocks:
        """The first few of these blocks."""
        return replace(self, numbers=self.numbers[:count])

    def batch(self, step: int, size: int, seed: int) -> torch.Tensor:
        """The batch of a training step, the same whenever it is asked for: int64 (size, length).

        Every epoch goes through all blocks in an order of its own.
        """
        count = len(self)
        numbers = np.arange(step * size, (step + 1) * size)
        orders = {epoch: self._order(seed, epoch) for epoch in {int(number) // count for number in numbers}}
        return self.rows([orders[int(number) // count][number % count] for number in numbers])

    def _order(self, seed: int, epoch: int) -> np.ndarray[Any, Any]:
        return np.random.default_rng((seed, epoch)).permutation(len(self))


def block_length(config: Any, wanted: int | None = None) -> int:
    """Tokens in a block for a model of some configuration.

    Args:
        config: of the model.
        wanted: the length; 256, or as many as the model has positions, if not given.

    Raises:
        UsageError: the model has fewer positions than that.
    """
    fitting = fitting_block(config, wanted or _BLOCK)
    if wanted is not None and fitting < wanted:
        raise UsageError(f"the model has {fitting} positions; give --block {fitting} or less")
    return fitting


def fitting_block(config: Any, wanted: int) -> int:
    """Tokens in a block: as many as wanted, or as the model has positions."""
    return min(wanted, positions(config) or wanted)


def split_blocks(tokens: np.ndarray[Any, Any], length: int) -> dict[Split, Blocks]:
    """Cut packed text into blocks, eight of ten for training, one each for validation and test.

    The splits interleave, so that each sees the whole text's range.

    Raises:
        DataError: the text is shorter than ten blocks.
    """
    numbers = np.arange(len(tokens) // length)
    if len(numbers) < _FOLDS:
        raise DataError(
            f"the text has {len(tokens)} tokens, but {_FOLDS} blocks of {length} are needed to train, "
            "choose and report; give more text or shorter blocks (--block)"
        )
    fold = numbers % _FOLDS
    members = {"train": fold < 8, "validation": fold == 8, "test": fold == 9}
    return {name: Blocks(tokens, length, numbers[where]) for name, where in members.items()}  # type: ignore[misc]
