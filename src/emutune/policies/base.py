"""The one protocol behind which every way to decide stands."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import fields
from typing import Any, Protocol, TypeVar, runtime_checkable

import jax
from jaxtyping import Array, Key

from emutune.step import Plan, Situation
from emutune.world import World

Kind = TypeVar("Kind")


@runtime_checkable
class Policy(Protocol):
    """Situation in, plan out; a pytree, so that compiled programs take policies as arguments."""

    def decide(self, world: World, situation: Situation, key: Key[Array, ""]) -> Plan:
        """Decide for every UE, over any leading batch axes of the situation.

        Args:
            world: the world decided in; policies read bounds and scales from it, never random draws.
            situation: what is known before the step.
            key: randomness for stochastic policies.

        Returns:
            who trains at the server, and with how many layers the others train, with the situation's batch axes;
            what is impossible is brought to the nearest plan that is not (``possible_plan``).
        """
        ...


def policy_pytree(kind: type[Kind]) -> type[Kind]:
    """Class decorator that makes a frozen dataclass a pytree; fields marked static are not traced.

    ``jax.tree_util.register_dataclass`` will not do: the structures it makes of two classes with the same
    fields compare equal, so now and then a program compiled for one policy would answer for another.
    """
    traced = [field.name for field in fields(kind) if not field.metadata.get("static")]  # type: ignore[arg-type]
    static = [field.name for field in fields(kind) if field.metadata.get("static")]  # type: ignore[arg-type]

    def flatten(policy: Kind) -> tuple[tuple[Any, ...], Hashable]:
        children, rest = ([getattr(policy, name) for name in names] for names in (traced, static))
        return tuple(children), tuple(rest)

    def unflatten(rest: Any, children: Any) -> Kind:
        return kind(**dict(zip(static, rest, strict=True)), **dict(zip(traced, children, strict=True)))

    jax.tree_util.register_pytree_node(kind, flatten, unflatten)
    return kind
