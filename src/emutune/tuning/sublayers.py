"""Find the linear maps inside one transformer layer, and what each of them is for, by their shapes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from emutune.errors import ModelError

# Either one fused map, or one each of queries, keys and values.
_ATTENTION_INPUTS = (1, 3)


@dataclass(frozen=True)
class Sublayers:
    """Dotted names, inside a layer, of its linear maps by what they are for."""

    attention_inputs: tuple[str, ...]
    attention_output: str
    mlp_inputs: tuple[str, ...]
    mlp_output: str


def linear_maps(layer: nn.Module) -> dict[str, nn.Module]:
    """The linear maps of a layer by their dotted names, in the order in which they were defined."""
    return {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear | Conv1D)}


def weight_of(linear: nn.Module) -> Tensor:
    """The weight of a linear map, (outputs, inputs) whichever way round it is stored."""
    weight = linear.get_parameter("weight")
    return weight.T if isinstance(linear, Conv1D) else weight


def widths_of(linear: nn.Module) -> tuple[int, int]:
    """How many inputs and outputs a linear map has."""
    outputs, inputs = weight_of(linear).shape
    return inputs, outputs


def find_sublayers(layer: nn.Module) -> Sublayers:
    """Tell attention from MLP in a layer, by the widths and the order of its linear maps.

    The last map is the MLP's output; those before it that share a parent and have the right widths are the
    MLP's inputs; the one before these is the attention's output; the rest are the attention's inputs.

    Raises:
        ModelError: the layer does not have this form.
    """
    maps = linear_maps(layer)
    widths = {name: widths_of(linear) for name, linear in maps.items()}
    names = list(widths)
    mlp_inputs = _mlp_inputs(names, widths)
    attention = names[: len(names) - 1 - len(mlp_inputs)]
    if not mlp_inputs or not _is_attention(attention, widths, hidden=widths[names[-1]][1]):
        found = ", ".join(f"{name} {inputs}->{outputs}" for name, (inputs, outputs) in widths.items())
        raise ModelError(
            f"{type(layer).__name__}: expected the maps of an attention (queries, keys, values; output) and "
            f"then of an MLP (inputs; output), found {found or 'no linear map'}; this layer cannot be pruned"
        )
    return Sublayers(tuple(attention[:-1]), attention[-1], mlp_inputs, names[-1])


def _mlp_inputs(names: Sequence[str], widths: dict[str, tuple[int, int]]) -> tuple[str, ...]:
    if len(names) < 2:
        return ()
    channels, hidden = widths[names[-1]]
    parent = _parent(names[-2])
    found: list[str] = []
    for name in reversed(names[:-1]):
        # The widths alone would take the attention's output for one where the MLP is as narrow as the layer.
        if widths[name] != (hidden, channels) or _parent(name) != parent:
            break
        found.insert(0, name)
    return tuple(found)


def _is_attention(names: Sequence[str], widths: dict[str, tuple[int, int]], hidden: int) -> bool:
    return (
        len(names) - 1 in _ATTENTION_INPUTS
        and widths[names[-1]][1] == hidden
        and all(widths[name][0] == hidden for name in names[:-1])
    )


def _parent(name: str) -> str:
    return name.rpartition(".")[0]
