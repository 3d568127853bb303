"""What sets UEs apart beside their radio: speed, power, memory, privacy, and whether they have a task.

Each is a feature of its own, and what is off is the same for all, so that it is not drawn.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from emutune.scenario import Scenario, Spread
from emutune.world.draws import Draw, bounds_of, key_of


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Same:
    """All have the same, which a situation knows to be so: nothing is drawn, and nothing of it is in a program."""

    mean: float = field(metadata={"static": True})
    varies: ClassVar[bool] = False

    @property
    def bounds(self) -> Float[Array, "2"]:
        """Twice the same."""
        return self.quantile(jnp.zeros(2))

    def quantile(self, share: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
        """The same at each share."""
        return jnp.full(share.shape, self.mean)

    def draw(self, key: Key[Array, ""], shape: tuple[int, ...]) -> None:
        """Nothing."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SpreadLaw:
    """Uniform over an interval, or in the logarithm."""

    bounds: Float[Array, "2"]
    logarithmic: Bool[Array, ""]
    varies: ClassVar[bool] = True

    def quantile(self, share: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
        """The value below which such a share of the distribution lies."""
        low, high = self.bounds
        return jnp.where(self.logarithmic, low * (high / low) ** share, low + (high - low) * share)

    def draw(self, key: Key[Array, ""], shape: tuple[int, ...]) -> Float[Array, "..."]:
        """Independent draws of the given shape."""
        return self.quantile(jax.random.uniform(key, shape))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Some:
    """So many of the UEs, whichever."""

    count: Float[Array, ""]
    varies: ClassVar[bool] = True

    def draw(self, key: Key[Array, ""], shape: tuple[int, ...]) -> Bool[Array, "..."]:
        """Which of them."""
        return jnp.argsort(jax.random.uniform(key, shape)) < self.count


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Chance:
    """Each by itself with the same probability, its mean."""

    mean: Float[Array, ""]
    varies: ClassVar[bool] = True

    def draw(self, key: Key[Array, ""], shape: tuple[int, ...]) -> Bool[Array, "..."]:
        """Independent draws of the given shape."""
        return jax.random.bernoulli(key, self.mean, shape)


class DeviceLaws(NamedTuple):
    """From which UEs are drawn, and which of them have a task; where a feature is off, its law is neutral."""

    tflops: SpreadLaw | Same
    j_per_tflop: SpreadLaw | Same
    memory_bits: SpreadLaw | Same
    private: Some | Same
    active: Chance | Same


class Devices(NamedTuple):
    """What each UE is for a whole episode, as far as UEs differ in it; see ``Situation``."""

    tflops: Float[Array, "*batch ues"] | None = None
    compute_w: Float[Array, "*batch ues"] | None = None
    memory_bits: Float[Array, "*batch ues"] | None = None
    private: Bool[Array, "*batch ues"] | None = None


def build_devices(scenario: Scenario) -> DeviceLaws:
    """The laws of a scenario."""
    computation, energy, memory = scenario.computation, scenario.energy, scenario.memory
    privacy, activity, real = scenario.privacy, scenario.activity, partial(jnp.asarray, dtype=jnp.float32)
    return DeviceLaws(
        tflops=_spread(computation.device_tflops if computation else None, math.inf),
        j_per_tflop=_spread(energy.compute_j_per_tflop if energy else None, 0.0),
        memory_bits=_spread(memory.device_gb if memory else None, math.inf, 8e9),
        private=Some(real(scenario.private_ues)) if privacy else Same(0.0),
        active=Chance(real(activity.task_probability)) if activity else Same(1.0),
    )


def draw_devices(key: Key[Array, ""], laws: DeviceLaws, ues: int) -> Devices:
    """The UEs of one episode."""

    def drawn(law: SpreadLaw | Some | Same, draw: Draw) -> Array | None:
        return law.draw(key_of(key, draw), (ues,))

    tflops, j_per_tflop = drawn(laws.tflops, Draw.SPEED), drawn(laws.j_per_tflop, Draw.ENERGY)
    return Devices(
        tflops=tflops,
        compute_w=None if tflops is None or j_per_tflop is None else j_per_tflop * tflops,
        memory_bits=drawn(laws.memory_bits, Draw.MEMORY),
        private=drawn(laws.private, Draw.PRIVACY),
    )


def _spread(wanted: Spread | None, otherwise: float, scale: float = 1.0) -> SpreadLaw | Same:
    if wanted is None:
        return Same(otherwise)
    return SpreadLaw(bounds_of(wanted, scale), jnp.asarray(wanted.law == "log_uniform"))
