"""Bottleneck adapters (Houlsby et al., "Parameter-efficient transfer learning for NLP", ICML 2019).

This file needs torch alone: it is copied into every model directory whose model carries such adapters.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional


class Bottleneck(nn.Module):
    """A linear map followed by ``y + up(gelu(down(y)))``; before training it is the map alone.

    Args:
        base: the output projection of attention or of the MLP.
        features: width of its output.
        width: of the bottleneck.
    """

    def __init__(self, base: nn.Module, features: int, width: int) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(features, width)
        self.up = nn.Linear(width, features)
        nn.init.normal_(self.down.weight, std=features**-0.5)
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    @property
    def weight(self) -> Tensor:
        """The projection's own weight: some architectures look at it."""
        weight = self.base.weight
        assert isinstance(weight, Tensor)
        return weight

    def forward(self, inputs: Tensor) -> Tensor:
        """Hidden states in, hidden states out; (..., features)."""
        outputs: Tensor = self.base(inputs)
        added: Tensor = self.up(functional.gelu(self.down(outputs)))
        return outputs + added


def insert_bottlenecks(layer: nn.Module, projections: Mapping[str, int], width: int) -> None:
    """Put a bottleneck behind some projections of a layer: their dotted names, with their output widths."""
    for name, features in projections.items():
        parent, _, attribute = name.rpartition(".")
        owner = layer.get_submodule(parent)
        base = getattr(owner, attribute)
        device = next(base.parameters()).device
        with torch.device(device):
            setattr(owner, attribute, Bottleneck(base, features, width))
