"""Perplexity against retention, measured: for one model and one text, the curve of Eq. 9."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from scipy.interpolate import PchipInterpolator
from scipy.optimize import isotonic_regression

from emutune.errors import CatalogueError
from emutune.files import replacing
from emutune.tuning.adapters import attach, copy_values
from emutune.tuning.catalogue import Catalogue
from emutune.tuning.manifest import Emulator
from emutune.tuning.perplexity import perplexity
from emutune.tuning.text import block_length, pack, split_blocks
from emutune.tuning.trainer import Progress, TrainerConfig
from emutune.tuning.tuner import AdapterTraining, Bench, TuneResult, adapter_layers

Column = Literal["zero_shot", "tuned", "plugged"]
COLUMNS: tuple[Column, ...] = ("zero_shot", "tuned", "plugged")
CALIBRATION = AdapterTraining(training=TrainerConfig(steps=60, score_every=20))


class Point(BaseModel):
    """What was measured at one retention, on the test text.

    Attributes:
        layers: kept between the adapter layers.
        bytes: of the emulator with its adapter layers, embeddings and head.
        zero_shot: perplexity of the emulator before tuning.
        tuned: of the emulator after tuning the adapter layers in it.
        plugged: of the whole model with those adapter layers.
        tokens_per_s: trained on.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    retention: float
    layers: int
    bytes: int
    zero_shot: float
    tuned: float
    plugged: float
    tokens_per_s: float


class Fit(BaseModel):
    """A quadratic in the retention, and how well it describes the points.

    Attributes:
        r_squared: coefficient of determination.
        worst_residual: the largest distance of a point from it, in perplexity.
        monotone: perplexities that never rise with retention and are nearest to the points.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    quadratic: float
    linear: float
    constant: float
    r_squared: float
    worst_residual: float
    monotone: tuple[float, ...]


def calibrate(
    catalogue: Catalogue,
    text: str,
    how: AdapterTraining = CALIBRATION,
    *,
    device: str | torch.device = "cpu",
    report: Callable[[float, Progress | None], None] = lambda retention, progress: None,
) -> list[Point]:
    """Measure every emulator of a recipe: as it is, tuned, and with its adapter plugged into the whole model.

    Each emulator's adapter layers are tuned from the same start, as often. What is measured is kept in the
    catalogue: a run that was stopped goes on, one that was finished is read.

    Args:
        catalogue: the emulators.
        text: the task's.
        how: what to train and how, and of which emulators.
        device: where to compute.
        report: told of the retention and the training's progress.

    Raises:
        CatalogueError: there are fewer than three emulators; a quadratic needs them.
        DataError: the text is too short.
        ModelError: the tokenizer does not fit the model.
        UsageError: a block has more tokens than the model positions.
    """
    emulators = catalogue.emulators(how.recipe)
    if len(emulators) < 3:
        raise CatalogueError(
            f"{catalogue.directory}: holds {len(emulators)} emulators of that recipe, a curve needs 3 or more; build "
            "with more --retentions"
        )
    work = catalogue.directory / "work" / "curves" / _name(text, how, emulators)
    done = _read_points(work)
    todo = [emulator for emulator in emulators if emulator.name not in done]
    for name in done:
        # Left by a run that was stopped right after it had written the point.
        shutil.rmtree(work / name, ignore_errors=True)
    if todo:
        tokenizer, length = catalogue.tokenizer(), block_length(catalogue.config, how.block)
        splits = split_blocks(pack(text, tokenizer, work.parent / "tokens"), length)
        full = catalogue.assemble(catalogue.base(), device)
        parameters = attach(adapter_layers(catalogue, full), how.adapter, how.width, how.training.seed)
        start = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        for emulator in todo:
            report(emulator.retention, None)
            copy_values(parameters, start)
            bench = Bench(catalogue, full, emulator, splits, tokenizer.mask_token_id)
            checkpoint = work / emulator.name
            result = bench.train(
                parameters,
                how.training,
                checkpoint,
                emulator.name,
                lambda progress, at=emulator.retention: report(at, progress),  # type: ignore[misc]
            )
            done[emulator.name] = _point(emulator, result)
            _write_points(work, done)
            shutil.rmtree(checkpoint, ignore_errors=True)
    return sorted(done.values(), key=lambda point: point.retention)


def _name(text: str, how: AdapterTraining, emulators: Sequence[Emulator]) -> str:
    """Of the directory in which a curve is kept."""
    key = [text, how.training.model_dump_json(), how.adapter, str(how.width), str(how.block)]
    key += [emulator.model_dump_json() for emulator in emulators]
    return hashlib.sha256("\0".join(key).encode()).hexdigest()[:16]


def fit_curve(points: Sequence[Point], column: Column = "plugged") -> Fit:
    """The least-squares quadratic through measured perplexities, and the monotone ones nearest to them."""
    retention = np.array([point.retention for point in points])
    measured = np.array([getattr(point, column) for point in points])
    quadratic, linear, constant = np.polyfit(retention, measured, 2)
    residual = measured - np.polyval([quadratic, linear, constant], retention)
    spread = float(((measured - measured.mean()) ** 2).sum())
    return Fit(
        quadratic=quadratic,
        linear=linear,
        constant=constant,
        r_squared=1 - float((residual**2).sum()) / spread if spread else 1.0,
        worst_residual=float(np.abs(residual).max()),
        monotone=tuple(float(value) for value in isotonic_regression(measured, increasing=False).x),
    )


def interpolant(points: Sequence[Point], fit: Fit) -> Callable[[float], float]:
    """Perplexity at any retention between the measured ones: monotone, through the monotone perplexities."""
    curve = PchipInterpolator([point.retention for point in points], fit.monotone)
    lowest, highest = points[0].retention, points[-1].retention
    return lambda retention: float(curve(min(max(retention, lowest), highest)))


def complexity(task_perplexity: float, reference_perplexity: float, weight: float = 10.0) -> float:
    """The complexity c of a task, which makes (c + iota) / iota the ratio of the perplexities (D2).

    Args:
        task_perplexity: of the whole model on the task's text.
        reference_perplexity: of the whole model on the text of the curve.
        weight: iota.

    Returns:
        c, negative for a task that is easier than the curve's.
    """
    return weight * (task_perplexity / reference_perplexity - 1)


def whole_model_perplexity(catalogue: Catalogue, texts: Mapping[str, str]) -> dict[str, float]:
    """Perplexity of the whole model, untuned, on the test split of some texts."""
    tokenizer, full = catalogue.tokenizer(), catalogue.assemble(catalogue.base())
    length = block_length(catalogue.config)
    return {
        name: perplexity(
            full, split_blocks(pack(text, tokenizer), length)["test"], mask_token=tokenizer.mask_token_id
        )
        for name, text in texts.items()
    }


def curve_file(
    catalogue: Catalogue, points: Sequence[Point], fit: Fit, column: Column, *, monotone: bool = False
) -> str:
    """A curve as TOML, to be named by a scenario: ``curve = "mine.toml"`` in its section ``quality``.

    Args:
        catalogue: what was measured.
        points: the measurements.
        fit: of the column.
        column: which perplexity the scenario's emulators have.
        monotone: whether the scenario shall use the monotone perplexities instead of the quadratic.
    """
    middle = [entry.shard.bytes for entry in catalogue.base().layers if entry.index in catalogue.info.middle]
    lines = [
        f"# Perplexity ({column}) against retention, measured by emutune calibrate; R^2 of the quadratic "
        f"{fit.r_squared:.4f}, worst residual {fit.worst_residual:.4g}.",
        f'base = "{catalogue.info.base}"        # for model.base',
        f"layers = {len(middle)}                 # for model.layers",
        f"size_gb = {sum(middle) / 1e9!r}        # for model.size_gb",
        "",
        "[curve]",
        f"quadratic = {fit.quadratic!r}",
        f"linear = {fit.linear!r}",
        f"constant = {fit.constant!r}",
    ]
    if points[-1].retention == 1:
        lines.append(f"untuned = {points[-1].zero_shot!r}")
    if monotone:
        knots = [[point.retention, value] for point, value in zip(points, fit.monotone, strict=True)]
        lines.append(f"knots = {json.dumps(knots)}")
    for point in points:
        lines += ["", "[[points]]", *(f"{name} = {value!r}" for name, value in point.model_dump().items())]
    return "\n".join(lines) + "\n"


def _point(emulator: Emulator, result: TuneResult) -> Point:
    return Point(
        retention=emulator.retention,
        layers=len(emulator.kept),
        bytes=emulator.bytes,
        zero_shot=result.emulator_before,
        tuned=result.emulator_after,
        plugged=result.after,
        tokens_per_s=result.tokens_per_s,
    )


def _read_points(work: Path) -> dict[str, Point]:
    path = work / "points.json"
    if not path.exists():
        return {}
    try:
        return {
            name: Point.model_validate(point) for name, point in json.loads(path.read_text("utf-8")).items()
        }
    except (OSError, ValueError, AttributeError) as error:
        raise CatalogueError(f"{path}: damaged; delete it to measure again") from error


def _write_points(work: Path, points: Mapping[str, Point]) -> None:
    path = work / "points.json"
    try:
        with replacing(path) as aside:
            aside.write_text(
                json.dumps({name: point.model_dump() for name, point in points.items()}, indent=1), "utf-8"
            )
    except OSError as error:
        raise CatalogueError(f"{path}: cannot be written ({error}); free some space") from error
