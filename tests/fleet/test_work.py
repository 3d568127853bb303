"""What a device computes, with a tiny random model: from shards alone, resumable, the same for the same seed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from device_models import TEXT, TRAINING, catalogue, emulator

from emutune.errors import AdapterError, CatalogueError, DataError
from emutune.fleet.device import work
from emutune.fleet.device.emulators import model_folder
from emutune.fleet.device.files import hash_file
from emutune.fleet.protocol import Training
from emutune.fleet.training import trainer_config
from emutune.tuning.adapters import load_adapter, plug_in
from emutune.tuning.catalogue import Catalogue
from emutune.tuning.layers import layer_stack
from emutune.tuning.perplexity import perplexity
from emutune.tuning.text import pack, split_blocks
from emutune.tuning.trainer import TrainerConfig


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Catalogue:
    return catalogue(tmp_path_factory.mktemp("model"))


@pytest.fixture
def cache(built: Catalogue, tmp_path: Path) -> Path:
    """Only what a device has: the emulator's shards, the description and the tokenizer."""
    directory = tmp_path / "cache"
    (directory / "shards").mkdir(parents=True)
    for sha256 in built.find(0.5).shards:
        shutil.copy(built.shard_path(sha256), directory / "shards")
    home = model_folder(directory, built.info.base)
    shutil.copytree(built.directory / "tokenizer", home / "tokenizer")
    shutil.copy(built.directory / "catalogue.json", home)
    return directory


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "a.txt"
    path.write_text(TEXT)
    return path


class KilledError(Exception):
    pass


@pytest.mark.parametrize("kind", ["lora", "layers", "bottleneck"])
def test_training_helps_and_the_adapter_says_what_it_is(
    built: Catalogue, cache: Path, text: Path, tmp_path: Path, kind: Any
) -> None:
    training = TRAINING.model_copy(update={"adapter": kind})
    made = work.train_adapter(cache, emulator(built), text, training, tmp_path / "work")
    assert made.after < made.before
    assert made.training_s > 0
    manifest, values = load_adapter(tmp_path / "work" / work.ADAPTER)
    assert manifest.base == built.info.base
    assert manifest.layer_map == built.info.adapter_layers
    assert (manifest.kind, manifest.width) == (kind, 0 if kind == "layers" else 4)
    assert manifest.emulator == built.find(0.5).name
    # Measured by another road: plugged into the emulator that the catalogue assembles.
    tokenizer, model = built.tokenizer(), built.assemble(built.find(0.5))
    stack = layer_stack(model)
    positions = {entry.index: place for place, entry in enumerate(built.find(0.5).layers)}
    plug_in({index: stack[positions[index]] for index in manifest.layer_map}, manifest, values)
    test = split_blocks(pack(TEXT, tokenizer), TRAINING.block)["test"]
    assert perplexity(model, test) == pytest.approx(made.after, rel=1e-5)


def test_a_run_that_was_stopped_ends_in_the_same_adapter(
    built: Catalogue, cache: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = work.train_adapter(cache, emulator(built), text, TRAINING, tmp_path / "plain")
    monkeypatch.setattr(work, "trainer_config", always_saving)
    again = work.train_adapter(cache, emulator(built), text, TRAINING, tmp_path / "saving")
    assert again.sha256 == plain.sha256
    stops = [2, 7, 11]
    steps: list[int] = []

    def stop(progress: Any) -> None:
        steps.append(progress.step)
        if stops and progress.step == stops[0]:
            stops.pop(0)
            raise KilledError

    for _ in range(3):
        with pytest.raises(KilledError):
            work.train_adapter(cache, emulator(built), text, TRAINING, tmp_path / "stopped", report=stop)
    stopped = work.train_adapter(cache, emulator(built), text, TRAINING, tmp_path / "stopped", report=stop)
    assert stopped.sha256 == plain.sha256
    assert (stopped.before, stopped.after) == (plain.before, plain.after)
    assert len(steps) < 2 * TRAINING.steps
    # Once it is there, nothing is trained.
    count = len(steps)
    assert (
        work.train_adapter(cache, emulator(built), text, TRAINING, tmp_path / "stopped", report=stop)
        == stopped
    )
    assert len(steps) == count


def always_saving(training: Training) -> TrainerConfig:
    return trainer_config(training).model_copy(update={"save_every_s": 0})


def test_another_seed_is_another_adapter(built: Catalogue, cache: Path, text: Path, tmp_path: Path) -> None:
    one = work.train_adapter(cache, emulator(built), text, TRAINING, tmp_path / "one")
    other = TRAINING.model_copy(update={"seed": 6})
    assert work.train_adapter(cache, emulator(built), text, other, tmp_path / "two").sha256 != one.sha256


def test_damage_on_the_way_costs_only_time(built: Catalogue, cache: Path, text: Path, tmp_path: Path) -> None:
    plain = work.train_adapter(cache, emulator(built), text, TRAINING, tmp_path / "work")
    (tmp_path / "work" / work.ADAPTER).write_bytes(b"damaged")
    (tmp_path / "work" / "training" / "training.safetensors").write_bytes(b"damaged")
    again = work.train_adapter(cache, emulator(built), text, TRAINING, tmp_path / "work")
    assert again.sha256 == plain.sha256
    assert hash_file(tmp_path / "work" / work.ADAPTER)[0] == plain.sha256


def test_training_goes_on_from_an_adapter(built: Catalogue, cache: Path, text: Path, tmp_path: Path) -> None:
    first = work.train_adapter(cache, emulator(built), text, TRAINING, tmp_path / "one")
    start = tmp_path / "one" / work.ADAPTER
    second = work.train_adapter(cache, emulator(built), text, TRAINING, tmp_path / "two", start=start)
    assert second.before == pytest.approx(first.after, rel=1e-6)
    other = TRAINING.model_copy(update={"width": 3})
    with pytest.raises(AdapterError, match="width 4, not lora and 3"):
        work.train_adapter(cache, emulator(built), text, other, tmp_path / "three", start=start)


def test_the_report_compares_texts(built: Catalogue, cache: Path, text: Path, tmp_path: Path) -> None:
    manifest = emulator(built)
    ratio = work.perplexity_ratio(cache, manifest, text)
    tokenizer, model = built.tokenizer(), built.assemble(built.find(0.5))
    blocks = split_blocks(pack(TEXT, tokenizer), 64)["test"].first(32)
    assert ratio == pytest.approx(perplexity(model, blocks) / manifest["perplexity"])
    assert work.perplexity_ratio(cache, manifest | {"perplexity": None}, text) is None
    short = tmp_path / "short.txt"
    short.write_text("too short")
    assert work.perplexity_ratio(cache, manifest, short) is None


def test_what_cannot_be_trained_is_refused(built: Catalogue, cache: Path, text: Path, tmp_path: Path) -> None:
    manifest = emulator(built)
    with pytest.raises(CatalogueError, match="is of the model"):
        work.train_adapter(cache, manifest | {"base": "0" * 64}, text, TRAINING, tmp_path / "w")
    with pytest.raises(CatalogueError, match=r"emulator\.retention"):
        work.train_adapter(cache, manifest | {"retention": 2}, text, TRAINING, tmp_path / "w")
    with pytest.raises(CatalogueError, match="lacks some of the adapter layers"):
        work.train_adapter(
            cache, manifest | {"layers": manifest["layers"][:-1]}, text, TRAINING, tmp_path / "w"
        )
    text.write_text("too short")
    with pytest.raises(DataError, match="10 blocks"):
        work.train_adapter(cache, manifest, text, TRAINING, tmp_path / "w")
