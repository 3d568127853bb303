"""The certificate that a server shows, renewed and read again while it runs."""

from __future__ import annotations

import asyncio
import logging
import ssl
import time
from collections.abc import Callable
from pathlib import Path

from cryptography import x509

from emutune.errors import FleetError
from emutune.fleet.config import FleetConfig
from emutune.fleet.security import (
    Certificate,
    check_trusted,
    lasts,
    own_certificate,
    self_made_certificate,
    serving,
)

log = logging.getLogger(__name__)

LOOK_AGAIN_S = 5.0
# A certificate that stays out of date, such as under an authority that is, is not made again and again.
_TRY_AGAIN_S = 600.0
_REMIND_S = 86400.0
_Stamp = tuple[tuple[int, int, int] | None, ...]


def certificate_of(config: FleetConfig) -> Certificate:
    """The user's certificate, or one of the fleet's own authority, which is made when there is none.

    Raises:
        FleetError: it cannot be read, its key is another's, or it is not for a name that devices use.
    """
    server = config.server
    if server.certificate is None or server.key is None:
        return self_made_certificate(server.directory / "tls", server.reached_as)
    for name in server.reached_as:
        found = own_certificate(server.certificate, server.key, name, server.authority)
    return found


class Renewal:
    """Looks after the certificate of a server.

    One that the fleet made is made anew before it expires, or if its files are gone; a user's own is read again when
    its files have changed. What cannot be used, or would not be taken by devices that took the one before, is said in
    the log, and the one before is shown on.

    Args:
        config: the fleet's file.
        shown: what the server shows now.
        show: shows another to whoever connects from then on.
    """

    def __init__(
        self, config: FleetConfig, shown: Certificate, show: Callable[[ssl.SSLContext], None]
    ) -> None:
        self._config, self._show, self._authority = config, show, shown.authority
        self._files = (shown.certificate, shown.key)
        self._certificate = _first(shown.certificate)
        self._stamp = self._stamped()
        self._again_at = time.monotonic()

    async def run(self) -> None:
        """Look again and again, until cancelled."""
        while True:
            await asyncio.sleep(LOOK_AGAIN_S)
            await asyncio.to_thread(self.look)

    def look(self) -> None:
        """Show what there is now, if that is another certificate or has to be."""
        stamp = self._stamped()
        if stamp == self._stamp and not self._due():
            return
        try:
            found = certificate_of(self._config)
            context, certificate = serving(found.certificate, found.key), _first(found.certificate)
            # That devices of its own authority take it is known already.
            for name in self._config.server.reached_as if found.authority != self._authority else ():
                check_trusted(context, found.certificate, self._authority, name)
        except FleetError as error:
            log.error("%s; the certificate from before is shown on", error)
        else:
            self._show(context)
            self._certificate = certificate
            until = (
                "" if certificate is None else f" until {certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC"
            )
            log.warning("another certificate is shown from now on, valid%s", until)
        # Also of what was refused, which is not tried again until it changes.
        self._stamp = self._stamped()

    def _due(self) -> bool:
        """Whether the fleet's own certificate is to be renewed; that of a user is the user's affair."""
        if self._certificate is not None and lasts(self._certificate):
            return False
        now, own = time.monotonic(), self._config.server.certificate
        if now < self._again_at:
            return False
        self._again_at = now + (_TRY_AGAIN_S if own is None else _REMIND_S)
        if own is not None and self._certificate is not None:
            until = self._certificate.not_valid_after_utc
            log.warning("%s: expires at %s; replace it, it is read while the server runs", own, until)
        return own is None

    def _stamped(self) -> _Stamp:
        return tuple(map(_stamp_of, self._files))


def _stamp_of(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size


def _first(path: Path) -> x509.Certificate | None:
    try:
        return x509.load_pem_x509_certificates(path.read_bytes())[0]
    except (OSError, ValueError):
        return None
