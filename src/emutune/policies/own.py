"""Policies of one's own: of NumPy, asked on the host, or of JAX, compiled with the rest."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from emutune.errors import EmutuneError, UsageError
from emutune.plugins import blame
from emutune.policies.base import Policy, policy_pytree
from emutune.scenario import Scenario
from emutune.step import Plan, Situation, possible_levels, usable_layers
from emutune.step.models import look_up
from emutune.step.options import at_server, every_level
from emutune.step.rules import Rules
from emutune.world import World

_CALLBACKS = logging.getLogger("jax._src.callback")


class NamedSituation(SimpleNamespace):
    """What a policy of NumPy decides from: arrays by name, one row a UE.

    All fields of ``emutune.step.Situation`` by the same names and in the same units, and what each choice would take a
    UE that had the links to itself. Where there are columns, column k stands for k layers, from 0.

    Attributes:
        whole_layers: of the foundation model that the task asks for.
        fewest_layers: of an emulator that the UE can hold for its task.
        most_layers: of the same; below ``fewest_layers`` where none fits.
        usable_layers: of the emulator of the task's family that the UE holds; 0 for none.
        download_s: seconds until what is missing has arrived, by layers.
        training_s: seconds of training on the UE, by layers.
        perplexity: of the task on the UE, by layers.
        upload_s: seconds of the task's upload.
        server_training_s: seconds of training at the server, alone there.
        server_perplexity: of the task at the server.
    """

    @cached_property
    def random(self) -> np.random.Generator:
        """Randomness of this decision: the same for every policy, and in every run."""
        return np.random.default_rng(self.seed)


class _Host:
    """Somebody's function, asked for one fleet after another, and what went wrong last."""

    def __init__(self, name: str, decide: Callable[[NamedSituation], Any]) -> None:
        self.name, self.decide = name, decide
        self.failure: EmutuneError | None = None

    def __call__(self, named: dict[str, Array]) -> tuple[np.ndarray, np.ndarray]:
        """One decision for each fleet of any leading axes; all arrays have the same ones."""
        arrays = {name: np.asarray(value) for name, value in named.items()}
        axes = arrays["progress"].shape
        fleets = np.ndindex(axes)
        try:
            plans = [self._plan({name: value[fleet] for name, value in arrays.items()}) for fleet in fleets]
        except EmutuneError as error:
            self.failure = error
            raise
        there, layers = (np.stack(part).reshape(*axes, -1) for part in zip(*plans, strict=True))
        return there, layers

    def _plan(self, row: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        situation = NamedSituation(**row)
        try:
            answer = self.decide(situation)
        except Exception as error:
            raise UsageError(f"policy {self.name}: decide raised {blame(error)}") from error
        return self._checked(answer, situation)

    def _checked(self, answer: Any, situation: NamedSituation) -> tuple[np.ndarray, np.ndarray]:
        ues = len(situation.complexity)
        if not isinstance(answer, tuple) or len(answer) != 2:
            raise UsageError(
                f"policy {self.name}: decide must return two arrays of {ues}, at_server and layers, "
                f"got {type(answer).__name__}; return them as a tuple or as emutune.step.Plan"
            )
        there, layers = self._numbers("at_server", answer[0], ues), self._numbers("layers", answer[1], ues)
        if not np.isin(there, (0, 1)).all():
            self._refuse("at_server", "must be true or false", there, ~np.isin(there, (0, 1)))
        if (wrong := layers != np.round(layers)).any():
            remedy = "must be whole; np.round(retention * situation.whole_layers) makes them of a retention"
            self._refuse("layers", remedy, layers, wrong)
        if (wrong := (layers < 0) | (layers > situation.whole_layers)).any():
            self._refuse("layers", f"must be 0 to {situation.whole_layers.max()}", layers, wrong)
        return there.astype(bool), layers.astype(np.int32)

    def _numbers(self, part: str, value: Any, ues: int) -> np.ndarray:
        array = np.asarray(value)
        if array.shape != (ues,) or array.dtype.kind not in "biuf":
            raise UsageError(
                f"policy {self.name}: {part} must be {ues} numbers, one a UE, got {array.dtype} {array.shape}"
            )
        if array.dtype.kind == "f" and (wrong := ~np.isfinite(array)).any():
            self._refuse(part, "must be finite; guard what divides or takes logarithms", array, wrong)
        return array

    def _refuse(self, part: str, rule: str, array: np.ndarray, wrong: np.ndarray) -> None:
        ue = int(np.flatnonzero(wrong)[0])
        raise UsageError(f"policy {self.name}: {part} of UE {ue} {rule}, got {array[ue]}")


@policy_pytree
@dataclass(frozen=True)
class HostPolicy:
    """A function of a ``NamedSituation``, asked on the host at every step of compiled programs."""

    host: _Host = field(metadata={"static": True})

    def decide(self, world: World, situation: Situation, key: Key[Array, ""]) -> Plan:
        """See ``Policy.decide``."""
        if situation.complexity.ndim > 1:
            keys = jax.random.split(key, situation.complexity.shape[0])
            return jax.vmap(self.decide, (None, 0, 0))(world, situation, keys)
        shape = situation.complexity.shape
        outcome = (jax.ShapeDtypeStruct(shape, jnp.bool_), jax.ShapeDtypeStruct(shape, jnp.int32))
        named = _named(world.rules, situation) | {"seed": jax.random.key_data(key)}
        # One call for all fleets that a program serves side by side.
        return Plan(*jax.pure_callback(self.host, outcome, named, vmap_method="broadcast_all"))


@policy_pytree
@dataclass(frozen=True)
class CompiledPolicy:
    """Somebody's policy of JAX that is no pytree: a constant of the programs that it is compiled into."""

    name: str = field(metadata={"static": True})
    policy: Any = field(metadata={"static": True})

    def decide(self, world: World, situation: Situation, key: Key[Array, ""]) -> Plan:
        """See ``Policy.decide``."""
        try:
            answer = self.policy(world, situation, key)
        except EmutuneError:
            raise
        except Exception as error:
            raise UsageError(f"policy {self.name}: decide raised {blame(error)}") from error
        shape = situation.complexity.shape
        if not isinstance(answer, tuple) or len(answer) != 2:
            raise UsageError(f"policy {self.name}: decide must return emutune.step.Plan, got {answer!r}")
        there, layers = (jnp.asarray(part) for part in answer)
        for part, value, kind in (("at_server", there, jnp.bool_), ("layers", layers, jnp.integer)):
            if value.shape != shape or not jnp.issubdtype(value.dtype, kind):
                wanted = "bool" if kind is jnp.bool_ else "integer"
                raise UsageError(
                    f"policy {self.name}: {part} must be {wanted} {shape}, one a UE, got {value.dtype} {value.shape}"
                )
        return Plan(there, layers.astype(jnp.int32))


def policy_of(thing: Any, name: str, scenario: Scenario) -> Policy:
    """The policy that somebody's class, object or function is.

    Args:
        thing: a class, made with the scenario if it takes one argument; an object with ``decide``; or a function in
            place of that. Those that take one argument, a ``NamedSituation``, are of NumPy, and those that take world,
            situation and key, as ``Policy.decide``, of JAX.
        name: by which errors call it.
        scenario: the world it will decide in.

    Raises:
        UsageError: it is none of these, or the class cannot be made.
    """
    if inspect.isclass(thing):
        thing = _made(thing, name, scenario)
    decide = getattr(thing, "decide", thing)
    count = _arguments(decide) if callable(decide) else None
    if count == 1:
        return HostPolicy(_Host(name, decide))
    if count == 3:
        # What is a leaf to JAX can be no argument of a program.
        plain = jax.tree_util.all_leaves([thing])
        policy: Policy = CompiledPolicy(name, decide) if plain else thing
        return policy
    raise UsageError(
        f"policy {name}: must have decide(situation), of NumPy arrays, or decide(world, situation, key), of JAX; "
        f"got {thing!r}"
    )


@contextmanager
def plain_failures(policy: Any) -> Iterator[None]:
    """Programs that ask a policy: what it did wrong is raised as it is, without what JAX has to say of it.

    Raises:
        UsageError: the policy raised, or decided something that is no decision.
    """
    if not isinstance(policy, HostPolicy):
        yield
        return
    policy.host.failure = None
    _CALLBACKS.addFilter(_nothing)
    try:
        yield
    except jax.errors.JaxRuntimeError:
        if policy.host.failure is None:
            raise
        raise policy.host.failure from None
    finally:
        _CALLBACKS.removeFilter(_nothing)


def _nothing(record: logging.LogRecord) -> bool:
    return False


def _named(rules: Rules, situation: Situation) -> dict[str, Array]:
    fewest, most = possible_levels(rules, situation)
    local, away = every_level(rules, situation), at_server(rules, situation, jnp.ones(()))
    columns = {name: value.T for name, value in local._asdict().items()}
    return {
        **situation._asdict(),
        **columns,
        "whole_layers": jnp.broadcast_to(look_up(rules.models.layers, situation.family), fewest.shape),
        "fewest_layers": fewest,
        "most_layers": most,
        "usable_layers": usable_layers(situation),
        "upload_s": away.upload_s,
        "server_training_s": away.training_s,
        "server_perplexity": away.perplexity,
    }


def _made(kind: type, name: str, scenario: Scenario) -> Any:
    try:
        return kind(scenario) if _arguments(kind) == 1 else kind()
    except EmutuneError:
        raise
    except Exception as error:
        raise UsageError(f"policy {name}: cannot be made: {blame(error)}") from error


def _arguments(function: Callable[..., Any]) -> int | None:
    """How many arguments must be given by place; None where Python cannot say."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return None
    by_place = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(each.kind in by_place and each.default is inspect.Parameter.empty for each in parameters)
