"""Bounds on the return of every policy, for a batch of the simulator's episodes."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from emutune.bounds.prices import price_bound
from emutune.bounds.programme import Draws, Method, cost_bound, episode_costs
from emutune.errors import UsageError
from emutune.scenario import Scenario
from emutune.world import Device, Episode, build_world, possible_levels

# Tasks times UEs times emulators: 64 UEs of the world of three families already take more than a minute.
_LARGEST_LINEAR = 100_000


def certified_bounds(
    scenario: Scenario,
    episodes: Episode,
    *,
    method: Method | None = None,
    time_limit_s: float = 60.0,
    progress: Callable[[int], None] | None = None,
) -> Float[np.ndarray, "episodes"]:
    """Upper bounds on the return of any policy, one per episode (negative numbers).

    Args:
        scenario: the world the episodes were drawn in.
        episodes: a batch of episodes, leading axis the episodes.
        method: ``"linear"``; tighter and slower, ``"integer"``; within some hundredths of a percent of linear
            and far faster in large fleets, ``"prices"``. Linear if not given, and prices where the linear
            programme would take minutes.
        time_limit_s: limit of each integer programme, in seconds.
        progress: called with 1 after each episode.

    Raises:
        UsageError: the method does not exist.
        BoundError: the solver failed.
    """
    if method not in ("linear", "integer", "prices", None):
        raise UsageError(f"method: must be 'linear', 'integer' or 'prices', got {method!r}")
    bounds = []
    more = _draws(scenario, episodes)
    family = None if episodes.family is None else np.asarray(episodes.family)
    drawn = [
        np.asarray(part, np.float64)
        for part in (episodes.gain, episodes.complexity, episodes.data_bits, episodes.transmit_power_w)
    ]
    for index in range(len(drawn[0])):
        gain, complexity, data_bits, power_w = (part[index] for part in drawn)
        of_episode = None if family is None else family[index]
        draws = Draws(*(None if part is None else part[index] for part in more))
        costs = episode_costs(scenario, gain[1:], complexity, data_bits, power_w, of_episode, draws)
        chosen = method or ("linear" if costs.local_cost.size <= _LARGEST_LINEAR else "prices")
        bounds.append(
            -(price_bound(costs) if chosen == "prices" else cost_bound(costs, chosen, time_limit_s))
        )
        if progress is not None:
            progress(1)
    return np.array(bounds)


def _draws(scenario: Scenario, episodes: Episode) -> Draws:
    """What more a batch of episodes draws, as float64 on the host."""
    device, active, downlink = episodes.device, episodes.active, episodes.downlink_gain
    most = None
    if device.memory_bits is not None:
        world = build_world(scenario)
        each = None if world.families is None else jnp.arange(len(scenario.models))
        memory = jnp.asarray(device.memory_bits)[..., None]
        _, high = possible_levels(world, each, Device(memory_bits=memory))
        most = np.asarray(high).reshape(*memory.shape[:-1], -1)

    def on_host(part: Array | None) -> Float[np.ndarray, "..."] | None:
        return None if part is None else np.asarray(part, np.float64)

    return Draws(
        active=None if active is None else np.asarray(active, bool),
        tflops=on_host(device.tflops),
        compute_w=on_host(device.compute_w),
        private=None if device.private is None else np.asarray(device.private, bool),
        most_layers=most,
        downlink_gain=None if downlink is None else on_host(downlink[:, 1:]),
    )
