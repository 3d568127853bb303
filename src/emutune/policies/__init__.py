"""Ways to decide that need no learning, all behind one protocol."""

from emutune.policies.base import Policy, register_policy
from emutune.policies.fixed import AllServer, Fixed
from emutune.policies.random import Random

__all__ = ["AllServer", "Fixed", "Policy", "Random", "register_policy"]
