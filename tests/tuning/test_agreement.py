"""A catalogue is built of the model that transformers loads, or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from directories import TEXT, model_directory, recipe

from emutune.errors import ModelError
from emutune.tuning import agreement, build, foundation
from emutune.tuning.agreement import check_agreement, fits_in_memory
from emutune.tuning.build import build_catalogue
from emutune.tuning.checkpoint import Stored
from emutune.tuning.foundation import open_foundation, read_tensors

TOKENS = torch.arange(5, 45)[None]


def test_every_architecture_agrees(architecture: str, tmp_path: Path) -> None:
    opened = open_foundation(model_directory(tmp_path, architecture))
    check_agreement(opened, opened.config, TOKENS)


@pytest.mark.parametrize("name", ["transformer.wte.weight", "ln_1.weight"])
def test_weight_read_otherwise_is_an_error(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rounded(where: dict[str, Stored]) -> dict[str, torch.Tensor]:
        return {n: t.bfloat16() if n == name else t for n, t in read_tensors(where).items()}

    monkeypatch.setattr(foundation, "read_tensors", rounded)
    source = model_directory(tmp_path / "model")
    with pytest.raises(
        ModelError, match=rf"emutune and transformers make different models .*{name} is another"
    ):
        build_catalogue(source, tmp_path / "catalogue", recipe(), TEXT)
    assert not (tmp_path / "catalogue" / "catalogue.json").exists()


def test_another_computation_is_an_error(tmp_path: Path) -> None:
    opened = open_foundation(model_directory(tmp_path, "llama"))
    changed = type(opened.config).from_dict(opened.config.to_dict())
    changed.rms_norm_eps *= 1e4
    with pytest.raises(ModelError, match="no weight differs, but its computation does"):
        check_agreement(opened, changed, TOKENS)


def test_what_transformers_cannot_load_is_an_error(tmp_path: Path) -> None:
    opened = open_foundation(model_directory(tmp_path))
    (tmp_path / "config.json").unlink()
    with pytest.raises(ModelError, match="transformers cannot load it"):
        check_agreement(opened, opened.config, TOKENS)


def test_only_models_that_fit_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source = model_directory(tmp_path / "model")
    config = open_foundation(source).config
    assert fits_in_memory(config)
    size = sum(4 * parameter.numel() for parameter in foundation.skeleton(config).parameters())
    for free, fits in ((2 * size + 1, True), (2 * size, False)):
        monkeypatch.setattr(agreement.psutil, "virtual_memory", lambda free=free: _Memory(free))
        assert fits_in_memory(config) == fits

    def fail(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(build, "check_agreement", fail)
    build_catalogue(source, tmp_path / "catalogue", recipe(), TEXT)
    assert "too large for the free memory to be compared" in caplog.text


class _Memory:
    def __init__(self, available: int) -> None:
        self.available = available
