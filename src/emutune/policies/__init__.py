"""Ways to decide that need no learning, all behind one protocol."""

from emutune.policies.base import Policy, policy_pytree
from emutune.policies.count_table import CountTable
from emutune.policies.fixed import AllServer, Fixed, search_best_fixed
from emutune.policies.hold import Hold
from emutune.policies.horizon import Horizon, plan_horizon
from emutune.policies.lookahead import Lookahead, plan_lookahead
from emutune.policies.own import NamedSituation, policy_of
from emutune.policies.playing import Step, play
from emutune.policies.random import Random
from emutune.policies.registry import baseline_policy, register_policy
from emutune.policies.worth import LaterPrices

__all__ = [
    "AllServer",
    "CountTable",
    "Fixed",
    "Hold",
    "Horizon",
    "LaterPrices",
    "Lookahead",
    "NamedSituation",
    "Policy",
    "Random",
    "Step",
    "baseline_policy",
    "plan_horizon",
    "plan_lookahead",
    "play",
    "policy_of",
    "policy_pytree",
    "register_policy",
    "search_best_fixed",
]
