"""What bounds without foresight know of a world: the law of what comes, what is seen at the start, and what came.

A UE's *view* is what it holds as its task sees it. Where families differ there is a view for every family of the
task and every emulator. Where all families are alike, only whether the emulator held is of the task's family counts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from emutune.errors import UsageError
from emutune.scenario import Scenario
from emutune.step import Rules, Situation, Taken, build_rules, downlink_bps, situation_of, uplink_bps
from emutune.step.charges import delay_cost, own_cost
from emutune.step.rules import complexity_factor
from emutune.world import Episode, World

# What a level that does not exist costs. If it were cheap a bound would be lower, and still a bound.
_NEVER = 1e9


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Chances:
    """The law of one UE's tasks, and what a task costs it; levels i are emulators of i + 1 layers.

    Attributes:
        delta: whether only missing layers are sent.
        cost_per_s: of a step's delay.
        factor: by which complexity scales perplexity, at nodes of complexity.
        weight: of each node. Between nodes a concave function of the factor is replaced by its chord, so that the
            weighted sum is never more than the expectation.
        data_bits: smallest and largest task.
        local_cost: of training on the UE at factor 1; enormous for a level that a family does not have.
        server_cost: of training at the server at factor 1.
        layer_bits: of one layer.
        kind: of each family, those that are alike being one kind.
        view_kind: kind of the task in each view.
        view_layers: layers that can be used in each view; 0 for none.
        fetched: view of a task of each kind once a level was fetched for it.
        moves: chances of the view of the next task, by that of the last.
        first: chances of the view of the first task, with nothing held.
        view: of a task of each family where a UE holds each emulator; the first is none.
        held_family: family of each emulator, -1 for none.
        held_layers: layers of each emulator, 0 for none.
        slot: number of each family's emulator of each level, 0 if there is none.
    """

    delta: bool = field(metadata={"static": True})
    cost_per_s: float
    factor: Float[Array, "nodes"]
    weight: Float[Array, "nodes"]
    data_bits: Float[Array, "2"]
    local_cost: Float[Array, "kinds levels"]
    server_cost: Float[Array, "kinds"]
    layer_bits: Float[Array, "kinds"]
    kind: Int[Array, "families"]
    view_kind: Int[Array, "views"]
    view_layers: Int[Array, "views"]
    fetched: Int[Array, "kinds levels"]
    moves: Float[Array, "views views"]
    first: Float[Array, "views"]
    view: Int[Array, "families held"]
    held_family: Int[Array, "held"]
    held_layers: Int[Array, "held"]
    slot: Int[Array, "families levels"]

    @property
    def levels(self) -> int:
        """Layers of the largest emulator."""
        return int(self.local_cost.shape[1])

    def usable(self, family: Int[Array, "*batch"]) -> Int[Array, "*batch held"]:
        """Layers of each emulator that a task of a family can use."""
        return jnp.where(self.held_family == family[..., None], self.held_layers, 0)


class Seconds(NamedTuple):
    """What an episode's gains say, all of which a policy may know from the start.

    Attributes:
        upload: seconds of a bit sent up by one of 1, 2, ... UEs that share the link.
        download: seconds of a bit sent down alone.
    """

    upload: Float[Array, "tasks ues sharers"]
    download: Float[Array, "tasks ues"]


class Came(NamedTuple):
    """The tasks that came, which no policy knows before their step."""

    family: Int[Array, "tasks ues"]
    factor: Float[Array, "tasks ues"]
    data_bits: Float[Array, "tasks ues"]


def refuse_unsuited(scenario: Scenario) -> None:
    """Refuse a world that bounds without foresight are not made for.

    Raises:
        UsageError: naming the sections that must be left out, and the methods that there are for them.
    """
    sections = ("computation", "energy", "memory", "privacy", "activity")
    unsuited = [name for name in sections if getattr(scenario, name) is not None]
    unsuited += ["families.cache_gb"] * (scenario.cache_gb is not None)
    unsuited += ["download.multicast"] * (scenario.download is not None and scenario.download.multicast)
    unsuited += ["radio.sharing"] * (scenario.radio.sharing != "equal")
    if unsuited:
        raise UsageError(
            f"method: 'foresight-free' does not allow {', '.join(unsuited)}; leave that out, or choose from "
            "'linear', 'integer' and 'prices', which allow every world"
        )


def read_chances(scenario: Scenario, world: World, nodes: int) -> Chances:
    """The law of a world's tasks, in double precision (inside ``jax.enable_x64``).

    Args:
        scenario: the world.
        world: the same as arrays, from which episodes are drawn.
        nodes: of complexity.
    """
    rules = build_rules(scenario, jnp.float64)
    per_perplexity = _cost_of_perplexity(rules, scenario.fleet.ues)
    alike = len({model._replace(parameters_billion=None) for model in scenario.models}) == 1
    families = len(scenario.models)
    kind = np.zeros(families, int) if alike else np.arange(families)
    models = scenario.models[:1] if alike else scenario.models
    most = max(model.most for model in models)
    exists = np.array([[model.fewest <= k <= model.most for k in range(1, most + 1)] for model in models])
    perplexity = np.asarray(rules.models.perplexity)[: len(models), 1 : most + 1]
    factor, weight = _complexity_nodes(rules, np.asarray(world.complexity, np.float64), nodes)
    return Chances(
        delta=scenario.delta_download,
        cost_per_s=float(delay_cost(rules, jnp.ones(()))),
        factor=jnp.asarray(factor),
        weight=jnp.asarray(weight),
        data_bits=jnp.asarray(world.data_bits, jnp.float64),
        local_cost=jnp.where(exists, per_perplexity * perplexity, _NEVER),
        server_cost=per_perplexity * rules.models.whole_perplexity[: len(models)],
        layer_bits=rules.models.layer_bits[: len(models)],
        kind=jnp.asarray(kind),
        **_read_views(exists[kind], float(world.families.stays), alike and families > 1),
    )


def read_seconds(scenario: Scenario, episode: Episode) -> Seconds:
    """What one episode's gains say, in double precision."""
    links = build_rules(scenario, jnp.float64).links
    gain = jnp.asarray(episode.gain[1:], jnp.float64)
    down = gain if episode.downlink_gain is None else jnp.asarray(episode.downlink_gain[1:], jnp.float64)
    sharers = jnp.arange(1.0, gain.shape[1] + 1)
    power_w = jnp.asarray(episode.transmit_power_w, jnp.float64)[:, None]
    return Seconds(1 / uplink_bps(links, power_w, gain[..., None], sharers), 1 / downlink_bps(links, down))


def read_tasks(scenario: Scenario, episode: Episode) -> Came:
    """The tasks of one episode, in double precision."""
    complexity = jnp.asarray(episode.complexity, jnp.float64)
    family = jnp.zeros(complexity.shape, jnp.int32) if episode.family is None else jnp.asarray(episode.family)
    factor = complexity_factor(build_rules(scenario, jnp.float64), complexity)
    return Came(family, factor, jnp.asarray(episode.data_bits, jnp.float64))


def _cost_of_perplexity(rules: Rules, ues: int) -> Float[Array, ""]:
    """What one unit of one UE's perplexity costs: everybody has a task."""
    each = jnp.ones(ues)
    nothing = jnp.zeros(ues)
    situation: Situation = situation_of(
        progress=jnp.zeros(()),
        complexity=each,
        data_bits=each,
        transmit_power_w=each,
        gain=each,
        held=jnp.zeros((ues, 1), jnp.int32),
        age=jnp.zeros((ues, 1), jnp.int32),
    )
    return own_cost(rules, situation, Taken(nothing, nothing, nothing, nothing, each))[0]


def _complexity_nodes(
    rules: Rules, bounds: Float[np.ndarray, "2"], nodes: int
) -> tuple[Float[np.ndarray, "nodes"], Float[np.ndarray, "nodes"]]:
    """Factors at equally spaced complexities, and the weights that chords between them have."""
    low, high = bounds
    if low == high:
        return np.asarray(complexity_factor(rules, jnp.asarray(bounds[:1]))), np.ones(1)
    at = np.linspace(low, high, nodes)
    factor = np.asarray(complexity_factor(rules, jnp.asarray(at)))
    # The mean factor of an interval says how much of its weight either end has.
    mean = (factor[1:] + factor[:-1]) / 2
    if rules.complexity_as_printed:
        mean = 1 + float(rules.complexity_weight) * np.log(at[1:] / at[:-1]) / np.diff(at)
    rise = np.diff(factor)
    upper = np.clip((mean - factor[:-1]) / np.where(rise == 0, 1.0, rise), 0.0, 1.0) / (nodes - 1)
    weight = np.zeros(nodes)
    weight[1:] += upper
    weight[:-1] += 1 / (nodes - 1) - upper
    return factor, weight


def _read_views(exists: np.ndarray, stays: float, alike: bool) -> dict[str, Array]:
    """Fields of ``Chances`` on views and emulators.

    Args:
        exists: whether a family has an emulator of a level.
        stays: chance that the next task is of the same family for certain.
        alike: whether there are several families, all alike.
    """
    families, levels = exists.shape
    family, level = np.nonzero(exists)
    held_family, held_layers = np.concatenate([[-1], family]), np.concatenate([[0], level + 1])
    slot = np.zeros(exists.shape, int)
    slot[family, level] = np.arange(1, len(family) + 1)
    same = stays + (1 - stays) / families
    if alike:
        # None; an emulator of the task's family, by level; one of another.
        view_kind, view_layers = np.zeros(1 + 2 * levels, int), np.arange(1 + 2 * levels)
        view_layers[1 + levels :] = 0
        own, other = 1 + np.arange(levels), 1 + levels + np.arange(levels)
        moves = np.eye(1 + 2 * levels)
        moves[own, own], moves[own, other] = same, 1 - same
        moves[other, own], moves[other, other] = (1 - stays) / families, 1 - (1 - stays) / families
        shift = np.where(held_family == np.arange(families)[:, None], 0, levels)
        view = np.where(held_layers > 0, held_layers + shift, 0)
        first, fetched = np.eye(1 + 2 * levels)[0], own[None]
    else:
        held = len(held_family)
        view = np.arange(families * held).reshape(families, held)
        view_kind = np.repeat(np.arange(families), held)
        view_layers = np.where(held_family == np.arange(families)[:, None], held_layers, 0).ravel()
        chain = stays * np.eye(families) + (1 - stays) / families
        moves = np.kron(chain, np.eye(held))
        first = np.zeros(families * held)
        first[view[:, 0]] = 1 / families
        fetched = np.take_along_axis(view, slot, axis=1)
    fields = {
        "view_kind": view_kind,
        "view_layers": view_layers,
        "fetched": fetched,
        "moves": moves,
        "first": first,
        "view": view,
        "held_family": held_family,
        "held_layers": held_layers,
        "slot": slot,
    }
    return {name: jnp.asarray(part) for name, part in fields.items()}
