"""Whether it is a clock that is wrong or a certificate that is out of date, for a device that refuses its server's."""

from __future__ import annotations

import asyncio
import ssl
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

from cryptography import x509

from emutune.fleet.authority import now

# X509_V_ERR_CERT_NOT_YET_VALID and X509_V_ERR_CERT_HAS_EXPIRED; OpenSSL looks at dates last, so the rest is in order.
OUT_OF_DATE = frozenset({9, 10})
_LOOK_S = 10.0
_HEAD_BYTES = 1 << 16
# Anybody may ask for it, so nothing is refused that would be noted.
_PATH = "/v1/openapi.json"


@dataclass(frozen=True)
class Dates:
    """From when until when a server's certificate is valid, and its authority's; what the server's clock says."""

    certificate: tuple[datetime, datetime]
    authority: tuple[datetime, datetime]
    servers_clock: datetime | None


async def what_is_wrong(url: str, authority: str) -> str | None:
    """Ask a server for its certificate and the time, without trusting it, and say what is wrong; None if unknown.

    Args:
        url: of the server; it is told nothing.
        authority: PEM of whom the device trusts.
    """
    with suppress(OSError, ValueError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
        async with asyncio.timeout(_LOOK_S):
            return explained(await _dates(url, authority), now())
    return None


def explained(dates: Dates, devices_clock: datetime) -> str:
    """Which of the two it is, and what to do.

    Args:
        dates: what the server shows.
        devices_clock: what this device takes the time to be.
    """
    what, remedy, (begin, end) = "the server's certificate", "renew it at the server", dates.certificate
    if not dates.authority[0] <= devices_clock <= dates.authority[1]:
        what, (begin, end) = "the certificate of the fleet's authority", dates.authority
        remedy = "make another authority, and credentials of it, at the server"
    server, valid = dates.servers_clock, f"valid from {_said(begin)} to {_said(end)}"
    clocks = f"this device's clock says {_said(devices_clock)}"
    clocks += "" if server is None else f", the server's {_said(server)}"
    if begin <= devices_clock <= end:
        return f"{what} is {valid}, and {clocks}: it was only just made, or a clock was only just set"
    if server is not None and begin <= server <= end:
        return f"this device's clock is wrong: {clocks}, and {what} is {valid}; set this device's clock"
    if devices_clock > end:
        # Without the server's clock it may be either.
        unsure = "" if server is not None else "set this device's clock if that is wrong, or else "
        return f"{what} has expired: it is {valid}, and {clocks}; {unsure}{remedy}"
    unsure = "set the server's clock, and this device's" if server is not None else "set this device's clock"
    return f"{what} is not valid yet: it is {valid}, and {clocks}; {unsure}"


async def _dates(url: str, authority: str) -> Dates:
    """What a server shows to anybody.

    Raises:
        OSError, ValueError, EOFError: it shows nothing that can be read.
    """
    parts = urlsplit(url)
    trusts_anybody = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    trusts_anybody.check_hostname, trusts_anybody.verify_mode = False, ssl.CERT_NONE
    reader, writer = await asyncio.open_connection(
        parts.hostname, parts.port or 443, ssl=trusts_anybody, limit=_HEAD_BYTES
    )
    try:
        shown: Any = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        writer.write(f"GET {_PATH} HTTP/1.1\r\nHost: fleet\r\nConnection: close\r\n\r\n".encode())
        try:
            async with asyncio.timeout(_LOOK_S / 2):
                head = await reader.readuntil(b"\r\n\r\n")
        except (TimeoutError, asyncio.IncompleteReadError):
            head = b""  # its certificate says enough
    finally:
        writer.transport.abort()
    certificate, trusted = (
        x509.load_der_x509_certificate(shown),
        x509.load_pem_x509_certificate(authority.encode()),
    )
    return Dates(_validity(certificate), _validity(trusted), _date_in(head))


def _validity(certificate: x509.Certificate) -> tuple[datetime, datetime]:
    return certificate.not_valid_before_utc, certificate.not_valid_after_utc


def _date_in(head: bytes) -> datetime | None:
    for line in head.decode("latin-1").split("\r\n"):
        name, _, value = line.partition(":")
        if name.strip().lower() == "date":
            with suppress(ValueError):
                date = parsedate_to_datetime(value.strip())
                return date if date.tzinfo is not None else date.replace(tzinfo=UTC)
    return None


def _said(time: datetime) -> str:
    return f"{time:%Y-%m-%d %H:%M} UTC"
