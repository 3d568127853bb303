"""Which layers stay: evenly spaced as in Offsite-Tuning, or greedily by influence, nested."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from emutune.errors import ModelError
from emutune.tuning.compression.layer_drop import (
    block_influence,
    importance_order,
    layer_count,
    uniform_layers,
)


@st.composite
def counts(draw: st.DrawFn) -> tuple[int, int]:
    layers = draw(st.integers(1, 200))
    return layers, draw(st.integers(1, layers))


@given(counts())
def test_uniform_layers_are_those_of_offsite_tuning(drawn: tuple[int, int]) -> None:
    layers, kept = drawn
    found = uniform_layers(layers, kept)
    assert len(found) == kept
    assert found[0] == 0
    assert all(below < above for below, above in itertools.pairwise(found))
    if kept == 1:
        return
    assert found[-1] == layers - 1
    # Offsite-Tuning multiplies by a rounded stride, so the two may differ where the exact place is a half.
    stride = (layers - 1) / (kept - 1)
    for index, layer in enumerate(found):
        exact = Fraction(index * (layers - 1), kept - 1)
        assert layer == round(exact)
        assert layer == round(index * stride) or exact.denominator == 2
    gaps = {above - below for below, above in itertools.pairwise(found)}
    assert max(gaps) - min(gaps) <= 2


@given(st.integers(1, 200))
def test_all_layers_are_all(layers: int) -> None:
    assert uniform_layers(layers, layers) == tuple(range(layers))


def test_uniform_layers_of_the_papers_example() -> None:
    assert uniform_layers(20, 8) == (0, 3, 5, 8, 11, 14, 16, 19)


@pytest.mark.parametrize("kept", [-1, 0, 6])
def test_layers_that_are_not_there_are_refused(kept: int) -> None:
    with pytest.raises(ModelError, match="keeps 1 to 5 layers"):
        uniform_layers(5, kept)


@given(counts())
def test_retention_of_k_layers_keeps_k(drawn: tuple[int, int]) -> None:
    layers, kept = drawn
    assert layer_count(kept / layers, layers) == kept


@given(st.floats(0, 1, exclude_min=True), st.integers(1, 200))
def test_layer_count_is_the_nearest_and_at_least_one(retention: float, layers: int) -> None:
    found = layer_count(retention, layers)
    assert 1 <= found <= layers
    if retention * layers >= 0.5:
        assert abs(found - retention * layers) <= 0.5


@pytest.mark.parametrize("retention", [-0.5, 0.0, 1.01, float("nan"), float("inf")])
def test_retention_outside_is_refused(retention: float) -> None:
    with pytest.raises(ModelError, match="retention"):
        layer_count(retention, 10)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_importance_is_greedy(weights: list[float]) -> None:
    layers = range(3, 3 + len(weights))
    asked: list[tuple[int, ...]] = []

    def influences(left: Sequence[int]) -> dict[int, float]:
        asked.append(tuple(left))
        # A layer counts for more once the one below it has gone.
        return {layer: weights[layer - 3] + (layer - 1 not in left) for layer in left}

    order = importance_order(layers, influences)
    assert sorted(order) == list(layers)
    # Every question was about the layers that the next smaller emulator keeps, in their order.
    assert asked == [tuple(sorted(order[:kept])) for kept in range(len(weights), 1, -1)]
    for left, dropped in zip(asked, reversed(order[1:]), strict=True):
        measured = {layer: weights[layer - 3] + (layer - 1 not in left) for layer in left}
        assert measured[dropped] == min(measured.values())


def test_importance_of_independent_layers_is_their_rank() -> None:
    weights = {2: 0.5, 3: 0.1, 4: 0.9, 5: 0.3}
    assert importance_order([2, 3, 4, 5], lambda left: {layer: weights[layer] for layer in left}) == (
        4,
        2,
        5,
        3,
    )


def test_block_influence_is_one_minus_the_cosine() -> None:
    states = torch.randn(2, 3, 8)
    assert block_influence(states, 2 * states) == pytest.approx(0)
    assert block_influence(states, -states) == pytest.approx(2)
    before, after = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[0.0, 1.0], [1.0, 1.0]])
    assert block_influence(before, after) == pytest.approx((1 + 1 - 0.5**0.5) / 2)
