"""The simulator: what is drawn, and episodes of steps."""

from emutune.world.dynamics import (
    Carried,
    Episode,
    Outcome,
    State,
    draw_batch,
    draw_episode,
    nothing_carried,
    observe,
    reset,
    serve,
    situation_at,
    step,
)
from emutune.world.fading import draw_drifting
from emutune.world.features import Feature, cached_retention, features_of, ue_features
from emutune.world.mobility import Waypoints
from emutune.world.parameters import World, build_world
from emutune.world.path_loss import path_loss_db
from emutune.world.summary import Summary, summarise

__all__ = [
    "Carried",
    "Episode",
    "Feature",
    "Outcome",
    "State",
    "Summary",
    "Waypoints",
    "World",
    "build_world",
    "cached_retention",
    "draw_batch",
    "draw_drifting",
    "draw_episode",
    "features_of",
    "nothing_carried",
    "observe",
    "path_loss_db",
    "reset",
    "serve",
    "situation_at",
    "step",
    "summarise",
    "ue_features",
]
