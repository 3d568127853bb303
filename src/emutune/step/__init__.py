"""One step: what a UE's situation is, what a plan is, and what it costs."""

from emutune.step import terms
from emutune.step.cache import empty_cache, put_in_cache, usable_layers
from emutune.step.charges import Charge, charge, marginal_charges
from emutune.step.ergodic import ergodic_nats
from emutune.step.link import Links, downlink_bps, uplink_bps
from emutune.step.models import Models, build_models, missing_bits, retention_of
from emutune.step.options import (
    Away,
    Local,
    at_server,
    on_ue,
    plan_of_wish,
    possible_case,
    possible_levels,
    possible_plan,
)
from emutune.step.rules import Rules, build_rules
from emutune.step.situation import Plan, Situation, situation_of
from emutune.step.taken import Taken, take_at_server, take_on_ue

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
    "charge",
    "downlink_bps",
    "empty_cache",
    "ergodic_nats",
    "marginal_charges",
    "missing_bits",
    "on_ue",
    "plan_of_wish",
    "possible_case",
    "possible_levels",
    "possible_plan",
    "put_in_cache",
    "retention_of",
    "situation_of",
    "take_at_server",
    "take_on_ue",
    "terms",
    "uplink_bps",
    "usable_layers",
]
