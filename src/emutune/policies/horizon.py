"""Planning over a receding horizon: the exact cost of the step at hand, then a linear programme of expected futures.

Price lookahead takes the links' prices to be the same in all later steps. Here the prices of the next ones come
of a linear programme (HiGHS) that moves the whole fleet, with what it holds now, through the expected steps
(``expected``). With them a dynamic programme over each UE's next steps says what its cache is worth;
beyond the horizon lookahead's table does. The programme is solved anew at each decision.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from emutune.policies.base import register_policy
from emutune.policies.expected import Expectation, link_shares
from emutune.policies.kinds import Kind, mean_tflop
from emutune.policies.lookahead import Lookahead, plan_lookahead, present_step
from emutune.policies.worth import (
    LaterPrices,
    TaskCosts,
    held_by,
    task_costs,
    worth_before,
    worth_of_kept,
    worth_of_renewed,
)
from emutune.scenario import Scenario
from emutune.world import Action, Observation, World

# More gain nothing: expectations say little about who will wait for what.
STEPS = 3


@register_policy
@dataclass(frozen=True)
class Horizon:
    """Decides by a linear programme over the next steps; see ``plan_horizon``.

    Attributes:
        steps: of the horizon, the present one included.
        base: worth of caches beyond the horizon, and how a step's choice is found.
        prices: of later steps, which the programme's take the place of; their sum is kept, since a
            programme of expectations does not know that a step lasts as long as its slowest UE.
    """

    steps: int = field(metadata={"static": True})
    base: Lookahead
    prices: LaterPrices

    def decide(self, world: World, observation: Observation, key: Key[Array, ""]) -> Action:
        """See ``Policy.decide``."""
        if observation.complexity.ndim > 1:
            return jax.vmap(lambda one: self.decide(world, one, key))(observation)
        return self.base.choose(world, observation, *self.later(world, observation))

    def later(
        self, world: World, observation: Observation
    ) -> tuple[Float[Array, "ues"], Float[Array, "ues levels"]]:
        """As ``Lookahead.later``, with the programme's prices."""
        shadow = self.base.shadow_per_j(world, observation)
        present = present_step(world, observation)
        last = jnp.minimum(present + self.steps, world.tasks) - 1
        after = self.base.table_of(world, observation, last, shadow)
        shares = self.shares(world, observation, after, shadow)
        kinds = _kinds_of(world, observation, shadow)

        def before(after: Array, now: tuple[Array, Array]) -> tuple[Array, None]:
            share, step = now
            prices = LaterPrices(share[0], share[1], self.prices.background_s)
            costs = jax.vmap(lambda kind: task_costs(world, self.base.most, Kind(**kind), prices))(kinds)
            worth = jax.vmap(partial(worth_before, world))(costs, after)
            return jnp.where(step <= last, worth, after), None

        coming = (shares[1:], present + jnp.arange(1, self.steps))
        worth, _ = jax.lax.scan(before, after, coming, reverse=True)
        family, _, _ = held_by(world, observation)
        own = worth[jnp.arange(worth.shape[0]), family]
        return worth_of_kept(world, observation, own), worth_of_renewed(world, observation, own)

    def shares(
        self,
        world: World,
        observation: Observation,
        after: Float[Array, "ues families families levels"],
        shadow_per_j: Float[Array, "ues"] | None,
    ) -> Float[Array, "steps 2"]:
        """Prices of uplink and downlink in the coming steps; lookahead's own if the solver fails."""
        kinds = _kinds_of(world, observation, shadow_per_j)
        background = self.prices.background_s

        def priced(price: float) -> TaskCosts:
            both = LaterPrices(jnp.float32(price), jnp.float32(price), background)
            return jax.vmap(lambda kind: task_costs(world, self.base.most, Kind(**kind), both))(kinds)

        free, dear = priced(0.0), priced(1.0)
        # Where data may not leave, uploads cost infinitely much at any price.
        barred = jnp.isinf(free.upload)
        upload_delay = jnp.where(barred, 0.0, dear.upload - jnp.where(barred, 0.0, free.upload))
        family, held_family, layers = held_by(world, observation)
        chance = world.devices.task_probability
        known = {
            "local": free.local,
            "upload": free.upload,
            "sent": free.layer[..., 0],
            "allowed": free.allowed,
            "upload_delay": upload_delay,
            "layer_delay": (dear.layer - free.layer)[..., 0],
            "family": family,
            "held_family": held_family,
            "held": layers,
            "after": after,
            "stays": jnp.float32(1.0) if world.families is None else world.families.persistence,
            "active": jnp.float32(1.0) if chance is None else chance,
            "delta": jnp.asarray(world.delta_download),
            "left": world.tasks - present_step(world, observation),
        }
        own = jnp.stack([self.prices.upload, self.prices.download])
        shape = jax.ShapeDtypeStruct((self.steps, 2), jnp.float32)
        return jax.pure_callback(partial(_solve, self.steps), shape, known, own, vmap_method="sequential")


def plan_horizon(scenario: Scenario, world: World, prices: LaterPrices, *, steps: int = STEPS) -> Horizon:
    """A horizon before whose end prices are the programme's, and after it lookahead's.

    Args:
        scenario: says how many levels there are.
        world: the same as arrays.
        prices: of lookahead, as found by search.
        steps: of the horizon, at least 1; with 1 it decides as lookahead does.

    Raises:
        ValueError: there are no steps.
    """
    if steps < 1:
        raise ValueError(f"steps: a horizon has at least 1 step, got {steps}")
    return Horizon(steps, plan_lookahead(scenario, world, prices), prices)


def _solve(steps: int, known: dict[str, Any], own: Any) -> np.ndarray:
    # NumPy only: JAX within a callback can wait for the very thread that it runs on.
    arrays = {name: np.asarray(part) for name, part in known.items()}
    own = np.asarray(own)
    shares = link_shares(Expectation(**arrays), steps)
    if shares is None:
        return np.broadcast_to(own, (steps, 2)).astype(np.float32)
    return (shares * own.sum()).astype(np.float32)


def _kinds_of(
    world: World, observation: Observation, shadow_per_j: Float[Array, "ues"] | None
) -> dict[str, Array | None]:
    """Every UE as a kind of its own, as ``Kind``'s fields."""
    device, energy = observation.device, world.devices.energy
    seconds = joules = private = None
    if device.tflops is not None and world.devices.computation is not None:
        seconds = mean_tflop(world) / device.tflops
        if energy is not None and device.compute_w is not None:
            price = -energy.weight_per_j if shadow_per_j is None else shadow_per_j - energy.weight_per_j
            joules = price / world.ues * device.compute_w * seconds
    if device.private is not None:
        private = device.private.astype(jnp.float32)
    return {
        "gain": observation.previous_gain,
        "seconds": seconds,
        "joules": joules,
        "memory_bits": device.memory_bits,
        "private": private,
    }
