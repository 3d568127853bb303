"""Run a model whose layers are in memory one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from emutune.tuning.foundation import load_tensors
from emutune.tuning.layers import layer_stack, stack_name

Load = Callable[[], Mapping[str, Tensor]]
# Told of a layer's position, its input and output, (rows, length, width) each, and what runs it on another input.
Watch = Callable[[int, Tensor, Tensor, Callable[[Tensor], Tensor]], None]


@contextmanager
def streamed(
    model: PreTrainedModel,
    outer: Load,
    layers: Sequence[Load],
    *,
    watch: Watch | None = None,
) -> Iterator[PreTrainedModel]:
    """A model without memory that loads each part when its turn comes and lets go of it afterwards.

    Args:
        model: from ``skeleton``; is without memory again after the block.
        outer: loads the tensors outside the layer stack, by their names in the model.
        layers: loads the tensors of each layer, by their names inside the layer.
        watch: told of every layer.
    """
    stack = stack_name(model)
    tied = model.all_tied_weights_keys
    handles = []
    for position, (layer, load) in enumerate(zip(layer_stack(model), layers, strict=True)):
        if watch is not None:
            # Before the hook that lets go of the layer, so that it can run again.
            handles.append(layer.register_forward_hook(_watcher(position, watch), with_kwargs=True))
        handles += _stream(layer, load)
    for name, module in model.named_modules():
        own = [key for key, _ in module.named_parameters(recurse=False)]
        if own and not name.startswith(stack + "."):
            sources = {key: tied.get(full := f"{name}.{key}".lstrip("."), full) for key in own}
            handles += _stream(module, _some(outer, sources))
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()


def _some(load: Load, sources: Mapping[str, str]) -> Load:
    def load_some() -> dict[str, Tensor]:
        tensors = load()
        return {key: tensors[source] for key, source in sources.items()}

    return load_some


def _stream(module: nn.Module, load: Load) -> list[Any]:
    empty = module.state_dict()

    def fill(*_: Any) -> None:
        load_tensors(module, load(), torch.float32, type(module).__name__)

    def drop(*_: Any) -> None:
        module.load_state_dict(empty, assign=True)

    return [module.register_forward_pre_hook(fill), module.register_forward_hook(drop)]


def _watcher(position: int, watch: Watch) -> Callable[..., None]:
    def see(layer: nn.Module, arguments: tuple[Any, ...], named: Mapping[str, Any], output: Any) -> None:
        first, *others = arguments if arguments else [named["hidden_states"]]

        def again(hidden: Tensor) -> Tensor:
            if arguments:
                return _hidden(layer.forward(hidden, *others, **named))
            return _hidden(layer.forward(**{**named, "hidden_states": hidden}))

        watch(position, first, _hidden(output), again)

    return see


def _hidden(output: Any) -> Tensor:
    states: Tensor = output[0] if isinstance(output, tuple) else output
    return states
