"""Find the layer stack of any transformers model, and cut it without copying a weight."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedModel

from emutune.errors import ModelError

# The names under which transformers' attention modules know their own position, for the cache.
_POSITION_ATTRIBUTES = ("layer_idx", "layer_id", "layer_number")
# Settings under which a layer's mathematics or shape follows from its absolute position.
_POSITION_SETTINGS = (
    "scale_attn_by_inverse_layer_idx",
    "first_k_dense_replace",
    "mlp_only_layers",
    "moe_layers",
    "num_kv_shared_layers",
    "attn_layer_indices",
    "attn_layer_period",
    "cross_attention_layers",
    "full_attn_idxs",
)


def text_config(model: PreTrainedModel) -> Any:
    """The configuration of the language part, which counts the layers.

    Raises:
        ModelError: there is not exactly one language part.
    """
    try:
        return model.config.get_text_config()
    except ValueError as error:
        raise ModelError(f"{type(model).__name__}: not one language model: {error}") from error


def stack_name(model: PreTrainedModel) -> str:
    """Dotted name of the module list that holds the layers, e.g. ``transformer.h``.

    It is the one list as long as the configuration says there are layers, of children of one class.

    Raises:
        ModelError: there is no such list, or more than one.
    """
    count = getattr(text_config(model), "num_hidden_layers", None)
    found: list[str] = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count and len({type(m) for m in module}) == 1
    ]
    outermost = [name for name in found if not any(name.startswith(other + ".") for other in found)]
    if len(outermost) != 1:
        raise ModelError(
            f"{type(model).__name__}: expected one list of {count} layers, found {outermost or 'none'}; "
            "this architecture cannot be cut"
        )
    return outermost[0]


def layer_stack(model: PreTrainedModel) -> nn.ModuleList:
    """The layers of a model, bottom first."""
    stack = model.get_submodule(stack_name(model))
    assert isinstance(stack, nn.ModuleList)
    return stack


def view(model: PreTrainedModel) -> PreTrainedModel:
    """A second model of the same structure whose parameters and buffers *are* those of the first."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def empty_copy(layer: nn.Module) -> nn.Module:
    """A layer of the same structure whose parameters have no memory yet."""
    saved = set(layer.state_dict())
    memo: dict[int, Any] = {}
    for parameter in layer.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
    for name, buffer in layer.named_buffers():
        # A buffer that is not saved was computed when the layer was made, and is in no file.
        memo[id(buffer)] = buffer.to("meta") if name in saved else buffer
    return copy.deepcopy(layer, memo)


def keep_layers(model: PreTrainedModel, kept: Sequence[int]) -> PreTrainedModel:
    """An ordinary transformers model of some of the layers, sharing every parameter with the given one.

    Positions of the layers and the configuration's layer count are rewritten, so that a cache, saving and
    loading work as for a model that was built with that many layers.

    Args:
        model: the model to cut; stays as it is.
        kept: indices of the layers that stay, rising.

    Raises:
        ModelError: the architecture cannot be cut, or there are no such layers.
    """
    name = stack_name(model)
    cut = view(model)
    shorten_config(text_config(cut), kept)
    stack = cut.get_submodule(name)
    assert isinstance(stack, nn.ModuleList)
    replace_stack(cut, name, [stack[index] for index in kept])
    return cut


def replace_stack(model: PreTrainedModel, name: str, layers: Sequence[nn.Module]) -> None:
    """Put other layers into a model, and number them."""
    for position, layer in enumerate(layers):
        _number(layer, position)
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, nn.ModuleList(layers))


def _number(layer: nn.Module, position: int) -> None:
    for module in layer.modules():
        for attribute in _POSITION_ATTRIBUTES:
            if isinstance(getattr(module, attribute, None), int):
                setattr(module, attribute, position)


def shorten_config(config: Any, kept: Sequence[int]) -> None:
    """Make a configuration that of a model with only some of the layers.

    Args:
        config: of the language part; stays as it is if there is an error.
        kept: indices of the layers that stay, rising.

    Raises:
        ModelError: the layers depend on their absolute position, so cutting would change those that stay; the
            configuration cannot describe the model that is left; or there are no such layers.
    """
    before = config.num_hidden_layers
    if not kept or list(kept) != sorted({*kept} & {*range(before)}):
        raise ModelError(f"layers {list(kept)}: give at least one, rising, of 0 to {before - 1}")
    if len(kept) == before:
        return
    for setting in _POSITION_SETTINGS:
        if getattr(config, setting, None):
            raise ModelError(
                f"{setting}: what a layer does depends on its absolute position, so dropping layers would "
                "change those that stay; use a model without this setting"
            )
    # Some configurations list a property of every layer, such as the kind of its attention.
    lists = {
        key: [value[index] for index in kept]
        for key, value in vars(config).items()
        if isinstance(value, list) and len(value) == before and "layer" in key
    }
    shortened = {"num_hidden_layers": len(kept), **lists}
    try:
        again = type(config).from_dict(config.to_dict() | _stored(config, shortened))
    except (StrictDataclassError, ValueError, TypeError, LookupError) as error:
        raise ModelError(
            f"{type(config).__name__}: cannot describe {len(kept)} of {before} layers: {error}"
        ) from error
    lost = [key for key, value in shortened.items() if getattr(again, key) != value]
    if lost:
        raise ModelError(
            f"{type(config).__name__}: {', '.join(lost)} cannot describe {len(kept)} of {before} layers"
        )
    for key, value in shortened.items():
        setattr(config, key, value)


def _stored(config: Any, values: dict[str, Any]) -> dict[str, Any]:
    # In a file, an attribute has the architecture's own name, such as n_layer.
    return {config.attribute_map.get(key, key): value for key, value in values.items()}
