"""Who is connected: strangers until a request brings a device's key, and for how long and how often one may be that."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain

from emutune.errors import EmutuneError
from emutune.fleet.addresses import place_of
from emutune.fleet.config import Limits
from emutune.fleet.ledger import Ledger
from emutune.fleet.server.ledger_thread import AskLedger

log = logging.getLogger(__name__)

# A device has one connection, and those that a bad link has left behind.
PER_DEVICE = 8
# Many devices behind one address may connect at once; none needs longer than this to say who it is.
_GRACE_S = 3.0
_REPORT_EVERY_S = 60.0
_PLACES_NAMED = 5
# What ledger, catalogue, logs, pools and pipes need beside the connections.
_OTHER_FILES = 128
_FILES_AT_MOST = 1 << 13


class Connection:
    """One connection, from when it was accepted until it is closed.

    Attributes:
        place: where it comes from.
        since: when it began to wait for what it waits for, or was last heard.
        waiting: whether a request is to come, or is only there in part.
        device, key_sha256: whose it is; None and empty of a stranger.
        close: closes it at once.
    """

    def __init__(self, owner: Connections, place: str, since: float) -> None:
        self._owner = owner
        self.place, self.since, self.waiting = place, since, True
        self.device: str | None = None
        self.key_sha256 = ""
        self.close: Callable[[], object] = lambda: None

    def begins(self) -> None:
        """The first bytes of a request are there."""
        if not self.waiting:
            self.waiting, self.since = True, self._owner.clock()

    def heard(self) -> None:
        """The head of a request is complete."""
        self.waiting, self.since = False, self._owner.clock()

    def identified(self, device: str, key_sha256: str) -> bool:
        """A request has brought a device's key; False if there is no room for more connections of devices."""
        return self._owner.identified(self, device, key_sha256)

    def ended(self) -> None:
        """It is closed."""
        self._owner.forget(self)


class Connections:
    """All connections of a server.

    Strangers have the room that devices leave. Where there is none, the one gives way that was silent the longest of
    the place that has most, so that whoever comes, and soon says who it is, always gets in. Of one place only so many
    strangers may stay, and none for longer than a request may take.

    Args:
        limits: of strangers.
        ledger: knows which keys are valid, and is told who was refused.
        clock: in seconds.

    Attributes:
        room: connections that there may be at once.
    """

    def __init__(
        self, limits: Limits, ledger: AskLedger, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._limits, self._ledger, self.clock = limits, ledger, clock
        self.room = _FILES_AT_MOST - _OTHER_FILES
        # In the order in which they came.
        self._strangers: dict[str, dict[Connection, None]] = {}
        self._devices: dict[str, dict[Connection, None]] = {}
        self._closed: Counter[tuple[str, str]] = Counter()
        self._reported_at = -_REPORT_EVERY_S

    def __len__(self) -> int:
        return sum(map(len, chain(self._strangers.values(), self._devices.values())))

    def __iter__(self) -> Iterator[Connection]:
        return chain.from_iterable([*self._strangers.values(), *self._devices.values()])

    def admit(self, address: str) -> Connection:
        """A connection was accepted."""
        if len(self) >= self.room:
            self.make_room()
        connection = Connection(self, place_of(address), self.clock())
        self._strangers.setdefault(connection.place, {})[connection] = None
        return connection

    def make_room(self) -> bool:
        """Close the stranger that was silent the longest of the place that has most; False if there is none."""
        most = max(self._strangers.values(), key=len, default=None)
        if most is None:
            return False
        self._refuse(
            min(most, key=lambda connection: connection.since), "there is no room for more connections"
        )
        return True

    def identified(self, connection: Connection, device: str, key_sha256: str) -> bool:
        """See ``Connection.identified``."""
        if connection.device == device:
            connection.key_sha256 = key_sha256
            return True
        # An eighth stays for those who have yet to say who they are.
        if sum(map(len, self._devices.values())) >= self.room - self.room // 8:
            log.error("no room for %s among %d connections; raise the limit of open files", device, self.room)
            return False
        self.forget(connection)
        connection.device, connection.key_sha256 = device, key_sha256
        own = self._devices.setdefault(device, {})
        own[connection] = None
        if len(own) > PER_DEVICE:
            oldest = min(own, key=lambda connection: connection.since)
            log.info("%s has more than %d connections; the oldest is closed", device, PER_DEVICE)
            self._close(oldest)
        return True

    def forget(self, connection: Connection) -> None:
        """A connection is closed, or somebody else's from now on."""
        device = connection.device
        kept = self._strangers if device is None else self._devices
        name = connection.place if device is None else device
        own = kept.get(name, {})
        own.pop(connection, None)
        if not own:
            kept.pop(name, None)

    async def sweep(self) -> None:
        """Close whoever may not stay; called once a second."""
        now, longest_s = self.clock(), self._limits.request_s
        for connection in list(self):
            if connection.waiting and now - connection.since > longest_s:
                self._refuse(connection, f"no complete request within {longest_s:g} s")
        most = self._limits.connections_per_address
        for own in list(self._strangers.values()):
            settled = sorted(
                (each for each in own if now - each.since > _GRACE_S), key=lambda each: each.since
            )
            for connection in settled[: max(0, len(own) - most)]:
                self._refuse(connection, f"more than {most} connections that bring no device's key")
        try:
            await self._close_revoked()
            await self._report(now)
        except EmutuneError as error:
            log.error("the ledger cannot be asked who may stay: %s", error)

    async def _close_revoked(self) -> None:
        # Of those that come meanwhile nothing is known yet.
        before = {connection: connection.key_sha256 for own in self._devices.values() for connection in own}
        valid = await self._ledger(Ledger.valid_keys) if before else set()
        for device, own in list(self._devices.items()):
            revoked = [
                each for each in own if each.key_sha256 not in valid and before.get(each) == each.key_sha256
            ]
            for connection in revoked:
                self._close(connection)
            if revoked:
                line = f"the key is not valid any more; open connections closed: {len(revoked)}"
                log.warning("refused %s: %s", device, line)
                await self._ledger(Ledger.audit, "refused", device, None, line)

    def _refuse(self, connection: Connection, reason: str) -> None:
        self._closed[reason, connection.device or connection.place] += 1
        self._close(connection)

    def _close(self, connection: Connection) -> None:
        # Now, since the socket may take a moment, and its place is needed.
        self.forget(connection)
        connection.close()

    async def _report(self, now: float) -> None:
        """Say who was refused, in a line for each reason and no more than once a minute."""
        if not self._closed or now - self._reported_at < _REPORT_EVERY_S:
            return
        closed, self._closed, self._reported_at = self._closed, Counter(), now
        for reason in sorted({reason for reason, _ in closed}):
            of = Counter({place: count for (why, place), count in closed.items() if why == reason})
            named = ", ".join(f"{place} ({count})" for place, count in of.most_common(_PLACES_NAMED))
            more = f", {len(of) - _PLACES_NAMED} more places" if len(of) > _PLACES_NAMED else ""
            line = f"{of.total()} connections closed, {reason}: {named}{more}"
            log.warning("refused %s", line)
            await self._ledger(Ledger.audit, "refused", None, None, line)


def room_for_connections() -> int:
    """Connections that fit into this process's limit of open files, which is raised as far as it may be."""
    try:
        import resource
    except ImportError:  # on Windows, whose sockets are no files
        return _FILES_AT_MOST - _OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _FILES_AT_MOST if hard == resource.RLIM_INFINITY else min(hard, _FILES_AT_MOST)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
        except (OSError, ValueError) as error:
            log.info("the limit of %d open files stays: %s", soft, error)
    files = wanted if soft == resource.RLIM_INFINITY else min(soft, _FILES_AT_MOST)
    return max(files - _OTHER_FILES, files // 2)
