"""What the ledger does not say: who was heard when, and how far an emulator is on its way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from emutune.fleet.database import utc_now

_SHARDS = "/v1/shards/"


@dataclass
class Watch:
    """Of this server's life alone; a restart begins anew.

    Attributes:
        heard: when each device last asked for anything.
        sent: bytes of shards that went to a device, and the lease that they were for.
    """

    now: Callable[[], datetime] = utc_now
    heard: dict[str, datetime] = field(default_factory=dict)
    sent: dict[str, tuple[str, int]] = field(default_factory=dict)

    def begin_shard(self, device: str, lease: str) -> None:
        """A shard goes out: for another lease than the one before, counting begins anew."""
        if self.sent.get(device, ("", 0))[0] != lease:
            self.sent[device] = (lease, 0)

    def count(self, device: str, size: int) -> None:
        """Bytes of a shard went out."""
        if device in self.sent:
            lease, sent = self.sent[device]
            self.sent[device] = (lease, sent + size)

    def sent_for(self, device: str, lease: str) -> int:
        """Bytes of shards that went to a device for a lease."""
        known, sent = self.sent.get(device, ("", 0))
        return sent if known == lease else 0


class Watching:
    """Middleware that tells a ``Watch`` of every request that a device is known to have made."""

    def __init__(self, app: ASGIApp, watch: Watch) -> None:
        self._app, self._watch = app, watch

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        shard = False

        async def watched(message: Message) -> None:
            nonlocal shard
            await send(message)
            # Who asks is known only once the route has checked the key.
            device = scope.get("state", {}).get("device")
            if device is None:
                return
            self._watch.heard[device] = self._watch.now()
            if message["type"] == "http.response.start":
                shard = scope["path"].startswith(_SHARDS) and message["status"] in (200, 206)
                if shard:
                    self._watch.begin_shard(device, scope["state"]["fetched_for"])
            elif shard:
                self._watch.count(device, len(message.get("body", b"")))

        await self._app(scope, receive, watched)
