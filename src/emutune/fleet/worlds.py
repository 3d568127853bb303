"""A shipped world as a fleet of real processes runs it: its links, devices and tasks, and the models of catalogues."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from emutune.errors import FleetError
from emutune.scenario import Scenario, load_scenario, shipped_scenarios
from emutune.scenario.schema import Model
from emutune.tuning.inventory import Inventory
from emutune.tuning.manifest import Emulator

_GB = 1e9


class ServedWorld(NamedTuple):
    """A scenario that a fleet can run, and how many of its bytes one of a catalogue's stands for."""

    scenario: Scenario
    byte_scale: float


def served_world(world: Scenario, catalogues: Sequence[Inventory], ues: int, steps: int) -> ServedWorld:
    """A world with the models of catalogues in the place of its own, and so many UEs and steps.

    Links, devices and what they may are the world's. An emulator of half of the first model's layers is as large as
    in the world, caches and memories hold as much of the largest emulators, and perplexity weighs as much against
    delay: the difference that the largest emulator makes to the smallest costs what it does in the world. Catalogues
    are nested, so that only missing layers are sent.

    Args:
        world: whose laws hold.
        catalogues: one for each foundation model, at most as many as the world has.
        ues: how many devices.
        steps: of an episode.

    Raises:
        FleetError: there are more catalogues than models, two of one model, or no curve is known of one.
    """
    theirs = world.models
    if not 0 < len(catalogues) <= len(theirs):
        raise FleetError(
            f"--catalogue: {len(catalogues)} were given, but the world {world.name!r} has {len(theirs)} foundation "
            "models; give at most one for each"
        )
    weights = [_Weights.of(catalogue) for catalogue in catalogues]
    half = (theirs[0].emulator_gb(0) + theirs[0].size_gb / 2) * _GB
    byte_scale = half / (weights[0].shared + weights[0].layers_bytes / 2)
    known = [calibrated(catalogue.info.base) for catalogue in catalogues]
    models = [
        {
            "size_gb": weight.layers_bytes * byte_scale / _GB,
            "shared_gb": weight.shared * byte_scale / _GB,
            "layers": weight.layers,
            "base": catalogue.info.base,
            "parameters_billion": their.parameters_billion,
            "curve": curve.curve.model_dump(),
        }
        for weight, catalogue, their, curve in zip(weights, catalogues, theirs, known, strict=False)
    ]
    return ServedWorld(_with_models(world, models, ues, steps), byte_scale)


def calibrated(base: str) -> Model:
    """The model of a hash, as a shipped scenario knows it.

    Raises:
        FleetError: none does.
    """
    for name in shipped_scenarios():
        for model in load_scenario(name).models:
            if model.base == base:
                return model
    raise FleetError(
        f"model {base[:12]}: no shipped scenario knows its curve; write a scenario of it with emutune calibrate and "
        "a fleet's file that names it"
    )


class _Weights(NamedTuple):
    """Bytes of a model's emulators: of the layers that they are made of, together, and of what all have beside."""

    layers: int
    layers_bytes: float
    shared: float

    @classmethod
    def of(cls, catalogue: Inventory) -> _Weights:
        largest = catalogue.emulators()[-1]
        middle = set(catalogue.info.middle)
        sizes = [entry.shard.bytes for entry in largest.layers if entry.index in middle]
        layers = len(catalogue.info.middle)
        return cls(layers, layers * sum(sizes) / len(sizes), _shared_bytes(largest, middle))


def _shared_bytes(emulator: Emulator, middle: set[int]) -> float:
    return emulator.outer.bytes + sum(
        entry.shard.bytes for entry in emulator.layers if entry.index not in middle
    )


def _with_models(world: Scenario, models: list[dict[str, Any]], ues: int, steps: int) -> Scenario:
    tree = world.model_dump(exclude_none=True)
    first, *others = ({key: part for key, part in model.items() if part is not None} for model in models)
    tree["fleet"] |= {"ues": ues, "tasks": steps}
    tree["quality"]["curve"] = first.pop("curve")
    tree["model"] = first
    tree["download"] = {"delta": True}
    tree["description"] = f"{world.name}, as a fleet runs it with the models of its catalogues"
    largest = _largest_gb(world)
    if others:
        tree["families"]["others"] = others
    else:
        tree.pop("families", None)
    cache_gb = tree.get("families", {}).pop("cache_gb", None)
    memory = tree.pop("memory", None)
    privacy = tree.pop("privacy", None)
    served = Scenario.model_validate(tree)
    # What a device holds is compared with emulators, and those have other sizes now.
    scale = _largest_gb(served) / largest
    if cache_gb is not None:
        tree["families"]["cache_gb"] = cache_gb * scale
    if memory is not None:
        tree["memory"] = {"device_gb": _scaled(memory["device_gb"], scale, served)}
    if privacy is not None:
        tree["privacy"] = privacy
    own, theirs = _gain(served), _gain(world)
    tree["reward"]["perplexity_weight"] *= theirs / own
    return Scenario.model_validate(tree)


def _largest_gb(scenario: Scenario) -> float:
    return max(model.emulator_gb(model.most) for model in scenario.models)


def _scaled(device_gb: dict[str, Any], scale: float, served: Scenario) -> dict[str, Any]:
    """Memories that hold as much of the largest emulators, and at least the smallest ones."""
    least = max(model.emulator_gb(model.fewest) for model in served.models)
    low = max(device_gb["min"] * scale, least)
    return device_gb | {"min": low, "max": max(device_gb["max"] * scale, low)}


def _gain(scenario: Scenario) -> float:
    """By how much the largest emulator of the first model is better than its smallest."""
    model = scenario.models[0]
    return model.curve(model.fewest / model.layers) - model.curve(model.most / model.layers)
