"""The one protocol behind which every way to decide stands."""

from __future__ import annotations

from typing import Protocol

from jaxtyping import Array, Key

from emutune.world import Action, Observation, World


class Policy(Protocol):
    """Observation in, decisions out; a pytree, so that compiled programs take policies as arguments."""

    def decide(self, world: World, observation: Observation, key: Key[Array, ""]) -> Action:
        """Decide for every UE, over any leading batch axes of the observation.

        Args:
            world: the world decided in; policies read bounds and scales from it, never random draws.
            observation: what is known before the step.
            key: randomness for stochastic policies.

        Returns:
            z and E of each UE, with the observation's batch axes.
        """
        ...
