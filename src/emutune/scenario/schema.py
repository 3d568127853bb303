"""A whole scenario: its sections together, and what must be true of all of them."""

from __future__ import annotations

import math
from typing import Annotated, NamedTuple

from pydantic import Field, model_validator

from emutune.scenario.sections import (
    Activity,
    Computation,
    Curve,
    Download,
    Energy,
    Families,
    Family,
    Fleet,
    FoundationModel,
    Memory,
    Mobility,
    Privacy,
    Quality,
    Radio,
    Retention,
    Reward,
    Section,
    Tasks,
    Trace,
)


class Model(NamedTuple):
    """One family's model: sizes, whole layers, fewest and most layers of an emulator, curve, parameters, hash."""

    size_gb: float
    layers: int
    fewest: int
    most: int
    curve: Curve
    parameters_billion: float | None = None
    shared_gb: float = 0.0
    base: str | None = None

    def emulator_gb(self, layers: int) -> float:
        """Size of the emulator of so many layers."""
        return self.shared_gb + self.size_gb * layers / self.layers


def _with_curves(
    first: FoundationModel, others: tuple[Family, ...]
) -> list[tuple[FoundationModel | Family, Curve | None]]:
    return [(first, None), *((other, other.curve) for other in others)]


class Scenario(Section):
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
    mobility: Mobility | None = None
    trace: Trace | None = None

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
        return self._levels(self.model)

    @property
    def models(self) -> tuple[Model, ...]:
        """Every family's model, the one in ``model`` first."""
        others = self.families.others if self.families else ()
        return tuple(
            Model(
                one.size_gb,
                one.layers,
                *self._levels(one),
                curve or self.quality.curve,
                one.parameters_billion,
                one.shared_gb,
                one.base,
            )
            for one, curve in _with_curves(self.model, others)
        )

    @property
    def delta_download(self) -> bool:
        """Whether only missing layers are sent."""
        return self.download is not None and self.download.delta

    @property
    def cache_gb(self) -> float | None:
        """What a UE can keep of emulators of several families; None where it keeps one emulator."""
        return self.families.cache_gb if self.families else None

    @property
    def interval_s(self) -> float | None:
        """Seconds from one task to the next; None where nothing depends on it."""
        clock = self.mobility or self.trace
        return clock.interval_s if clock else None

    @property
    def fading_interval_s(self) -> float | None:
        """Seconds from one task's fading to the next one's; None where it is drawn anew."""
        fading = self.radio.fading
        return fading.interval_s or self.interval_s if fading else None

    @property
    def speeds_mps(self) -> tuple[float, ...]:
        """The slowest and the fastest that UEs or their surroundings move, or the only one; none if it is not known."""
        fading, speeds = self.radio.fading, self.mobility and self.mobility.speed_mps
        if fading and fading.speed_mps is not None:
            return (fading.speed_mps,)
        return tuple(dict.fromkeys((speeds.min, speeds.max))) if speeds else ()

    @property
    def plain_radio(self) -> bool:
        """Whether gains are a power of the distance times fading that is drawn anew."""
        radio = self.radio
        features = (self.trace, self.mobility, radio.path_loss, radio.fading)
        return radio.rate == "shannon" and all(feature is None for feature in features)

    def _levels(self, one: FoundationModel | Family) -> tuple[int, int]:
        fewest, most = self._levels_between_bounds(one.layers)
        if self.cache_gb is not None:
            room = min((self.cache_gb - one.shared_gb) / one.size_gb, 1.0)
            most = min(most, math.floor(room * one.layers + 1e-9 * one.layers))
        return fewest, most

    def _levels_between_bounds(self, layers: int) -> tuple[int, int]:
        # The guard absorbs binary fractions: 0.3 * 10 is 2.9999999999999996 or 3.0000000000000004.
        guard = 1e-9 * layers
        return max(1, math.ceil(self.retention.min * layers - guard)), math.floor(
            self.retention.max * layers + guard
        )

    @model_validator(mode="after")
    def _some_emulator_exists(self) -> Scenario:
        for index, model in enumerate(self.models):
            fewest, most = self._levels_between_bounds(model.layers)
            if fewest > most:
                where = f"families.others.{index - 1}" if index else "model"
                raise ValueError(
                    f"retention: no whole number of the {model.layers} layers lies between "
                    f"{self.retention.min:g} and {self.retention.max:g}; widen the bounds or raise {where}.layers"
                )
        return self

    @model_validator(mode="after")
    def _every_family_fits_the_cache(self) -> Scenario:
        if self.cache_gb is None:
            return self
        for index, model in enumerate(self.models):
            if model.fewest > model.most:
                where = f"families.others.{index - 1}" if index else "model"
                raise ValueError(
                    f"families.cache_gb: {self.cache_gb:g} GB hold no emulator of {where}, the smallest of "
                    f"which has {model.emulator_gb(model.fewest):g} GB; raise families.cache_gb to at least that, "
                    "lower retention.min or leave families.cache_gb out"
                )
        return self

    @model_validator(mode="after")
    def _channel_is_described_once(self) -> Scenario:
        problem = _trace_problem(self) if self.trace else _model_problem(self)
        if problem:
            raise ValueError(problem)
        return self

    @model_validator(mode="after")
    def _what_is_multicast_is_shared(self) -> Scenario:
        if self.radio.sharing == "none" and self.download is not None and self.download.multicast:
            raise ValueError(
                'download.multicast: links of their own share no transmission; drop it or radio.sharing = "none"'
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
            smallest = model.emulator_gb(model.fewest)
            if least < smallest:
                where = f"families.others.{index - 1}" if index else "model"
                raise ValueError(
                    f"memory.device_gb.min: a UE that may not upload and holds {least:g} GB can train nowhere, "
                    f"since the smallest emulator of {where} has {smallest:g} GB; raise memory.device_gb.min "
                    "to that, lower retention.min or set privacy.share to 0"
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
