"""The radio of a world: how an episode's gains are drawn, whichever law a scenario gives them, and their range."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from emutune.scenario import Scenario
from emutune.world.channel import Channel
from emutune.world.fading import DriftingFading, FreshFading, Unfaded, build_fading
from emutune.world.mobility import Standing, Waypoints, build_place
from emutune.world.path_loss import PathLossTables, PowerLaw, build_path_loss
from emutune.world.trace import MeasuredRadio, build_trace

# Standard deviations of shadowing, against and in favour, that features are scaled by.
_SCORES = 2.0


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ModelledRadio:
    """Gains of UEs at places: path loss, and fading about it.

    Attributes:
        reciprocal: whether the downlink has the uplink's gain.
    """

    place: Standing | Waypoints
    path_loss: PowerLaw | PathLossTables
    fading: Unfaded | FreshFading | DriftingFading
    reciprocal: ClassVar[bool] = True

    @property
    def gain_bounds(self) -> Float[Array, "2"]:
        """The weakest and the strongest gain of the uplink that features and tables are scaled by.

        Those at the farthest and nearest distance, shadowing and fading against and in favour.
        """
        return self.path_loss.end_gains(self.place.distance_m, _SCORES)[::-1] * self.fading.bounds()

    @property
    def downlink_gain_bounds(self) -> Float[Array, "2"]:
        """The same of the downlink."""
        return self.gain_bounds

    @property
    def middle_gain(self) -> Float[Array, ""]:
        """The downlink's gain at the middle of the distances, without shadowing and fading."""
        return self.path_loss.mean_gain(self.place.distance_m.mean())

    def downlink_gain_at(self, gain: Float[Array, ""]) -> Float[Array, ""]:
        """The downlink's gain that goes with one of the uplink."""
        return gain

    def ends(self) -> dict[str, tuple[Array, Array]]:
        """The nearest and the farthest distance, and the gains there without shadowing and fading."""
        near, far = zip(self.place.distance_m, self.path_loss.end_gains(self.place.distance_m), strict=True)
        return {"nearest": near, "farthest": far}

    def draw(self, key: Key[Array, ""], transmit_power_w: Float[Array, "ues"], rows: int) -> Channel:
        """The gains of an episode.

        Args:
            key: of the episode.
            transmit_power_w: of each UE, with which it has the rate that a trace says.
            rows: one more than there are tasks.
        """
        shape = (rows, transmit_power_w.shape[0])
        path = self.place.draw(key, *shape)
        gain, way = self.path_loss.draw(key, path)
        gain = jnp.broadcast_to(gain * self.fading.draw(key, path, shape), shape)
        return Channel(gain, {**self.place.told(path), **way})


Radio = ModelledRadio | MeasuredRadio


def build_radio(scenario: Scenario) -> Radio:
    """The radio of a scenario."""
    trace, distance = scenario.trace, scenario.fleet.distance_m
    if trace is not None:
        return build_trace(scenario, trace)
    # A scenario without both is refused.
    assert distance is not None
    return ModelledRadio(build_place(scenario, distance), build_path_loss(scenario), build_fading(scenario))
