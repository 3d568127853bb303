"""The foundation models that a fleet serves: each one's catalogue beside what the policy's scenario says of it."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from emutune.errors import FleetError
from emutune.fleet.protocol import ModelInfo, Report
from emutune.scenario import Scenario
from emutune.tuning.inventory import Inventory
from emutune.tuning.manifest import Emulator

_NAME = re.compile("[0-9A-Za-z][0-9A-Za-z._-]{0,63}")


class UntrainableError(FleetError):
    """A task can be trained neither on its device nor at the server."""


class Family:
    """One of the models that a fleet serves.

    Args:
        number: which of the scenario's models it is.
        name: what people know it by.
        catalogue: its emulators.
        scenario: that the policy knows.

    Raises:
        FleetError: the catalogue is that of another model than the scenario's, or lacks its emulators.

    Attributes:
        emulators: those within the scenario's bounds, by rising retention.
    """

    def __init__(self, number: int, name: str, catalogue: Inventory, scenario: Scenario) -> None:
        self.number, self.name, self.catalogue = number, name, catalogue
        self.model = scenario.models[number]
        self.emulators = _usable_emulators(catalogue, scenario, number)
        self._base_perplexity = catalogue.base().perplexity or catalogue.find(1.0).perplexity

    @property
    def base(self) -> str:
        """Its hash."""
        return self.catalogue.info.base

    @property
    def key(self) -> str | None:
        """What the ledger knows it by: its hash, or None for the fleet's first, which all are that it does not name."""
        return self.base if self.number else None

    def describe(self) -> dict[str, Any]:
        """What a device has to know of it: the fields of ``ModelInfo``."""
        info, folder = self.catalogue.info, self.catalogue.directory / "tokenizer"
        files = sorted(path for path in folder.iterdir() if path.is_file())
        return {
            "model": self.name,
            "base": info.base,
            "config": info.config,
            "layers": info.layers,
            "bottom": info.bottom,
            "top": info.top,
            "tokenizer": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files},
            "smallest_bytes": min(emulator.bytes for emulator in self.emulators),
        }

    def emulator(self, layers: int) -> Emulator:
        """The emulator of so many of the scenario's layers, or the nearest."""
        retention = layers / self.model.layers
        return min(self.emulators, key=lambda emulator: abs(emulator.retention - retention))

    def named(self, name: str | None) -> Emulator | None:
        """The emulator of a name; None if there is none of that name."""
        return next((emulator for emulator in self.emulators if emulator.name == name), None)

    def layers_of(self, emulator: Emulator | None) -> int:
        """How many of the scenario's layers an emulator has; 0 for none."""
        return 0 if emulator is None else round(emulator.retention * self.model.layers)

    def excess(self, ratio: float | None) -> float | None:
        """By how much a text is harder than what the scenario's curve was measured on, as a share.

        Args:
            ratio: of an emulator's perplexity on the text over that on the catalogue's calibration text.

        Returns:
            ppl / ppl_reference - 1; None if that is not known.
        """
        untuned = self.model.curve.untuned or self._base_perplexity
        if ratio is None or untuned is None or self._base_perplexity is None:
            return None
        return ratio * self._base_perplexity / untuned - 1


class Families:
    """The models that a fleet serves, the scenario's first model first.

    Args:
        scenario: that the policy knows.
        catalogues: one of each of its models, in their order.

    Raises:
        FleetError: there are more or fewer than the scenario has, two are of one model, or one is not of the
            scenario's or lacks its emulators.
    """

    def __init__(self, scenario: Scenario, catalogues: Sequence[Inventory]) -> None:
        self.scenario = scenario
        if len(catalogues) != len(scenario.models):
            raise FleetError(
                f"--catalogue: given {len(catalogues)} times, but the policy's scenario {scenario.name!r} has "
                f"{len(scenario.models)} foundation models; give a catalogue for each, in their order"
            )
        of: dict[str, Inventory] = {}
        for catalogue in catalogues:
            if (base := catalogue.info.base) in of:
                raise FleetError(
                    f"--catalogue {catalogue.directory}: is of the model {base[:12]}, as is {of[base].directory}; give "
                    "one catalogue for each model"
                )
            of[base] = catalogue
        self._all = tuple(
            Family(number, name, catalogue, scenario)
            for number, (name, catalogue) in enumerate(zip(model_names(catalogues), catalogues, strict=True))
        )

    def __iter__(self) -> Iterator[Family]:
        """In the scenario's order."""
        return iter(self._all)

    def __len__(self) -> int:
        """How many there are."""
        return len(self._all)

    def of(self, base: str | None) -> Family:
        """The model of a hash; the first for None.

        Raises:
            UntrainableError: it is not served.
        """
        for family in self._all:
            if base in (None, family.base):
                return family
        served = ", ".join(f"{family.name} ({family.base[:12]})" for family in self._all)
        raise UntrainableError(
            f"model: the fleet serves no {str(base)[:12]}, but {served}; report tasks of those"
        )

    def held(self, report: Report) -> tuple[Emulator | None, ...]:
        """The emulator of each model that a device has."""
        names = dict(report.held) | {self.of(report.model).base: report.emulator}
        return tuple(family.named(names.get(family.base)) for family in self._all)

    def age(self, report: Report) -> tuple[int, ...]:
        """How many models a device has used since each; those that it never used come last, in their order."""
        used = [base for base, _ in report.held]
        order = sorted(
            self._all, key=lambda one: (used.index(one.base) if one.base in used else len(used), one.number)
        )
        return tuple(order.index(family) for family in self._all)

    def check(self, report: Report) -> None:
        """See that a report's task can be trained somewhere.

        Raises:
            UntrainableError: it is of a model that is not served, or its data may not leave a device that can hold
                no emulator of it.
        """
        smallest = self.of(report.model).emulators[0].bytes
        if report.private and room_of(report) < smallest:
            raise UntrainableError(
                f"memory_bytes: is below the {smallest} bytes of the smallest emulator, and the data are private; give "
                "the device more memory or cache, or let the server have the data"
            )

    def describe(self) -> tuple[dict[str, Any], tuple[ModelInfo, ...]]:
        """The first model as fields of ``FleetInfo``, and the others; a model that is alone needs no name."""
        first, *others = (family.describe() for family in self._all)
        return (first if others else first | {"model": None}), tuple(ModelInfo(**other) for other in others)


def room_of(report: Report) -> int:
    """Bytes of the largest emulator that a device can hold and train with."""
    return min(size for size in (report.cache_bytes, report.memory_bytes) if size is not None)


def model_names(catalogues: Sequence[Inventory]) -> list[str]:
    """What models are called: as their catalogues' directories, or as their hashes begin where those are alike."""
    names = [catalogue.directory.resolve().name for catalogue in catalogues]
    # Folders of texts have these names too, and some systems do not tell upper case from lower.
    often = Counter(name.lower() for name in names)
    return [
        name if _NAME.fullmatch(name) and often[name.lower()] == 1 else catalogue.info.base[:12]
        for name, catalogue in zip(names, catalogues, strict=True)
    ]


def _usable_emulators(catalogue: Inventory, scenario: Scenario, number: int) -> list[Emulator]:
    """The catalogue's emulators within the bounds of one of the scenario's models, by rising retention."""
    model, base = scenario.models[number], catalogue.info.base
    if model.base not in (None, base):
        where = f"families.others.{number - 1}" if number else "model"
        raise FleetError(
            f"{catalogue.directory}: was made from the model {base[:12]}, but {where} of the policy's scenario "
            f"{scenario.name!r} was measured on {str(model.base)[:12]}; build a catalogue of that model, or "
            "train in a scenario of this one (emutune calibrate)"
        )
    low, high = model.fewest / model.layers, model.most / model.layers
    within: list[Emulator] = [e for e in catalogue.emulators() if low - 1e-9 <= e.retention <= high + 1e-9]
    if not within:
        raise FleetError(
            f"{catalogue.directory}: holds no emulator with a retention of {low:.3g} to {high:.3g}, the bounds of "
            f"scenario {scenario.name!r}; build with --retentions inside them"
        )
    return within
