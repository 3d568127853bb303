"""From a text file to blocks of tokens: read, tokenised once, packed, memory-mapped."""

from __future__ import annotations

import codecs
import hashlib
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import torch

from emutune.errors import DataError, UsageError
from emutune.files import replacing
from emutune.tuning.foundation import positions

Split = Literal["train", "validation", "test"]
# Every tenth block is held back for choosing and accepting, the next one for reporting.
_FOLDS, _TRAINING_FOLDS = 10, 8
_BLOCK = 256
# Tokenizers take some 200 bytes for a character of what they are given at once.
_PIECE_CHARACTERS = 1 << 16
_BREAK_WITHIN = 1 << 12
# Tokenizers join runs of white space, so a cut next to another white space could change tokens.
_LINE_END = re.compile(r"(?<=\S)\n(?=\S)")
_WHOLE_WORDS = re.compile(r"\s(.*)\s", re.DOTALL)
_WORD_END = re.compile(r"(?<=\S)(?= \S)")
# Of ordinary text, with room to spare.
_TOKEN_BYTES = 8
_STRETCHES = 16
# Of each split that is measured: enough for three digits, and nobody waits long for it.
_MEASURED = 48


def read_text(path: Path) -> str:
    """A text file as a string.

    Raises:
        DataError: it is missing, unreadable, not UTF-8, or empty.
    """
    return _read(path, None)


def read_sample(path: Path, tokens: int) -> str:
    """So much of a text file as makes about so many tokens: 8 bytes for each, from all over a longer file.

    What is read of a longer file are sixteen stretches of equal length and distance, without the words that their
    ends cut.

    Raises:
        DataError: it is missing, unreadable, not UTF-8, or empty.
    """
    return _read(path, _TOKEN_BYTES * tokens)


def _read(path: Path, most: int | None) -> str:
    """A text file, or stretches of a longer one; at most so many bytes of it."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            if most is None or size <= most:
                text = _decoded(path, file.read(), 0, final=True)
            else:
                length = most // _STRETCHES
                starts = [number * (size - length) // (_STRETCHES - 1) for number in range(_STRETCHES)]
                text = "\n".join(_stretch(path, file, start, length) for start in starts)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    if not text.strip():
        raise DataError(f"{path}: holds no text; give a file with the text to tune on")
    return text


def _stretch(path: Path, file: BinaryIO, start: int, length: int) -> str:
    """The words between the one that the beginning of a stretch cuts and the one that its end cuts."""
    file.seek(start)
    content = file.read(length)
    # Of a character that is cut, at most three bytes follow.
    skipped = next((at for at in range(min(3, len(content))) if content[at] & 0xC0 != 0x80), 3)
    text = _decoded(path, content[skipped:], start + skipped, final=False)
    words = _WHOLE_WORDS.search(text)
    return text if words is None else words[1]


def _decoded(path: Path, content: bytes, start: int, *, final: bool) -> str:
    """The text of a file's bytes from ``start`` on, with the line ends that Python reads.

    Unless they are ``final``, what they end with may be the beginning of a character, which is left out.
    """
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(content, final)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: not UTF-8 text (byte {start + error.start} cannot be decoded); convert it to UTF-8"
        ) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def pack(text: str, tokenizer: Any, cache: Path | None = None) -> np.ndarray[Any, np.dtype[np.integer[Any]]]:
    """All tokens of a text in a row, as the smallest unsigned type that holds the vocabulary.

    Args:
        text: the text; long ones are tokenised in pieces of 65536 characters or up to 4096 more: cut between two
            lines, or else between two words, which changes no token of a tokenizer that splits text there, or else
            within what is one word for so long.
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
        end = _piece_end(text, start + _PIECE_CHARACTERS)
        yield text[start:end]
        start = end


def _piece_end(text: str, least: int) -> int:
    """Where to cut, from ``least`` on."""
    most = least + _BREAK_WITHIN
    breaks = (pattern.search(text, least, most) for pattern in (_LINE_END, _WORD_END))
    return next((found.end() for found in breaks if found is not None), min(most, len(text)))


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

    def spread(self, count: int) -> Blocks:
        """So many of these blocks from all over them, or all if there are no more."""
        positions = np.linspace(0, len(self) - 1, min(count, len(self))).astype(int)
        return replace(self, numbers=self.numbers[np.unique(positions)])

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
    members = {"train": fold < _TRAINING_FOLDS, "validation": fold == 8, "test": fold == 9}
    return {name: Blocks(tokens, length, numbers[where]) for name, where in members.items()}  # type: ignore[misc]


def task_blocks(
    path: Path, tokenizer: Any, length: int, trained: int, cache: Path | None = None
) -> dict[Split, Blocks]:
    """The blocks of a task whose text may be much longer than its training needs: only so much of it is used.

    Args:
        path: the text.
        tokenizer: see ``pack``.
        length: tokens in a block.
        trained: how many blocks training takes, one after another.
        cache: see ``pack``.

    Returns:
        The splits of ``split_blocks``, of validation and test at most 48 blocks each.

    Raises:
        DataError: the text is unusable or too short, or the cache cannot be written.
    """
    needed = _FOLDS * max(_MEASURED, -(-trained // _TRAINING_FOLDS))
    splits = split_blocks(pack(read_sample(path, needed * length), tokenizer, cache), length)
    return {name: blocks if name == "train" else blocks.spread(_MEASURED) for name, blocks in splits.items()}
