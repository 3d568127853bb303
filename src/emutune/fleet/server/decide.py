"""The policy at work: reports become an observation, its decisions become leases with a prediction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from emutune.errors import FleetError
from emutune.fleet.server.choices import Candidate, Choice, Forecast
from emutune.fleet.server.links import plain_law
from emutune.learning.agents import LearnedPolicy
from emutune.learning.training import load_policy
from emutune.policies import Policy
from emutune.scenario import Scenario
from emutune.study.baselines import baseline_policy
from emutune.world import Observation, World, build_world
from emutune.world.dynamics import choose_layers
from emutune.world.link import download_delay_s, shared_rate_bps, upload_delay_s
from emutune.world.quality import task_perplexity


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
        for section in ("computation", "energy", "memory", "privacy", "activity"):
            if getattr(scenario, section) is not None:
                raise FleetError(
                    f"scenario {scenario.name!r}: has the section {section}, which devices of a fleet do not "
                    "report; use a policy for a scenario without it"
                )
        plain_law(scenario)
        self.scenario = scenario
        self._world = build_world(scenario)
        self._policy = policy
        self._key = jax.random.key(seed)

    def world(self, ues: int) -> World:
        """The scenario's world with so many UEs."""
        return replace(self._world, ues=ues)

    def decide(self, step: int, candidates: Sequence[Candidate]) -> list[Choice]:
        """One choice a device; the same for the same step and candidates."""
        world = self.world(len(candidates))
        observation = Observation(
            previous_gain=_column(candidates, "gain"),
            complexity=_column(candidates, "complexity"),
            data_bits=8 * _column(candidates, "data_bytes"),
            cached_retention=_column(candidates, "cached_layers") / world.model_layers,
            progress=jnp.asarray((step % world.tasks) / world.tasks, jnp.float32),
            transmit_power_w=_column(candidates, "transmit_power_w"),
        )
        key = jax.random.fold_in(self._key, step)
        at_server, layers = _decide(
            world, self._policy, observation, jnp.asarray(_layers_of(candidates)), key
        )
        return [
            Choice(bool(z), int(k)) for z, k in zip(np.asarray(at_server), np.asarray(layers), strict=True)
        ]

    def forecast(
        self, candidates: Sequence[Candidate], choices: Sequence[Choice], bytes_to_move: Sequence[float]
    ) -> list[Forecast]:
        """What the system model predicts.

        Args:
            candidates: as they were decided for.
            choices: what was decided.
            bytes_to_move: of the scenario, over each device's link: data, or what it lacks of an emulator.
        """
        rates, delays, perplexities = _forecast(
            self.world(len(candidates)),
            _column(candidates, "gain"),
            _column(candidates, "transmit_power_w"),
            _column(candidates, "complexity"),
            jnp.asarray([choice.at_server for choice in choices]),
            jnp.asarray([choice.layers for choice in choices], jnp.float32),
            8 * jnp.asarray(bytes_to_move, jnp.float32),
        )
        return [
            Forecast(float(rate), float(delay), float(value))
            for rate, delay, value in zip(rates, delays, perplexities, strict=True)
        ]


def open_decider(policy: str, scenario: Scenario, retention: float | None = None, seed: int = 0) -> Decider:
    """A decider for a run's directory, or for a rule's name.

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
        return Decider(header.scenario, learned, seed)
    return Decider(scenario, baseline_policy(policy, scenario, retention), seed)


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
    world: World, policy: Policy, observation: Observation, cached: jax.Array, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
    action = policy.decide(world, observation, key)
    return action.at_server, choose_layers(world, action.retention, cached)


@jax.jit
def _forecast(
    world: World,
    gain: jax.Array,
    power: jax.Array,
    complexity: jax.Array,
    at_server: jax.Array,
    layers: jax.Array,
    bits: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rate of every link in use, delay and perplexity of every device."""
    uploads, downloads = at_server & (bits > 0), ~at_server & (bits > 0)
    delays = upload_delay_s(world, bits, power, gain, uploads) + download_delay_s(
        world, bits, gain, downloads
    )
    perplexity = task_perplexity(world, layers / world.model_layers, complexity, at_server)
    return _rates(world, gain, power, uploads, downloads), delays, perplexity


def _rates(
    world: World, gain: jax.Array, power: jax.Array, uploads: jax.Array, downloads: jax.Array
) -> jax.Array:
    up, down = jnp.sum(uploads) * 1.0, jnp.sum(downloads) * 1.0
    rate = partial(
        shared_rate_bps, gain=gain, noise_w_per_hz=world.noise_w_per_hz, ergodic=world.ergodic_rate
    )
    upward = rate(world.uplink_bandwidth_hz, power, sharers=up)
    downward = rate(
        world.downlink_bandwidth_hz, world.downlink_power_w / jnp.maximum(down, 1.0), sharers=down
    )
    return jnp.where(uploads, upward, downward)


def _column(candidates: Sequence[Candidate], name: str) -> jax.Array:
    return jnp.asarray([getattr(candidate, name) for candidate in candidates], jnp.float32)


def _layers_of(candidates: Sequence[Candidate]) -> list[int]:
    return [candidate.cached_layers for candidate in candidates]
