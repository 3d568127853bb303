"""The simulator: what is drawn, and episodes of steps."""

from emutune.world.dynamics import (
    Carried,
    Episode,
    Outcome,
    State,
    draw_batch,
    draw_episode,
    during,
    nothing_carried,
    observe,
    reset,
    serve,
    situation_at,
    step,
)
from emutune.world.features import (
    Feature,
    cached_retention,
    feature_index,
    features_of,
    other_retention,
    progress_feature,
    task_features,
    ue_features,
    with_carried,
)
from emutune.world.parameters import World, build_world
from emutune.world.summary import Summary, summarise

__all__ = [
    "Carried",
    "Episode",
    "Feature",
    "Outcome",
    "State",
    "Summary",
    "World",
    "build_world",
    "cached_retention",
    "draw_batch",
    "draw_episode",
    "during",
    "feature_index",
    "features_of",
    "nothing_carried",
    "observe",
    "other_retention",
    "progress_feature",
    "reset",
    "serve",
    "situation_at",
    "step",
    "summarise",
    "task_features",
    "ue_features",
    "with_carried",
]
