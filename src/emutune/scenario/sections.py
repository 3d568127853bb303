"""The sections of a scenario: every number that describes a fleet, with its unit in its name.

Symbols and equation numbers refer to Yu, Chua and Zhao, "Orchestration of Emulator Assisted Mobile
Edge Tuning for AI Foundation Models" (arXiv 2310.17492); D1 and so on to ``docs/decisions.md``.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Number = Annotated[float, Field(allow_inf_nan=False)]
# The upper limits keep every derived quantity inside single precision.
Positive = Annotated[float, Field(gt=0, le=1e15, allow_inf_nan=False)]
Weight = Annotated[float, Field(le=0, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=100_000)]
Probability = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
# Narrower limits where numbers are multiplied: a product of all of them still is a single-precision number.
Speed = Annotated[float, Field(ge=1e-6, le=1e9, allow_inf_nan=False)]


# TOML has lists, no tuples.
Knot = Annotated[tuple[Share, Positive], Field(strict=False)]


class Section(BaseModel):
    """Part of a scenario: nothing unknown, nothing converted, nothing changed later."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class _Interval(Section):
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


class Spread(_Interval):
    """A distribution over a positive interval: uniform, or uniform in the logarithm."""

    min: Positive
    max: Positive
    law: Literal["uniform", "log_uniform"] = "uniform"


class Speeds(Spread):
    """A distribution of training speeds in TFLOP/s."""

    min: Speed
    max: Speed


class Span(_Interval):
    """A uniform distribution over the interval from ``min`` to ``max``, which may begin at 0."""

    min: Annotated[float, Field(ge=0, le=1e15, allow_inf_nan=False)]
    max: Annotated[float, Field(ge=0, le=1e15, allow_inf_nan=False)]


class Fleet(Section):
    """The user equipments (UEs) and how long an episode lasts.

    Attributes:
        distance_m: from the base station; left out where a trace says what the links carry.
    """

    ues: Count
    tasks: Count
    transmit_power_w: Range
    distance_m: Range | None = None


class Tasks(Section):
    """What each task brings: local data to train on, and its complexity."""

    data_mb: Range
    complexity: Range


class FoundationModel(Section):
    """The model whose emulators the UEs hold.

    Attributes:
        size_gb: of the layers that emulators are made of, the whole model's.
        shared_gb: of what every emulator has beside its layers, such as embeddings and adapter layers; with delta
            download it is sent to who holds no emulator of the family.
        parameters_billion: what training has to compute with; wanted where there is ``computation``.
        base: hash of the real model that the scenario was measured on; a fleet with another one is refused.
    """

    size_gb: Positive
    layers: Count
    shared_gb: Annotated[float, Field(ge=0, le=1e15, allow_inf_nan=False)] = 0.0
    parameters_billion: Annotated[float, Field(gt=0, le=1e4, allow_inf_nan=False)] | None = None
    base: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None


class Retention(_Interval):
    """The share of layers an emulator may keep, and when a UE keeps the one it has (D9)."""

    min: Share
    max: Share
    hold_tolerance: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)] = 0.0


class PathLoss(Section):
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


class Fading(Section):
    """Fading that drifts from task to task (D21) instead of being drawn anew.

    Attributes:
        speed_mps: of every UE or its surroundings; left out where UEs move, each at its own.
        interval_s: from a block of one task to that of the next; where UEs move, that of ``mobility``.
    """

    speed_mps: Annotated[float, Field(ge=0, le=1000, allow_inf_nan=False)] | None = None
    interval_s: Positive | None = None


class Radio(Section):
    """Bandwidths and powers of the links, and the law of the channel gain (D8).

    Attributes:
        path_loss_exponent: the gain is the distance to the power of minus this; or give ``path_loss``.
        fading_blocks: a task's gain is the mean over so many Rayleigh blocks.
        rate: that of a task's gain, or its mean over Rayleigh fading, which then is no part of the gain (D20).
        sharing: those who send split a band equally, or each has a link of its own, whoever else sends (D18).
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
    sharing: Literal["equal", "none"] = "equal"
    carrier_ghz: Annotated[float, Field(ge=0.5, le=100, allow_inf_nan=False)] | None = None
    path_loss: PathLoss | None = None
    fading: Fading | None = None


class Curve(Section):
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


class Quality(Section):
    """Perplexity against retention and complexity (Eq. 9, D2)."""

    curve: Curve
    complexity_weight: Positive
    complexity_factor: Literal["rising", "as_printed"] = "rising"


class Reward(Section):
    """The weights of the joint objective (Eq. 12, D6); both are costs, so neither is positive."""

    perplexity_weight: Weight
    delay_weight_per_min: Weight


class Family(Section):
    """A foundation model beside the one in ``model``.

    Attributes:
        size_gb, shared_gb, parameters_billion, base: see ``FoundationModel``.
        curve: its perplexity against retention, where that differs from ``quality.curve``.
    """

    size_gb: Positive
    layers: Count
    shared_gb: Annotated[float, Field(ge=0, le=1e15, allow_inf_nan=False)] = 0.0
    parameters_billion: Annotated[float, Field(gt=0, le=1e4, allow_inf_nan=False)] | None = None
    base: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
    curve: Curve | None = None


class Families(Section):
    """Several foundation models, so that an emulator at hand may be of the wrong one.

    The family of a UE's task is a Markov chain: it stays with probability ``persistence`` and is drawn
    anew from all families otherwise. The model in ``model`` is the first family, ``others`` the rest.

    Attributes:
        cache_gb: what a UE can keep of emulators, one of each family; those used least recently make room for
            what is fetched, and none may be larger than this. If not given, a UE keeps one emulator, of any size.
    """

    persistence: Probability
    others: Annotated[tuple[Family, ...], Field(min_length=1, max_length=63, strict=False)]
    cache_gb: Positive | None = None


class Download(Section):
    """How emulators travel.

    Attributes:
        delta: an emulator contains every smaller one of its family, and only missing layers are sent.
        multicast: UEs that fetch the same layers in the same step share one transmission, at the rate of the
            weakest of them; power and band are split equally between transmissions (D17).
    """

    delta: bool = False
    multicast: bool = False


class Computation(Section):
    """Training takes time: 4 P E operations for every token and epoch (D13).

    Attributes:
        device_tflops: what a UE sustains in training; drawn for each UE and episode.
        server_tflops: what the server sustains, shared equally by all who train there.
        bytes_per_token: of a task's data.
        epochs: passes over a task's data.
    """

    device_tflops: Speeds
    server_tflops: Speed
    bytes_per_token: Annotated[float, Field(ge=0.1, le=1e9, allow_inf_nan=False)]
    epochs: Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False)] = 1.0


class Energy(Section):
    """What UEs spend on sending, receiving and computing (D14).

    Attributes:
        receive_w: power of a UE's receiver while an emulator arrives.
        compute_j_per_tflop: energy of 1e12 operations on the UE; drawn for each UE and episode. Wanted
            where there is ``computation``. Times the UE's speed it is the power that training takes.
        weight_per_j: cost of a joule, as the mean over the fleet's UEs.
        budget_j: what a UE should spend in an episode at most.
        over_budget_weight_per_j: what a joule costs beyond the budget, on top.
    """

    receive_w: Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]
    compute_j_per_tflop: Spread | None = None
    weight_per_j: Weight
    budget_j: Positive | None = None
    over_budget_weight_per_j: Weight | None = None

    @model_validator(mode="after")
    def _budget_has_a_price(self) -> Self:
        if (self.budget_j is None) != (self.over_budget_weight_per_j is None):
            missing = "budget_j" if self.budget_j is None else "over_budget_weight_per_j"
            raise ValueError(
                f"{missing}: missing; budget_j and over_budget_weight_per_j go together, give both or none"
            )
        return self


class Memory(Section):
    """How large an emulator may be (D15).

    Attributes:
        device_gb: what a UE can hold; drawn for each UE and episode.
    """

    device_gb: Spread


class Privacy(Section):
    """UEs whose data may not leave them (D15).

    Attributes:
        share: of the UEs, rounded to whole ones; who they are is drawn for each episode.
    """

    share: Probability


class Activity(Section):
    """UEs that now and then have nothing to train (D16).

    Attributes:
        task_probability: how likely a UE has a task at a step.
    """

    task_probability: Share


class Mobility(Section):
    """UEs that walk from one random waypoint to the next, in the ring of ``fleet.distance_m`` (D22).

    Attributes:
        speed_mps: drawn for every way.
        pause_s: drawn for every waypoint.
        interval_s: from one task to the next.
    """

    speed_mps: Range
    pause_s: Span = Span(min=0.0, max=0.0)
    interval_s: Positive


class Trace(Section):
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
