"""Scenarios and fleets for tests, and their translation into the oracles' plain numbers and back."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

import oracle
import plain
from emutune.scenario import Scenario, load_scenario
from emutune.step import Plan, Situation, plan_of_wish, situation_of
from emutune.world import Carried, Episode, Outcome, State, World, build_world, observe, reset, serve, step

OTHER = (
    "families.others=[{size_gb=4.0,layers=12,parameters_billion=1.0,"
    "curve={quadratic=0.0,linear=-9.0,constant=30.0}}]"
)
EVERYTHING = {"computation", "budget", "memory", "privacy", "activity"}

reset_compiled = jax.jit(reset)
serve_compiled = jax.jit(serve)


@jax.jit
def step_wish(world: World, state: State, at_server: jax.Array, wanted: jax.Array) -> tuple[State, Outcome]:
    """The step that a wish for retentions comes to."""
    return step(world, state, plan_of_wish(world.rules, observe(world, state), at_server, wanted))


def alike(world: World, at_server: bool, wanted: float) -> tuple[jax.Array, jax.Array]:
    """One wish for all UEs."""
    return jnp.full(world.ues, at_server), jnp.full(world.ues, wanted, jnp.float32)


def serve_alike(
    scenario: Scenario,
    *,
    at_server: bool,
    wanted: float = 0.8,
    cached: int = 0,
    ues: int = 1,
    gain: float = 1e-4,
) -> tuple[jax.Array, Outcome]:
    """Serve equal UEs of 0.5 W at 100 m with 400 MB each: one step from equal caches and wishes; what is held after."""
    world = build_world(edited(scenario, {"fleet.ues": ues}))
    situation = fleet_alike(ues, cached, gain)
    plan = plan_of_wish(world.rules, situation, *alike(world, at_server, wanted))
    carried, outcome = serve_compiled(world, situation, plan)
    return carried.held[:, 0], outcome


def fleet_alike(ues: int, cached: int = 0, gain: float = 1e-4) -> Situation:
    """Equal UEs of 0.5 W at 100 m with 400 MB each, in a world of one family."""
    row = {"complexity": 10.0, "data_bits": 400 * 8e6, "transmit_power_w": 0.5, "gain": gain}
    return situation_from([row] * ues, [plain.carrying(0, cached, 0.0)] * ues, 1)


def situation_from(
    rows: Sequence[dict[str, Any]],
    carried: Sequence[plain.Carried],
    families: int,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> Situation:
    """What plain numbers describe, one row a UE, as the library's situation."""
    names = {name for name, value in rows[0].items() if value is not None}
    known = {name: jnp.asarray([row[name] for row in rows]) for name in names}
    known = {name: part.astype(dtype) if part.dtype.kind == "f" else part for name, part in known.items()}
    used = [[family for family, _ in mine.emulators] for mine in carried]
    order = [mine + [family for family in range(families) if family not in mine] for mine in used]
    return situation_of(
        **known,
        progress=jnp.zeros((), dtype),
        held=jnp.asarray([[mine.of(family) for family in range(families)] for mine in carried], jnp.int32),
        age=jnp.asarray([[mine.index(family) for family in range(families)] for mine in order], jnp.int32),
        spent_j=jnp.asarray([mine.spent_j for mine in carried], dtype),
    )


def plan_from(plan: Sequence[tuple[str, int]]) -> Plan:
    """A plan of plain numbers as the library's."""
    return Plan(
        jnp.asarray([kind == "server" for kind, _ in plan]),
        jnp.asarray([layers if kind == "local" else 0 for kind, layers in plan], jnp.int32),
    )


def world_with(features: set[str], *changes: str, name: str = "families") -> Scenario:
    """A shipped scenario with features of ``plain.FEATURES`` switched on."""
    base = [OTHER] if name == "families" else []
    return load_scenario(name, [*base, *plain.changes_for(features), *changes])


def play_both(scenario: Scenario, seed: int, tasks: int) -> Iterator[tuple[dict[str, Any], Any, Any]]:
    """An episode of random wishes, by the simulator and in plain numbers; yields both at every step."""
    world, draw = build_world(scenario), np.random.default_rng(seed)
    state = reset_compiled(jax.random.key(seed), world)
    every = plain.tasks_of(state.episode)
    carried = [plain.Carried()] * scenario.fleet.ues
    for t in range(tasks):
        at_server = draw.random(scenario.fleet.ues) < 0.4
        # A little off the levels and far from where two of them are equally near.
        wanted = (draw.integers(240, 960, scenario.fleet.ues) + 0.1) / 1200
        plan = [
            plain.project(scenario, task, z, e)
            for task, z, e in zip(every[t], at_server, wanted, strict=True)
        ]
        before, (carried, expected) = carried, plain.serve(scenario, every[t], carried, plan)
        old = state
        state, outcome = step_wish(world, state, jnp.asarray(at_server), jnp.asarray(wanted, jnp.float32))
        told = {"t": t, "before": before, "plan": plan, "tasks": every[t], "state": old}
        yield told, (carried, expected), (state, outcome)


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


def assert_same(theirs: tuple[list[plain.Carried], dict[str, Any]], ours: tuple[State, Outcome]) -> None:
    """A step in plain numbers and by the simulator: what was charged, and what is carried on."""
    (carried, expected), (state, outcome) = theirs, ours
    taken, held = outcome.charge.taken, state.carried.held
    for found, name in (
        (taken.delay_s, "delay_s"),
        (taken.perplexity, "perplexity"),
        (taken.training_s, "training_s"),
        (taken.joules, "energy_j"),
        (outcome.reward, "reward"),
    ):
        np.testing.assert_allclose(found, expected[name], rtol=2e-5, atol=1e-6, err_msg=name)
    families = range(held.shape[1])
    np.testing.assert_array_equal(held, [[mine.of(family) for family in families] for mine in carried])
    np.testing.assert_allclose(state.carried.spent_j, [mine.spent_j for mine in carried], rtol=3e-5)


@dataclass(frozen=True)
class Case:
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
        held = jnp.asarray(self.fleet.cached_layers, jnp.int32)[:, None]
        return State(
            episode, Carried(held, jnp.zeros_like(held), jnp.zeros(len(held))), jnp.asarray(0, jnp.int32)
        )

    @property
    def wish(self) -> tuple[jax.Array, jax.Array]:
        """The same orders as the library's."""
        return jnp.asarray(self.at_server, bool), jnp.asarray(self.wanted, jnp.float32)

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
    # Each most is a program of its own to compile, so only a few are tried.
    high = draw(st.sampled_from([1, 3, 12, 26, 48]))
    layers = draw(st.integers(high, 48))
    low = draw(st.integers(1, high))
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
def cases(draw: st.DrawFn, base: Scenario, ues: int) -> Case:
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
    return Case(scenario, fleet, at_server, wanted)
