"""Structured pruning: whole attention heads and MLP channels go, so that bytes and time really fall."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from emutune.errors import ModelError, UsageError
from emutune.tuning.layers import layer_stack, text_config, view
from emutune.tuning.manifest import Widths
from emutune.tuning.sublayers import Sublayers, find_sublayers, weight_of, widths_of

# The names under which transformers' layers keep numbers that are proportional to the heads or the channels.
_PER_HEAD_ATTRIBUTES = (
    "num_heads",
    "num_attention_heads",
    "num_key_value_heads",
    "split_size",
    "all_head_size",
)
_PER_CHANNEL_ATTRIBUTES = ("intermediate_size",)
# A map's outputs are first divided into parts, then each part among the heads. One part: queries, keys and
# values have a map each, or lie side by side for every head. Three: all queries, all keys, all values.
_LAYOUTS = (1, 3)
# Of the norm of a layer's output in single precision; a wrong layout is off by a thousand times more.
_ROUNDING = 2e-5
_ROWS = 8

_Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class _Cut:
    """What stays of a layer: indices of groups (a key/value head and its query heads) and of channels."""

    groups: Tensor
    channels: Tensor
    layout: int


@dataclass
class _Observation:
    """What a layer was given on the calibration tokens."""

    energies: dict[str, Tensor] = field(default_factory=dict)
    arguments: _Arguments = ((), {})


@torch.no_grad()
def prune_layers(
    model: PreTrainedModel, indices: Sequence[int], share: float, tokens: Tensor
) -> tuple[list[nn.Module], Widths]:
    """Copies of some layers without their least important attention heads and MLP channels.

    A column of an output projection is as important as its input is large (root mean square over the tokens)
    times its weights (their norm); a head counts with all of its columns. Query heads that share a key and a
    value go together. How a fused projection orders its heads is found by trying, and every layer returned
    was seen to equal its original with the pruned columns set to zero. Where no order achieves that, because
    the model itself makes something for every head (such as BLOOM's position biases), all heads stay.

    Args:
        model: the model whose layers to prune; stays as it is and shares nothing with the result.
        indices: which layers.
        share: of the heads and of the channels that stay, rounded, at least one.
        tokens: int64 (rows, length), on which to measure importance.

    Returns:
        The pruned layers, and the widths that all of them have.

    Raises:
        UsageError: no layer is named, or the share is not in (0, 1].
        ModelError: the layers cannot be pruned.
    """
    if not 0 < share <= 1:
        raise UsageError(f"share: must be above 0 and at most 1, got {share}")
    if not indices:
        raise UsageError("indices: name at least one layer to prune")
    stack, heads = layer_stack(model), text_config(model).num_attention_heads
    layers = [stack[index] for index in indices]
    observations = _observe(model, indices, tokens)
    layout = _find_layout(layers[0], heads, share, observations[0])
    pruned = []
    for index, layer, observation in zip(indices, layers, observations, strict=True):
        cut = _choose(layer, heads, share, observation, layout)
        pruned.append(_cut_layer(layer, cut, heads))
        if not _is_masked_equal(layer, pruned[-1], cut, heads, observation.arguments):
            raise ModelError(
                f"layer {index}: {type(layer).__name__} without heads or channels does not compute what it "
                "computes with them set to zero; this architecture cannot be pruned"
            )
    return pruned, _widths(layers[0], cut, heads)


def shrink_layer(layer: nn.Module, widths: Widths, heads: int) -> None:
    """Give a whole layer the shapes and attributes of a pruned one, for a state dict to be assigned to it.

    Args:
        layer: a layer as the configuration builds it, on any device (also meta); its linear maps end empty.
        widths: those of the pruned layer.
        heads: query heads before pruning, ``num_attention_heads`` of the configuration.

    Raises:
        ModelError: the layer does not have the usual form.
    """
    sublayers = find_sublayers(layer)
    for name in sublayers.attention_inputs:
        inputs, outputs = widths_of(layer.get_submodule(name))
        _resize(layer.get_submodule(name), inputs, outputs * widths.heads // heads)
    for name in sublayers.mlp_inputs:
        _resize(layer.get_submodule(name), widths_of(layer.get_submodule(name))[0], widths.channels)
    inputs, outputs = widths_of(layer.get_submodule(sublayers.attention_output))
    _resize(layer.get_submodule(sublayers.attention_output), inputs * widths.heads // heads, outputs)
    channels, outputs = widths_of(layer.get_submodule(sublayers.mlp_output))
    _resize(layer.get_submodule(sublayers.mlp_output), widths.channels, outputs)
    _scale_attributes(layer, _PER_HEAD_ATTRIBUTES, widths.heads, heads)
    _scale_attributes(layer, _PER_CHANNEL_ATTRIBUTES, widths.channels, channels)


def _resize(linear: nn.Module, inputs: int, outputs: int) -> None:
    if isinstance(linear, Conv1D):
        shape, attributes = (inputs, outputs), {"nx": inputs, "nf": outputs}
    else:
        shape, attributes = (outputs, inputs), {"in_features": inputs, "out_features": outputs}
    for attribute, width in attributes.items():
        setattr(linear, attribute, width)
    linear.weight = _empty_like(linear.get_parameter("weight"), shape)
    if linear.bias is not None:
        linear.bias = _empty_like(linear.get_parameter("bias"), (outputs,))


def _empty_like(parameter: nn.Parameter, shape: tuple[int, ...]) -> nn.Parameter:
    return nn.Parameter(parameter.new_empty(shape), requires_grad=parameter.requires_grad)


def _scale_attributes(layer: nn.Module, attributes: Sequence[str], left: int, before: int) -> None:
    for module in layer.modules():
        for attribute in attributes:
            value = getattr(module, attribute, None)
            if isinstance(value, int):
                setattr(module, attribute, value * left // before)


def _observe(model: PreTrainedModel, indices: Sequence[int], tokens: Tensor) -> list[_Observation]:
    # Hooks and the mode are set on a second model, so that a failure leaves nothing behind on the first.
    watched = view(model).train(False)
    stack = layer_stack(watched)
    observations = []
    for index in indices:
        observations.append(_Observation())
        _watch(stack[index], observations[-1])
    for rows in torch.split(tokens.to(model.device), _ROWS):
        watched.base_model(input_ids=rows, use_cache=False)
    return observations


def _watch(layer: nn.Module, observation: _Observation) -> None:
    def keep_arguments(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        observation.arguments = (args, kwargs)

    def add_energy(name: str, _: nn.Module, args: tuple[Tensor]) -> None:
        energy = args[0].float().square().flatten(0, -2).sum(dim=0)
        observation.energies[name] = observation.energies.get(name, torch.zeros_like(energy)) + energy

    layer.register_forward_pre_hook(keep_arguments, with_kwargs=True)
    sublayers = find_sublayers(layer)
    for name in (sublayers.attention_output, sublayers.mlp_output):
        layer.get_submodule(name).register_forward_pre_hook(partial(add_energy, name))


def _find_layout(layer: nn.Module, heads: int, share: float, observation: _Observation) -> int | None:
    """The layout under which the layer can lose heads, or none."""
    for layout in _LAYOUTS:
        try:
            cut = _choose(layer, heads, share, observation, layout)
            pruned = _cut_layer(layer, cut, heads)
            if _is_masked_equal(layer, pruned, cut, heads, observation.arguments):
                return layout
        except RuntimeError:
            # Shapes that do not fit: torch knows no narrower error.
            continue
    return None


def _choose(
    layer: nn.Module, heads: int, share: float, observation: _Observation, layout: int | None
) -> _Cut:
    """The most important groups and channels of a layer; all groups where no layout is known."""
    sublayers = find_sublayers(layer)
    columns = {name: _importance(layer, name, energy) for name, energy in observation.energies.items()}
    by_group = (
        columns[sublayers.attention_output].view(_count_groups(layer, sublayers, heads), -1).norm(dim=1)
    )
    groups = _largest(by_group, 1.0 if layout is None else share)
    return _Cut(groups, _largest(columns[sublayers.mlp_output], share), layout or _LAYOUTS[0])


def _importance(layer: nn.Module, name: str, energy: Tensor) -> Tensor:
    # The number of tokens, which the mean would divide by, is the same for all columns.
    return energy.sqrt() * weight_of(layer.get_submodule(name)).float().norm(dim=0)


def _largest(importance: Tensor, share: float) -> Tensor:
    count = max(1, round(share * len(importance)))
    return importance.topk(count).indices.sort().values


def _count_groups(layer: nn.Module, sublayers: Sublayers, heads: int) -> int:
    """How many key/value heads there are: fewer than query heads where some of these share one."""
    queries = widths_of(layer.get_submodule(sublayers.attention_output))[0]
    outputs = sum(widths_of(layer.get_submodule(name))[1] for name in sublayers.attention_inputs)
    return heads * (outputs - queries) // (2 * queries)


def _widths(layer: nn.Module, cut: _Cut, heads: int) -> Widths:
    groups = _count_groups(layer, find_sublayers(layer), heads)
    return Widths(heads=len(cut.groups) * heads // groups, channels=len(cut.channels))


def _cut_layer(layer: nn.Module, cut: _Cut, heads: int) -> nn.Module:
    pruned = copy.deepcopy(layer)
    shrink_layer(pruned, _widths(layer, cut, heads), heads)
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    pruned.load_state_dict(state | _cut_state(layer, cut, heads), assign=True)
    return pruned


def _cut_state(layer: nn.Module, cut: _Cut, heads: int) -> dict[str, Tensor]:
    """Weights and biases of the linear maps that lose something."""
    sublayers = find_sublayers(layer)
    groups = _count_groups(layer, sublayers, heads)
    state: dict[str, Tensor] = {}
    for name in sublayers.attention_inputs:
        outputs = widths_of(layer.get_submodule(name))[1]
        state |= _selected(layer, name, outputs=_of_groups(outputs, cut.groups, groups, cut.layout))
    for name in sublayers.mlp_inputs:
        state |= _selected(layer, name, outputs=cut.channels)
    columns = widths_of(layer.get_submodule(sublayers.attention_output))[0]
    state |= _selected(layer, sublayers.attention_output, inputs=_of_groups(columns, cut.groups, groups))
    return state | _selected(layer, sublayers.mlp_output, inputs=cut.channels)


def _of_groups(width: int, kept: Tensor, groups: int, layout: int = 1) -> Tensor:
    """Which of a map's outputs (or inputs) belong to the groups that stay: int64 (kept,)."""
    positions = torch.arange(width, device=kept.device).view(
        layout, groups, -1
    )  # (part, group, in the group)
    return positions[:, kept].flatten()


def _selected(
    layer: nn.Module, name: str, *, outputs: Tensor | None = None, inputs: Tensor | None = None
) -> dict[str, Tensor]:
    linear = layer.get_submodule(name)
    weight = weight_of(linear)
    weight = weight[outputs] if inputs is None else weight[:, inputs]
    state = {f"{name}.weight": (weight.T if isinstance(linear, Conv1D) else weight).contiguous()}
    if outputs is not None and linear.bias is not None:
        state[f"{name}.bias"] = linear.get_parameter("bias")[outputs]
    return state


def _is_masked_equal(
    layer: nn.Module, pruned: nn.Module, cut: _Cut, heads: int, arguments: _Arguments
) -> bool:
    """Whether a pruned layer computes what the whole one does with the pruned columns set to zero."""
    sublayers = find_sublayers(layer)
    masked = copy.deepcopy(layer)
    attention, mlp = (
        weight_of(masked.get_submodule(n)) for n in (sublayers.attention_output, sublayers.mlp_output)
    )
    kept = _of_groups(attention.shape[1], cut.groups, _count_groups(layer, sublayers, heads))
    _zero_other_columns(attention, kept)
    _zero_other_columns(mlp, cut.channels)
    expected = _output(masked, arguments)
    return bool((_output(pruned, arguments) - expected).norm() <= _ROUNDING * expected.norm())


def _zero_other_columns(weight: Tensor, kept: Tensor) -> None:
    dropped = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
    dropped[kept] = False
    weight[:, dropped] = 0


def _output(layer: nn.Module, arguments: _Arguments) -> Tensor:
    # Half precision would hide a wrong layout behind its rounding.
    args, kwargs = _in_single_precision(arguments)
    output = copy.deepcopy(layer).float().eval()(*args, **kwargs)
    return output if isinstance(output, Tensor) else output[0]


def _in_single_precision(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, tuple):
        return tuple(map(_in_single_precision, value))
    if isinstance(value, dict):
        return {key: _in_single_precision(item) for key, item in value.items()}
    return value
