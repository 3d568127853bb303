"""Foundation models on disk: any local directory in the Hugging Face format, read one layer at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)

from emutune.errors import ModelError, one_line
from emutune.tuning.checkpoint import (
    Stored,
    placed,
    refuse_special,
    stored_tensors,
    weight_entry,
    weight_files,
)
from emutune.tuning.documentation import REFERENCE, REFERENCE_CODE
from emutune.tuning.gguf_file import is_gguf, unpacked
from emutune.tuning.layers import layer_stack, shorten_config, stack_name

_SHIPPED = {
    REFERENCE: Path(__file__).parent / "reference_model",
    REFERENCE_CODE: Path(__file__).parent / "reference_code_model",
}
_MASKED = ("ForMaskedLM", "ForPreTraining")


@dataclass(frozen=True)
class Foundation:
    """A model directory whose weights are not loaded yet.

    Attributes:
        directory: where it is.
        config: its transformers configuration.
        stack: dotted name of its layer stack, e.g. ``transformer.h``.
        outer: where each parameter outside the stack is stored, by name.
        layers: the same of each layer, with names inside the layer.
        entry: the file of all weights, or the index of several.
    """

    directory: Path
    config: PreTrainedConfig
    stack: str
    outer: Mapping[str, Stored]
    layers: Sequence[Mapping[str, Stored]]
    entry: Path

    def units(self) -> Iterator[dict[str, Tensor]]:
        """The tensors outside the stack, then those of each layer, one unit in memory at a time."""
        yield read_tensors(self.outer)
        for layer in self.layers:
            yield read_tensors(layer)


def open_foundation(source: str | Path) -> Foundation:
    """Find every weight of a model directory as ``transformers`` would, without reading one.

    Args:
        source: a directory in the Hugging Face format with safetensors weights, sharded or not, a GGUF file, or
            ``"reference"`` or ``"reference-code"`` for the small models that emutune ships.

    Raises:
        ModelError: the directory, its configuration or a weight is missing, damaged or quantised, or the
            architecture is not a stack of layers.
    """
    directory = _directory(source)
    config = _read_config(directory)
    model = skeleton(config)
    stack = stack_name(model)
    entry = weight_entry(directory, config)
    found = placed(stored_tensors(weight_files(directory, entry)), model)
    if apart := _settle_ties(found, model.all_tied_weights_keys):
        for part in (config, config.get_text_config()):
            part.tie_word_embeddings = False
        model = skeleton(config)
        if still := sorted(apart & model.all_tied_weights_keys.keys()):
            raise ModelError(
                f"{directory}: the weights hold another {still[0]} than the one that the architecture ties; remove it"
            )
    outer: dict[str, Stored] = {}
    layers: list[dict[str, Stored]] = [{} for _ in layer_stack(model)]
    for name in model.state_dict():
        if name in model.all_tied_weights_keys:
            continue
        if name not in found:
            raise ModelError(
                f"{directory}: the weights lack {name}; copy the directory again, or load and save it once with "
                "the transformers version that wrote it"
            )
        if name.startswith(stack + "."):
            index, _, inner = name.removeprefix(stack + ".").partition(".")
            layers[int(index)][inner] = found[name]
        else:
            outer[name] = found[name]
    return Foundation(directory, config, stack, outer, layers, entry)


def _directory(source: str | Path) -> Path:
    if str(source) in _SHIPPED:
        return _SHIPPED[str(source)]
    return unpacked(source) if is_gguf(source) and not Path(source).is_dir() else Path(source)


def _settle_ties(found: dict[str, Stored], tied: Mapping[str, str]) -> set[str]:
    """Find for tied tensors the one that the files have, and return those that the files have apart.

    Like ``transformers``, which ties what has one value, under whichever name, and leaves alone what has two.
    """
    for target, source in tied.items():
        if target in found:
            found.setdefault(source, found[target])
    apart = {t for t, source in tied.items() if t in found and not _same_values(found[t], found[source])}
    if apart:
        for target, source in tied.items():
            if source in found:
                found.setdefault(target, found[source])
    return apart


def _same_values(one: Stored, other: Stored) -> bool:
    if one == other:
        return True
    tensors = read_tensors({"one": one, "other": other})
    if one.dtype != other.dtype:
        tensors = {name: tensor.float() for name, tensor in tensors.items()}
    return torch.equal(tensors["one"], tensors["other"])


def skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a configuration in single precision, its parameters without memory, its buffers real."""
    try:
        with init_empty_weights(include_buffers=False):
            model: PreTrainedModel = auto_class(config).from_config(config, dtype=torch.float32)
    except Exception as error:  # an architecture raises whatever it met, a library that it lacks among it
        raise ModelError(
            f"config.json: no language model of that configuration: {one_line(error)}"
        ) from error
    return model.eval()


def auto_class(config: PreTrainedConfig) -> Any:
    """The ``AutoModel...`` that loads the model of a configuration."""
    return AutoModelForMaskedLM if fills_masks(config) else AutoModelForCausalLM


def fills_masks(config: PreTrainedConfig) -> bool:
    """Whether the model of a configuration fills masked tokens instead of predicting the next one."""
    return (config.architectures or [""])[0].endswith(_MASKED)


def positions(config: PreTrainedConfig) -> int | None:
    """How many tokens a model takes at once, or None if its configuration sets no limit.

    A table of positions with a row for padding, as RoBERTa's, counts from the row after that one.
    """
    names = ("max_position_embeddings", "max_seq_len", "n_positions")
    text = config.get_text_config()
    count = next((count for name in names if (count := getattr(text, name, None) or 0) > 0), None)
    if count is None:
        return None
    model = skeleton(config)
    reserved = [
        table.padding_idx + 1
        for table in model.modules()
        if isinstance(table, nn.Embedding)
        and (table.num_embeddings, table is model.get_input_embeddings()) == (count, False)
        and table.padding_idx is not None
    ]
    return int(count) - max(reserved, default=0)


def load_model(foundation: Foundation, device: str | torch.device = "cpu") -> PreTrainedModel:
    """The whole model, in single precision on a CPU and bfloat16 on an accelerator."""
    units = foundation.units()
    return assemble(foundation.config, next(units), units, device=device)


def assemble(
    config: PreTrainedConfig,
    outer: Mapping[str, Tensor],
    layers: Iterator[Mapping[str, Tensor]],
    *,
    kept: Sequence[int] | None = None,
    prepare: Callable[[nn.Module, int], None] | None = None,
    device: str | torch.device = "cpu",
) -> PreTrainedModel:
    """A model from tensors that arrive layer by layer.

    Args:
        config: of the whole model.
        outer: tensors outside the layer stack, by their names in the model.
        layers: tensors of each layer that is kept, bottom first, by their names inside the layer.
        kept: indices of those layers in the whole model; all if not given.
        prepare: gives an empty layer, at its position, the modules and shapes of a compressed one.
        device: where to.

    Raises:
        ModelError: a tensor is missing or has another shape than its place.
    """
    config = type(config).from_dict(config.to_dict())
    if kept is not None:
        shorten_config(config.get_text_config(), kept)
    model = skeleton(config)
    dtype = compute_dtype(device)
    load_tensors(model, outer, dtype, "the tensors outside the layers")
    for position, (layer, tensors) in enumerate(zip(layer_stack(model), layers, strict=True)):
        if prepare is not None:
            prepare(layer, position)
        load_tensors(layer, tensors, dtype, f"layer {position}")
    model.tie_weights()
    lacking = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if lacking:
        raise ModelError(f"the weights lack {', '.join(lacking[:3])}; build or copy them again")
    model.requires_grad_(False)
    model.to(torch.device(device))  # type: ignore[arg-type]
    return model.eval()


def compute_dtype(device: str | torch.device) -> torch.dtype:
    """What to compute with: single precision on a CPU, bfloat16 on an accelerator."""
    return torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16


def load_tokenizer(directory: Path, config: PreTrainedConfig) -> Any:
    """The tokenizer of a directory, for the model of a configuration.

    Raises:
        ModelError: there is none, it has no vocabulary, tokens that the model has no embedding for, or no mask
            token for a model that fills masked ones.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        tokens = tokenizer("the", add_special_tokens=False)["input_ids"]
    except Exception as error:  # the many loaders behind AutoTokenizer raise whatever they meet
        raise ModelError(
            f"{directory}: no tokenizer can be loaded ({one_line(error)}); save one there with "
            "tokenizer.save_pretrained"
        ) from error
    if not tokens or len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise ModelError(
            f"{directory}: the tokenizer has no vocabulary; save the one that the model was trained with"
        )
    last, rows = max(tokenizer.get_vocab().values()), config.get_text_config().vocab_size
    if last >= rows:
        raise ModelError(
            f"{directory}: the tokenizer has tokens up to {last}, the model's embedding {rows} rows; "
            "resize_token_embeddings and save"
        )
    if fills_masks(config) and tokenizer.mask_token_id is None:
        raise ModelError(
            f"{directory}: the model fills masked tokens, its tokenizer has no mask token; set "
            "tokenizer.mask_token and save"
        )
    return tokenizer


def base_hash(foundation: Foundation) -> str:
    """Identity of a model: SHA-256 over its architecture and every weight, in hexadecimal."""
    return combine_digests(foundation.config, (unit_digest(unit) for unit in foundation.units()))


def combine_digests(config: PreTrainedConfig, units: Iterator[str] | Sequence[str]) -> str:
    """The base hash from the digests of the units."""
    return hashlib.sha256("\n".join([config.model_type, *units]).encode()).hexdigest()


def unit_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and values of some tensors, in hexadecimal."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_tensors(where: Mapping[str, Stored]) -> dict[str, Tensor]:
    """Tensors from safetensors files; they are mapped, not read, and let go of with the last reference.

    Raises:
        ModelError: a file is missing or truncated.
    """
    tensors: dict[str, Tensor] = {}
    for path in sorted({stored.path for stored in where.values()}):
        names: dict[str, list[str]] = {}
        for name, stored in where.items():
            if stored.path == path:
                names.setdefault(stored.key, []).append(name)
        try:
            # Opened anew for every unit: a file kept open keeps all of its pages.
            with safe_open(path, "pt") as file:
                for key, (first, *others) in names.items():
                    tensors[first] = file.get_tensor(key)
                    # Two names of one memory would be one tensor to whoever saves them.
                    tensors |= {name: tensors[first].clone() for name in others}
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{path}: missing or damaged ({error}); copy it again") from error
    return tensors


def load_tensors(module: nn.Module, tensors: Mapping[str, Tensor], dtype: torch.dtype, what: str) -> None:
    """Put tensors into the places of their names; those that are missing stay without memory.

    Raises:
        ModelError: a tensor has another shape than its place; the message names ``what``.
    """
    # Scales of quantised weights are buffers and keep their type.
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    cast = {
        name: tensor.to(dtype) if tensor.is_floating_point() and name in parameters else tensor
        for name, tensor in tensors.items()
    }
    try:
        module.load_state_dict(cast, strict=False, assign=True)
    except RuntimeError as error:
        raise ModelError(f"{what}: do not fit the configuration: {one_line(error)}") from error


def _read_config(directory: Path) -> PreTrainedConfig:
    if not (directory / "config.json").is_file():
        raise ModelError(
            f"{directory}: no config.json; give a model directory as transformers' save_pretrained writes it"
        )
    refuse_special(directory)
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        raise ModelError(f"{directory / 'config.json'}: cannot be understood: {one_line(error)}") from error
    return config
