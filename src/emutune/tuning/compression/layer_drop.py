"""Which layers an emulator keeps: evenly spaced, or nested, in the order in which they can best be spared."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from emutune.errors import ModelError


def layer_count(retention: float, layers: int) -> int:
    """How many of some layers a retention keeps: the nearest whole number, one at least.

    Raises:
        ModelError: the retention is outside (0, 1].
    """
    if not 0 < retention <= 1:
        raise ModelError(f"retention: must be above 0 and at most 1, got {retention:g}")
    return max(1, round(retention * layers))


def uniform_layers(layers: int, kept: int) -> tuple[int, ...]:
    """The first, the last, and evenly spaced ones between; of one, the first (Offsite-Tuning, sec. 3.2).

    Raises:
        ModelError: as many are not there.
    """
    if not 1 <= kept <= layers:
        raise ModelError(f"an emulator keeps 1 to {layers} layers, not {kept}")
    if kept == 1:
        return (0,)
    return tuple(round(index * (layers - 1) / (kept - 1)) for index in range(kept))


def importance_order(
    layers: Sequence[int], influences: Callable[[Sequence[int]], dict[int, float]]
) -> tuple[int, ...]:
    """Layers by falling importance: an emulator of k layers keeps the first k, so it contains the one of k - 1.

    Args:
        layers: the layers to put in order, rising.
        influences: the influence of each of some remaining layers, while only these are in the model.
    """
    dropped = list(sparing(layers, influences))
    (last,) = set(layers) - set(dropped)
    return (last, *reversed(dropped))


def sparing(
    layers: Sequence[int], costs: Callable[[Sequence[int]], dict[int, float]], spared: Sequence[int] = ()
) -> Iterator[int]:
    """Layers in the order in which they can be spared: again and again the one that costs least; one layer stays.

    Args:
        layers: the layers to put in order, rising.
        costs: of dropping each of some remaining layers, while only these are in the model.
        spared: the beginning of the order, where it is known; what is yielded comes after it.
    """
    left = [layer for layer in layers if layer not in spared]
    while len(left) > 1:
        measured = costs(left)
        least = min(left, key=lambda layer: measured[layer])
        left.remove(least)
        yield least


def block_influence(before: Tensor, after: Tensor) -> float:
    """1 - cos of a layer's input and output, mean over tokens (Men et al., ShortGPT, 2024).

    Args:
        before: hidden states that enter the layer, (..., width).
        after: those that leave it, of the same shape.
    """
    return 1.0 - float(torch.cosine_similarity(before.double(), after.double(), dim=-1).mean())
