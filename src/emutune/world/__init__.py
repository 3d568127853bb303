"""The simulator: channel, links, quality and dynamics as pure JAX functions."""

from emutune.world.dynamics import (
    Action,
    Episode,
    Outcome,
    State,
    Task,
    all_tasks,
    choose_layers,
    current_task,
    draw_episode,
    empty_cache,
    reset,
    serve,
    step,
)
from emutune.world.observation import (
    Observation,
    cache_feature,
    observe,
    observe_task,
    progress_feature,
    task_features,
    ue_features,
)
from emutune.world.parameters import World, build_world

__all__ = [
    "Action",
    "Episode",
    "Observation",
    "Outcome",
    "State",
    "Task",
    "World",
    "all_tasks",
    "build_world",
    "cache_feature",
    "choose_layers",
    "current_task",
    "draw_episode",
    "empty_cache",
    "observe",
    "observe_task",
    "progress_feature",
    "reset",
    "serve",
    "step",
    "task_features",
    "ue_features",
]
