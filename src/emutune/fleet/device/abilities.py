"""What a device can, and may: told when it joins, reported with every task."""

from __future__ import annotations

from dataclasses import dataclass

from emutune.errors import FleetError
from emutune.fleet.protocol import FleetInfo


@dataclass(frozen=True)
class Abilities:
    """Of one device.

    Attributes:
        memory_bytes: of the largest emulator that it can train with; None if only its cache is a limit.
        private: its data never leave it, whatever a lease says.
    """

    memory_bytes: int | None = None
    private: bool = False

    def check(self, info: FleetInfo) -> None:
        """See that the device is of use to a fleet.

        Raises:
            FleetError: its data may not leave it, and its memory is below the smallest emulator.
        """
        if self.private and self.memory_bytes is not None and self.memory_bytes < info.smallest_bytes:
            raise FleetError(
                f"--memory-gb: is {self.memory_bytes / 1e9:.3g}, the smallest emulator of the fleet takes "
                f"{info.smallest_bytes / 1e9:.3g}, and --private keeps the data from the server; give more memory, or "
                "leave --private out"
            )


ANYTHING = Abilities()
