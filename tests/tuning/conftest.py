"""Every test that asks for a model runs on all architectures."""

from __future__ import annotations

import pytest
from transformers import PreTrainedModel
from tuning_models import ARCHITECTURES


@pytest.fixture(params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    """The name of an architecture."""
    return request.param


@pytest.fixture
def model(architecture: str) -> PreTrainedModel:
    """A tiny model of that architecture."""
    return ARCHITECTURES[architecture]()
