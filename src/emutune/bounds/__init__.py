"""Certified lower bounds on the cost of every policy."""

from emutune.bounds.certified import certified_bounds
from emutune.bounds.costs import Costs, Joules, Room, episode_costs
from emutune.bounds.free import Certificate, bound_without_foresight
from emutune.bounds.prices import Prices, bound_at_prices, find_prices, price_bound
from emutune.bounds.programme import cost_bound

__all__ = [
    "Certificate",
    "Costs",
    "Joules",
    "Prices",
    "Room",
    "bound_at_prices",
    "bound_without_foresight",
    "certified_bounds",
    "cost_bound",
    "episode_costs",
    "find_prices",
    "price_bound",
]
