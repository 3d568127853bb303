"""The policy at work: reports become an observation, its decisions become leases with a prediction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool

from emutune.errors import FleetError
from emutune.fleet.server.choices import Candidate, Choice, Forecast, Opening
from emutune.fleet.server.drawn import Draws
from emutune.learning.agents import LearnedPolicy
from emutune.learning.training import load_policy
from emutune.policies import Policy
from emutune.policies.own import plain_failures
from emutune.policies.registry import baseline_policy
from emutune.scenario import Scenario
from emutune.step import (
    Models,
    Plan,
    Situation,
    at_server,
    downlink_bps,
    on_ue,
    possible_case,
    possible_plan,
    put_in_cache,
    uplink_bps,
)
from emutune.step.link import downlink_gain, parts, uplink_gain
from emutune.step.taken import share
from emutune.world import Carried, World, build_world, situation_at
from emutune.world.dynamics import during as situation_during

# More than any radio carries, and little enough for the ratio to be a number in single precision.
_MOST_BITS_PER_HZ = 50.0


class Decider:
    """A policy in its scenario, for any number of devices.

    Args:
        scenario: the world that the policy knows.
        policy: what decides.
        seed: of policies that draw, and of what is drawn for devices.
        shaped: whether links, speeds and who has a task are drawn from the scenario's laws.
        episode: how many steps belong together; as many as the scenario has tasks if not given.

    Raises:
        FleetError: the scenario is one of downloads that devices share.
    """

    def __init__(
        self,
        scenario: Scenario,
        policy: Policy,
        seed: int = 0,
        *,
        shaped: bool = False,
        episode: int | None = None,
    ) -> None:
        if scenario.download is not None and scenario.download.multicast:
            raise FleetError(
                f"scenario {scenario.name!r}: has download.multicast, but a fleet sends each device its own layers "
                "over its own connection; set download.multicast = false"
            )
        self.scenario = scenario
        world = build_world(with_episode(scenario, episode))
        # Whatever the scenario says, devices have limits.
        self._world = replace(world, rules=replace(world.rules, limits_memory=True))
        self._draws = Draws(self._world, seed)
        self.policy, self._shaped = policy, shaped
        self._key = jax.random.key(seed)

    def world(self, ues: int) -> World:
        """The scenario's world with so many UEs."""
        return replace(self._world, ues=ues)

    def decide(self, step: int, candidates: Sequence[Candidate]) -> list[Choice]:
        """One choice a device; the same for the same step and candidates."""
        world = _with_bands(self.world(len(candidates)), candidates)
        key = jax.random.fold_in(self._key, step)
        with plain_failures(self.policy):
            found = _decide(world, self.policy, self._situation(world, step, candidates), key)
            plan, stays = jax.device_get(found)
        return [
            Choice(bool(z), int(k), tuple(map(int, np.flatnonzero(kept))))
            for z, k, kept in zip(*plan, stays, strict=True)
        ]

    def forecast(
        self,
        step: int,
        candidates: Sequence[Candidate],
        choices: Sequence[Choice],
        bytes_to_move: Sequence[float],
        during: bool = False,
    ) -> list[Forecast]:
        """What the system model predicts.

        Args:
            step: which.
            candidates: as they were decided for.
            choices: what was decided.
            bytes_to_move: of the scenario, over each device's link: data, or what it lacks of an emulator.
            during: at the gains that links are shaped to in the step, instead of those that are known before it.
        """
        world = _with_bands(self.world(len(candidates)), candidates)
        plan = Plan(
            jnp.asarray([choice.at_server for choice in choices]),
            jnp.asarray([choice.layers for choice in choices], jnp.int32),
        )
        bits = 8 * jnp.asarray(bytes_to_move, jnp.float32)
        situation = self._situation(world, step, candidates, during)
        found = _forecast(world, situation, _measured(candidates), plan, bits)
        parts, known = (jax.tree.map(np.asarray, each) for each in (found, situation))
        return [
            Forecast(
                **{name: part.item(row) for name, part in parts._asdict().items()}, situation=_row(known, row)
            )
            for row in range(len(candidates))
        ]

    def _situation(
        self, world: World, step: int, candidates: Sequence[Candidate], during: bool = False
    ) -> Situation:
        """What is known of devices: what they reported, and what is drawn for them."""
        number, row = divmod(step, world.tasks)
        episode = self._draws.episode(number, [candidate.device for candidate in candidates])
        now = jnp.asarray(row)
        drawn = situation_at(world, episode, now, _carried(world, candidates))
        if during:
            drawn = situation_during(episode, now, drawn)
        if not self._shaped:
            drawn = _of_real_devices(world, drawn)
        return _reported(world, drawn, candidates)


def with_episode(scenario: Scenario, steps: int | None) -> Scenario:
    """A scenario whose episodes have so many steps; its own if None."""
    if steps is None:
        return scenario
    return scenario.model_copy(update={"fleet": scenario.fleet.model_copy(update={"tasks": steps})})


def open_decider(opening: Opening) -> Decider:
    """A decider for a run's directory, or for a rule's name, in its scenario or with links shared otherwise.

    Raises:
        FleetError: the policy is unknown, or its networks take a fixed number of UEs.
    """
    scenario, policy = opening.scenario, opening.policy
    checkpoint = checkpoint_of(policy)
    if checkpoint is not None:
        learned, header = load_policy(checkpoint)
        if isinstance(learned, LearnedPolicy) and learned.kind == "flat":
            raise FleetError(
                f"--policy {policy}: its networks are flat, for exactly {header.scenario.fleet.ues} "
                "UEs, but devices come and go; train with --network set"
            )
        scenario = header.scenario
    scenario = _with_sharing(scenario, opening.sharing)
    chosen = learned if checkpoint is not None else baseline_policy(policy, scenario, opening.retention)
    return Decider(scenario, chosen, opening.seed, shaped=opening.shaped, episode=opening.episode)


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
def _decide(
    world: World, policy: Policy, situation: Situation, key: jax.Array
) -> tuple[Plan, Bool[jax.Array, "ues families"]]:
    """A plan, and the other models of which each device that trains keeps its emulator."""
    plan = policy.decide(world, situation, key)
    # What a device that uploads would train with is of use where the server may not take its data.
    local = Plan(jnp.zeros_like(plan.at_server), plan.layers)
    there = possible_case(world.rules, situation, plan.at_server)
    layers = possible_plan(world.rules, situation, local).layers
    held, _ = put_in_cache(world.rules, situation.held, situation.age, situation.family, layers)
    others = jnp.arange(held.shape[-1]) != situation.family[..., None]
    return Plan(there, layers), (held > 0) & others & ~there[..., None]


class _Measured(NamedTuple):
    """What is known of real links beside their rates: whether the uplink's was measured, and latencies."""

    uplink: jax.Array
    upward_s: jax.Array
    downward_s: jax.Array


class _Parts(NamedTuple):
    """Of every device; see ``Forecast``."""

    rate_bps: jax.Array
    transfer_s: jax.Array
    training_s: jax.Array
    transfer_w: jax.Array
    training_w: jax.Array
    perplexity: jax.Array


@jax.jit
def _forecast(world: World, situation: Situation, measured: _Measured, plan: Plan, bits: jax.Array) -> _Parts:
    """What every device's choice comes to when so many bits are moved."""
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
    counts = 1.0 if rules.uses_energy else 0.0
    return _Parts(
        rate_bps=jnp.where(sends, upward, downward / loaders),
        transfer_s=taken.upload_s + taken.download_s + latency_s,
        training_s=taken.training_s,
        transfer_w=counts * jnp.where(plan.at_server, situation.transmit_power_w, rules.receive_w),
        training_w=counts * jnp.where(plan.at_server, 0.0, situation.compute_w),
        perplexity=taken.perplexity,
    )


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


def _carried(world: World, candidates: Sequence[Candidate]) -> Carried:
    """What devices hold, and have spent."""
    nothing, rising = [0] * world.rules.models.families, range(world.rules.models.families)
    held = [candidate.held or nothing for candidate in candidates]
    # Where a device keeps one emulator, none makes room for being old.
    age = [(world.rules.several and candidate.age) or rising for candidate in candidates]
    spent_j = _single([candidate.spent_j for candidate in candidates])
    return Carried(jnp.asarray(held, jnp.int32), jnp.asarray(age, jnp.int32), spent_j)


def _of_real_devices(world: World, drawn: Situation) -> Situation:
    """Nothing is known of a real link before it has moved something, and whoever reports a task has one."""
    middle, everywhere = world.radio.middle_gain, jnp.ones_like(drawn.gain)
    return drawn._replace(
        gain=middle * everywhere,
        downlink_gain=middle * everywhere,
        active=jnp.ones_like(drawn.active),
        distance_m=world.radio.place.distance_m.mean() * everywhere,
        approach_m=0 * everywhere,
    )


def _reported(world: World, drawn: Situation, candidates: Sequence[Candidate]) -> Situation:
    """A situation with what devices reported, and what was measured, in the place of what was drawn."""
    links = world.rules.links
    power_w = _told(candidates, "transmit_power_w", drawn.transmit_power_w)
    tflops = _told(candidates, "tflops", drawn.tflops)
    gain, downlink = (_told(candidates, "gain", each) for each in (drawn.gain, drawn.downlink_gain))
    up, down = _rates(candidates)
    # A faster device than was thought takes as much energy for an operation.
    compute_w = drawn.compute_w * jnp.where(tflops == drawn.tflops, 1.0, tflops / drawn.tflops)
    return drawn._replace(
        family=jnp.asarray([candidate.family for candidate in candidates], jnp.int32),
        complexity=_single([candidate.complexity for candidate in candidates]),
        data_bits=8 * _single([candidate.data_bytes for candidate in candidates]),
        transmit_power_w=power_w,
        gain=jnp.where(up > 0, _single(uplink_gain(links, np.asarray(power_w), _there(up))), gain),
        downlink_gain=jnp.where(down > 0, _single(downlink_gain(links, _there(down))), downlink),
        tflops=tflops,
        compute_w=_told(candidates, "compute_w", compute_w),
        memory_bits=_largest_bits(world.rules.models, candidates),
        private=jnp.asarray([candidate.private for candidate in candidates]),
    )


def _largest_bits(models: Models, candidates: Sequence[Candidate]) -> jax.Array:
    """What the largest emulator that each device can train with takes by the scenario."""
    most = [min(candidate.most_layers, models.most) for candidate in candidates]
    return models.memory_bits[jnp.asarray([candidate.family for candidate in candidates]), jnp.asarray(most)]


def _there(rates: np.ndarray) -> np.ndarray:
    """Rates that have a gain, in the place of those that were not measured too."""
    return np.where(rates > 0, rates, 1.0)


def _told(candidates: Sequence[Candidate], name: str, otherwise: jax.Array) -> jax.Array:
    """What was told of each device, or else something."""
    values = [getattr(candidate, name) for candidate in candidates]
    told = jnp.asarray([value is not None for value in values])
    return jnp.where(told, _single([value or 0.0 for value in values]), otherwise)


def _single(values: Sequence[float] | np.ndarray) -> jax.Array:
    return jnp.asarray(values, jnp.float32)


def _row(situation: Situation, device: int) -> dict[str, Any]:
    """One device's part of a situation, as JSON has words for it: what is infinite limits nothing."""
    parts = {
        name: part.item() if part.ndim == 0 else part[device].tolist()
        for name, part in situation._asdict().items()
    }
    return {name: part for name, part in parts.items() if isinstance(part, list) or math.isfinite(part)}
