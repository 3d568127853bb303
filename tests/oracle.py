"""One step of the system model, written from the paper's equations and nothing else.

Slow on purpose: plain float64 numbers, one UE at a time, one function an equation. It shares no line with
the library, so that agreement between the two means something.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np

BITS_PER_BYTE = 8


@dataclass(frozen=True)
class World:
    """The numbers of a scenario that one step needs, in SI units; the reward counts delay in minutes."""

    uplink_bandwidth_hz: float = 1e5
    downlink_bandwidth_hz: float = 1e6
    noise_w_per_hz: float = 10 ** (-174 / 10) / 1000
    downlink_power_w: float = 60.0
    model_bytes: float = 10.8e9
    layers: int = 32
    retention_lowest: float = 0.2
    retention_highest: float = 0.8
    curve: tuple[float, float, float] = (25.2, -43.1, 31.9)
    iota: float = 10.0
    factor: str = "rising"
    perplexity_weight: float = -0.092
    delay_weight_per_minute: float = -0.015
    hold_tolerance: float = 0.0


@dataclass(frozen=True)
class Fleet:
    """What the UEs bring to one step: one entry a UE; ``cached_layers`` is 0 where nothing is cached."""

    power_w: np.ndarray
    gain: np.ndarray
    data_bytes: np.ndarray
    complexity: np.ndarray
    cached_layers: np.ndarray


@dataclass
class Outcome:
    """What one step yields: lists hold one entry a UE, and 0 where a quantity does not apply to a UE."""

    step_delay_s: float = 0.0
    reward: float = 0.0
    delay_s: list[float] = field(default_factory=list)
    rate_bps: list[float] = field(default_factory=list)
    switched: list[bool] = field(default_factory=list)
    layers: list[int] = field(default_factory=list)
    perplexity: list[float] = field(default_factory=list)
    cached_layers: list[int] = field(default_factory=list)


def allowed_layers(world: World) -> list[int]:
    """Every whole number of layers k whose retention k/L lies inside the retention bounds."""
    lowest = Fraction(str(world.retention_lowest))
    highest = Fraction(str(world.retention_highest))
    return [k for k in range(1, world.layers + 1) if lowest <= Fraction(k, world.layers) <= highest]


def round_to_layers(world: World, wanted: float) -> int:
    """D9: the allowed number of layers whose retention is nearest to the wanted one."""
    return min(allowed_layers(world), key=lambda k: abs(k / world.layers - wanted))


def distance_to_rounding_tie(world: World, wanted: float) -> float:
    """How far the wanted retention is from a point where two numbers of layers are equally near."""
    levels = allowed_layers(world)
    ties = [(k + 0.5) / world.layers for k in levels[:-1]]
    return min((abs(wanted - tie) for tie in ties), default=math.inf)


def distance_to_hold_limit(world: World, wanted: float, cached_layers: int) -> float:
    """How far the wanted retention is from the point where a UE stops keeping the emulator it has."""
    if world.hold_tolerance == 0 or cached_layers == 0:
        return math.inf
    return abs(abs(wanted - cached_layers / world.layers) - world.hold_tolerance)


def holds(world: World, wanted: float, cached_layers: int) -> bool:
    """D9's hold: a UE keeps an emulator that is near enough to the wanted one; an empty cache is none."""
    if cached_layers == 0:
        return False
    return abs(wanted - cached_layers / world.layers) < world.hold_tolerance


def shannon_rate_bps(bandwidth_hz: float, power_w: float, gain: float, noise_w_per_hz: float) -> float:
    """Eq. 2 and Eq. 6: the rate over one UE's share of bandwidth and power."""
    snr = power_w * gain / (noise_w_per_hz * bandwidth_hz)
    return bandwidth_hz * math.log(1 + snr) / math.log(2)


def curve(world: World, retention: float) -> float:
    """The perplexity f(E) of a task of no complexity at one retention."""
    square, linear, constant = world.curve
    return square * retention**2 + linear * retention + constant


def complexity_factor(world: World, complexity: float) -> float:
    """D2: the factor g(c) on perplexity."""
    if world.factor == "rising":
        return (complexity + world.iota) / world.iota
    if world.factor == "as_printed":
        return (complexity + world.iota) / complexity
    raise ValueError(world.factor)


def choose_layers(world: World, fleet: Fleet, at_server: np.ndarray, wanted: np.ndarray) -> list[int]:
    """The layers that each local UE trains with; 0 for a UE whose task the server takes."""
    chosen = []
    for n in range(len(at_server)):
        if at_server[n]:
            chosen.append(0)
        elif holds(world, wanted[n], fleet.cached_layers[n]):
            chosen.append(int(fleet.cached_layers[n]))
        else:
            chosen.append(round_to_layers(world, wanted[n]))
    return chosen


def upload(world: World, fleet: Fleet, n: int, uploaders: int) -> tuple[float, float]:
    """Eq. 1 to 3: rate and delay of UE n, one of several that send their data."""
    share_hz = world.uplink_bandwidth_hz / uploaders
    rate = shannon_rate_bps(share_hz, fleet.power_w[n], fleet.gain[n], world.noise_w_per_hz)
    return rate, fleet.data_bytes[n] * BITS_PER_BYTE / rate


def download(world: World, fleet: Fleet, n: int, layers: int, downloaders: int) -> tuple[float, float]:
    """Eq. 5 to 7 with D1: rate and delay of UE n, one of several that fetch an emulator."""
    share_hz = world.downlink_bandwidth_hz / downloaders
    share_w = world.downlink_power_w / downloaders
    rate = shannon_rate_bps(share_hz, share_w, fleet.gain[n], world.noise_w_per_hz)
    return rate, layers / world.layers * world.model_bytes * BITS_PER_BYTE / rate


def serve(world: World, fleet: Fleet, at_server: np.ndarray, wanted: np.ndarray) -> Outcome:
    """One step of the whole system: Eq. 1 to 9, the cache and the reward."""
    chosen = choose_layers(world, fleet, at_server, wanted)
    switched = [not at_server[n] and chosen[n] != fleet.cached_layers[n] for n in range(len(chosen))]
    uploaders = sum(bool(z) for z in at_server)
    downloaders = sum(switched)

    outcome = Outcome(layers=chosen, switched=switched)
    for n in range(len(chosen)):
        if at_server[n]:
            rate, delay = upload(world, fleet, n, uploaders)
        elif switched[n]:
            rate, delay = download(world, fleet, n, chosen[n], downloaders)
        else:
            rate, delay = 0.0, 0.0
        retention = 1.0 if at_server[n] else chosen[n] / world.layers
        outcome.rate_bps.append(rate)
        outcome.delay_s.append(delay)
        outcome.perplexity.append(
            curve(world, retention) * complexity_factor(world, fleet.complexity[n])  # Eq. 9
        )
        outcome.cached_layers.append(int(fleet.cached_layers[n]) if at_server[n] else chosen[n])

    outcome.step_delay_s = max(outcome.delay_s)
    outcome.reward = (
        world.perplexity_weight * sum(outcome.perplexity) / len(chosen)
        + world.delay_weight_per_minute * outcome.step_delay_s / 60
    )
    return outcome
