"""The terms of a step's cost that each UE has of its own; the fleet's delay is charged beside them (``charge``).

A term is a module with a ``NAME``, ``is_on(scenario)`` and ``cost(rules, situation, taken)``, which gives the cost of
each UE in units of reward, positive. To add one, write it and list it here.
"""

from __future__ import annotations

from types import ModuleType

from emutune.step.terms import budget, energy, perplexity

TERMS: tuple[ModuleType, ...] = (perplexity, energy, budget)
BY_NAME = {term.NAME: term for term in TERMS}
