"""Who tunes in an emulator that is no language model, or is led astray by one, is told."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from directories import TEXT, catalogue_of, recipe

from emutune.tuning import doubts
from emutune.tuning.catalogue import Catalogue, open_catalogue
from emutune.tuning.doubts import doubt, misled
from emutune.tuning.trainer import TrainerConfig
from emutune.tuning.tuner import TuneConfig, tune

QUICK = TrainerConfig(steps=4, batch=2, score_every=2)


def with_perplexity(catalogue: Catalogue, retention: float, multiple: float) -> str:
    """Make an emulator's measured perplexity a multiple of the whole model's."""
    whole = catalogue.base().perplexity
    assert whole is not None
    emulator = catalogue.find(retention).model_copy(update={"perplexity": multiple * whole})
    catalogue.save_emulator(emulator)
    return emulator.name


def test_the_limit_is_five_times_the_whole_models(tmp_path: Path) -> None:
    catalogue = catalogue_of(tmp_path)
    whole = catalogue.base()
    assert whole.perplexity == catalogue.find(1).perplexity
    for multiple, doubted in ((1.0, False), (4.99, False), (5.01, True)):
        with_perplexity(catalogue, 0.5, multiple)
        assert (doubt(catalogue.find(0.5), whole) is not None) == doubted
    unmeasured = catalogue.find(0.5).model_copy(update={"perplexity": None})
    assert doubt(unmeasured, whole) is None


def test_build_and_tune_say_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    catalogue = catalogue_of(tmp_path)
    name = with_perplexity(catalogue, 0.25, 41.0)
    with caplog.at_level(logging.WARNING):
        catalogue_of(tmp_path)
        (line,) = [record.getMessage() for record in caplog.records]
        assert line.startswith(f"{name}: is no language model: its perplexity of ")
        assert "41 times the whole model's" in line
        assert "\n" not in line
        caplog.clear()
        config = TuneConfig(retention=0.25, training=QUICK)
        tune(open_catalogue(catalogue.directory), TEXT, config, tmp_path / "adapter.safetensors")
        assert caplog.records[0].getMessage() == line
        caplog.clear()
        tune(catalogue, TEXT, TuneConfig(retention=1, training=QUICK), tmp_path / "other.safetensors")
        assert not caplog.records


@pytest.mark.parametrize(
    ("losses", "plugged", "expected"),
    [
        ([3.0, 2.0, 1.0], {0: 10.0, 3: 11.0}, True),
        ([3.0, 2.0, 1.0], {0: 10.0, 3: 9.0}, False),
        ([1.0, 2.0, 3.0], {0: 10.0, 3: 11.0}, False),
        ([3.0, 2.0, 1.0], {0: 10.0, 1: 12.0, 3: 10.0}, False),
        ([3.0, 1.0], {0: 10.0, 2: float("nan")}, True),
    ],
)
def test_misled_is_a_loss_that_fell_while_the_whole_model_got_worse(
    losses: list[float], plugged: dict[int, float], expected: bool
) -> None:
    assert misled(losses, plugged) == expected


def test_tuning_says_when_it_was_misled(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalogue = catalogue_of(tmp_path, made=recipe(retentions=(0.5,)))
    monkeypatch.setattr("emutune.tuning.tuner.misled", lambda losses, plugged: True)
    for where, told in (("device", True), ("server", False)):
        caplog.clear()
        config = TuneConfig(retention=0.5, where=where, training=QUICK)
        with caplog.at_level(logging.WARNING):
            tune(catalogue, TEXT, config, tmp_path / f"{where}.safetensors")
        lines = [record.getMessage() for record in caplog.records]
        assert any("does not point the way of the whole model's" in line for line in lines) == told
    assert doubts.WORST_MULTIPLE == 5
