"""Action and observation spaces of a scenario, and the checks that an action passes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from gymnasium import spaces
from jaxtyping import Bool, Float, Shaped

from emutune.errors import UsageError
from emutune.scenario import Scenario
from emutune.world.features import features_of
from emutune.world.parameters import world_outline

# Features run from -1 to 1, but where a range is a millionth wide, float32 rounding moves them by up to 0.18.
_FEATURE_BOUND = 1.25


def action_space(scenario: Scenario) -> spaces.Dict:
    """Where to train (``at_server``, N bits) and the retention (N shares of layers) of every UE."""
    ues, retention = scenario.fleet.ues, scenario.retention
    return spaces.Dict(
        at_server=spaces.MultiBinary(ues),
        retention=spaces.Box(retention.min, retention.max, (ues,), np.float32),
    )


def observation_space(scenario: Scenario) -> spaces.Box:
    """The features of every UE, feature by feature, then the progress.

    4N features of s1 (gains, complexities, data sizes, cached retentions), and more where the world has
    more; see ``emutune.world.ue_features``. A gain has no bounds, since fading has none.
    """
    ues, slack = scenario.fleet.ues, _FEATURE_BOUND
    of_ue = [(feature.low, feature.high) for feature in features_of(world_outline(scenario))]
    bounds = np.array([*np.repeat(of_ue, ues, axis=0), (-1.0, 1.0)])
    low, high = (slack * bounds).astype(np.float32).T
    return spaces.Box(low, high, dtype=np.float32)


def read_action(
    action: Any, shape: tuple[int, ...]
) -> tuple[Bool[np.ndarray, "*batch ues"], Float[np.ndarray, "*batch ues"]]:
    """The two checked parts of an action, ``at_server`` and ``retention``, each of the given shape.

    Raises:
        UsageError: a part is missing, has another shape, or holds something else than 0 and 1
            (``at_server``) or NaN (``retention``).
    """
    if not isinstance(action, Mapping) or set(action) != {"at_server", "retention"}:
        raise UsageError("action: pass a dictionary with the entries at_server and retention")
    at_server = _shaped("action.at_server", action["at_server"], shape)
    if not ((at_server == 0) | (at_server == 1)).all():
        raise UsageError("action.at_server: every entry must be 0 (on the UE) or 1 (at the server)")
    retention = _shaped("action.retention", action["retention"], shape)
    return at_server.astype(bool), _without_nan("action.retention", retention)


def read_flat_action(action: Any, shape: tuple[int, ...]) -> Float[np.ndarray, "*batch parts"]:
    """A checked flat action of the given shape.

    Raises:
        UsageError: the action has another shape or holds NaN.
    """
    return _without_nan("action", _shaped("action", action, shape))


def _without_nan(name: str, values: Shaped[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    if np.isnan(values).any():
        raise UsageError(f"{name}: holds NaN; the learner's network has probably diverged")
    return values.astype(np.float32)


def _shaped(name: str, values: Any, shape: tuple[int, ...]) -> Shaped[np.ndarray, "*shape"]:
    array = np.asarray(values)
    if array.shape != shape or array.dtype.kind not in "biuf":
        raise UsageError(f"{name}: must be numbers of shape {shape}, got {array.dtype} {array.shape}")
    return array
