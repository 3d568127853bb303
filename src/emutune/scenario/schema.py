"""The schema of a scenario: every number that describes a fleet, with its unit in its name.

Symbols and equation numbers refer to Yu, Chua and Zhao, "Orchestration of Emulator Assisted Mobile
Edge Tuning for AI Foundation Models" (arXiv 2310.17492); D1 to D12 to ``docs/decisions.md``.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Annotated, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Number = Annotated[float, Field(allow_inf_nan=False)]
# The upper limits keep every derived quantity inside single precision.
Positive = Annotated[float, Field(gt=0, le=1e15, allow_inf_nan=False)]
Weight = Annotated[float, Field(le=0, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=100_000)]
Probability = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


# TOML has lists, no tuples.
Knot = Annotated[tuple[Share, Positive], Field(strict=False)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class _Interval(_Section):
    min: float
    max: float

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min is above max ({self.min:g} > {self.max:g}); swap them")
        return self


class Range(_Interval):
    """A uniform distribution over the interval from ``min`` to ``max``, both positive."""

    min: Positive
    max: Positive


class Span(_Interval):
    """A uniform distribution over the interval from ``min`` to ``max``, which may begin at 0."""

    min: Annotated[float, Field(ge=0, le=1e15, allow_inf_nan=False)]
    max: Annotated[float, Field(ge=0, le=1e15, allow_inf_nan=False)]


class Fleet(_Section):
    """The user equipments (UEs) and how long an episode lasts.

    Attributes:
        distance_m: from the base station; left out where a trace says what the links carry.
    """

    ues: Count
    tasks: Count
    transmit_power_w: Range
    distance_m: Range | None = None


class Tasks(_Section):
    """What each task brings: local data to train on, and its complexity."""

    data_mb: Range
    complexity: Range


class FoundationModel(_Section):
    """The model whose emulators the UEs hold.

    Attributes:
        base: hash of the real model that the scenario was measured on; a fleet with another one is refused.
    """

    size_gb: Positive
    layers: Count
    base: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None


class Retention(_Interval):
    """The share of layers an emulator may keep, and when a UE keeps the one it has (D9)."""

    min: Share
    max: Share
    hold_tolerance: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)] = 0.0


class PathLoss(_Section):
    """Path loss of 3GPP TR 38.901 instead of a power of the distance.

    Attributes:
        model: street canyons (UMi) or a macro cell (UMa).
        bs_height_m: of the base station; 10 m for UMi and 25 m for UMa if left out.
        ue_height_m: of the UEs.
        line_of_sight: drawn by the model's probability, or the same for all.
        shadowing: whether there is log-normal shadowing.
    """

    model: Literal["umi", "uma"]
    bs_height_m: Annotated[float, Field(ge=2, le=150, allow_inf_nan=False)] | None = None
    ue_height_m: Annotated[float, Field(ge=1.5, lt=13, allow_inf_nan=False)] = 1.5
    line_of_sight: Literal["drawn", "always", "never"] = "drawn"
    shadowing: bool = True


class Fading(_Section):
    """Fading that drifts from task to task (D21) instead of being drawn anew.

    Attributes:
        speed_mps: of every UE or its surroundings; left out where UEs move, each at its own.
        interval_s: from a block of one task to that of the next; where UEs move, that of ``mobility``.
    """

    speed_mps: Annotated[float, Field(ge=0, le=1000, allow_inf_nan=False)] | None = None
    interval_s: Positive | None = None


class Radio(_Section):
    """Bandwidths and powers of the links, and the law of the channel gain (D8).

    Attributes:
        path_loss_exponent: the gain is the distance to the power of minus this; or give ``path_loss``.
        fading_blocks: a task's gain is the mean over so many Rayleigh blocks.
        rate: that of a task's gain, or its mean over Rayleigh fading, which then is no part of the gain (D20).
        carrier_ghz: for ``path_loss`` and ``fading``.
    """

    uplink_bandwidth_hz: Positive
    downlink_bandwidth_hz: Positive
    downlink_power_w: Positive
    noise_dbm_per_hz: Annotated[float, Field(ge=-250, le=0, allow_inf_nan=False)]
    path_loss_exponent: Annotated[float, Field(gt=0, le=10, allow_inf_nan=False)] | None = None
    # One block would be a single Rayleigh draw: the mean delay of such a link diverges (D8).
    fading_blocks: Annotated[int, Field(ge=2, le=1_000_000)] | None = None
    rate: Literal["shannon", "ergodic"] = "shannon"
    carrier_ghz: Annotated[float, Field(ge=0.5, le=100, allow_inf_nan=False)] | None = None
    path_loss: PathLoss | None = None
    fading: Fading | None = None


class Curve(_Section):
    """Perplexity at retention E: ``quadratic * E**2 + linear * E + constant``, or between measured knots.

    Attributes:
        knots: pairs of retention and perplexity, by rising retention. If there are any, perplexity is
            linear between them and constant outside, and the quadratic is only a description.
        untuned: perplexity of the whole model, not tuned, on the text that the curve was measured on. In a
            real fleet a task's complexity is measured against it.
    """

    quadratic: Number
    linear: Number
    constant: Number
    knots: tuple[Knot, ...] = Field(default=(), strict=False)
    untuned: Positive | None = None

    def __call__(self, retention: float) -> float:
        """Perplexity at one retention, dimensionless."""
        if not self.knots:
            return self.quadratic * retention**2 + self.linear * retention + self.constant
        if retention <= self.knots[0][0]:
            return self.knots[0][1]
        for (left, before), (right, after) in pairwise(self.knots):
            if retention <= right:
                return before + (after - before) * (retention - left) / (right - left)
        return self.knots[-1][1]

    def lowest_between(self, low: float, high: float) -> tuple[float, float]:
        """The retention in [low, high] with the lowest perplexity, and that perplexity."""
        candidates = [low, high, *(knot[0] for knot in self.knots if low < knot[0] < high)]
        if (
            not self.knots
            and self.quadratic > 0
            and low < (vertex := -self.linear / (2 * self.quadratic)) < high
        ):
            candidates.append(vertex)
        best = min(candidates, key=self)
        return best, self(best)

    @model_validator(mode="after")
    def _knots_rise(self) -> Self:
        retentions = [knot[0] for knot in self.knots]
        if any(later <= earlier for earlier, later in pairwise(retentions)):
            raise ValueError("knots: their retentions must rise; sort them and drop doubles")
        return self


class Quality(_Section):
    """Perplexity against retention and complexity (Eq. 9, D2)."""

    curve: Curve
    complexity_weight: Positive
    complexity_factor: Literal["rising", "as_printed"] = "rising"


class Reward(_Section):
    """The weights of the joint objective (Eq. 12, D6); both are costs, so neither is positive."""

    perplexity_weight: Weight
    delay_weight_per_min: Weight


class Family(_Section):
    """A foundation model beside the one in ``model``.

    Attributes:
        curve: its perplexity against retention, where that differs from ``quality.curve``.
    """

    size_gb: Positive
    layers: Count
    curve: Curve | None = None


class Families(_Section):
    """Several foundation models, so that an emulator at hand may be of the wrong one.

    The family of a UE's task is a Markov chain: it stays with probability ``persistence`` and is drawn
    anew from all families otherwise. The model in ``model`` is the first family, ``others`` the rest.
    """

    persistence: Probability
    others: Annotated[tuple[Family, ...], Field(min_length=1, max_length=63, strict=False)]


class Download(_Section):
    """How emulators travel.

    Attributes:
        delta: an emulator contains every smaller one of its family, and only missing layers are sent.
    """

    delta: bool = False


class Mobility(_Section):
    """UEs that walk from one random waypoint to the next, in the ring of ``fleet.distance_m`` (D22).

    Attributes:
        speed_mps: drawn for every way.
        pause_s: drawn for every waypoint.
        interval_s: from one task to the next.
    """

    speed_mps: Range
    pause_s: Span = Span(min=0.0, max=0.0)
    interval_s: Positive


class Trace(_Section):
    """Measured rates instead of a modelled channel (D23): those of a UE alone with the whole band.

    A scenario file may name the rates' file, as ``emutune trace import`` writes it, with ``file`` instead of
    the two lists.

    Attributes:
        interval_s: from one task to the next; what each of the rates is the mean over.
        downlink_mbps: the rates one after another, at least one more than an episode has tasks.
        uplink_mbps: as many.
    """

    interval_s: Positive
    downlink_mbps: Annotated[tuple[Positive, ...], Field(min_length=2, strict=False)]
    uplink_mbps: Annotated[tuple[Positive, ...], Field(min_length=2, strict=False)]

    @model_validator(mode="after")
    def _as_many(self) -> Self:
        down, up = len(self.downlink_mbps), len(self.uplink_mbps)
        if down != up:
            raise ValueError(f"{down} downlink rates but {up} uplink rates; give one of each per interval")
        return self


class Model(NamedTuple):
    """One family's model: size, whole layers, fewest and most layers of an emulator, and its curve."""

    size_gb: float
    layers: int
    fewest: int
    most: int
    curve: Curve


def _with_curves(
    first: FoundationModel, others: tuple[Family, ...]
) -> list[tuple[FoundationModel | Family, Curve | None]]:
    return [(first, None), *((other, other.curve) for other in others)]


class Scenario(_Section):
    """A whole world: fleet, tasks, model, links, quality and objective; the last sections are optional."""

    name: Annotated[str, Field(min_length=1)]
    description: str = ""
    fleet: Fleet
    tasks: Tasks
    model: FoundationModel
    retention: Retention
    radio: Radio
    quality: Quality
    reward: Reward
    families: Families | None = None
    download: Download | None = None
    mobility: Mobility | None = None
    trace: Trace | None = None

    @property
    def level_bounds(self) -> tuple[int, int]:
        """Fewest and most layers an emulator may keep: the levels k/L inside the retention bounds (D9)."""
        return self._levels(self.model.layers)

    @property
    def models(self) -> tuple[Model, ...]:
        """Every family's model, the one in ``model`` first."""
        others = self.families.others if self.families else ()
        return tuple(
            Model(one.size_gb, one.layers, *self._levels(one.layers), curve or self.quality.curve)
            for one, curve in _with_curves(self.model, others)
        )

    @property
    def delta_download(self) -> bool:
        """Whether only missing layers are sent."""
        return self.download is not None and self.download.delta

    @property
    def fading_interval_s(self) -> float | None:
        """Seconds from one task's fading to the next one's; None where it is drawn anew."""
        fading = self.radio.fading
        if fading is None:
            return None
        if fading.interval_s is None and self.mobility is not None:
            return self.mobility.interval_s
        return fading.interval_s

    @property
    def plain_radio(self) -> bool:
        """Whether gains are a power of the distance times fading that is drawn anew."""
        radio = self.radio
        features = (self.trace, self.mobility, radio.path_loss, radio.fading)
        return radio.rate == "shannon" and all(feature is None for feature in features)

    def _levels(self, layers: int) -> tuple[int, int]:
        # The guard absorbs binary fractions: 0.3 * 10 is 2.9999999999999996 or 3.0000000000000004.
        guard = 1e-9 * layers
        return max(1, math.ceil(self.retention.min * layers - guard)), math.floor(
            self.retention.max * layers + guard
        )

    @model_validator(mode="after")
    def _some_emulator_exists(self) -> Scenario:
        for index, model in enumerate(self.models):
            if model.fewest > model.most:
                where = f"families.others.{index - 1}" if index else "model"
                raise ValueError(
                    f"retention: no whole number of the {model.layers} layers lies between "
                    f"{self.retention.min:g} and {self.retention.max:g}; widen the bounds or raise {where}.layers"
                )
        return self

    @model_validator(mode="after")
    def _channel_is_described_once(self) -> Scenario:
        problem = _trace_problem(self) if self.trace else _model_problem(self)
        if problem:
            raise ValueError(problem)
        return self

    @model_validator(mode="after")
    def _perplexity_is_positive(self) -> Scenario:
        for index, model in enumerate(self.models):
            retention, lowest = model.curve.lowest_between(self.retention.min, 1.0)
            if lowest <= 0:
                own = index and model.curve is not self.quality.curve
                where = f"families.others.{index - 1}.curve" if own else "quality.curve"
                raise ValueError(
                    f"{where}: perplexity falls to {lowest:g} at retention {retention:g}; "
                    "it must stay positive from retention.min to 1"
                )
        return self


# No modulation carries more bits per second and Hz than this, on however many antennas a UE has.
_MOST_BITS_PER_HZ = 50.0


def _trace_problem(scenario: Scenario) -> str | None:
    """What is wrong with a scenario whose links are measured ones."""
    trace, radio = scenario.trace, scenario.radio
    assert trace is not None
    for name, section in (
        ("radio.path_loss", radio.path_loss),
        ("radio.fading", radio.fading),
        ("mobility", scenario.mobility),
    ):
        if section is not None:
            return f"{name}: the rates of a trace hold all of that already; drop this section or trace"
    windows, needed = len(trace.downlink_mbps), scenario.fleet.tasks + 1
    if windows < needed:
        return (
            f"trace: too short: {windows} intervals of {trace.interval_s:g} s, but {scenario.fleet.tasks} tasks "
            f"need {needed}; take a longer trace, or lower trace.interval_s or fleet.tasks"
        )
    for link in ("uplink", "downlink"):
        hertz = getattr(radio, f"{link}_bandwidth_hz")
        fastest = max(getattr(trace, f"{link}_mbps"))
        if fastest * 1e6 > _MOST_BITS_PER_HZ * hertz:
            return (
                f"trace.{link}_mbps: {fastest:g} Mbit/s over {hertz:g} Hz are {fastest * 1e6 / hertz:.3g} bit/s "
                f"per Hz, more than any radio carries ({_MOST_BITS_PER_HZ:g}); raise radio.{link}_bandwidth_hz "
                "to the band that the trace was measured on"
            )
    return None


def _model_problem(scenario: Scenario) -> str | None:
    """What is wrong with a scenario whose channel is a modelled one."""
    radio, distance = scenario.radio, scenario.fleet.distance_m
    if distance is None:
        return "fleet.distance_m: missing; add it to the scenario"
    if radio.path_loss is None and radio.path_loss_exponent is None:
        return "radio.path_loss_exponent: missing; add it to the scenario, or a section radio.path_loss"
    if radio.path_loss is not None:
        if radio.path_loss_exponent is not None:
            return "radio.path_loss: there is a path_loss_exponent too; drop one of them"
        if distance.min < 10 or distance.max > 5000:
            return (
                f"fleet.distance_m: path loss {radio.path_loss.model} holds from 10 to 5000 m, "
                f"got {distance.min:g} to {distance.max:g}"
            )
    if radio.fading_blocks is None and radio.rate == "shannon":
        return "radio.fading_blocks: missing; add it to the scenario"
    if radio.fading is not None:
        if radio.rate == "ergodic":
            return (
                "radio.fading: the ergodic rate is the mean over all fading; drop the section or radio.rate"
            )
        if radio.fading.speed_mps is None and scenario.mobility is None:
            return "radio.fading.speed_mps: missing where UEs do not move; add it to the scenario"
        if scenario.fading_interval_s is None:
            return "radio.fading.interval_s: missing where UEs do not move; add it to the scenario"
    if radio.carrier_ghz is None and (radio.path_loss or radio.fading):
        return "radio.carrier_ghz: missing; path_loss and fading need it, e.g. 3.5"
    return None
