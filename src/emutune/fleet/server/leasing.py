"""From reports to leases: what each device is told to do in a step, and what that is predicted to cost."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from emutune.fleet.config import FleetConfig
from emutune.fleet.protocol import FleetInfo, Lease, Report
from emutune.fleet.rows import Decision, Kind, Transfer
from emutune.fleet.server.choices import Candidate, Choice, Deciding, Forecast
from emutune.fleet.server.families import Families, Family, room_of
from emutune.fleet.server.rates import LinkEstimate, estimate_links
from emutune.tuning.manifest import Emulator, missing

log = logging.getLogger("emutune.fleet")

MegaBytes = 1e6
# Of the leases whose bytes go up, and of those whose come down.
KINDS: tuple[Kind, Kind] = ("upload", "train")


class Known(NamedTuple):
    """What is known of a device beside its report.

    Attributes:
        progress: by what the curve's perplexity is to be multiplied for its next training; see ``adaptation``.
        complexity: c of the text that is held back for it; None if that was never measured.
        spent_j: energy that it has spent in this episode.
        tflops: its training speed, as measured; None if that never was.
        transfers: what it moved for its last leases of each kind, the oldest first; none where links are shaped.
        adapter: SHA-256 of the one of the task's model in service; None if none is.
    """

    progress: float
    complexity: float | None
    spent_j: float
    tflops: float | None
    transfers: Mapping[Kind, Sequence[Transfer]]
    adapter: str | None


@dataclass(frozen=True)
class _Plan:
    """What one device is to do, and what is known of it.

    Attributes:
        family: the task's foundation model.
        emulator: the one chosen, or the one that would be if the device trained.
        moved: bytes that have to move, before they are scaled.
    """

    device: str
    report: Report
    known: Known
    candidate: Candidate
    choice: Choice
    family: Family
    emulator: Emulator
    moved: int

    @property
    def measured(self) -> LinkEstimate | None:
        """The link that is used, if it was measured."""
        return self.candidate.uplink if self.choice.at_server else self.candidate.downlink


class Leasing:
    """What decisions need to know beside the reports.

    Args:
        config: the fleet's file.
        families: the foundation models that are served.
        decider: the policy.
    """

    def __init__(self, config: FleetConfig, families: Families, decider: Deciding) -> None:
        self._config, self._families, self._decider = config, families, decider
        self._scenario = decider.scenario

    def describe(self) -> FleetInfo:
        """What a device has to know before its first task."""
        first, others = self._families.describe()
        return FleetInfo(name=self._config.name, **first, others=others)

    async def lease_step(
        self, step: int, reports: Sequence[tuple[str, Report]], known: Mapping[str, Known]
    ) -> list[Decision]:
        """Decide a step; the same for the same step, reports, and what is known of the devices beside."""
        candidates = self._with_links(
            {device: known[device] for device, _ in reports},
            [self._candidate(device, report, known[device]) for device, report in reports],
        )
        choices = await self._decider.decide(step, candidates)
        plans = [
            self._plan(device, report, known[device], candidate, choice)
            for (device, report), candidate, choice in zip(reports, candidates, choices, strict=True)
        ]
        # What is measured later is perplexity on the text that is held back, not on the device's own.
        judged = [
            plan.candidate
            if plan.known.complexity is None
            else replace(plan.candidate, complexity=plan.known.complexity)
            for plan in plans
        ]
        predicted = await self._forecast(step, plans, judged)
        rates = await self._rates(step, plans)
        rows = zip(plans, predicted, rates, strict=True)
        return [self._decision(step, *row) for row in rows if not row[0].choice.idle]

    def _plan(self, device: str, report: Report, known: Known, candidate: Candidate, choice: Choice) -> _Plan:
        family = self._families.of(report.model)
        emulator = family.emulator(choice.layers)
        lacking = missing(self._families.held(report)[family.number], emulator)
        moved = report.data_bytes if choice.at_server else sum(lacking.values())
        moved = 0 if choice.idle else moved
        return _Plan(device, report, known, candidate, choice, family, emulator, moved)

    async def _forecast(
        self, step: int, plans: Sequence[_Plan], candidates: Sequence[Candidate], during: bool = False
    ) -> list[Forecast]:
        """What plans come to for candidates that may differ from those that were decided about."""
        scaled = [plan.moved * self._config.shaping.byte_scale for plan in plans]
        choices = [plan.choice for plan in plans]
        return await self._decider.forecast(step, candidates, choices, scaled, during)

    def _candidate(self, device: str, report: Report, known: Known) -> Candidate:
        shaping = self._config.shaping
        held = zip(self._families, self._families.held(report), strict=True)
        return Candidate(
            device=device,
            complexity=self._complexity(report, known),
            data_bytes=report.data_bytes * shaping.byte_scale,
            family=self._families.of(report.model).number,
            held=tuple(family.layers_of(emulator) for family, emulator in held),
            age=self._families.age(report),
            spent_j=known.spent_j,
            gain=None if shaping.enabled else report.gain,
            transmit_power_w=report.transmit_w,
            tflops=known.tflops,
            compute_w=report.compute_w,
            **self._limits(report),
        )

    def _with_links(self, known: Mapping[str, Known], candidates: list[Candidate]) -> list[Candidate]:
        """Candidates with the links that were measured, where links are real."""
        if self._config.shaping.enabled:
            return candidates
        scale = self._config.shaping.byte_scale

        def transfers_of(device: str, kind: Kind) -> list[Transfer]:
            return [Transfer(scale * one.bytes, one.seconds) for one in known[device].transfers[kind]]

        up, down = (estimate_links(transfers_of, list(known), kind) for kind in KINDS)
        for device, *links in zip(known, up, down, strict=True):
            log.info("%s: up %s, down %s", device, *(link or "not measured yet" for link in links))
        return [
            replace(candidate, uplink=uplink, downlink=downlink)
            for candidate, uplink, downlink in zip(candidates, up, down, strict=True)
        ]

    def _complexity(self, report: Report, known: Known) -> float:
        """C = iota (ppl_task / ppl_reference - 1), from the device's measurement, or else from held-back text."""
        excess = self._families.of(report.model).excess(report.perplexity_ratio)
        if excess is None:
            middle = self._scenario.tasks.complexity
            return (middle.min + middle.max) / 2 if known.complexity is None else known.complexity
        return self._scenario.quality.complexity_weight * excess

    def _limits(self, report: Report) -> dict[str, Any]:
        """What the device can hold, and whether its data may reach the server."""
        family = self._families.of(report.model)
        fitting = [emulator for emulator in family.emulators if emulator.bytes <= room_of(report)]
        too_large = report.data_bytes > self._config.limits.data_mb * MegaBytes
        if too_large and not report.private:
            # Somebody has to train them.
            fitting = fitting or family.emulators[:1]
        return {
            "most_layers": max(map(family.layers_of, fitting), default=0),
            "private": report.private or too_large,
        }

    async def _rates(self, step: int, plans: Sequence[_Plan]) -> list[float | None]:
        """What each link carries in this step, in bits/s of wall time: with the gain during it, not before it."""
        shaping = self._config.shaping
        if not shaping.enabled:
            return [None] * len(plans)
        actual = await self._forecast(step, plans, [plan.candidate for plan in plans], during=True)
        scale = shaping.time_scale / shaping.byte_scale
        return [
            forecast.rate_bps * scale if plan.moved else None
            for forecast, plan in zip(actual, plans, strict=True)
        ]

    def _decision(self, step: int, plan: _Plan, forecast: Forecast, rate_bps: float | None) -> Decision:
        device, report, emulator = plan.device, plan.report, plan.emulator
        local, shaping = not plan.choice.at_server, self._config.shaping
        # A real device, and a server that many share, take the time that they take.
        paced = shaping.enabled and local and forecast.training_s > 0
        lease = Lease(
            lease=f"{step}-{device}",
            step=step,
            kind="train" if local else "upload",
            task=report.task,
            emulator=json.loads(emulator.model_dump_json()) if local else None,
            keep=tuple(family.base for family in self._families if family.number in plan.choice.keep),
            start=None if self._config.steps.fresh else plan.known.adapter,
            training=self._config.training.model_copy(update={"seed": self._config.training.seed + step}),
            rate_bps=rate_bps,
            training_s=forecast.training_s / shaping.time_scale if paced else None,
            deadline_s=self._config.steps.deadline_s,
        )
        return Decision(
            device=device,
            task=report.task,
            base=plan.family.key,
            lease=lease.lease,
            kind=lease.kind,
            retention=emulator.retention if local else None,
            at_server=plan.choice.at_server,
            emulator_name=emulator.name if local else None,
            lease_json=lease.model_dump_json(),
            predicted_bytes=plan.moved,
            predicted_delay_s=forecast.delay_s,
            predicted_training_s=forecast.training_s,
            predicted_perplexity=forecast.perplexity * plan.known.progress,
            curve_perplexity=forecast.perplexity,
            transfer_w=forecast.transfer_w,
            training_w=forecast.training_w,
            situation=json.dumps(forecast.situation),
            gain=forecast.situation["gain"] if plan.measured is None else None,
            complexity=plan.candidate.complexity,
            rate_bps=rate_bps,
        )
