"""What a world is made of: the validated schema, its units, and the shipped scenario files."""

from emutune.scenario.load import dump_scenario, load_scenario, parse_scenario, shipped_scenarios
from emutune.scenario.schema import (
    Curve,
    Download,
    Families,
    Family,
    Fleet,
    FoundationModel,
    Model,
    Quality,
    Radio,
    Range,
    Retention,
    Reward,
    Scenario,
    Tasks,
)

__all__ = [
    "Curve",
    "Download",
    "Families",
    "Family",
    "Fleet",
    "FoundationModel",
    "Model",
    "Quality",
    "Radio",
    "Range",
    "Retention",
    "Reward",
    "Scenario",
    "Tasks",
    "dump_scenario",
    "load_scenario",
    "parse_scenario",
    "shipped_scenarios",
]
