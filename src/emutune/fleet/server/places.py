"""From where a device's key is used: one that two use shows itself by being used from two places in turn."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from emutune.errors import EmutuneError
from emutune.fleet.addresses import place_of
from emutune.fleet.ledger import Ledger
from emutune.fleet.server.ledger_thread import AskLedger

log = logging.getLogger(__name__)

# A device that changes networks does not come back within this.
AT_ONCE_S = 60.0
# What comes again within this is the same occurrence.
_OCCURRENCE_S = 600.0


@dataclass
class Use:
    """The use of a key from one place.

    Attributes:
        begun: when the last request came.
        active: when the last request ended.
        requests: under way.
    """

    begun: float
    active: float
    requests: int = 0


class Places:
    """The places that every device's key was lately used from.

    A key that moves from one place to another is that of a device which changes networks. One that is used in a place
    again, though another place has used it in between, is noted, once for as long as that goes on.

    Args:
        ledger: takes the note.
        clock: in seconds.
    """

    def __init__(self, ledger: AskLedger, clock: Callable[[], float] = time.monotonic) -> None:
        self._ledger, self._clock = ledger, clock
        self._uses: dict[str, dict[str, Use]] = {}
        self._last: dict[str, float] = {}

    async def begin(self, device: str, address: str) -> Use:
        """A request of a device; ``end`` it."""
        place, now = place_of(address), self._clock()
        uses = self._uses.setdefault(device, {})
        _forget_old(uses, now)
        use = uses.setdefault(place, Use(now, now))
        between = [other for other, seen in uses.items() if seen.begun > use.begun]
        use.begun = now
        use.requests += 1
        if between:
            await self._note(device, now, [place, *between])
        return use

    def end(self, use: Use) -> None:
        """The request is over."""
        use.requests -= 1
        use.active = self._clock()

    async def _note(self, device: str, now: float, places: list[str]) -> None:
        new = now - self._last.get(device, -_OCCURRENCE_S) >= _OCCURRENCE_S
        self._last[device] = now
        if not new:
            return
        line = f"used in turn from {' and '.join(sorted(places))}; if they are not one device, revoke it"
        log.warning("key of %s in two places: %s", device, line)
        try:
            await self._ledger(Ledger.audit, "key in two places", device, None, line)
        except EmutuneError as unwritten:
            log.error("the ledger does not take it: %s", unwritten)


def _forget_old(uses: dict[str, Use], now: float) -> None:
    """Drop what no place that is still in use could come back to."""
    lately = {place for place, use in uses.items() if use.requests or now - use.active <= AT_ONCE_S}
    first = min((uses[place].begun for place in lately), default=now)
    for place in [place for place, use in uses.items() if place not in lately and use.begun < first]:
        del uses[place]
