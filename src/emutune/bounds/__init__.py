"""Certified lower bounds on the cost of every policy."""

from emutune.bounds.certified import certified_bounds
from emutune.bounds.programme import Costs, Draws, Method, cost_bound, episode_costs

__all__ = ["Costs", "Draws", "Method", "certified_bounds", "cost_bound", "episode_costs"]
