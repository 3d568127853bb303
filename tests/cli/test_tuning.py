"""The commands around real models, as a user meets them: real processes on a tiny model directory."""

from __future__ import annotations

import json
import shutil
import tomllib
from pathlib import Path

import pytest
from commands import Ended, emutune
from directories import TEXT, generated_text, model_directory

# Ctrl-C comes in the third step of a training.
STOPPING = """
import os, signal
from emutune.cli import terminal
signal.signal(signal.SIGINT, signal.default_int_handler)
plain = terminal.advance
def stop(stage, name, progress, total):
    plain(stage, name, progress, total)
    if progress is not None and progress.step == 3:
        os.kill(os.getpid(), signal.SIGINT)
terminal.advance = stop
"""
BUILD = ("catalogue", "build", "model", "--out", "catalogue", "--bottom", "1", "--top", "1")
BUILD += ("--data", "calibration.txt")
TUNE = ("tune", "catalogue", "--data", "task.txt", "--steps", "6", "--batch", "2", "--out")
KEYS = {"name", "retention", "layers", "bits", "kept", "bytes", "bytes_missing", "perplexity"}


def succeed(cwd: Path, *commands: tuple[str, ...]) -> list[Ended]:
    ended = emutune(cwd, *commands)
    for one in ended:
        assert one.status == 0, one.err
        assert one.err == ""
    return ended


def content(directory: Path) -> dict[Path, tuple[int, int]]:
    stats = {path: path.stat() for path in directory.rglob("*") if path.is_file()}
    return {path: (stat.st_mtime_ns, stat.st_ino) for path, stat in stats.items()}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with a model, its catalogue, a task and an adapter."""
    directory = tmp_path_factory.mktemp("place")
    model_directory(directory / "model")
    (directory / "calibration.txt").write_text(TEXT)
    (directory / "task.txt").write_text(generated_text(seed=7))
    succeed(
        directory, (*BUILD, "--json", "built.json"), (*TUNE, "adapter.safetensors", "--json", "tune.json")
    )
    return directory


@pytest.fixture(scope="module")
def later(place: Path) -> list[Ended]:
    """What the other commands said."""
    built = content(place / "catalogue")
    curve = ("calibrate", "catalogue", "--data", "calibration.txt", "--task", "task.txt", "--steps", "2")
    plug = ("plug", "model", "adapter.safetensors", "--out", "plugged")
    ended = succeed(
        place,
        BUILD,
        ("catalogue", "show", "catalogue", "--json", "shown.json"),
        (*plug, "--data", "task.txt", "--json", "plugged.json"),
        (*curve, "--json", "curve.json"),
        (*curve, "--out", "again.toml", "--fit", "monotone"),
    )
    after = content(place / "catalogue")
    # All commands but calibrate only read a catalogue.
    assert {path: stat for path, stat in after.items() if "curves" not in path.parts} == built
    return ended


@pytest.mark.usefixtures("later")
def test_building_twice_builds_nothing_twice(place: Path) -> None:
    shown = json.loads((place / "shown.json").read_text())
    assert shown == json.loads((place / "built.json").read_text())
    assert set(shown) == {"recipe", "base", "emulators", "frontier"}
    assert [row["retention"] for row in shown["emulators"]] == [0.25, 0.5, 0.75, 1.0]
    assert all(set(row) == KEYS for row in shown["emulators"])
    # Nested emulators: the next one lacks only what it adds.
    assert all(row["bytes_missing"] < row["bytes"] for row in shown["emulators"][1:])


@pytest.mark.usefixtures("later")
def test_tuned_adapter_is_plugged_in(place: Path) -> None:
    tuned = json.loads((place / "tune.json").read_text())
    assert tuned["accepted"]
    assert tuned["adapter"] == "adapter.safetensors"
    assert tuned["after"] < tuned["before"]
    plugged = json.loads((place / "plugged.json").read_text())
    assert plugged["out"] == "plugged"
    assert plugged["before"] == pytest.approx(tuned["before"], rel=1e-5)
    assert plugged["after"] == pytest.approx(tuned["after"], rel=1e-5)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        path.name for path in (place / "plugged").iterdir()
    }
    assert not list(place.glob("*.partial"))


def test_calibration_writes_curve_and_plot(place: Path, later: list[Ended]) -> None:
    first, second = later[-2:]
    assert "complexity of task" in first.out
    assert "again.toml" in second.out
    curve = tomllib.loads((place / "curve.toml").read_text())
    figures = json.loads((place / "curve.json").read_text())
    assert curve["points"] == figures["points"]
    assert curve["curve"]["quadratic"] == figures["fits"]["plugged"]["quadratic"]
    again = tomllib.loads((place / "again.toml").read_text())
    assert again["points"] == curve["points"]
    assert [value for _, value in again["curve"]["knots"]] == figures["fits"]["plugged"]["monotone"]
    assert set(figures["complexity"]) == {"task"}
    for name in ("curve.png", "again.png"):
        assert (place / name).read_bytes().startswith(b"\x89PNG")


def test_tuning_stopped_by_ctrl_c_goes_on(place: Path) -> None:
    command = (*TUNE, "stopped.safetensors")
    [stopped] = emutune(place, command, prelude=STOPPING)
    assert stopped.status == 130
    assert stopped.err.strip() == (
        "stopped; what was done is kept beside stopped.safetensors; the same command goes on"
    )
    assert not (place / "stopped.safetensors").exists()
    assert list((place / "stopped.safetensors.training").rglob("training.safetensors"))
    succeed(place, command)
    assert (place / "stopped.safetensors").read_bytes() == (place / "adapter.safetensors").read_bytes()


def test_bad_input_is_one_line_and_status_two(place: Path) -> None:
    (place / "empty.txt").write_text("\n")
    (place / "latin.txt").write_bytes(b"caf\xe9 " * 1000)
    (place / "short.txt").write_text("too short")
    (place / "damaged.safetensors").write_bytes(b"no adapter")
    shutil.copytree(place / "model", place / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    (place / "weighty").mkdir()
    (place / "weighty" / "mine.txt").write_text("mine")
    tune = ("tune", "catalogue", "--data")
    calibrate = ("calibrate", "catalogue", "--data", "task.txt")
    plug = ("plug", "model", "adapter.safetensors", "--data", "task.txt", "--out")
    wrong = {
        (*tune, "task.txt", "--retention", "1.5"): "retention: must be above 0 and at most 1, got 1.5",
        (*tune, "task.txt", "--retention", "nan"): "retention: must be above 0 and at most 1",
        (*tune, "none.txt"): "none.txt: cannot be read",
        (*tune, "empty.txt"): "empty.txt: holds no text",
        (*tune, "latin.txt"): "latin.txt: not UTF-8",
        (*tune, "short.txt"): "the text has",
        (*tune, "task.txt", "--adapter", "prefix"): "--adapter: ",
        (*tune, "task.txt", "--where", "cloud"): "--where: ",
        (*tune, "task.txt", "--learning-rate", "-1"): "--learning-rate: ",
        (*tune, "task.txt", "--device", "abacus"): "--device: ",
        (*tune, "task.txt", "--recipe", "none"): "no emulators of recipe 'none'",
        (*tune, "task.txt", "--out", "damaged.safetensors"): "damaged.safetensors: missing or damaged",
        ("tune", "model", "--data", "task.txt"): "model: no catalogue",
        ("catalogue", "build", "bare", "--out", "c"): "bare",
        ("catalogue", "build", "nowhere", "--out", "c"): "nowhere",
        (*BUILD, "--compress", "zip"): "--compress: ",
        (*BUILD, "--compress", ""): "--compress: ",
        (*BUILD, "--retentions", "half"): "--retentions: must be numbers",
        (*BUILD, "--retentions", "1.5"): "retention: must be above 0 and at most 1, got 1.5",
        (*BUILD, "--bits", "5"): "--bits: ",
        (*BUILD, "--order", "worst"): "--order: ",
        ("catalogue", "show", "nowhere"): "nowhere: no catalogue",
        ("catalogue", "show", "catalogue", "--recipe", "none"): "no emulators of recipe 'none'",
        (*calibrate, "--column", "best"): "--column: must be one of",
        (*calibrate, "--fit", "cubic"): "--fit: must be one of",
        (*calibrate, "--recipe", "none"): "holds 0 emulators",
        (*calibrate, "--out", "curve.png"): "--out curve.png: ",
        (*calibrate, "--task", "model/task.txt", "--task", "task.txt"): "--task: two files",
        (*plug, "weighty"): "--out weighty: is there already",
        (*plug, "task.txt"): "--out task.txt: is there already",
        (*plug, "/dev/null/out"): "--out /dev/null/out: cannot be written",
        ("plug", "model", "damaged.safetensors", "--out", "p"): "damaged.safetensors: missing or damaged",
        ("plug", "reference", "adapter.safetensors", "--out", "p"): "was tuned on the model",
        ("reference", "tasks", "--out", "/dev/null/tasks"): "--out /dev/null/tasks: cannot be written",
    }
    (place / "model" / "task.txt").write_text(TEXT)
    failures = []
    for command, ended in zip(wrong, emutune(place, *wrong), strict=True):
        lines = ended.err.splitlines()
        if ended.status != 2 or len(lines) != 1 or wrong[command] not in ended.err:
            failures.append((command, wrong[command], ended))
    assert not failures, "\n".join(map(str, failures))
    assert not (place / "p").exists()
    assert not (place / "c" / "catalogue.json").exists()


@pytest.mark.slow
def test_reference_model_is_a_model_directory(tmp_path: Path) -> None:
    build = ("reference", "build", "--steps", "2", "--out", "mine", "--json", "mine.json")
    succeed(tmp_path, build, ("reference", "tasks", "--out", "tasks"))
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "mine")
    tokens = AutoTokenizer.from_pretrained(tmp_path / "mine")("import os", return_tensors="pt").input_ids
    assert model(input_ids=tokens).logits.isfinite().all()
    assert json.loads((tmp_path / "mine.json").read_text())["perplexity"] > 1
    assert not list((tmp_path / "mine").glob("training.safetensors*"))
    assert list((tmp_path / "tasks").glob("*.txt"))
