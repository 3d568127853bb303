"""The frontier is what enumeration says, sizes are those of the models, and a ladder climbs."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from directories import TEXT, catalogue_of, model_directory, recipe
from hypothesis import given
from hypothesis import strategies as st
from tuning_models import ARCHITECTURES

from emutune.tuning.build import build_catalogue
from emutune.tuning.catalogue import Catalogue
from emutune.tuning.compression.quantize import QuantizedLinear
from emutune.tuning.frontier import Level, frontier, ladder, levels
from emutune.tuning.inventory import FRONTIER
from emutune.tuning.layers import layer_stack
from emutune.tuning.manifest import Emulator, LayerEntry, Shard, missing


def emulator(number: int, layers: int = 3) -> Emulator:
    shards = [Shard(sha256=f"{number:032x}{index:032x}", bytes=1 + index) for index in range(layers + 1)]
    return Emulator(
        base="0",
        name=str(number),
        recipe="any",
        method=(),
        order=None,
        retention=1,
        kept=(),
        seed=0,
        outer=shards[-1],
        layers=tuple(LayerEntry(index=index, shard=shard) for index, shard in enumerate(shards[:-1])),
    )


numbers = st.integers(1, 4)
costs = st.lists(
    st.tuples(numbers, numbers, numbers, st.sampled_from([10.0, 10.05, 11.0, 30.0])), min_size=1, max_size=9
)


@given(costs)
def test_what_is_kept_is_what_none_of_all_beats(drawn: list[tuple[int, int, int, float]]) -> None:
    found = [Level(emulator(number), *values) for number, values in enumerate(drawn)]
    kept = frontier(found)
    for level, values in zip(found, drawn, strict=True):
        beaten = any(
            all(a <= b for a, b in zip(other[:3], values[:3], strict=True))
            and other[3] <= 1.01 * values[3]
            and (other[:3] != values[:3] or other[3] < values[3])
            for other in drawn
        )
        assert (level in kept) == (not beaten)
    assert kept == sorted(kept, key=lambda level: level.bytes)


def test_the_same_shards_under_two_names_are_one_level() -> None:
    one = Level(emulator(1), 1, 1, 1, 10.0)
    other = Level(emulator(1).model_copy(update={"name": "again"}), 1, 1, 1, 10.0)
    assert frontier([one, other]) == [one]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sizes_are_those_of_the_assembled_models(architecture: str, tmp_path: Path) -> None:
    catalogue = catalogue_of(tmp_path, architecture, recipe("layer_drop", "prune", retentions=(0.5,)))
    catalogue_of(tmp_path, architecture, recipe("layer_drop", "quantize", retentions=(0.5,)))
    found = {level.emulator.name: level for level in levels(catalogue)}
    assert len(found) == 3
    adapters = catalogue.info.adapter_layers
    whole = sum(parameter.numel() for parameter in catalogue.assemble(catalogue.base()).parameters())
    for level in found.values():
        model = catalogue.assemble(level.emulator)
        stack = layer_stack(model)
        if level.emulator.name != catalogue.base().name and "quantize" in level.emulator.method:
            assert any(isinstance(module, QuantizedLinear) for module in stack.modules())
        else:
            held = sum(4 * parameter.numel() for parameter in model.parameters())
            # Gradients and two moments of the adapter layers.
            held += sum(
                3 * 4 * parameter.numel()
                for layer, entry in zip(stack, level.emulator.layers, strict=True)
                if entry.index in adapters
                for parameter in layer.parameters()
            )
            assert level.memory_bytes == held
            head = model.get_output_embeddings()
            counted = sum(parameter.numel() for parameter in (*stack.parameters(), *head.parameters()))
            assert level.operations == 2 * counted
            assert counted <= whole


def test_rounding_takes_memory_and_no_operations(tmp_path: Path) -> None:
    catalogue = catalogue_of(tmp_path, "llama", recipe("layer_drop"))
    catalogue_of(tmp_path, "llama", recipe("layer_drop", "quantize", bits=8))
    found = {(level.emulator.recipe, level.emulator.retention): level for level in levels(catalogue)}
    for retention in (0.25, 0.5, 0.75, 1.0):
        plain, rounded = found["layer_drop-loss", retention], found["layer_drop-loss+quantize-8", retention]
        assert plain.operations == rounded.operations
        assert rounded.bytes < plain.bytes
        assert rounded.memory_bytes < plain.memory_bytes


def build(tmp_path: Path, **changes: object) -> Catalogue:
    source = tmp_path / "model"
    if not source.exists():
        model_directory(source)
    made = recipe(**changes).model_copy(update={"frontier": True})
    return build_catalogue(source, tmp_path / "catalogue", made, TEXT)


def test_a_build_of_levels_on_the_frontier(tmp_path: Path) -> None:
    catalogue = build(tmp_path)
    assert catalogue.info.recipe == FRONTIER
    recipes = {one.recipe for one in catalogue.all_emulators()}
    assert recipes >= {"layer_drop-loss", "layer_drop-loss+quantize-8", "layer_drop-loss+gptq-4"}
    steps = catalogue.emulators()
    chosen = [level.emulator for level in ladder(frontier(levels(catalogue)))]
    assert [one.shards for one in steps] == [one.shards for one in chosen]
    assert len({one.retention for one in steps}) == len(steps)
    assert all(later.perplexity < earlier.perplexity for earlier, later in itertools.pairwise(steps))
    for have, want in itertools.pairwise(steps):
        assert sum(missing(have, want).values()) < want.bytes
    expected = catalogue.assemble(chosen[0])(torch.arange(9)[None]).logits
    assert torch.equal(catalogue.assemble(steps[0])(torch.arange(9)[None]).logits, expected)


def test_building_again_with_other_levels_replaces_them(tmp_path: Path) -> None:
    first = {path: path.stat().st_mtime_ns for path in build(tmp_path).directory.glob("emulators/*")}
    again = {path: path.stat().st_mtime_ns for path in build(tmp_path).directory.glob("emulators/*")}
    assert again == first
    catalogue = build(tmp_path)
    stale = catalogue.emulators()[0].model_copy(update={"name": "frontier-0.1000"})
    catalogue.save_emulator(stale)
    assert "frontier-0.1000" not in {one.name for one in build(tmp_path).emulators()}
