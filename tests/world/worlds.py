"""Random scenarios and fleets for hypothesis, and their translation into the oracle's plain numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
import oracle
from hypothesis import strategies as st

from emutune.scenario import Scenario
from emutune.world import Action, Cache, Episode, State


def edited(scenario: Scenario, changes: dict[str, object]) -> Scenario:
    """A scenario with some fields changed, each named by its dotted path."""
    tree = scenario.model_dump()
    for path, value in changes.items():
        *sections, name = path.split(".")
        node = tree
        for section in sections:
            node = node[section]
        node[name] = value
    return Scenario.model_validate(tree)


def as_oracle(scenario: Scenario) -> oracle.World:
    """The numbers of a scenario as the oracle wants them, with the units converted anew."""
    return oracle.World(
        uplink_bandwidth_hz=scenario.radio.uplink_bandwidth_hz,
        downlink_bandwidth_hz=scenario.radio.downlink_bandwidth_hz,
        noise_w_per_hz=math.pow(10, scenario.radio.noise_dbm_per_hz / 10) / 1000,
        downlink_power_w=scenario.radio.downlink_power_w,
        model_bytes=scenario.model.size_gb * 1e9,
        layers=scenario.model.layers,
        retention_lowest=scenario.retention.min,
        retention_highest=scenario.retention.max,
        curve=(
            scenario.quality.curve.quadratic,
            scenario.quality.curve.linear,
            scenario.quality.curve.constant,
        ),
        iota=scenario.quality.complexity_weight,
        factor=scenario.quality.complexity_factor,
        perplexity_weight=scenario.reward.perplexity_weight,
        delay_weight_per_minute=scenario.reward.delay_weight_per_min,
        hold_tolerance=scenario.retention.hold_tolerance,
    )


@dataclass(frozen=True)
class Situation:
    """One step of some world: the fleet's tasks, its caches, and what it is told to do."""

    scenario: Scenario
    fleet: oracle.Fleet
    at_server: np.ndarray
    wanted: np.ndarray

    @property
    def state(self) -> State:
        """The same tasks and caches as a state of the library, at the first step."""
        gain = jnp.asarray(self.fleet.gain, jnp.float32)
        episode = Episode(
            gain=jnp.stack([jnp.ones_like(gain), gain]),
            complexity=jnp.asarray(self.fleet.complexity, jnp.float32)[None],
            data_bits=jnp.asarray(self.fleet.data_bytes * 8, jnp.float32)[None],
            transmit_power_w=jnp.asarray(self.fleet.power_w, jnp.float32),
        )
        cache = Cache(jnp.asarray(self.fleet.cached_layers, jnp.int32))
        return State(episode, cache, jnp.asarray(0, jnp.int32))

    @property
    def action(self) -> Action:
        """The same orders as an action of the library."""
        return Action(jnp.asarray(self.at_server, bool), jnp.asarray(self.wanted, jnp.float32))

    @property
    def is_near_a_threshold(self) -> bool:
        """Whether float32 and float64 may round or hold differently, so that they cannot be compared."""
        world = as_oracle(self.scenario)
        return any(
            oracle.distance_to_rounding_tie(world, wanted) < 1e-4
            or oracle.distance_to_hold_limit(world, wanted, cached) < 1e-4
            for wanted, cached in zip(self.wanted, self.fleet.cached_layers, strict=True)
        )


def decades(low: float, high: float) -> st.SearchStrategy[float]:
    """Numbers spread evenly over the orders of magnitude between two positive bounds."""
    return st.floats(math.log(low), math.log(high)).map(math.exp)


@st.composite
def curves(draw: st.DrawFn) -> dict[str, float]:
    """Perplexity curves by their lowest point, well above 0: cancellation there would only test float32."""
    steepness = draw(st.floats(0, 60))
    vertex = draw(st.floats(0.2, 1.2))
    lowest = draw(st.floats(5, 40))
    return {
        "quadratic": steepness,
        "linear": -2 * steepness * vertex,
        "constant": steepness * vertex**2 + lowest,
    }


@st.composite
def level_choices(draw: st.DrawFn) -> tuple[int, float, float]:
    """A number of layers, and retention bounds with at least one whole level between them."""
    layers = draw(st.integers(1, 48))
    low = draw(st.integers(1, layers))
    high = draw(st.integers(low, layers))
    # Bounds beside the levels as well as on them, always as decimals that a person could write.
    slack = draw(st.sampled_from([0.0, 0.3, 0.9])) / layers
    lowest = math.floor((low / layers - slack) * 1e6) / 1e6
    highest = math.ceil((high / layers + slack) * 1e6) / 1e6
    return layers, max(lowest, 1e-6), min(highest, 1.0)


@st.composite
def scenarios(draw: st.DrawFn, base: Scenario, ues: int) -> Scenario:
    """Worlds of ``ues`` UEs and one task, random in every number that a step reads."""
    layers, lowest, highest = draw(level_choices())
    return edited(
        base,
        {
            "fleet.ues": ues,
            "fleet.tasks": 1,
            "model": {"size_gb": draw(decades(0.1, 500)), "layers": layers},
            "retention": {
                "min": lowest,
                "max": highest,
                "hold_tolerance": draw(st.sampled_from([0.0, 0.0, 0.03, 0.2])),
            },
            "radio.uplink_bandwidth_hz": draw(decades(1e4, 1e9)),
            "radio.downlink_bandwidth_hz": draw(decades(1e4, 1e9)),
            "radio.downlink_power_w": draw(decades(0.1, 200)),
            "radio.noise_dbm_per_hz": draw(st.floats(-180, -100)),
            "quality": {
                "curve": draw(curves()),
                "complexity_weight": draw(decades(0.5, 50)),
                "complexity_factor": draw(st.sampled_from(["rising", "as_printed"])),
            },
            "reward.perplexity_weight": draw(st.floats(-2, -0.001)),
            "reward.delay_weight_per_min": draw(st.floats(-2, -0.001)),
        },
    )


@st.composite
def situations(draw: st.DrawFn, base: Scenario, ues: int) -> Situation:
    """One step of a random world, with caches that may be empty and any mix of orders."""

    def each(values: st.SearchStrategy) -> st.SearchStrategy[np.ndarray]:
        return st.lists(values, min_size=ues, max_size=ues).map(np.array)

    scenario = draw(scenarios(base, ues))
    levels = oracle.allowed_layers(as_oracle(scenario))
    fleet = oracle.Fleet(
        power_w=draw(each(decades(0.01, 5))),
        gain=draw(each(decades(1e-9, 1e-1))),
        data_bytes=draw(each(decades(1e6, 1e10))),
        complexity=draw(each(decades(0.5, 50))),
        cached_layers=draw(each(st.sampled_from([0, *levels]))),
    )
    at_server = draw(st.sampled_from([st.just(True), st.just(False), st.booleans()]).flatmap(each))
    # Most often a wish for the emulator that is cached already: with ever new wishes nobody would hold one.
    kept = draw(each(st.booleans()))
    wanted = np.where(kept, fleet.cached_layers / scenario.model.layers, draw(each(st.floats(0, 1))))
    return Situation(scenario, fleet, at_server, wanted)
