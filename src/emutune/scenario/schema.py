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
# Narrower limits where numbers are multiplied: a product of all of them still is a single-precision number.
Speed = Annotated[float, Field(ge=1e-6, le=1e9, allow_inf_nan=False)]


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


class Spread(_Interval):
    """A distribution over a positive interval: uniform, or uniform in the logarithm."""

    min: Positive
    max: Positive
    law: Literal["uniform", "log_uniform"] = "uniform"


class Speeds(Spread):
    """A distribution of training speeds in TFLOP/s."""

    min: Speed
    max: Speed


class Fleet(_Section):
    """The user equipments (UEs) and how long an episode lasts."""

    ues: Count
    tasks: Count
    transmit_power_w: Range
    distance_m: Range


class Tasks(_Section):
    """What each task brings: local data to train on, and its complexity."""

    data_mb: Range
    complexity: Range


class FoundationModel(_Section):
    """The model whose emulators the UEs hold.

    Attributes:
        parameters_billion: what training has to compute with; wanted where there is ``computation``.
        base: hash of the real model that the scenario was measured on; a fleet with another one is refused.
    """

    size_gb: Positive
    layers: Count
    parameters_billion: Annotated[float, Field(gt=0, le=1e4, allow_inf_nan=False)] | None = None
    base: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None


class Retention(_Interval):
    """The share of layers an emulator may keep, and when a UE keeps the one it has (D9)."""

    min: Share
    max: Share
    hold_tolerance: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)] = 0.0


class Radio(_Section):
    """Bandwidths and powers of the links, and the law of the channel gain (D8)."""

    uplink_bandwidth_hz: Positive
    downlink_bandwidth_hz: Positive
    downlink_power_w: Positive
    noise_dbm_per_hz: Annotated[float, Field(ge=-250, le=0, allow_inf_nan=False)]
    path_loss_exponent: Annotated[float, Field(gt=0, le=10, allow_inf_nan=False)]
    # One block would be a single Rayleigh draw: the mean delay of such a link diverges (D8).
    fading_blocks: Annotated[int, Field(ge=2, le=1_000_000)]


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
        parameters_billion: what training has to compute with; wanted where there is ``computation``.
        curve: its perplexity against retention, where that differs from ``quality.curve``.
    """

    size_gb: Positive
    layers: Count
    parameters_billion: Annotated[float, Field(gt=0, le=1e4, allow_inf_nan=False)] | None = None
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


class Computation(_Section):
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


class Energy(_Section):
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


class Memory(_Section):
    """How large an emulator may be (D15).

    Attributes:
        device_gb: what a UE can hold; drawn for each UE and episode.
    """

    device_gb: Spread


class Privacy(_Section):
    """UEs whose data may not leave them (D15).

    Attributes:
        share: of the UEs, rounded to whole ones; who they are is drawn for each episode.
    """

    share: Probability


class Activity(_Section):
    """UEs that now and then have nothing to train (D16).

    Attributes:
        task_probability: how likely a UE has a task at a step.
    """

    task_probability: Share


class Model(NamedTuple):
    """One family's model: size, whole layers, fewest and most layers of an emulator, curve, parameters."""

    size_gb: float
    layers: int
    fewest: int
    most: int
    curve: Curve
    parameters_billion: float | None = None


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
    computation: Computation | None = None
    energy: Energy | None = None
    memory: Memory | None = None
    privacy: Privacy | None = None
    activity: Activity | None = None

    @property
    def private_ues(self) -> int:
        """How many UEs may not upload."""
        return 0 if self.privacy is None else round(self.privacy.share * self.fleet.ues)

    @property
    def has_devices(self) -> bool:
        """Whether UEs differ in more than their radio: in what they can compute, spend, hold or tell."""
        sections = (self.computation, self.energy, self.memory, self.privacy, self.activity)
        return any(section is not None for section in sections)

    @property
    def level_bounds(self) -> tuple[int, int]:
        """Fewest and most layers an emulator may keep: the levels k/L inside the retention bounds (D9)."""
        return self._levels(self.model.layers)

    @property
    def models(self) -> tuple[Model, ...]:
        """Every family's model, the one in ``model`` first."""
        others = self.families.others if self.families else ()
        return tuple(
            Model(
                one.size_gb,
                one.layers,
                *self._levels(one.layers),
                curve or self.quality.curve,
                one.parameters_billion,
            )
            for one, curve in _with_curves(self.model, others)
        )

    @property
    def delta_download(self) -> bool:
        """Whether only missing layers are sent."""
        return self.download is not None and self.download.delta

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

    @model_validator(mode="after")
    def _what_computes_has_parameters(self) -> Scenario:
        if self.computation is None:
            return self
        for index, model in enumerate(self.models):
            if model.parameters_billion is None:
                where = f"families.others.{index - 1}" if index else "model"
                raise ValueError(
                    f"{where}.parameters_billion: missing; add it, since training takes time with the "
                    "section computation, or leave that section out"
                )
        return self

    @model_validator(mode="after")
    def _energy_of_computing_is_told(self) -> Scenario:
        if self.energy is None:
            return self
        told = self.energy.compute_j_per_tflop is not None
        if told and self.computation is None:
            raise ValueError(
                "energy.compute_j_per_tflop: nothing computes without the section computation; add that "
                "section or leave this field out"
            )
        if not told and self.computation is not None:
            raise ValueError(
                "energy.compute_j_per_tflop: missing; add it, or leave out the section computation"
            )
        return self

    @model_validator(mode="after")
    def _everybody_can_train_somewhere(self) -> Scenario:
        if self.memory is None or self.private_ues == 0:
            return self
        least = self.memory.device_gb.min
        for index, model in enumerate(self.models):
            smallest = model.size_gb * model.fewest / model.layers
            if least < smallest:
                where = f"families.others.{index - 1}" if index else "model"
                raise ValueError(
                    f"memory.device_gb.min: a UE that may not upload and holds {least:g} GB can train nowhere, "
                    f"since the smallest emulator of {where} has {smallest:g} GB; raise memory.device_gb.min "
                    "to that, lower retention.min or set privacy.share to 0"
                )
        return self
