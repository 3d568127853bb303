"""Distilled students come closer to the whole model, stay nested, and go on where they were stopped."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from tuning_models import ARCHITECTURES, LAYERS, MASK_TOKEN, logits, tokens

from emutune.tuning.compression.distill import distill, hidden_distance
from emutune.tuning.layers import keep_layers, layer_stack, replace_stack, stack_name
from emutune.tuning.trainer import Bookkeeping, Progress, TrainerConfig

MIDDLE = range(1, LAYERS - 1)
CONFIG = TrainerConfig(steps=6, batch=2, learning_rate=3e-3, save_every_s=0.0, weight_decay=0.0)


def batch(step: int) -> Tensor:
    return tokens(4, 10, seed=step)


def students_of(model: PreTrainedModel, *kept: tuple[int, ...]) -> list[list[nn.Module]]:
    return [[layer_stack(model)[index] for index in indices] for indices in kept]


def weights(students: list[list[nn.Module]]) -> list[Tensor]:
    return [
        parameter.detach().clone()
        for layers in students
        for layer in layers
        for parameter in layer.parameters()
    ]


@torch.no_grad()
def distance(model: PreTrainedModel, layers: list[nn.Module]) -> float:
    """Between the hidden states after the middle of the whole model and after a student in its place."""
    found = []
    for middle in (list(layer_stack(model))[MIDDLE.start : MIDDLE.stop], layers):
        cut = keep_layers(model, range(1 + len(middle)))
        replace_stack(cut, stack_name(cut), [layer_stack(cut)[0], *copy.deepcopy(middle)])
        seen: list[Tensor] = []

        def see(
            _: object, __: object, output: Tensor | tuple[Tensor, ...], seen: list[Tensor] = seen
        ) -> None:
            seen.append(output[0] if isinstance(output, tuple) else output)

        handle = layer_stack(cut)[-1].register_forward_hook(see)
        cut(input_ids=tokens(4, 10, seed=99), use_cache=False)
        handle.remove()
        found += seen
    return float(hidden_distance(found[0], found[1]))


def test_students_come_closer(model: PreTrainedModel) -> None:
    model.requires_grad_(False)
    students = students_of(model, (2,), (1, 3))
    before = [distance(model, layers) for layers in students]
    expected = logits(model)
    steps = CONFIG.model_copy(update={"steps": 30})
    distilled = distill(model, MIDDLE, students, batch, steps, mask_token=MASK_TOKEN)
    after = [distance(model, layers) for layers in distilled]
    assert all(new < old for new, old in zip(after, before, strict=True))
    assert torch.equal(logits(model), expected)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(
        parameter.requires_grad
        for layers in distilled
        for layer in layers
        for parameter in layer.parameters()
    )


def test_shared_layers_stay_shared_and_others_apart() -> None:
    model = ARCHITECTURES["gpt2"]().requires_grad_(False)
    students = students_of(model, (2,), (2, 3), (1, 2, 3))
    one, two, three = distill(model, MIDDLE, students, batch, CONFIG)
    assert one[0] is two[0] is three[1]
    assert two[1] is three[2]
    assert len({id(layer) for layer in (*one, *two, *three)}) == 3
    assert not {id(layer) for layer in three} & {id(layer) for layer in layer_stack(model)}
    changed = zip(weights([three]), weights(students_of(model, (1, 2, 3))), strict=True)
    assert any(not torch.equal(new, old) for new, old in changed)


def test_stopped_distillation_ends_the_same(tmp_path: Path) -> None:
    def run(directory: Path, stop: int | None) -> list[Tensor]:
        model = ARCHITECTURES["llama"]().requires_grad_(False)

        def report(progress: Progress) -> None:
            if progress.step == stop:
                raise RuntimeError("stopped")

        students = students_of(model, (2,), (2, 3))
        kept = Bookkeeping(directory, report=report)
        return weights(distill(model, MIDDLE, students, batch, CONFIG, kept))

    expected = run(tmp_path / "a", None)
    for stop in (2, 4):
        with pytest.raises(RuntimeError, match="stopped"):
            run(tmp_path / "b", stop)
    found = run(tmp_path / "b", None)
    assert all(map(torch.equal, found, expected))


def test_seed_decides_the_order_of_students() -> None:
    def run(seed: int) -> list[Tensor]:
        model = ARCHITECTURES["gpt2"]().requires_grad_(False)
        config = CONFIG.model_copy(update={"seed": seed})
        return weights(distill(model, MIDDLE, students_of(model, (1,), (2,)), batch, config))

    first, again, other = run(1), run(1), run(2)
    assert all(map(torch.equal, first, again))
    assert not all(map(torch.equal, first, other))


def test_hidden_distance_is_relative_to_each_token() -> None:
    taught = torch.randn(2, 3, 8)
    assert hidden_distance(taught, taught) == 0
    assert float(hidden_distance(taught, torch.zeros_like(taught))) == pytest.approx(1)
    scaled = taught * torch.rand(2, 3, 1) * 100
    assert float(hidden_distance(scaled, 1.5 * scaled)) == pytest.approx(0.25, rel=1e-5)
