"""One step: what a UE's situation is, what a plan is, and what it costs."""

from emutune.step.cache import cache_share, empty_cache, other_layers, put_in_cache, usable_layers
from emutune.step.charges import Charge, charge, delay_cost, marginal_charges, own_cost, own_terms
from emutune.step.link import Links, downlink_bps, uplink_bps
from emutune.step.models import Models, build_models, look_up, missing_bits, retention_of
from emutune.step.options import (
    Away,
    Local,
    at_server,
    chooses_case,
    every_count,
    every_level,
    on_ue,
    plan_of_wish,
    possible_case,
    possible_levels,
    possible_plan,
    whole_training_s,
)
from emutune.step.rules import Rules, build_rules, complexity_factor
from emutune.step.situation import Plan, Situation, situation_of
from emutune.step.taken import Taken, share, take, take_at_server, take_on_ue

__all__ = [
    "Away",
    "Charge",
    "Links",
    "Local",
    "Models",
    "Plan",
    "Rules",
    "Situation",
    "Taken",
    "at_server",
    "build_models",
    "build_rules",
    "cache_share",
    "charge",
    "chooses_case",
    "complexity_factor",
    "delay_cost",
    "downlink_bps",
    "empty_cache",
    "every_count",
    "every_level",
    "look_up",
    "marginal_charges",
    "missing_bits",
    "on_ue",
    "other_layers",
    "own_cost",
    "own_terms",
    "plan_of_wish",
    "possible_case",
    "possible_levels",
    "possible_plan",
    "put_in_cache",
    "retention_of",
    "share",
    "situation_of",
    "take",
    "take_at_server",
    "take_on_ue",
    "uplink_bps",
    "usable_layers",
    "whole_training_s",
]
