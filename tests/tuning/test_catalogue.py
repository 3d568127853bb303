"""Shards are named by their content, checked when read, and never half written."""

from __future__ import annotations

import errno
import hashlib
import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from directories import TEXT, built, catalogue_of, model_directory, recipe
from tuning_models import logits

from emutune.errors import CatalogueError
from emutune.tuning import catalogue as module
from emutune.tuning.adapters import attach
from emutune.tuning.build import build_catalogue
from emutune.tuning.catalogue import Catalogue, open_catalogue
from emutune.tuning.manifest import missing
from emutune.tuning.tuner import adapter_layers


@pytest.fixture
def made(tmp_path: Path) -> Catalogue:
    return catalogue_of(tmp_path)


def test_base_emulator_is_the_model(architecture: str, tmp_path: Path) -> None:
    catalogue = catalogue_of(tmp_path, architecture)
    assert torch.equal(logits(catalogue.assemble(catalogue.base())), logits(built(architecture)))


def test_emulators_assembled_and_cut_are_equal(architecture: str, tmp_path: Path) -> None:
    catalogue = catalogue_of(tmp_path, architecture)
    full = catalogue.assemble(catalogue.base())
    before, emulators = logits(full), catalogue.emulators()
    assert [emulator.retention for emulator in emulators] == [0.25, 0.5, 0.75, 1]
    for emulator in emulators:
        assert torch.equal(logits(catalogue.assemble(emulator)), logits(catalogue.cut(full, emulator)))
    assert torch.equal(logits(full), before)
    assert torch.equal(logits(catalogue.assemble(emulators[-1])), before)


def test_emulators_are_nested_and_grow(architecture: str, tmp_path: Path) -> None:
    catalogue = catalogue_of(tmp_path, architecture)
    middle, spared = {*catalogue.info.middle}, catalogue.info.spared
    emulators = catalogue.emulators()
    for count, emulator in enumerate(emulators, 1):
        assert emulator.kept == tuple(sorted(middle - {*spared[: len(middle) - count]}))
    for small, large in itertools.pairwise(emulators):
        assert small.bytes < large.bytes
        assert small.shards.items() < large.shards.items()


def test_cached_shards_and_those_sent_are_the_emulator(made: Catalogue) -> None:
    catalogue_of(made.directory.parent, made=recipe("layer_drop", "quantize"))
    emulators = [made.base(), *made.emulators(recipe().label), *open_catalogue(made.directory).emulators()]
    assert len(emulators) == 9
    for want in emulators:
        assert missing(None, want) == want.shards
        assert missing(want, want) == {}
        for have in emulators:
            sent = missing(have, want)
            kept = {name: size for name, size in want.shards.items() if name in have.shards}
            assert sent | kept == want.shards
            assert not sent.keys() & have.shards.keys()
    small, large = made.emulators(recipe().label)[:2]
    assert sum(missing(small, large).values()) == large.bytes - small.bytes


def test_shards_are_named_by_their_content(made: Catalogue) -> None:
    files = list((made.directory / "shards").iterdir())
    assert len(files) == 7
    for path in files:
        assert path.name == hashlib.sha256(path.read_bytes()).hexdigest() + ".safetensors"
    for name, size in made.base().shards.items():
        assert made.shard_path(name).stat().st_size == size


def test_catalogue_holds_no_pickle(made: Catalogue) -> None:
    files = [path for path in made.directory.rglob("*") if path.is_file()]
    kinds = {(path.relative_to(made.directory).parts[0], path.suffix) for path in files}
    assert kinds <= {
        ("catalogue.json", ".json"),
        ("emulators", ".json"),
        ("shards", ".safetensors"),
        ("tokenizer", ".json"),
        ("tokenizer", ".jinja"),
        ("tokenizer", ".txt"),
        ("work", ".npy"),
    }


def test_damaged_shard_is_refused_by_name(made: Catalogue) -> None:
    emulator = made.emulators()[0]
    path = made.shard_path(emulator.layers[1].shard.sha256)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CatalogueError, match=f"{path.name}: damaged"):
        made.assemble(emulator)


def test_missing_shard_is_refused_by_name(made: Catalogue) -> None:
    path = made.shard_path(made.base().outer.sha256)
    path.unlink()
    with pytest.raises(CatalogueError, match=f"{path.name}: missing"):
        made.assemble(made.base())


def test_damaged_manifest_is_refused_by_name(made: Catalogue) -> None:
    path = made.directory / "emulators" / f"{made.emulators()[0].name}.json"
    path.write_text(path.read_text()[:100])
    with pytest.raises(CatalogueError, match=rf"{path.name}: damaged"):
        made.emulators()
    (made.directory / "catalogue.json").write_bytes(b"\xff")
    with pytest.raises(CatalogueError, match=r"catalogue\.json: damaged"):
        open_catalogue(made.directory)


def test_directory_without_a_catalogue_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CatalogueError, match="no catalogue"):
        open_catalogue(tmp_path)


def test_nearest_retention_is_found(made: Catalogue) -> None:
    assert made.find(0.01).retention == 0.25
    assert made.find(0.6).retention == 0.5
    assert made.find(1).retention == 1
    with pytest.raises(CatalogueError, match="no emulators of recipe 'quantize-4'"):
        made.find(0.5, "quantize-4")


@pytest.mark.parametrize("retention", [0, -0.5, 1.2, float("nan")])
def test_retention_outside_is_refused(made: Catalogue, retention: float) -> None:
    with pytest.raises(CatalogueError, match="retention"):
        made.find(retention)


@pytest.mark.parametrize("writable", [0, 3])
def test_full_disk_leaves_no_half_written_shard(
    writable: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = catalogue_of(tmp_path / "expected").base()
    written, save = 0, module.save_file

    def save_until_full(tensors: Any, path: Path) -> None:
        nonlocal written
        written += 1
        save(tensors, path)
        if written > writable:
            path.write_bytes(path.read_bytes()[:100])
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "save_file", save_until_full)
    with pytest.raises(CatalogueError, match=r"cannot be written.*No space left"):
        catalogue_of(tmp_path)
    shards = tmp_path / "catalogue" / "shards"
    assert len(list(shards.iterdir())) == writable
    for path in shards.iterdir():
        assert path.name == hashlib.sha256(path.read_bytes()).hexdigest() + ".safetensors"
    with pytest.raises(CatalogueError, match="not finished"):
        open_catalogue(tmp_path / "catalogue").base()
    monkeypatch.undo()
    assert catalogue_of(tmp_path).base() == expected


def test_manifest_that_cannot_be_written_leaves_the_earlier_one(
    made: Catalogue, monkeypatch: pytest.MonkeyPatch
) -> None:
    emulator = made.emulators()[0]

    def fail(*_: object) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(CatalogueError, match="cannot be written"):
        made.save_emulator(emulator.model_copy(update={"seed": 5}))
    assert made.emulator(emulator.name) == emulator


def test_tokenizer_that_cannot_be_written_is_a_catalogue_error(tmp_path: Path) -> None:
    source = model_directory(tmp_path / "model")
    (tmp_path / "catalogue").mkdir()
    (tmp_path / "catalogue" / "tokenizer").write_text("in the way")
    with pytest.raises(CatalogueError, match="tokenizer"):
        build_catalogue(source, tmp_path / "catalogue", recipe(), text=TEXT)


_LIMITED = """
import resource, signal, sys
from pathlib import Path
from safetensors.torch import save_file
import torch
from emutune.errors import CatalogueError
from emutune.tuning.catalogue import Catalogue, CatalogueInfo
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
info = CatalogueInfo(base="", config={}, layers=1, bottom=0, top=0, text="")
catalogue = Catalogue(Path(sys.argv[1]), info)
catalogue.save_shard({"small": torch.zeros(10)})
try:
    catalogue.save_shard({"large": torch.zeros(10_000)})
except CatalogueError as error:
    print(error)
"""


def test_file_size_limit_is_a_catalogue_error(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _LIMITED, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert "cannot be written" in done.stdout
    assert len(list((tmp_path / "shards").iterdir())) == 1


def test_building_again_adds_what_adapters_are_made_of(tmp_path: Path) -> None:
    catalogue = catalogue_of(tmp_path)
    known = catalogue.info.adapters
    assert set(known) == {"layers", "lora", "bottleneck"}
    catalogue.save_info(adapters={})
    with pytest.raises(CatalogueError, match="run emutune catalogue build again"):
        catalogue.asked(catalogue.base(), "lora", 2)
    again = catalogue_of(tmp_path)
    assert again.info.adapters == known
    layers = adapter_layers(again, again.assemble(again.base()))
    made = {name: tuple(value.shape) for name, value in attach(layers, "lora", 2).items()}
    assert again.asked(again.base(), "lora", 2).shapes == made
