"""Tuning keeps what makes the whole model better, and nothing else; stopped, it goes on where it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from directories import TEXT, catalogue_of, generated_text, model_directory, recipe
from tuning_models import LAYERS

from emutune.errors import AdapterError, CatalogueError, CheckpointError, DataError, TrainingInterruptedError
from emutune.tuning import tuner as module
from emutune.tuning.adapters import load_adapter, plug_in, save_adapter
from emutune.tuning.catalogue import Catalogue, open_catalogue
from emutune.tuning.layers import layer_stack
from emutune.tuning.perplexity import perplexity
from emutune.tuning.text import block_length, pack, split_blocks
from emutune.tuning.trainer import Progress, TrainerConfig
from emutune.tuning.tuner import TuneConfig, chosen_emulator, tune

TASK = generated_text(seed=7)
TRAINING = TrainerConfig(steps=6, batch=4, learning_rate=3e-3, score_every=3, save_every_s=0.0)


@pytest.fixture(scope="module")
def catalogues(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Catalogue]:
    root = tmp_path_factory.mktemp("catalogues")
    return {name: catalogue_of(root / name, name) for name in ("gpt2", "llama", "bert")}


@pytest.fixture(scope="module")
def catalogue(catalogues: dict[str, Catalogue]) -> Catalogue:
    return catalogues["gpt2"]


def config(**changes: Any) -> TuneConfig:
    training = TRAINING.model_copy(update=changes.pop("training", {}))
    return TuneConfig(training=training, **{"retention": 0.5} | changes)


def plugged_perplexity(catalogue: Catalogue, path: Path) -> float:
    """Of the whole model with an adapter, on the task's test text."""
    full = catalogue.assemble(catalogue.base())
    manifest, values = load_adapter(path)
    plug_in(dict(enumerate(layer_stack(full))), manifest, values)
    blocks = split_blocks(pack(TASK, catalogue.tokenizer()), block_length(catalogue.config))["test"]
    return perplexity(full, blocks, mask_token=catalogue.tokenizer().mask_token_id)


@pytest.mark.parametrize("adapter", ["layers", "lora", "bottleneck"])
@pytest.mark.parametrize("architecture", ["gpt2", "llama", "bert"])
def test_accepted_adapter_makes_the_model_better(
    architecture: str, adapter: Any, catalogues: dict[str, Catalogue], tmp_path: Path
) -> None:
    catalogue, out = catalogues[architecture], tmp_path / "adapter.safetensors"
    result = tune(catalogue, TASK, config(adapter=adapter), out)
    assert result.accepted
    assert result.after < result.before
    assert result.emulator_after < result.emulator_before
    assert min(result.plugged_validation.values()) < result.plugged_validation[0]
    assert sorted(result.plugged_validation) == [0, 3, 6]
    assert result.steps == 6
    assert result.tokens_per_s > 0
    assert result.retention == 0.5
    manifest, values = load_adapter(out)
    assert result.trainable == sum(value.numel() for value in values.values())
    assert manifest.layer_map == (0, LAYERS - 1)
    assert (manifest.perplexity_before, manifest.perplexity) == (result.before, result.after)
    assert plugged_perplexity(catalogue, out) == pytest.approx(result.after, rel=1e-5)
    assert not list(tmp_path.rglob("training.safetensors*"))


def test_tuning_goes_on_from_the_adapter_in_service(catalogue: Catalogue, tmp_path: Path) -> None:
    out = tmp_path / "adapter.safetensors"
    first = tune(catalogue, TASK, config(), out)
    second = tune(catalogue, TASK, config(), out)
    assert second.before == pytest.approx(first.after)
    assert second.after < first.after


def test_rejected_adapter_leaves_no_file(catalogue: Catalogue, tmp_path: Path) -> None:
    out = tmp_path / "adapter.safetensors"
    result = tune(catalogue, TASK, config(training={"learning_rate": 1e3}), out)
    assert not result.accepted
    assert result.after == result.before
    assert result.emulator_after == result.emulator_before
    assert not out.exists()


@pytest.mark.parametrize("rate", [1e3, 1e-30])
def test_rejected_adapter_leaves_the_earlier_one(rate: float, catalogue: Catalogue, tmp_path: Path) -> None:
    out = tmp_path / "adapter.safetensors"
    tune(catalogue, TASK, config(), out)
    before = out.read_bytes()
    result = tune(catalogue, TASK, config(training={"learning_rate": rate}), out)
    assert not result.accepted
    assert result.after == result.before
    assert out.read_bytes() == before


@pytest.mark.parametrize("adapter", ["layers", "lora"])
def test_stopped_tuning_ends_the_same(adapter: Any, catalogue: Catalogue, tmp_path: Path) -> None:
    whole, stopped = tmp_path / "whole.safetensors", tmp_path / "stopped.safetensors"
    tune(catalogue, TASK, config(adapter=adapter), whole)
    steps: list[int] = []

    def stop(progress: Progress) -> None:
        steps.append(progress.step)
        if len(steps) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(catalogue, TASK, config(adapter=adapter), stopped, report=stop)
    assert not stopped.exists()
    tune(catalogue, TASK, config(adapter=adapter), stopped, report=stop)
    # Step 3 was not saved yet when its report stopped the run.
    assert steps == [1, 2, 3, 3, 4, 5, 6]
    assert stopped.read_bytes() == whole.read_bytes()


def test_stop_before_the_result_is_written_trains_nothing_twice(
    catalogue: Catalogue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, stopped = tmp_path / "whole.safetensors", tmp_path / "stopped.safetensors"
    first = tune(catalogue, TASK, config(), whole)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(module, "save_adapter", stop)
        with pytest.raises(KeyboardInterrupt):
            tune(catalogue, TASK, config(), stopped)
    again = tune(catalogue, TASK, config(), stopped, report=lambda progress: pytest.fail("trained again"))
    assert stopped.read_bytes() == whole.read_bytes()
    assert (again.before, again.emulator_before) == (first.before, first.emulator_before)


def test_stop_after_the_result_is_written_is_no_obstacle(
    catalogue: Catalogue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "adapter.safetensors"

    def write_and_stop(*arguments: Any) -> None:
        save_adapter(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(module, "save_adapter", write_and_stop)
        with pytest.raises(KeyboardInterrupt):
            tune(catalogue, TASK, config(), out)
    assert out.exists()
    assert tune(catalogue, TASK, config(), out).steps == config().training.steps
    assert list(out.with_name(out.name + ".training").glob("*/training.safetensors")) == []


def test_stopped_run_of_other_settings_is_refused(catalogue: Catalogue, tmp_path: Path) -> None:
    out = tmp_path / "adapter.safetensors"

    def stop(progress: Progress) -> None:
        if progress.step == 2:
            raise TrainingInterruptedError

    with pytest.raises(TrainingInterruptedError):
        tune(catalogue, TASK, config(), out, report=stop)
    for other in (config(retention=1), config(training={"seed": 1}), config(adapter="lora")):
        with pytest.raises(CheckpointError, match="other settings"):
            tune(catalogue, TASK, other, out)
    with pytest.raises(CheckpointError, match="other settings"):
        tune(catalogue, generated_text(seed=8), config(), out)


def test_server_trains_against_the_whole_model(catalogue: Catalogue, tmp_path: Path) -> None:
    server = config(where="server", retention=0.25)
    assert chosen_emulator(catalogue, server) == catalogue.base()
    result = tune(catalogue, TASK, server, tmp_path / "adapter.safetensors")
    assert result.retention == 1
    assert result.emulator_before == result.before
    assert result.emulator_after == result.after


def test_server_with_the_cached_emulator_trains_as_the_device(catalogue: Catalogue, tmp_path: Path) -> None:
    cached = config(where="server", server_model="cached", retention=0.25)
    assert chosen_emulator(catalogue, cached) == chosen_emulator(catalogue, config(retention=0.25))
    assert chosen_emulator(catalogue, cached).retention == 0.25
    paths = [tmp_path / name for name in ("cached.safetensors", "device.safetensors")]
    for tuned, path in zip((cached, config(retention=0.25)), paths, strict=True):
        tune(catalogue, TASK, tuned, path)
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_quantised_emulator_tunes(tmp_path: Path) -> None:
    catalogue = catalogue_of(tmp_path, made=recipe("layer_drop", "prune", "quantize"))
    for adapter in ("layers", "lora", "bottleneck"):
        out = tmp_path / f"{adapter}.safetensors"
        assert tune(catalogue, TASK, config(adapter=adapter), out).accepted


@pytest.mark.parametrize("retention", [0, -1, 1.5, float("nan")])
def test_retention_outside_is_refused(retention: float, catalogue: Catalogue, tmp_path: Path) -> None:
    with pytest.raises(CatalogueError, match="retention"):
        tune(catalogue, TASK, config(retention=retention), tmp_path / "adapter.safetensors")


def test_unknown_recipe_is_refused(catalogue: Catalogue, tmp_path: Path) -> None:
    with pytest.raises(CatalogueError, match="no emulators of recipe 'prune'"):
        tune(catalogue, TASK, config(recipe="prune"), tmp_path / "adapter.safetensors")


def test_short_text_is_refused(catalogue: Catalogue, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="blocks of 64 are needed"):
        tune(catalogue, "Too short.", config(), tmp_path / "adapter.safetensors")
    result = tune(catalogue, TASK[:1200], config(block=16), tmp_path / "adapter.safetensors")
    assert result.steps == 6


@pytest.mark.parametrize("changes", [{"adapter": "lora"}, {"adapter": "bottleneck", "width": 8}])
def test_adapter_of_another_kind_is_refused(
    changes: dict[str, Any], catalogue: Catalogue, tmp_path: Path
) -> None:
    out = tmp_path / "adapter.safetensors"
    tune(catalogue, TASK, config(adapter="bottleneck", width=4), out)
    before = out.read_bytes()
    with pytest.raises(AdapterError, match="holds an adapter of kind bottleneck and width 4"):
        tune(catalogue, TASK, config(**changes), out)
    assert out.read_bytes() == before


def test_adapter_of_another_model_is_refused(catalogues: dict[str, Catalogue], tmp_path: Path) -> None:
    out = tmp_path / "adapter.safetensors"
    tune(catalogues["gpt2"], TASK, config(), out)
    with pytest.raises(AdapterError, match="tuned on the model"):
        tune(catalogues["llama"], TASK, config(), out)


def test_adapter_of_other_layers_is_refused(catalogue: Catalogue, tmp_path: Path) -> None:
    model_directory(tmp_path / "model")
    other = catalogue_of(tmp_path, made=recipe(bottom=2))
    tune(catalogue, TASK, config(), tmp_path / "adapter.safetensors")
    with pytest.raises(AdapterError, match=r"changes layers \[0, 5\] of 6, here .* \[0, 1, 5\] of 6"):
        tune(other, TASK, config(), tmp_path / "adapter.safetensors")


def test_damaged_shard_is_refused(tmp_path: Path) -> None:
    catalogue = catalogue_of(tmp_path, made=recipe("layer_drop", "quantize"))
    path = catalogue.shard_path(catalogue.emulators()[0].layers[1].shard.sha256)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CatalogueError, match=path.name):
        tune(
            open_catalogue(catalogue.directory),
            TEXT,
            config(retention=0.25),
            tmp_path / "adapter.safetensors",
        )
