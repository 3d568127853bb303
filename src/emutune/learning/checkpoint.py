"""Checkpoints: safetensors with the scenario, configuration and version they belong to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from emutune.errors import CheckpointError, ScenarioError
from emutune.files import replacing
from emutune.learning.configuration import Settings
from emutune.learning.learners import read_settings
from emutune.scenario import Scenario, dump_scenario, parse_scenario

FORMAT_VERSION = "1"
State = TypeVar("State")


class CheckpointHeader(NamedTuple):
    """What a checkpoint belongs to."""

    scenario: Scenario
    config: Settings
    seed: int


def save_checkpoint(path: Path, header: CheckpointHeader, state: Any) -> None:
    """Write a training state, its random state and its optimisers' included.

    Raises:
        CheckpointError: the file cannot be written; an earlier checkpoint is untouched.
    """
    tensors = {f"{index:04d}": np.asarray(_raw(leaf)) for index, leaf in enumerate(jax.tree.leaves(state))}
    metadata = {
        "format_version": FORMAT_VERSION,
        "scenario": dump_scenario(header.scenario),
        "config": header.config.model_dump_json(),
        "seed": str(header.seed),
        "jax_version": jax.__version__,
    }
    try:
        with replacing(path) as aside:
            save_file(tensors, aside, metadata=metadata)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path}: cannot be written ({error}); free some space or choose another --out"
        ) from error


def read_header(path: Path) -> CheckpointHeader:
    """What a checkpoint belongs to.

    Raises:
        CheckpointError: the file is missing, damaged or of another format version.
    """
    metadata = _metadata(path)
    if metadata.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format_version is {metadata.get('format_version')!r}, this emutune reads "
            f"{FORMAT_VERSION!r}; train again or use the version that wrote it"
        )
    try:
        return CheckpointHeader(
            parse_scenario(metadata["scenario"]),
            read_settings(metadata["config"]),
            int(metadata["seed"]),
        )
    except (KeyError, ValueError, ValidationError, ScenarioError) as error:
        raise CheckpointError(f"{path}: its header is damaged ({error}); train again") from error


def load_checkpoint(path: Path, header: CheckpointHeader, template: State) -> State:
    """Read a training state back.

    Args:
        path: a file written by ``save_checkpoint``.
        header: what the state must belong to.
        template: a state of the right shapes, as training starts from.

    Raises:
        CheckpointError: the checkpoint belongs to something else, was written by a version whose states held other
            arrays, or is damaged.
    """
    _refuse_difference(path, read_header(path), header)
    leaves, structure = jax.tree.flatten(template)
    try:
        with safe_open(path, framework="numpy") as file:
            loaded = [jnp.asarray(file.get_tensor(name)) for name in sorted(file.keys())]
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: damaged ({error}); delete it and train again") from error
    # The header is right, and damage would not have been read: only what is learned can differ.
    if [_outline(_raw(leaf)) for leaf in leaves] != [_outline(leaf) for leaf in loaded]:
        raise CheckpointError(
            f"{path}: was written by another version of emutune, whose {header.config.algorithm} runs hold other "
            "arrays; use that version, or train again with another --out"
        )
    state: State = jax.tree.unflatten(
        structure,
        [
            jax.random.wrap_key_data(new) if _is_key(old) else new
            for old, new in zip(leaves, loaded, strict=True)
        ],
    )
    return state


def _is_key(leaf: Array) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _raw(leaf: Array) -> Array:
    """What a file can hold: a random state as its words."""
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _outline(leaf: Array) -> tuple[tuple[int, ...], str]:
    return leaf.shape, str(leaf.dtype)


def _metadata(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint; run emutune train first")
    try:
        with safe_open(path, framework="numpy") as file:
            return dict(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: damaged ({error}); delete it and train again") from error


def _refuse_difference(path: Path, found: CheckpointHeader, wanted: CheckpointHeader) -> None:
    if type(found.config) is not type(wanted.config):
        raise CheckpointError(
            f"{path}: belongs to a run of {found.config.algorithm}, not {wanted.config.algorithm}; choose another --out"
        )
    for section in ("scenario", "config"):
        old, new = getattr(found, section).model_dump(), getattr(wanted, section).model_dump()
        for field in old:
            if old[field] != new[field]:
                name = field if section == "scenario" else f"training {field}"
                raise CheckpointError(
                    f"{path}: belongs to another {section}: {name} is {_shown(old[field])} there and "
                    f"{_shown(new[field])} here; choose another --out or train with the same {section}"
                )
    if found.seed != wanted.seed:
        raise CheckpointError(f"{path}: belongs to seed {found.seed}, not {wanted.seed}")


def _shown(value: Any) -> str:
    return json.dumps(value)
