"""The compiled programs behind the environments: the start of an episode, and one step of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import wraps
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped, UInt32

from emutune.errors import UsageError
from emutune.forking import refuse_fork
from emutune.scenario import Scenario, dump_scenario, load_scenario, parse_scenario
from emutune.step import Situation, plan_of_wish, retention_of
from emutune.world.dynamics import Carried, Outcome, State, during, observe, reset, step
from emutune.world.features import cached_retention, progress_feature, ue_features
from emutune.world.parameters import World

Result = TypeVar("Result")

# What is told of each UE's step, from the world, the situation that was charged, and the outcome.
_PER_UE: dict[str, Callable[[World, Situation, Outcome], Array]] = {
    "gain": lambda w, s, o: s.gain,
    "complexity": lambda w, s, o: s.complexity,
    "data_mb": lambda w, s, o: s.data_bits / 8e6,
    "transmit_power_w": lambda w, s, o: s.transmit_power_w,
    "at_server": lambda w, s, o: o.plan.at_server,
    "retention": lambda w, s, o: retention_of(w.rules.models, s.family, o.plan.layers),
    "cached_retention": lambda w, s, o: cached_retention(w, s),
    "switched": lambda w, s, o: o.switched,
    "delay_s": lambda w, s, o: o.charge.taken.delay_s,
    "perplexity": lambda w, s, o: o.charge.taken.perplexity,
}
# What there is of these depends on the world: their kind, where there are any, and what is told.
_MORE: dict[str, tuple[Any, Callable[[World], bool], Callable[[Situation, Outcome], Array]]] = {
    "family": (np.int32, lambda w: w.rules.models.families > 1, lambda s, o: s.family),
    "training_s": (np.float32, lambda w: w.rules.trains_in_time, lambda s, o: o.charge.taken.training_s),
    "energy_j": (np.float32, lambda w: w.rules.uses_energy, lambda s, o: o.charge.taken.joules),
    "active": (bool, lambda w: w.devices.active.varies, lambda s, o: s.active),
}


class Progress(NamedTuple):
    """The part of a state that a step changes; the draws of the episode stay where they are."""

    carried: Carried
    step: Int[Array, "*batch"]


class Report(NamedTuple):
    """What a step tells the caller, stacked, since each array that leaves the device costs a transfer.

    The rows of ``per_ue`` are named in ``_PER_UE``, and those of ``more`` by their keys; ``fleet`` holds the
    step's delay in s and its reward.
    """

    observation: Float[Array, "features"]
    terminated: Bool[Array, ""]
    per_ue: Float[Array, "entries ues"]
    fleet: Float[Array, "2"]
    more: dict[str, Shaped[Array, "ues"]]


class Fetched(NamedTuple):
    """A report on the host, as NumPy arrays that the caller may keep and write to."""

    observation: Float[np.ndarray, "*batch features"]
    terminated: Bool[np.ndarray, "*batch"]
    info: dict[str, Shaped[np.ndarray, "..."]]


def read_scenario(scenario: Scenario | str | Path, overrides: Iterable[str]) -> Scenario:
    """A scenario given as such, by a shipped name or by a path, with overrides applied.

    Raises:
        ScenarioError: the scenario cannot be read, or a value is invalid.
    """
    if isinstance(scenario, Scenario):
        return parse_scenario(dump_scenario(scenario), overrides=overrides, source=scenario.name)
    return load_scenario(scenario, overrides)


def check_render_mode(render_mode: str | None) -> None:
    """Take what the metadata declare, which is nothing.

    Raises:
        UsageError: a render mode is asked for.
    """
    if render_mode is not None:
        raise UsageError(f"render_mode: nothing is drawn, got {render_mode!r}; leave it out")


def plain_seed(seed: int | np.integer | None) -> int | None:
    """A seed as Gymnasium's generators take it, which refuse NumPy's integers."""
    return int(seed) if isinstance(seed, np.integer) else seed


def draw_seed(generator: np.random.Generator) -> UInt32[np.ndarray, "2"]:
    """The data of a JAX key: the 64 bits of an episode, drawn from Gymnasium's generator."""
    return generator.integers(2**32, size=2, dtype=np.uint32)


def fetch(report: Report) -> Fetched:
    """Bring a report to the host; ``info`` is named as ``OrchestrationEnv`` says."""
    observation, terminated, per_ue, fleet, more = jax.device_get(report)
    info = dict(zip(_PER_UE, np.moveaxis(per_ue, -2, 0).copy(), strict=True))
    info |= {name: info[name].astype(bool) for name in ("at_server", "switched")}
    info |= {name: more[name].astype(kind) for name, (kind, *_) in _MORE.items() if name in more}
    # Gymnasium gathers the floats of single environments as float64.
    info["step_delay_s"], info["reward"] = np.moveaxis(fleet, -1, 0).astype(np.float64)
    return Fetched(observation.copy(), terminated.copy(), info)


def _begin(seed: UInt32[Array, "2"], world: World) -> tuple[State, Float[Array, "features"]]:
    state = reset(jax.random.wrap_key_data(seed, impl="threefry2x32"), world)
    return state, _observation(world, state)


def _advance(
    world: World, state: State, at_server: Bool[Array, "ues"], retention: Float[Array, "ues"]
) -> tuple[Progress, Report]:
    known = observe(world, state)
    after, outcome = step(world, state, plan_of_wish(world.rules, known, at_server, retention))
    true = during(state.episode, state.step, known)
    per_ue = [told(world, true, outcome) for told in _PER_UE.values()]
    report = Report(
        observation=_observation(world, after),
        terminated=after.step >= world.tasks,
        per_ue=jnp.stack(per_ue).astype(jnp.float32),
        fleet=jnp.stack([outcome.charge.delay_s, outcome.reward]),
        more={name: told(true, outcome) for name, (_, is_on, told) in _MORE.items() if is_on(world)},
    )
    return Progress(after.carried, after.step), report


def _observation(world: World, state: State) -> Float[Array, "features"]:
    """s1 feature by feature, as the paper lists it, what more there is, then the progress."""
    seen = observe(world, state)
    return jnp.append(ue_features(world, seen).T.ravel(), progress_feature(seen))


def _merge(begins: Bool[Array, ""], fresh: State, state: State) -> State:
    """A state that begins anew or goes on."""
    return jax.tree.map(lambda new, old: jnp.where(begins, new, old), fresh, state)


def _compiled(function: Callable[..., Result]) -> Callable[..., Result]:
    """Compile for 32 bits, whatever the default of the learner beside it, and stop where JAX would hang.

    Spaces promise float32, and a seed's episode must not depend on that default.
    """
    program = jax.jit(function)

    @wraps(function)
    def call(*args: Any) -> Result:
        refuse_fork()
        with jax.enable_x64(False):
            return program(*args)

    return call


begin = _compiled(_begin)
begin_many = _compiled(jax.vmap(_begin, in_axes=(0, None)))
advance = _compiled(_advance)
advance_many = _compiled(jax.vmap(_advance, in_axes=(None, 0, 0, 0)))
merge_many = _compiled(jax.vmap(_merge))
