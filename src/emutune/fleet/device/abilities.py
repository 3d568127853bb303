"""What a device can, and may: told when it joins, reported with every task."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from emutune.errors import FleetError
from emutune.fleet.device.cache import megabytes
from emutune.fleet.protocol import ModelInfo


@dataclass(frozen=True)
class Abilities:
    """Of one device.

    Attributes:
        memory_bytes: of the largest emulator that it can train with; None if only its cache is a limit.
        private: its data never leave it, whatever a lease says.
        transmit_w, compute_w: power that sending and training take; None where that is not known.
    """

    memory_bytes: int | None = None
    private: bool = False
    transmit_w: float | None = None
    compute_w: float | None = None

    def check(self, models: Iterable[ModelInfo], cache_bytes: int) -> None:
        """See that what the device is to train can be trained somewhere.

        Args:
            models: that it has tasks of.
            cache_bytes: the most that its cache may hold.

        Raises:
            FleetError: its data may not leave it, and it cannot hold the smallest emulator of a model.
        """
        for model in models if self.private else ():
            smallest = model.smallest_bytes
            needs = f"the smallest emulator of the model {model.called} takes {smallest / 1e9:.3g} GB"
            if cache_bytes < smallest:
                raise FleetError(
                    f"--cache-mb: is {cache_bytes // 1_000_000}, {needs}, and --private keeps the data from the "
                    f"server; give at least {megabytes(smallest)}, or leave --private out"
                )
            if self.memory_bytes is not None and self.memory_bytes < smallest:
                raise FleetError(
                    f"--memory-gb: is {self.memory_bytes / 1e9:.3g}, {needs}, and --private keeps the data from the "
                    "server; give more memory, or leave --private out"
                )


ANYTHING = Abilities()
