"""Building: each piece once, the same after an interruption, each recipe as it says."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from directories import TEXT, catalogue_of, generated_text, model_directory, recipe, tokenizer
from safetensors.torch import load_file, save_file
from tuning_models import HEADS, logits

from emutune.errors import CatalogueError, DataError, ModelError
from emutune.tuning.build import Recipe, build_catalogue
from emutune.tuning.catalogue import Catalogue, open_catalogue
from emutune.tuning.compression.quantize import QuantizedLinear
from emutune.tuning.layers import layer_stack
from emutune.tuning.manifest import Emulator
from emutune.tuning.perplexity import perplexity
from emutune.tuning.text import block_length, pack, split_blocks
from emutune.tuning.trainer import TrainerConfig

QUICK = TrainerConfig(steps=3, batch=2, learning_rate=1e-3, save_every_s=0.0)
RECIPES = {
    "drop": recipe("layer_drop"),
    "uniform": recipe("layer_drop", order="uniform"),
    "distill": recipe("layer_drop", "distill", distillation=QUICK),
    "quantize-8": recipe("layer_drop", "quantize", bits=8),
    "quantize-4": recipe("layer_drop", "quantize", bits=4),
    "prune": recipe("prune"),
    "all": recipe("layer_drop", "prune", "distill", "quantize", distillation=QUICK),
    "quantize alone": recipe("quantize", bits=4),
    "prune and distill": recipe("prune", "distill", distillation=QUICK),
}


class StoppedError(Exception):
    """Raised where a build is to stop."""


def state(catalogue: Catalogue) -> dict[str, bytes]:
    """Content of every file but the working ones."""
    return {
        str(path.relative_to(catalogue.directory)): path.read_bytes()
        for path in catalogue.directory.rglob("*")
        if path.is_file() and "work" not in path.relative_to(catalogue.directory).parts
    }


def stamps(catalogue: Catalogue) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in catalogue.directory.rglob("*") if path.is_file()}


def stop_at(count: int) -> Callable[[str, Any], None]:
    def report(*_: object) -> None:
        nonlocal count
        count -= 1
        if count < 0:
            raise StoppedError

    return report


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_recipes(architecture: str, name: str, tmp_path: Path) -> None:
    made = RECIPES[name]
    catalogue = catalogue_of(tmp_path, architecture, made)
    full = catalogue.assemble(catalogue.base())
    before, emulators = logits(full), catalogue.emulators()
    assert [emulator.retention for emulator in emulators] == sorted({e.retention for e in emulators})
    assert len(emulators) == (1 if name == "quantize alone" else 4)
    assert all(small.bytes < large.bytes for small, large in itertools.pairwise(emulators))
    for emulator in emulators:
        _check(catalogue, full, emulator, made)
    assert torch.equal(logits(full), before)


def _check(catalogue: Catalogue, full: Any, emulator: Emulator, made: Recipe) -> None:
    assembled, cut = catalogue.assemble(emulator), catalogue.cut(full, emulator)
    assert torch.equal(logits(assembled), logits(cut))
    assert emulator.method == made.methods
    assert (emulator.bytes < catalogue.base().bytes) == (emulator.shards != catalogue.base().shards)
    blocks = split_blocks(pack(TEXT, catalogue.tokenizer()), block_length(catalogue.config))["validation"]
    found = perplexity(assembled, blocks.first(32), mask_token=tokenizer().mask_token_id)
    assert emulator.perplexity == pytest.approx(found, rel=1e-5)
    info, whole = catalogue.info, catalogue.base().layers
    assert emulator.layers[: info.bottom] == whole[: info.bottom]
    assert emulator.layers[-info.top :] == whole[-info.top :]
    for entry, layer in zip(emulator.layers, layer_stack(assembled), strict=True):
        quantised = any(isinstance(inner, QuantizedLinear) for inner in layer.modules())
        assert quantised == (entry.bits is not None)
        assert quantised == ("quantize" in made.methods and entry.index in info.middle)
        if "prune" in made.methods and entry.index in info.middle:
            share = made.width_share if "layer_drop" in made.methods else emulator.retention
            groups = catalogue.config.get_text_config().to_dict().get("num_key_value_heads", HEADS)
            heads = max(1, round(share * groups)) * HEADS // groups
            assert (entry.widths.heads if entry.widths else HEADS) == heads


def test_distilled_students_share_their_layers(tmp_path: Path) -> None:
    catalogue = catalogue_of(tmp_path, made=RECIPES["distill"])
    one, two, three, four = catalogue.emulators()
    assert one.shards.items() < two.shards.items() < three.shards.items()
    # The whole model has nothing to learn.
    assert four.layers == catalogue.base().layers
    untrained = {layer.shard for layer in four.layers[1:-1]}
    assert not untrained & {layer.shard for layer in three.layers[1:-1]}


@pytest.mark.parametrize("name", ["drop", "distill", "all"])
def test_building_twice_writes_nothing(name: str, tmp_path: Path) -> None:
    before = stamps(catalogue_of(tmp_path, made=RECIPES[name]))
    assert stamps(catalogue_of(tmp_path, made=RECIPES[name])) == before


@pytest.mark.parametrize("name", ["drop", "distill", "all"])
def test_interrupted_builds_end_the_same(name: str, tmp_path: Path) -> None:
    expected = catalogue_of(tmp_path / "expected", made=RECIPES[name])
    source = model_directory(tmp_path / "model")
    for calls in range(100):
        try:
            catalogue = build_catalogue(source, tmp_path / "catalogue", RECIPES[name], TEXT, stop_at(calls))
            break
        except StoppedError:
            continue
    assert calls >= 4
    assert state(catalogue) == state(expected)


def test_interrupted_distillation_goes_on_where_it_was(tmp_path: Path) -> None:
    expected = catalogue_of(tmp_path / "expected", made=RECIPES["distill"])
    source, out = model_directory(tmp_path / "model"), tmp_path / "catalogue"
    steps: list[int] = []

    def stop_after_two(_: str, progress: Any) -> None:
        if progress is not None:
            steps.append(progress.step)
            if steps == [1, 2]:
                raise StoppedError

    with pytest.raises(StoppedError):
        build_catalogue(source, out, RECIPES["distill"], TEXT, stop_after_two)
    catalogue = build_catalogue(source, out, RECIPES["distill"], TEXT, stop_after_two)
    # Step 2 was not saved yet when its report stopped the build.
    assert steps == [1, 2, 2, 3]
    assert state(catalogue) == state(expected)
    assert not list(out.rglob("training.safetensors*"))


def test_recipes_share_a_catalogue(tmp_path: Path) -> None:
    catalogue = catalogue_of(tmp_path)
    shards = set((catalogue.directory / "shards").iterdir())
    again = catalogue_of(tmp_path, made=RECIPES["uniform"])
    assert set((catalogue.directory / "shards").iterdir()) == shards
    assert again.info.recipe == "layer_drop-uniform"
    assert [e.order for e in again.emulators()] == ["uniform"] * 4
    assert [e.kept for e in again.emulators()] == [(1,), (1, 4), (1, 3, 4), (1, 2, 3, 4)]
    assert len(again.emulators(recipe().label)) == 4


def test_more_retentions_are_added(tmp_path: Path) -> None:
    few = catalogue_of(tmp_path, made=recipe(retentions=(0.5,)))
    assert [emulator.retention for emulator in few.emulators()] == [0.5]
    before = stamps(few)
    more = catalogue_of(tmp_path, made=recipe(retentions=(0.2, 0.5, 1.0)))
    assert [emulator.retention for emulator in more.emulators()] == [0.25, 0.5, 1]
    after = stamps(more)
    # The order of layers is now known further.
    assert {path.name for path in before if before[path] != after[path]} == {"catalogue.json"}
    assert {path.parent.name for path in after.keys() - before.keys()} == {"emulators"}


def test_more_distilled_retentions_leave_the_first_as_they_were(tmp_path: Path) -> None:
    made = RECIPES["distill"]
    few = catalogue_of(tmp_path, made=made.model_copy(update={"retentions": (0.5,)}))
    before = few.emulators()
    more = catalogue_of(tmp_path, made=made)
    assert more.emulators()[1] == before[0]


def test_catalogue_of_another_model_is_refused(tmp_path: Path) -> None:
    catalogue_of(tmp_path)
    other = model_directory(tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    tensors["transformer.wte.weight"] += 1
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    before = stamps(open_catalogue(tmp_path / "catalogue"))
    with pytest.raises(CatalogueError, match="belongs to another build: base"):
        build_catalogue(other, tmp_path / "catalogue", recipe(), text=TEXT)
    assert stamps(open_catalogue(tmp_path / "catalogue")) == before


@pytest.mark.parametrize(("changes", "field"), [({"bottom": 2}, "bottom"), ({"top": 0}, "top")])
def test_catalogue_with_other_adapter_layers_is_refused(
    changes: dict[str, int], field: str, tmp_path: Path
) -> None:
    catalogue_of(tmp_path)
    with pytest.raises(CatalogueError, match=f"another build: {field}"):
        catalogue_of(tmp_path, made=recipe(**changes))


def test_catalogue_on_other_text_is_refused(tmp_path: Path) -> None:
    catalogue_of(tmp_path)
    with pytest.raises(CatalogueError, match="another build: text"):
        build_catalogue(tmp_path / "model", tmp_path / "catalogue", recipe(), text=generated_text(seed=1))


def test_too_few_layers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has 6 layers, but 3 \+ 3 adapter layers"):
        catalogue_of(tmp_path, made=recipe(bottom=3, top=3))
    assert not (tmp_path / "catalogue").exists()


def test_one_layer_between_is_enough(tmp_path: Path) -> None:
    catalogue = catalogue_of(tmp_path, made=recipe(bottom=2, top=3))
    assert [emulator.kept for emulator in catalogue.emulators()] == [(2,)]
    assert catalogue.info.importance is None


def test_short_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="blocks of 64 are needed"):
        build_catalogue(
            model_directory(tmp_path / "model"), tmp_path / "catalogue", recipe(), text="Too short."
        )


def test_retention_outside_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="retention"):
        catalogue_of(tmp_path, made=recipe(retentions=(0.5, 1.5)))


def test_no_adapter_layers_at_one_end(tmp_path: Path) -> None:
    catalogue = catalogue_of(tmp_path, made=recipe("layer_drop", "distill", bottom=0, distillation=QUICK))
    full = catalogue.assemble(catalogue.base())
    for emulator in catalogue.emulators():
        assert torch.equal(logits(catalogue.assemble(emulator)), logits(catalogue.cut(full, emulator)))
