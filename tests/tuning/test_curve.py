"""Curves against closed forms, and calibration that is stopped and goes on."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from directories import TEXT, catalogue_of, recipe
from hypothesis import given
from hypothesis import strategies as st

from emutune.errors import CatalogueError
from emutune.scenario import load_scenario
from emutune.tuning.curve import Point, calibrate, complexity, curve_file, fit_curve, interpolant
from emutune.tuning.trainer import Progress, TrainerConfig
from emutune.tuning.tuner import AdapterTraining

HOW = AdapterTraining(training=TrainerConfig(steps=3, batch=2, score_every=2))


def points(values: list[float]) -> list[Point]:
    grid = np.linspace(0.2, 1.0, len(values))
    return [
        Point(
            retention=float(retention),
            layers=index + 1,
            bytes=1,
            zero_shot=2 * value,
            tuned=value + 1,
            plugged=value,
            tokens_per_s=1.0,
        )
        for index, (retention, value) in enumerate(zip(grid, values, strict=True))
    ]


def test_a_quadratic_is_recovered() -> None:
    grid = np.linspace(0.2, 1.0, 7)
    fit = fit_curve(points(list(25.2 * grid**2 - 43.1 * grid + 31.9)))
    assert (fit.quadratic, fit.linear, fit.constant) == pytest.approx((25.2, -43.1, 31.9))
    assert fit.r_squared == pytest.approx(1)
    assert fit.worst_residual == pytest.approx(0, abs=1e-9)


@given(st.lists(st.floats(1, 100), min_size=3, max_size=8))
def test_the_interpolant_never_rises_and_meets_the_monotone_points(values: list[float]) -> None:
    measured = points(values)
    fit = fit_curve(measured)
    curve = interpolant(measured, fit)
    drawn = [curve(value) for value in np.linspace(0.1, 1.1, 101)]
    assert all(later <= earlier + 1e-9 for earlier, later in itertools.pairwise(drawn))
    assert [curve(point.retention) for point in measured] == pytest.approx(list(fit.monotone))
    assert all(later <= earlier for earlier, later in itertools.pairwise(fit.monotone))
    falling = sorted(values, reverse=True)
    assert fit_curve(points(falling)).monotone == pytest.approx(tuple(falling))


@given(st.floats(1, 1e3), st.floats(1, 1e3), st.floats(0.1, 100))
def test_complexity_makes_the_factor_the_ratio_of_perplexities(
    task: float, reference: float, iota: float
) -> None:
    factor = (complexity(task, reference, iota) + iota) / iota
    assert factor == pytest.approx(task / reference)


@pytest.mark.parametrize("monotone", [False, True])
def test_a_scenario_names_the_curve(tmp_path: Path, monotone: bool) -> None:
    catalogue, measured = catalogue_of(tmp_path), points([30.0, 25.0, 26.0, 20.0])
    fit = fit_curve(measured)
    path = tmp_path / "curve.toml"
    path.write_text(curve_file(catalogue, measured, fit, "plugged", monotone=monotone))
    curve = load_scenario("paper", [f"quality.curve={path}"]).quality.curve
    for point, value in zip(measured, fit.monotone, strict=True):
        at = point.retention
        expected = value if monotone else fit.quadratic * at**2 + fit.linear * at + fit.constant
        assert curve(at) == pytest.approx(expected)


def test_stopped_calibration_goes_on_and_a_finished_one_is_read(tmp_path: Path) -> None:
    whole = calibrate(catalogue_of(tmp_path / "whole"), TEXT, HOW)
    catalogue = catalogue_of(tmp_path / "stopped")

    def stop(retention: float, progress: Progress | None) -> None:
        if retention > 0.5 and progress is not None and progress.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(catalogue, TEXT, HOW, report=stop)
    again = calibrate(catalogue, TEXT, HOW)
    timeless = {"tokens_per_s": 0.0}
    assert [p.model_copy(update=timeless) for p in again] == [p.model_copy(update=timeless) for p in whole]
    assert [point.retention for point in again] == [0.25, 0.5, 0.75, 1.0]
    read = calibrate(catalogue, TEXT, HOW, report=lambda *_: pytest.fail("trained again"))
    assert read == again


@pytest.mark.parametrize("name", ["_write_points", "shutil.rmtree"])
def test_calibration_stopped_around_its_notes_goes_on(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalogue = catalogue_of(tmp_path)
    steps: list[tuple[float, int]] = []

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(f"emutune.tuning.curve.{name}", stop)
        with pytest.raises(KeyboardInterrupt):
            calibrate(catalogue, TEXT, HOW)

    def note(retention: float, progress: Progress | None) -> None:
        if progress is not None:
            steps.append((retention, progress.step))

    measured = calibrate(catalogue, TEXT, HOW, report=note)
    # The first emulator was trained to its end before the stop, and is not trained again.
    assert sorted({retention for retention, _ in steps}) == [0.5, 0.75, 1.0]
    assert [point.retention for point in measured] == [0.25, 0.5, 0.75, 1.0]
    assert not list(catalogue.directory.rglob("training.safetensors"))


def test_damaged_measurements_are_refused(tmp_path: Path) -> None:
    catalogue = catalogue_of(tmp_path)
    calibrate(catalogue, TEXT, HOW)
    [path] = (catalogue.directory / "work" / "curves").glob("*/points.json")
    for content in ('{"a": ', "[]", '{"a": {"retention": 1}}'):
        path.write_text(content)
        with pytest.raises(CatalogueError, match=r"points\.json: damaged; delete it"):
            calibrate(catalogue, TEXT, HOW)


def test_a_curve_needs_three_emulators(tmp_path: Path) -> None:
    catalogue = catalogue_of(tmp_path, made=recipe(retentions=(0.5, 1.0)))
    with pytest.raises(CatalogueError, match="3 or more"):
        calibrate(catalogue, TEXT, HOW)
