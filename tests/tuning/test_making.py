"""What a build says beforehand, what it goes on with, and that students learn only once."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from directories import TEXT, catalogue_of, model_directory, recipe

from emutune.tuning.build import build_catalogue
from emutune.tuning.catalogue import open_catalogue
from emutune.tuning.compression.distill import DISTILLATION, budgeted
from emutune.tuning.measuring import Measuring
from emutune.tuning.trainer import TrainerConfig

QUICK = TrainerConfig(steps=3, batch=2, learning_rate=1e-3, save_every_s=0.0)


def test_what_takes_minutes_is_said_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("emutune.tuning.making._MINUTE_S", 1e-9)
    told: list[str] = []
    events: list[str] = []
    build_catalogue(
        model_directory(tmp_path / "model"),
        tmp_path / "catalogue",
        recipe("layer_drop", "distill", retentions=(0.5,), distillation=QUICK),
        TEXT,
        lambda stage, progress: events.append(stage),
        lambda line: (told.append(line), events.append("told"))[0],  # type: ignore[func-returns-value]
    )
    choosing, distilling = told
    assert choosing.startswith("choosing layers by the loss takes about ")
    assert distilling.startswith("distilling, 2 more steps, takes about ")
    assert all(line.endswith(" minutes on this machine as busy as it is now") for line in told)
    first, second = (at for at, event in enumerate(events) if event == "told")
    assert events[first + 1].startswith("choosing layers by the loss, 1 of 2")
    assert events[second + 1] == "distilling"
    assert events.count("distilling") == QUICK.steps


def test_choosing_goes_on_at_the_layer_that_it_had_reached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = catalogue_of(tmp_path / "expected").info.spared
    passes = 0
    losses_without = Measuring.losses_without

    def counted(self: Measuring, middle: list[int], blocks: object) -> dict[int, float]:
        nonlocal passes
        passes += 1
        # The first pass of a build only tells how long one takes.
        if passes == 3:
            raise KeyboardInterrupt
        return losses_without(self, middle, blocks)  # type: ignore[arg-type]

    monkeypatch.setattr(Measuring, "losses_without", counted)
    with pytest.raises(KeyboardInterrupt):
        catalogue_of(tmp_path)
    assert open_catalogue(tmp_path / "catalogue").info.spared == expected[:1]
    before = passes
    assert catalogue_of(tmp_path).info.spared == expected
    assert passes - before == 1 + len(expected) - 1


def test_students_learn_once_and_are_rounded_then(tmp_path: Path) -> None:
    made = recipe("layer_drop", "distill", "quantize", distillation=QUICK)
    catalogue = catalogue_of(tmp_path, made=made)
    plain = catalogue.emulators(made.without("quantize").label)
    rounded = catalogue.emulators(made.label)
    assert [one.retention for one in plain] == [one.retention for one in rounded] == [0.25, 0.5, 0.75, 1]
    assert [one.kept for one in plain] == [one.kept for one in rounded]
    for smaller, larger in itertools.pairwise(rounded[:3]):
        assert smaller.shards.items() < larger.shards.items()
    stages: list[str] = []
    again = made.model_copy(update={"bits": 8})
    build_catalogue(
        tmp_path / "model", catalogue.directory, again, TEXT, lambda stage, _: stages.append(stage)
    )
    assert not any("distilling" in stage for stage in stages)
    assert any("rounding" in stage for stage in stages)


@pytest.mark.parametrize(("tokens", "batch", "steps"), [(256, 1, 1), (38_400, 1, 150), (100_000, 2, 195)])
def test_a_budget_is_kept_in_many_steps(tokens: int, batch: int, steps: int) -> None:
    config = budgeted(tokens)
    assert (config.batch, config.steps) == (batch, steps)
    assert config.batch * config.steps * 256 <= tokens


def test_the_default_budget_is_the_default() -> None:
    assert budgeted(819_200) == DISTILLATION
