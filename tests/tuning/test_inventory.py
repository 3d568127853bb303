"""What a catalogue holds, as a process without torch sees it: the same as with torch, and the same errors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from directories import catalogue_of

from emutune.errors import CatalogueError
from emutune.tuning.catalogue import Catalogue, open_catalogue
from emutune.tuning.inventory import BASE, Inventory, open_inventory
from emutune.tuning.manifest import missing

READ = """
import json, sys
from emutune.tuning.inventory import open_inventory
from emutune.tuning.manifest import missing
opened = open_inventory(sys.argv[1])
emulators = opened.emulators()
print(json.dumps({
    "names": [emulator.name for emulator in emulators],
    "missing": missing(emulators[0], emulators[-1]),
    "nearest": opened.find(0.5).name,
    "base": opened.base().bytes,
    "heavy": sorted({"torch", "transformers", "jax"} & sys.modules.keys()),
}))
"""


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> Catalogue:
    return catalogue_of(tmp_path_factory.mktemp("inventory"))


def test_a_process_without_torch_reads_the_same(catalogue: Catalogue) -> None:
    done = subprocess.run(
        [sys.executable, "-c", READ, str(catalogue.directory)], capture_output=True, text=True, check=True
    )
    emulators = catalogue.emulators()
    assert json.loads(done.stdout) == {
        "names": [emulator.name for emulator in emulators],
        "missing": missing(emulators[0], emulators[-1]),
        "nearest": catalogue.find(0.5).name,
        "base": catalogue.base().bytes,
        "heavy": [],
    }
    assert len(emulators) > 1


def test_every_shard_is_where_it_says(catalogue: Catalogue) -> None:
    inventory = open_inventory(catalogue.directory)
    whole = inventory.emulator(BASE)
    assert whole is not None
    assert {sha256: inventory.shard_path(sha256).stat().st_size for sha256 in whole.shards} == whole.shards


def test_no_catalogue_and_damaged_ones_are_refused(catalogue: Catalogue, tmp_path: Path) -> None:
    for reader in (open_inventory, open_catalogue):
        with pytest.raises(CatalogueError, match="no catalogue"):
            reader(tmp_path)
    with pytest.raises(CatalogueError, match="not finished"):
        Inventory(tmp_path, catalogue.info).base()
    (tmp_path / "emulators").mkdir()
    (tmp_path / "emulators" / "base.json").write_text("{}")
    with pytest.raises(CatalogueError, match=r"base\.json: damaged"):
        Inventory(tmp_path, catalogue.info).base()
    (tmp_path / "catalogue.json").write_text('{"base": 3}')
    with pytest.raises(CatalogueError, match=r"catalogue\.json: damaged"):
        open_inventory(tmp_path)
