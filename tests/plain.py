"""One step of a world with any features in plain numbers, one UE at a time, from their description alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st
from scipy import special

from emutune.scenario import Scenario
from emutune.world import Episode


@dataclass(frozen=True)
class Carried:
    """What a UE takes along: family and layers of each emulator, the one used last first, and joules spent."""

    emulators: tuple[tuple[int, int], ...] = ()
    spent_j: float = 0.0

    @property
    def layers(self) -> int:
        """Of the emulator used last; 0 for none."""
        return self.emulators[0][1] if self.emulators else 0

    def of(self, family: int) -> int:
        """Layers held of a family; 0 for none."""
        return dict(self.emulators).get(family, 0)


def carrying(family: int, layers: int, spent_j: float) -> Carried:
    """A UE with one emulator, or with none where it has 0 layers."""
    return Carried(((int(family), int(layers)),) if layers else (), float(spent_j))


def tasks_of(episode: Episode) -> list[list[dict[str, Any]]]:
    """Every step's UEs as dictionaries of plain numbers."""
    drawn = {
        "complexity": episode.complexity,
        "data_bits": episode.data_bits,
        "gain": episode.gain[1:],
        "downlink_gain": (episode.gain if episode.downlink_gain is None else episode.downlink_gain)[1:],
        "family": episode.family,
        "active": episode.active,
    }
    fixed = {"transmit_power_w": episode.transmit_power_w, **episode.devices._asdict()}
    steps, ues = episode.complexity.shape
    host = {name: None if part is None else np.asarray(part) for name, part in {**drawn, **fixed}.items()}
    defaults = {"family": 0, "active": True, "private": False, "memory_bits": math.inf}

    def value(name: str, t: int, n: int) -> Any:
        part = host[name]
        if part is None:
            return defaults.get(name)
        return (part[t, n] if name in drawn else part[n]).item()

    return [[{name: value(name, t, n) for name in host} for n in range(ues)] for t in range(steps)]


def possible_layers(scenario: Scenario, task: dict[str, Any]) -> list[int]:
    """Levels inside the retention bounds that the UE can hold."""
    model, cache_gb = scenario.models[task["family"]], cache_of(scenario)
    return [
        k
        for k in range(1, model.layers + 1)
        if scenario.retention.min - 1e-9 <= k / model.layers <= scenario.retention.max + 1e-9
        and 8e9 * _gb(scenario, task["family"], k) <= task["memory_bits"] * (1 + 1e-6)
        and (cache_gb is None or _gb(scenario, task["family"], k) <= cache_gb * (1 + 1e-9))
    ]


def cache_of(scenario: Scenario) -> float | None:
    """GB that a UE can keep of emulators; None where it keeps one of any size."""
    return scenario.families.cache_gb if scenario.families else None


def kept_after(
    scenario: Scenario, emulators: tuple[tuple[int, int], ...], used: tuple[int, int]
) -> tuple[tuple[int, int], ...]:
    """Emulators, the one used last first, once one was used: those at the end go until all fit."""
    cache_gb = cache_of(scenario)
    if cache_gb is None:
        return (used,)
    kept = [used, *(one for one in emulators if one[0] != used[0])]
    while len(kept) > 1 and sum(_gb(scenario, *one) for one in kept) > cache_gb * (1 + 1e-6):
        kept.pop()
    return tuple(kept)


def _gb(scenario: Scenario, family: int, layers: int) -> float:
    model = scenario.models[family]
    return model.shared_gb + model.size_gb * layers / model.layers


def options(scenario: Scenario, task: dict[str, Any]) -> list[tuple[str, int]]:
    """Everything that a UE can do with a task."""
    possible = [("local", k) for k in possible_layers(scenario, task)]
    if not task["active"]:
        return [("idle", 0)]
    return possible if task["private"] and possible else [*possible, ("server", 0)]


def project(scenario: Scenario, task: dict[str, Any], at_server: bool, wanted: float) -> tuple[str, int]:
    """What comes of a wish: idle, server, or local with so many layers."""
    if not task["active"]:
        return "idle", 0
    levels = possible_layers(scenario, task)
    if not levels or (at_server and not task["private"]):
        return "server", 0
    layers = scenario.models[task["family"]].layers
    return "local", min(levels, key=lambda k: abs(k / layers - wanted))


def bits_per_hz(scenario: Scenario, snr: float) -> float:
    """What a link carries: at its gain, or on average over Rayleigh fading about it."""
    if scenario.radio.rate == "ergodic":
        return float(special.exp1(1 / snr) * math.exp(1 / snr) / math.log(2))
    return math.log2(1 + snr)


def serve(
    scenario: Scenario, tasks: list[dict[str, Any]], carried: list[Carried], plan: list[tuple[str, int]]
) -> tuple[list[Carried], dict[str, Any]]:
    """New carries, and what was charged, for a plan that is possible."""
    radio, quality = scenario.radio, scenario.quality
    noise = 10 ** (radio.noise_dbm_per_hz / 10) / 1000
    there = sum(kind == "server" for kind, _ in plan)
    sent = []
    for task, mine, (kind, layers) in zip(tasks, carried, plan, strict=True):
        held = mine.of(task["family"])
        if kind != "local" or layers == held:
            sent.append(0)
        else:
            sent.append(max(layers - held, 0) if scenario.delta_download else layers)
    shared = {}
    for task, mine, (_, layers), missing in zip(tasks, carried, plan, sent, strict=True):
        if missing:
            shared.setdefault(transmission(scenario, task, mine, layers), []).append(task["downlink_gain"])
    delays, joules, perplexities, after, trained = [], [], [], [], []
    for task, mine, (kind, layers), missing in zip(tasks, carried, plan, sent, strict=True):
        model = scenario.models[task["family"]]
        up = down = train = 0.0
        tflop = 0.0
        if scenario.computation:
            tokens = task["data_bits"] / 8 / scenario.computation.bytes_per_token
            tflop = 4 * model.parameters_billion * 1e9 * tokens * scenario.computation.epochs / 1e12
        if kind == "server":
            share = radio.uplink_bandwidth_hz / (there if radio.sharing == "equal" else 1)
            snr = task["transmit_power_w"] * task["gain"] / (noise * share)
            up = task["data_bits"] / (share * bits_per_hz(scenario, snr))
            if scenario.computation:
                train = tflop / (scenario.computation.server_tflops / there)
        if missing:
            weakest = min(shared[transmission(scenario, task, mine, layers)])
            snr = radio.downlink_power_w * weakest / (noise * radio.downlink_bandwidth_hz)
            transmissions = len(shared) if radio.sharing == "equal" else 1
            rate = radio.downlink_bandwidth_hz / transmissions * bits_per_hz(scenario, snr)
            whole = not (scenario.delta_download and mine.of(task["family"]))
            gb = model.size_gb * missing / model.layers + (model.shared_gb if whole else 0.0)
            down = 8e9 * gb / rate
        if kind == "local" and scenario.computation:
            train = tflop * layers / model.layers / task["tflops"]
        spent = 0.0
        if scenario.energy:
            spent = task["transmit_power_w"] * up + scenario.energy.receive_w * down
            spent += (task["compute_w"] or 0.0) * train if kind == "local" else 0.0
        divisor = (
            task["complexity"] if quality.complexity_factor == "as_printed" else quality.complexity_weight
        )
        retention = 1.0 if kind == "server" else layers / model.layers
        factor = (task["complexity"] + quality.complexity_weight) / divisor
        perplexities.append(0.0 if kind == "idle" else model.curve(retention) * factor)
        delays.append(up + down + train)
        trained.append(train)
        joules.append(spent)
        emulators = mine.emulators
        if kind == "local":
            emulators = kept_after(scenario, emulators, (task["family"], layers))
        after.append(Carried(emulators, mine.spent_j + spent))
    active = sum(kind != "idle" for kind, _ in plan)
    cost = -scenario.reward.perplexity_weight * sum(perplexities) / max(active, 1)
    cost -= scenario.reward.delay_weight_per_min * max(delays) / 60
    if scenario.energy:
        cost -= scenario.energy.weight_per_j * sum(joules) / len(plan)
        if scenario.energy.budget_j:
            over = [
                max(new.spent_j - scenario.energy.budget_j, 0)
                - max(old.spent_j - scenario.energy.budget_j, 0)
                for new, old in zip(after, carried, strict=True)
            ]
            cost -= scenario.energy.over_budget_weight_per_j * sum(over) / len(plan)
    return after, {
        "delay_s": delays,
        "training_s": trained,
        "energy_j": joules,
        "perplexity": perplexities,
        "reward": -cost,
        "sent": sent,
    }


def transmission(scenario: Scenario, task: dict[str, Any], mine: Carried, layers: int) -> Any:
    """What tells a transmission from others: its UE, or with multicast the layers that are sent."""
    if not (scenario.download and scenario.download.multicast):
        return id(task)
    return task["family"], layers, mine.of(task["family"]) if scenario.delta_download else 0


def best_return(scenario: Scenario, tasks: Sequence[list[dict[str, Any]]]) -> float:
    """Return of the best of all plans, by enumeration."""
    reached = {tuple([Carried()] * len(tasks[0])): 0.0}
    for row in tasks:
        following: dict[tuple[Carried, ...], float] = {}
        for carried, total in reached.items():
            for plan in itertools.product(*(options(scenario, task) for task in row)):
                after, outcome = serve(scenario, row, list(carried), list(plan))
                state, value = tuple(after), total + outcome["reward"]
                if value > following.get(state, -math.inf):
                    following[state] = value
        reached = following
    return max(reached.values())


FEATURES = {
    "computation": ["computation={device_tflops={min=0.3,max=20.0,law='log_uniform'},server_tflops=5.0,"
                    "bytes_per_token=2000.0,epochs=2.0}", "model.parameters_billion=2.7"],
    "energy": ["energy={receive_w=1.5,weight_per_j=-1e-5}"],
    "budget": ["energy={receive_w=1.5,weight_per_j=-1e-5,budget_j=2500.0,over_budget_weight_per_j=-1e-3}"],
    "memory": ["memory={device_gb={min=2.4,max=9.0}}"],
    "privacy": ["privacy={share=0.4}"],
    "activity": ["activity={task_probability=0.6}"],
    "delta": ["download={delta=true}"],
    "multicast": ["download.multicast=true"],
    # Two of the larger emulators of 10.8 GB do not fit, smaller ones do.
    "cache": ["families.cache_gb=9.0"],
    "mobility": ["mobility={speed_mps={min=1.0,max=20.0},interval_s=60.0}"],
    "fading": ["radio.fading={speed_mps=1.0,interval_s=0.01}", "radio.carrier_ghz=3.5"],
    "ergodic": ["radio.rate='ergodic'"],
    "shared": ["model.shared_gb=2.0"],
    "unshared": ["radio.sharing='none'"],
    "trace": [f"trace={{interval_s=60.0,downlink_mbps={list(range(45, 16, -1)) * 2 + [9]},"
              f"uplink_mbps={[0.1 * (1 + t * t % 17) for t in range(59)]}}}"],
}  # fmt: skip


def changes_for(features: set[str]) -> list[str]:
    """Overrides that switch features on."""
    changes = [change for name in sorted(features) for change in FEATURES[name]]
    if "computation" in features and features & {"energy", "budget"}:
        changes.append("energy.compute_j_per_tflop={min=2.0,max=5.0}")
    return changes


@st.composite
def feature_sets(draw: st.DrawFn) -> set[str]:
    """Any combination of features that a scenario of several families may have together."""
    features = draw(st.sets(st.sampled_from(sorted(FEATURES))))
    if "trace" in features:
        features -= {"mobility", "fading", "ergodic"}
    if "unshared" in features:
        features -= {"multicast"}
    return features - {"energy" if "budget" in features else "", "fading" if "ergodic" in features else ""}
