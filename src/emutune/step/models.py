"""The levels of each foundation model's emulator as tables: what each takes, and how good it is.

Level k of a family is its emulator of k layers; level 0 is none. The tables are filled from the paper's formulas
(Eq. 5, 9 and sec. VI-A). Rows are families; levels that a family does not have are filled in, but never allowed.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from emutune.scenario import Model, Scenario


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Models:
    """Tables over families m and levels k of 0 to the most layers of any emulator.

    Attributes:
        layers: of the whole model.
        low: layers of the smallest emulator.
        high: layers of the largest emulator.
        bits: that a level takes in a cache.
        shared_bits: of them, what every level has beside its layers.
        memory_bits: that a level takes in memory, rising.
        missing_bits: that are sent for level k (last axis) to a UE that holds another level; one row for all of
            those where whole emulators are sent, else a row for each.
        tflop_per_bit: operations, in 1e12, of training with a level on a bit of data.
        perplexity: f of a level.
        whole_tflop_per_bit: of training with the whole model.
        whole_perplexity: f(1).
    """

    layers: Int[Array, "families"]
    low: Int[Array, "families"]
    high: Int[Array, "families"]
    bits: Float[Array, "families levels"]
    shared_bits: Float[Array, "families"]
    memory_bits: Float[Array, "families levels"]
    missing_bits: Float[Array, "families held levels"]
    tflop_per_bit: Float[Array, "families levels"]
    perplexity: Float[Array, "families levels"]
    whole_tflop_per_bit: Float[Array, "families"]
    whole_perplexity: Float[Array, "families"]

    @property
    def families(self) -> int:
        """How many there are."""
        return self.bits.shape[0]

    @property
    def layer_bits(self) -> Float[Array, "families"]:
        """Size of one layer of each family."""
        return self.bits[:, 1] - self.shared_bits

    @property
    def whole_bits(self) -> Float[Array, "families"]:
        """Size of the layers of each whole model."""
        return self.layer_bits * self.layers

    @property
    def delta(self) -> bool:
        """Whether only missing layers are sent, so that what is sent depends on what is held."""
        return self.missing_bits.shape[1] > 1

    @property
    def most(self) -> int:
        """Layers of the largest emulator of any family."""
        return self.bits.shape[1] - 1


def build_models(scenario: Scenario, dtype: DTypeLike = jnp.float32) -> Models:
    """The tables of a scenario."""
    models = scenario.models
    levels = np.arange(max(model.most for model in models) + 1)
    layers = np.array([model.layers for model in models])
    share = levels / layers[:, None]
    shared = 8e9 * np.array([[model.shared_gb] for model in models])
    bits = np.where(levels == 0, 0.0, shared + 8e9 * np.array([[model.size_gb] for model in models]) * share)
    missing = bits[:, None, :]
    if scenario.delta_download:
        missing = np.maximum(bits[:, None, :] - bits[..., None], 0.0)
    whole_tflop = np.array(whole_tflop_per_bit(scenario))

    def real(values: np.ndarray | list[float]) -> Array:
        return jnp.asarray(values, dtype)

    def whole(values: np.ndarray | list[int]) -> Array:
        return jnp.asarray(values, jnp.int32)

    return Models(
        layers=whole(layers),
        low=whole([model.fewest for model in models]),
        high=whole([model.most for model in models]),
        bits=real(bits),
        shared_bits=real(shared[:, 0]),
        memory_bits=real(bits),
        missing_bits=real(missing),
        tflop_per_bit=real(whole_tflop[:, None] * share),
        perplexity=real(np.stack([_perplexity(model, levels) for model in models])),
        whole_tflop_per_bit=real(whole_tflop),
        whole_perplexity=real([model.curve(1.0) for model in models]),
    )


def whole_tflop_per_bit(scenario: Scenario) -> list[float]:
    """Operations, in 1e12, of training each family's whole model on a bit of data (D13); 0 where it takes no time."""
    wanted = scenario.computation
    if wanted is None:
        return [0.0] * len(scenario.models)
    # 4 P operations a token: 2 forward, and 2 backward to the activations of weights that stay frozen.
    tflop_per_token = [4e-3 * (model.parameters_billion or 0.0) for model in scenario.models]
    return [each * wanted.epochs / (8 * wanted.bytes_per_token) for each in tflop_per_token]


def look_up(table: Array, family: Int[Array, "*#batch"], *levels: Int[Array, "*#batch"] | int) -> Array:
    """A table's entries for a family and levels each; where there is one family, which one is not read."""
    return table[(0, *levels)] if table.shape[0] == 1 else table[(family, *levels)]


def missing_bits(
    models: Models, family: Int[Array, "*#batch"], held: Int[Array, "*#batch"], layers: Int[Array, "*#batch"]
) -> Float[Array, "*batch"]:
    """Bits to send to a UE that holds one level of a family for it to train with another."""
    row = held if models.delta else 0
    return jnp.where(layers == held, 0.0, look_up(models.missing_bits, family, row, layers))


def retention_of(
    models: Models, family: Int[Array, "*#batch"], layers: Int[Array, "*#batch"]
) -> Float[Array, "*batch"]:
    """The share of its family's layers that a level keeps: E, as the paper has it."""
    return layers / look_up(models.layers, family)


def _perplexity(model: Model, levels: np.ndarray) -> np.ndarray:
    """Perplexity f of each level; level 0 is none and costs nothing, and beyond the last one nothing is read."""
    inside = np.clip(levels, 1, model.layers) / model.layers
    return np.where(levels == 0, 0.0, np.array([model.curve(float(share)) for share in inside]))
