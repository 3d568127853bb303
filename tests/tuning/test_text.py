"""Packing, the cache of tokens, splits and batches."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from emutune.errors import DataError
from emutune.tuning import text as module
from emutune.tuning.reference import build_tokenizer
from emutune.tuning.text import Blocks, pack, read_sample, read_text, split_blocks, task_blocks

LINES = (
    "The quick brown fox\njumps over the lazy dog.\n\n    Indented, after an empty line.\n \n\ttab  \nEnd\n"
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return spanning_tokenizer()


def spanning_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer like GPT-2's, with merges of runs of white space that hold line ends."""
    vocabulary = dict(build_tokenizer(LINES, vocabulary=257).get_vocab())
    newline, space = "Ċ", "Ġ"
    merges = [
        (newline, newline),
        (newline, space),
        (newline + newline, space),
        (space, newline),
        (space, space),
    ]
    for left, right in merges:
        vocabulary.setdefault(left + right, len(vocabulary))
    whole = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    whole.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=whole, eos_token="<|endoftext|>")


class Counting:
    """A tokenizer that counts its calls."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.calls = 0

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def __call__(self, *arguments, **options):
        self.calls += 1
        return self.tokenizer(*arguments, **options)


def at_once(text, tokenizer):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


# reading


def test_text_is_read(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes("naïve\r\nΔ 漢\n".encode())
    assert read_text(path) == "naïve\nΔ 漢\n"


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"absent\.txt: cannot be read: No such file"):
        read_text(tmp_path / "absent.txt")


def test_a_directory_is_named(tmp_path):
    with pytest.raises(DataError, match="cannot be read: Is a directory"):
        read_text(tmp_path)


@pytest.mark.parametrize("content", [b"", b" \n\t\n"])
def test_an_empty_file_is_named(tmp_path, content):
    path = tmp_path / "empty.txt"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"empty\.txt: holds no text; give"):
        read_text(path)


def test_what_is_not_utf8_is_named_with_the_byte(tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes(b"caf\xe9 au lait")
    with pytest.raises(DataError, match=r"latin\.txt: not UTF-8 text \(byte 3 .*convert it to UTF-8"):
        read_text(path)


# samples


def numbered(words: int, between: str = " ") -> str:
    return between.join(f"{number:06d}" for number in range(words))


@pytest.mark.parametrize("between", [" ", "\n"])
def test_a_sample_is_the_text_or_stretches_from_all_over_it(tmp_path, between):
    path = tmp_path / "text.txt"
    text = numbered(10_000, between)
    path.write_text(text)
    assert read_sample(path, len(text) // 8 + 1) == text
    sample = read_sample(path, 800)
    assert 0.8 * 6400 < len(sample) <= 6400
    words = [int(word) for word in sample.split()]
    assert words == sorted(set(words))
    gaps = np.diff(words)
    assert (gaps > 10).sum() == 15, "sixteen stretches"
    assert gaps.max() < 10_000 / 14
    assert words[0] < 10
    assert words[-1] > 9_990


@pytest.mark.parametrize("letters", ["ab", "äö", "漢字", "𝒳𝒴"])
def test_a_sample_of_one_word_keeps_to_whole_characters(tmp_path, letters):
    path = tmp_path / "text.txt"
    for shift in range(4):
        path.write_bytes(b"x" * shift + (letters * 5000).encode())
        sample = read_sample(path, 101)
        assert len(sample.encode()) <= 808 + 15
        assert set(sample) <= set(letters) | {"x", "\n"}


def test_a_sample_names_the_byte_that_is_not_utf8(tmp_path):
    path = tmp_path / "text.txt"
    content = bytearray(numbered(10_000).encode())
    content[-20] = 0xFF
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"byte {len(content) - 20} cannot be decoded"):
        read_sample(path, 100)
    path.write_text(" " * 10_000)
    with pytest.raises(DataError, match="holds no text"):
        read_sample(path, 100)
    with pytest.raises(DataError, match="cannot be read"):
        read_sample(tmp_path / "none.txt", 100)


# packing


@pytest.mark.parametrize("piece", [1, 5, 20, 64, 10_000])
def test_pieces_give_the_tokens_of_the_whole(tokenizer, monkeypatch, piece):
    monkeypatch.setattr(module, "_PIECE_CHARACTERS", piece)
    text = LINES * 7
    counting = Counting(tokenizer)
    tokens = pack(text, counting)
    assert tokens.tolist() == at_once(text, tokenizer)
    assert tokens.dtype == np.uint16
    assert (counting.calls > 1) == (piece < 10_000)


@pytest.mark.parametrize(
    ("text", "longest"),
    [
        ("word " * 40_000, 65_541),
        ("word\n" * 40_000, 65_541),
        ("w" * 300_000, 69_632),
        (" " * 300_000, 69_632),
    ],
    ids=["one line", "lines", "one word", "white space"],
)
def test_no_piece_is_much_longer_than_it_may_be(tokenizer, text, longest):
    class Watching(Counting):
        longest = 0

        def __call__(self, piece, **options):
            self.longest = max(self.longest, len(piece))
            return super().__call__(piece, **options)

    watching = Watching(tokenizer)
    tokens = pack(text, watching)
    assert watching.longest <= longest
    # What is cut within a word changes tokens at the cut and nowhere else.
    assert abs(len(tokens) - len(at_once(text, tokenizer))) <= watching.calls


def test_the_words_of_one_line_keep_their_tokens(tokenizer, monkeypatch):
    monkeypatch.setattr(module, "_PIECE_CHARACTERS", 50)
    text = "The quick brown fox jumps over the lazy dog; " * 30
    counting = Counting(tokenizer)
    assert pack(text, counting).tolist() == at_once(text, tokenizer)
    assert counting.calls > 10


@given(
    st.text(alphabet="ab.\n\n \t", min_size=1, max_size=60),
    st.integers(1, 30),
)
def test_pieces_give_the_tokens_of_the_whole_for_any_text(text, piece):
    tokenizer = _SPANNING
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(module, "_PIECE_CHARACTERS", piece)
        assert pack(text, tokenizer).tolist() == at_once(text, tokenizer)


_SPANNING = spanning_tokenizer()


def test_the_spanning_tokenizer_would_notice_a_wrong_cut(tokenizer):
    assert at_once("a\n", tokenizer) + at_once("\n\nb", tokenizer) != at_once("a\n\n\nb", tokenizer)
    assert at_once("a \n", tokenizer) + at_once("b", tokenizer) != at_once("a \nb", tokenizer)


def test_a_trained_tokenizer_gives_back_the_text(monkeypatch):
    monkeypatch.setattr(module, "_PIECE_CHARACTERS", 30)
    trained = build_tokenizer(LINES, vocabulary=300)
    tokens = pack(LINES * 3, trained)
    assert tokens.tolist() == at_once(LINES * 3, trained)
    assert trained.decode(tokens, clean_up_tokenization_spaces=False) == LINES * 3


def test_a_vocabulary_with_high_numbers_gets_the_wider_type(tokenizer):
    vocabulary = {"a": 0, "b": 70_000, "[UNK]": 1}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokens = pack("a b c", PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]"))
    assert tokens.tolist() == [0, 70_000, 1]
    assert tokens.dtype == np.uint32


# the cache


def test_the_cache_saves_tokenising(tokenizer, tmp_path):
    counting = Counting(tokenizer)
    cache = tmp_path / "deep" / "cache"
    first = pack(LINES, counting, cache)
    assert counting.calls == 1
    second = pack(LINES, counting, cache)
    assert counting.calls == 1
    for tokens in (first, second):
        assert isinstance(tokens, np.memmap)
        assert tokens.tolist() == at_once(LINES, tokenizer)
        assert not tokens.flags.writeable
    pack(LINES + "more\n", counting, cache)
    assert counting.calls == 2
    assert len(list(cache.iterdir())) == 2


def test_tokenizers_of_one_vocabulary_do_not_share_a_cache(tmp_path):
    def words(lower: bool) -> PreTrainedTokenizerFast:
        tokenizer = Tokenizer(models.WordLevel({"a": 0, "A": 1, "[UNK]": 2}, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        if lower:
            tokenizer.normalizer = normalizers.Lowercase()
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")

    assert pack("a A", words(lower=True), tmp_path).tolist() == [0, 0]
    assert pack("a A", words(lower=False), tmp_path).tolist() == [0, 1]


def test_a_tokenizer_without_a_definition_is_cached_by_its_vocabulary(tmp_path):
    class Characters:
        def __init__(self, letters: str) -> None:
            self.letters = letters

        def get_vocab(self) -> dict[str, int]:
            return {letter: number for number, letter in enumerate(self.letters)}

        def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
            return {"input_ids": [self.letters.index(letter) for letter in text]}

    assert pack("abc", Characters("abc"), tmp_path).tolist() == [0, 1, 2]
    assert pack("abc", Characters("cba"), tmp_path).tolist() == [2, 1, 0]


@pytest.mark.parametrize("left", [0, 5, 100, -1])
def test_a_half_written_cache_is_written_anew(tokenizer, tmp_path, left):
    pack(LINES, tokenizer, tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[:left])
    assert pack(LINES, tokenizer, tmp_path).tolist() == at_once(LINES, tokenizer)
    assert path.read_bytes() == whole
    # A process that was killed leaves the file it was writing.
    path.rename(path.with_name(path.name + ".partial"))
    assert pack(LINES, tokenizer, tmp_path).tolist() == at_once(LINES, tokenizer)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_cache_that_cannot_be_written_is_named(tokenizer, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("no directory")
    with pytest.raises(DataError, match=r"file.*\.npy: cannot be written .*choose another"):
        pack(LINES, tokenizer, blocked)


# blocks


@given(st.integers(10, 400), st.integers(1, 9), st.integers(0, 8))
def test_splits_are_disjoint_and_cover_every_block(blocks, length, rest):
    tokens = np.arange(blocks * length + min(rest, length - 1), dtype=np.uint16)
    splits = split_blocks(tokens, length)
    assert set(splits) == {"train", "validation", "test"}
    rows = {name: split.rows(slice(None)) for name, split in splits.items()}
    covered = torch.cat(list(rows.values()))
    assert sorted(covered.flatten().tolist()) == list(range(blocks * length))
    assert covered.dtype == torch.int64
    assert all(len(split) == len(rows[name]) > 0 for name, split in splits.items())
    assert len(splits["train"]) >= 0.75 * blocks
    # Each is spread over the whole text: no stretch of ten blocks is without one of every split.
    for split in splits.values():
        assert np.diff([-1, *split.numbers, blocks]).max() <= 10


def test_blocks_are_consecutive_tokens():
    splits = split_blocks(np.arange(103), 5)
    assert splits["train"].rows([8, 0]).tolist() == [[50, 51, 52, 53, 54], [0, 1, 2, 3, 4]]
    assert splits["validation"].rows(slice(0, 9)).tolist() == [[40, 41, 42, 43, 44], [90, 91, 92, 93, 94]]


@pytest.mark.parametrize("tokens", [0, 1, 79])
def test_too_short_a_text_is_refused(tokens):
    with pytest.raises(DataError, match=rf"has {tokens} tokens, but 10 blocks of 8 are needed.*--block"):
        split_blocks(np.zeros(tokens, np.uint16), 8)


def test_ten_blocks_are_enough():
    assert [len(split) for split in split_blocks(np.zeros(80, np.uint16), 8).values()] == [8, 1, 1]


@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 3), st.integers(1, 3))
def test_each_epoch_visits_every_block_once(blocks, size, seed, epochs):
    training = Blocks(np.arange(blocks * 2), 2, np.arange(blocks))
    steps = -(-blocks * epochs // size)
    visited = [int(row[0]) // 2 for step in range(steps) for row in training.batch(step, size, seed)]
    for epoch in range(epochs):
        assert Counter(visited[epoch * blocks : (epoch + 1) * blocks]) == Counter(range(blocks))


def test_batches_depend_on_step_and_seed_alone():
    training = Blocks(np.arange(1000), 5, np.arange(200))
    later = [training.batch(step, 8, 3) for step in (30, 7)]
    again = Blocks(np.arange(1000), 5, np.arange(200))
    assert all(torch.equal(a, again.batch(step, 8, 3)) for a, step in zip(later, (30, 7), strict=True))
    assert not torch.equal(training.batch(0, 8, 3), training.batch(0, 8, 4))
    assert not torch.equal(training.batch(0, 8, 3), training.batch(25, 8, 3))  # the same place in two epochs


def test_smaller_batches_are_the_halves_of_a_large_one():
    training = Blocks(np.arange(100), 5, np.arange(20))
    halves = torch.cat([training.batch(step, 4, 1) for step in (6, 7)])
    assert torch.equal(halves, training.batch(3, 8, 1))


@given(st.integers(1, 300), st.integers(1, 100))
def test_spread_blocks_are_from_all_over(blocks, count):
    every = Blocks(np.arange(3 * blocks), 3, np.arange(blocks))
    spread = every.spread(count)
    assert len(spread) == min(blocks, count)
    assert spread.numbers[0] == 0
    assert count == 1 or spread.numbers[-1] == blocks - 1
    gaps = np.diff(spread.numbers)
    assert not len(gaps) or gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize(("trained", "needed"), [(4, 480), (800, 1000)])
def test_of_a_long_text_only_what_training_needs_is_tokenised(tokenizer, tmp_path, trained, needed):
    path = tmp_path / "text.txt"
    text = "The lazy dog; " * 30_000
    path.write_text(text)
    counting = Counting(tokenizer)
    splits = task_blocks(path, counting, 8, trained)
    tokens = sum(map(len, splits.values()))
    assert len(splits["train"]) >= trained
    assert len(splits["validation"]) == len(splits["test"]) == 48
    assert tokens <= needed * 8
    short = tmp_path / "short.txt"
    short.write_text(text[:3000])
    whole = split_blocks(pack(text[:3000], tokenizer), 8)
    used = task_blocks(short, tokenizer, 8, trained)
    assert all(np.array_equal(used[name].numbers, whole[name].numbers) for name in whole)
