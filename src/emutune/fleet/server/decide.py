"""The policy at work: reports become an observation, its decisions become leases with a prediction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from emutune.errors import FleetError
from emutune.fleet.server.choices import Candidate, Choice, Forecast
from emutune.fleet.server.links import plain_law
from emutune.learning.agents import LearnedPolicy
from emutune.learning.training import load_policy
from emutune.policies import Policy
from emutune.policies.own import plain_failures
from emutune.policies.registry import baseline_policy
from emutune.scenario import Scenario
from emutune.step import (
    Plan,
    Situation,
    at_server,
    downlink_bps,
    empty_cache,
    on_ue,
    possible_case,
    possible_plan,
    situation_of,
    uplink_bps,
)
from emutune.step.link import downlink_gain, parts, uplink_gain
from emutune.step.taken import share
from emutune.world import World, build_world

# More than any radio carries, and little enough for the ratio to be a number in single precision.
_MOST_BITS_PER_HZ = 50.0


class Decider:
    """A policy in its scenario, for any number of devices.

    Args:
        scenario: the world that the policy knows.
        policy: what decides.
        seed: of policies that draw.

    Raises:
        FleetError: the scenario is one of several foundation models, of devices that differ in what a fleet
            does not know of its own, or of links that a fleet cannot have.
    """

    def __init__(self, scenario: Scenario, policy: Policy, seed: int = 0) -> None:
        if scenario.families is not None:
            raise FleetError(
                f"scenario {scenario.name!r}: has several foundation models, but a fleet serves one; use a policy "
                "for a scenario without the section families"
            )
        for section in ("computation", "energy"):
            if getattr(scenario, section) is not None:
                raise FleetError(
                    f"scenario {scenario.name!r}: has the section {section}, which devices of a fleet do not "
                    "report; use a policy for a scenario without it"
                )
        if scenario.download is not None and scenario.download.multicast:
            raise FleetError(
                f"scenario {scenario.name!r}: has download.multicast, but a fleet sends each device its own layers "
                "over its own connection; set download.multicast = false"
            )
        plain_law(scenario)
        self.scenario = scenario
        world = build_world(scenario)
        # Whatever the scenario says, devices have limits.
        self._world = replace(world, rules=replace(world.rules, limits_memory=True))
        self._policy = policy
        self._key = jax.random.key(seed)

    def world(self, ues: int) -> World:
        """The scenario's world with so many UEs."""
        return replace(self._world, ues=ues)

    def decide(self, step: int, candidates: Sequence[Candidate]) -> list[Choice]:
        """One choice a device; the same for the same step and candidates."""
        world = _with_bands(self.world(len(candidates)), candidates)
        key = jax.random.fold_in(self._key, step)
        progress = (step % world.tasks) / world.tasks
        with plain_failures(self._policy):
            plan = jax.device_get(_decide(world, self._policy, _situation(world, progress, candidates), key))
        return [Choice(bool(z), int(k)) for z, k in zip(*plan, strict=True)]

    def forecast(
        self, candidates: Sequence[Candidate], choices: Sequence[Choice], bytes_to_move: Sequence[float]
    ) -> list[Forecast]:
        """What the system model predicts.

        Args:
            candidates: as they were decided for.
            choices: what was decided.
            bytes_to_move: of the scenario, over each device's link: data, or what it lacks of an emulator.
        """
        world = _with_bands(self.world(len(candidates)), candidates)
        plan = Plan(
            jnp.asarray([choice.at_server for choice in choices]),
            jnp.asarray([choice.layers for choice in choices], jnp.int32),
        )
        bits = 8 * jnp.asarray(bytes_to_move, jnp.float32)
        situation, measured = _situation(world, 0.0, candidates), _measured(candidates)
        rates, delays, perplexities = _forecast(world, situation, measured, plan, bits)
        return [
            Forecast(float(rate), float(delay), float(value))
            for rate, delay, value in zip(rates, delays, perplexities, strict=True)
        ]


def open_decider(
    policy: str,
    scenario: Scenario,
    retention: float | None = None,
    seed: int = 0,
    sharing: Literal["equal", "none"] | None = None,
) -> Decider:
    """A decider for a run's directory, or for a rule's name, in its scenario or with links shared otherwise.

    Raises:
        FleetError: the policy is unknown, or its networks take a fixed number of UEs.
    """
    checkpoint = checkpoint_of(policy)
    if checkpoint is not None:
        learned, header = load_policy(checkpoint)
        if isinstance(learned, LearnedPolicy) and learned.kind == "flat":
            raise FleetError(
                f"--policy {policy}: its networks are flat, for exactly {header.scenario.fleet.ues} "
                "UEs, but devices come and go; train with --network set"
            )
        return Decider(_with_sharing(header.scenario, sharing), learned, seed)
    scenario = _with_sharing(scenario, sharing)
    return Decider(scenario, baseline_policy(policy, scenario, retention), seed)


def _with_sharing(scenario: Scenario, sharing: Literal["equal", "none"] | None) -> Scenario:
    radio = scenario.radio.model_copy(update={"sharing": sharing or scenario.radio.sharing})
    return scenario.model_copy(update={"radio": radio})


def checkpoint_of(policy: str) -> Path | None:
    """The checkpoint that a policy is read from; None if it is a rule's name.

    Raises:
        FleetError: it is a directory without one.
    """
    path = Path(policy)
    if not path.exists():
        return None
    checkpoints = sorted(path.glob("**/checkpoint.safetensors")) if path.is_dir() else [path]
    if not checkpoints:
        raise FleetError(f"--policy {policy}: holds no checkpoint; give the directory of emutune train")
    return checkpoints[0]


@jax.jit
def _decide(world: World, policy: Policy, situation: Situation, key: jax.Array) -> Plan:
    plan = policy.decide(world, situation, key)
    # What a device that uploads would train with is of use where the server may not take its data.
    local = Plan(jnp.zeros_like(plan.at_server), plan.layers)
    there = possible_case(world.rules, situation, plan.at_server)
    return Plan(there, possible_plan(world.rules, situation, local).layers)


class _Measured(NamedTuple):
    """What is known of real links beside their rates: whether the uplink's was measured, and latencies."""

    uplink: jax.Array
    upward_s: jax.Array
    downward_s: jax.Array


@jax.jit
def _forecast(
    world: World, situation: Situation, measured: _Measured, plan: Plan, bits: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rate of every link in use, delay and perplexity of every device, when so many bits are moved."""
    rules, links = world.rules, world.rules.links
    sends, loads = plan.at_server & (bits > 0), ~plan.at_server & (bits > 0)
    downward = downlink_bps(links, situation.downlink_gain)
    # A real catalogue's emulators share layers, and what a device lacks of one is known.
    local = on_ue(rules, situation, plan.layers)._replace(download_s=bits / downward)
    uploaders = jnp.sum(sends, dtype=jnp.float32)
    # A real bottleneck is split as it is: no part of it has a better ratio than the whole.
    power_w = situation.transmit_power_w / jnp.where(
        measured.uplink, jnp.maximum(parts(links, uploaders), 1.0), 1.0
    )
    uploaded = situation._replace(data_bits=bits, transmit_power_w=power_w)
    taken = share(rules, situation, plan, local, at_server(rules, uploaded, uploaders))
    loaders = jnp.maximum(parts(links, jnp.sum(loads, dtype=jnp.float32)), 1.0)
    upward = uplink_bps(links, power_w, situation.gain, uploaders)
    latency_s = jnp.where(sends, measured.upward_s, 0.0) + jnp.where(loads, measured.downward_s, 0.0)
    return jnp.where(sends, upward, downward / loaders), taken.delay_s + latency_s, taken.perplexity


def _measured(candidates: Sequence[Candidate]) -> _Measured:
    up, down = [one.uplink for one in candidates], [one.downlink for one in candidates]
    latencies = [jnp.asarray([link.latency_s if link else 0.0 for link in links]) for links in (up, down)]
    return _Measured(jnp.asarray([link is not None for link in up]), *latencies)


def _with_bands(world: World, candidates: Sequence[Candidate]) -> World:
    """A world whose bands are wide enough for the rates that were measured."""
    links, rates = world.rules.links, _rates(candidates)
    up, down = (
        jnp.maximum(hertz, rate.max() / _MOST_BITS_PER_HZ)
        for hertz, rate in zip((links.uplink_bandwidth_hz, links.downlink_bandwidth_hz), rates, strict=True)
    )
    links = replace(links, uplink_bandwidth_hz=up, downlink_bandwidth_hz=down)
    return replace(world, rules=replace(world.rules, links=links))


def _rates(candidates: Sequence[Candidate]) -> tuple[np.ndarray, np.ndarray]:
    """Of uplinks and downlinks, as measured; 0 where they were not."""
    pairs = [(candidate.uplink, candidate.downlink) for candidate in candidates]
    up, down = np.array([[link.rate_bps if link else 0.0 for link in pair] for pair in pairs]).T
    return up, down


def _situation(world: World, progress: float, candidates: Sequence[Candidate]) -> Situation:
    """What devices reported; a fleet knows of one foundation model and of no other differences yet."""
    _, age = empty_cache(world.rules, len(candidates))
    links, told, power_w = (
        world.rules.links,
        _column(candidates, "gain"),
        _column(candidates, "transmit_power_w"),
    )
    up, down = _rates(candidates)
    held = jnp.asarray([[candidate.cached_layers] for candidate in candidates], jnp.int32)
    return situation_of(
        progress=jnp.asarray(progress, jnp.float32),
        complexity=_column(candidates, "complexity"),
        data_bits=8 * _column(candidates, "data_bytes"),
        transmit_power_w=power_w,
        gain=jnp.where(up > 0, _single(uplink_gain(links, np.asarray(power_w), up)), told),
        downlink_gain=jnp.where(down > 0, _single(downlink_gain(links, down)), told),
        memory_bits=_largest_bits(world, candidates),
        private=jnp.asarray([candidate.private for candidate in candidates]),
        held=held,
        age=age,
    )


def _largest_bits(world: World, candidates: Sequence[Candidate]) -> jax.Array:
    """What the largest emulator that each device can train with takes by the scenario."""
    bits = world.rules.models.memory_bits[0]
    return bits[jnp.asarray([min(candidate.most_layers, len(bits) - 1) for candidate in candidates])]


def _single(values: np.ndarray) -> jax.Array:
    return jnp.asarray(values, jnp.float32)


def _column(candidates: Sequence[Candidate], name: str) -> jax.Array:
    return jnp.asarray([getattr(candidate, name) for candidate in candidates], jnp.float32)
