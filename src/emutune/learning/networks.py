"""Small networks over the UEs: one shared by all UEs (``set``), or one over all features (``flat``).

A network's parameters are a list of layers. Each takes features of every UE, shape ``(..., ues,
features)``, and context that all UEs share, shape ``(..., context)``.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float


class Layer(NamedTuple):
    """Weights of one layer; ``pooled`` acts on the mean over UEs and is empty in flat networks."""

    own: Float[Array, "inputs outputs"]
    pooled: Float[Array, "pooled_inputs outputs"]
    bias: Float[Array, "outputs"]


Network = list[Layer]
# Features and numbers of every UE, which of them, and what all of them share.
Features = Float[Array, "*batch ues features"]
PerUe = Float[Array, "*batch ues"]
Which = Bool[Array, "*batch ues"]
Context = Float[Array, "*batch context"]
_HIDDEN_GAIN = 2**0.5


def set_outputs(network: Network, features: Features, context: Context) -> Float[Array, "*batch ues outputs"]:
    """Several outputs per UE of a network that all UEs share."""
    hidden, pooled = _set_hidden(network, features, context)
    last = network[-1]
    return _times(hidden, last.own) + (pooled @ last.pooled + last.bias)[..., None, :]


def set_value(network: Network, features: Features, context: Context) -> Float[Array, "*batch"]:
    """One output of such a network for all UEs together."""
    _, pooled = _set_hidden(network, features, context)
    last = network[-1]
    return (pooled @ last.pooled + last.bias)[..., 0]


def flat_outputs(network: Network, features: Features, context: Context) -> Float[Array, "*batch outputs"]:
    """The outputs of a network over all features at once."""
    hidden = jnp.concatenate([features.reshape(*features.shape[:-2], -1), context], axis=-1)
    for layer in network[:-1]:
        hidden = jnp.tanh(hidden @ layer.own + layer.bias)
    return hidden @ network[-1].own + network[-1].bias


def create_network(
    generator: np.random.Generator,
    *,
    features: int,
    context: int,
    width: int,
    head: str,
    head_gain: float,
    outputs: int = 1,
) -> Network:
    """A network that all UEs share: orthogonal weights and zero biases, drawn with NumPy.

    Several vmapped orthogonal initialisers in one JAX program can deadlock on two threads; NumPy's cannot.

    Args:
        generator: source of the weights.
        features: features of each UE.
        context: features shared by all UEs.
        width: units of each of the two hidden layers.
        head: ``"ue"`` for outputs per UE, ``"value"`` for one in all.
        head_gain: scale of the last layer's weights.
        outputs: of each UE.
    """
    return [
        _layer(generator, features, features + context, width, _HIDDEN_GAIN),
        _layer(generator, width, width, width, _HIDDEN_GAIN),
        _layer(generator, width if head == "ue" else 0, width, outputs, head_gain),
    ]


def create_flat_network(
    generator: np.random.Generator, inputs: int, width: int, outputs: int, head_gain: float
) -> Network:
    """The same of a network over all features at once."""
    sizes, gains = [inputs, width, width, outputs], [_HIDDEN_GAIN, _HIDDEN_GAIN, head_gain]
    return [
        _layer(generator, before, 0, after, gain)
        for before, after, gain in zip(sizes, sizes[1:], gains, strict=False)
    ]


def _layer(
    generator: np.random.Generator, inputs: int, pooled_inputs: int, outputs: int, gain: float
) -> Layer:
    weights = gain * _orthogonal(generator, inputs + pooled_inputs, outputs)
    return Layer(
        own=jnp.asarray(weights[:inputs], jnp.float32),
        pooled=jnp.asarray(weights[inputs:], jnp.float32),
        bias=jnp.zeros(outputs, jnp.float32),
    )


def _orthogonal(generator: np.random.Generator, rows: int, columns: int) -> Float[np.ndarray, "rows columns"]:
    tall = generator.standard_normal((max(rows, columns), min(rows, columns)))
    basis, triangle = np.linalg.qr(tall)
    basis = basis * np.sign(np.diag(triangle))
    return basis if rows >= columns else basis.T


def _set_hidden(
    network: Network, features: Features, context: Context
) -> tuple[Float[Array, "*batch ues width"], Float[Array, "*batch width"]]:
    """Hidden units of each UE after the last hidden layer, and their mean over UEs."""
    hidden = features
    pooled = jnp.concatenate([features.mean(-2), context], axis=-1)
    for layer in network[:-1]:
        hidden = jnp.tanh(_times(hidden, layer.own) + (pooled @ layer.pooled + layer.bias)[..., None, :])
        pooled = hidden.mean(-2)
    return hidden, pooled


def _times(
    hidden: Float[Array, "*batch ues inputs"], weights: Float[Array, "inputs outputs"]
) -> Float[Array, "*batch ues outputs"]:
    """Product over one flat batch axis: its gradient needs no transposed copy of the activations."""
    flat = hidden.reshape(-1, hidden.shape[-1]) @ weights
    return flat.reshape(*hidden.shape[:-1], weights.shape[-1])
