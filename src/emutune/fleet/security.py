"""Who is who: the fleet's own authority and certificate, devices' tokens, keys and credentials files.

Secrets never enter a log, a message or a ``repr``; files that hold them are made for their owner alone (0600).
"""

from __future__ import annotations

import datetime
import hashlib
import logging
import os
import secrets
import ssl
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from emutune.errors import FleetError
from emutune.files import sync_directory
from emutune.fleet.authority import (
    RENEW_DAYS,
    general_name,
    issue,
    key_pem,
    make_authority,
    now,
    pem,
    read_authority,
)
from emutune.fleet.protocol import DeviceName, Sha256

log = logging.getLogger(__name__)

# What every self-made certificate names.
LOOPBACK = ("localhost", "127.0.0.1")
_CREDENTIALS_BYTES = 1 << 18


@dataclass(frozen=True)
class Certificate:
    """What a server shows, and what devices know it by.

    Attributes:
        certificate: PEM file, with the certificates between it and its authority.
        key: PEM file of its key.
        authority: PEM of the authority that devices trust, and no other.
    """

    certificate: Path
    key: Path
    authority: str


class Credentials(BaseModel):
    """A device's credentials file.

    Attributes:
        fleet: the fleet's name.
        device: whose they are.
        url: of the server.
        token: takes the device's place once; kept out of ``repr``.
        ca: PEM of the authority that the server's certificate comes from.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: Literal["1"] = "1"
    fleet: Annotated[str, Field(min_length=1, max_length=100)]
    device: DeviceName
    url: Annotated[str, Field(max_length=300)]
    token: Annotated[Sha256, Field(repr=False)]
    ca: Annotated[str, Field(max_length=_CREDENTIALS_BYTES, repr=False)]

    @field_validator("url")
    @classmethod
    def _over_tls(cls, url: str) -> str:
        parts = urlsplit(url)
        if parts.scheme != "https" or not parts.hostname or parts.username or parts.path not in ("", "/"):
            raise ValueError("must be of the form https://host:port")
        _ = parts.port  # a ValueError if it is none
        return url.rstrip("/")

    @field_validator("ca")
    @classmethod
    def _is_a_certificate(cls, ca: str) -> str:
        try:
            trusting(ca)
        except FleetError as error:
            raise ValueError("must be a certificate in PEM form") from error
        return ca


def new_secret() -> str:
    """A token or a key: 32 random bytes as 64 hexadecimal digits."""
    return secrets.token_hex(32)


def secret_sha256(secret: str) -> str:
    """What the server keeps of a token or a key: the SHA-256 of its hexadecimal digits."""
    return hashlib.sha256(secret.encode()).hexdigest()


def write_secret(path: Path, text: str) -> None:
    """Write a file that only its owner can read; an earlier one stays whole until the new one is on disk.

    Raises:
        FleetError: it cannot be written.
    """
    aside = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
        except BaseException:
            with suppress(OSError):
                aside.unlink()
            raise
        sync_directory(path.parent)
    except OSError as error:
        raise FleetError(
            f"{path}: cannot be written ({error.strerror}); free some space or choose another place"
        ) from (error)


def warn_of_readers(path: Path) -> None:
    """Say so if others than its owner can read a secret; what Windows shows as a mode says nothing about that."""
    if os.name != "nt" and path.stat().st_mode & 0o077:
        log.warning("%s: others can read it, and it holds a secret; chmod 600 it", path)


def write_credentials(path: Path, credentials: Credentials) -> None:
    """Write a device's credentials file.

    Raises:
        FleetError: it cannot be written.
    """
    write_secret(path, credentials.model_dump_json(indent=1) + "\n")


def read_credentials(path: Path) -> Credentials:
    """Read a device's credentials file.

    Raises:
        FleetError: it is missing or damaged; the message names the field, never its value.
    """
    remedy = "make it again with emutune enroll"
    try:
        if path.stat().st_size > _CREDENTIALS_BYTES:
            raise FleetError(f"{path}: too large for a credentials file; {remedy}")
        warn_of_readers(path)
        return Credentials.model_validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise FleetError(f"{path}: no such file; {remedy}, and copy it to this device") from error
    except OSError as error:
        raise FleetError(f"{path}: cannot be read ({error.strerror}); allow yourself to read it") from error
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, problem['loc'])) or 'file'}: {problem['msg']}" for problem in error.errors()
        )
        # The error itself carries the values.
        raise FleetError(f"{path}: damaged ({problems}); {remedy}") from None


def trusting(authority: str) -> ssl.SSLContext:
    """TLS of a device: nobody is trusted but servers with a certificate from this authority (PEM).

    Raises:
        FleetError: it is no certificate.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    try:
        context.load_verify_locations(cadata=authority)
    except (ssl.SSLError, ValueError, TypeError) as error:
        raise FleetError(
            "ca: is no certificate in PEM form; make the credentials again with emutune enroll"
        ) from error
    return context


def serving(certificate: Path, key: Path) -> ssl.SSLContext:
    """TLS of a server.

    Raises:
        FleetError: the files are unreadable, damaged, or do not belong together.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    try:
        # An encrypted key would otherwise stop and ask for its password.
        context.load_cert_chain(certificate, key, password="")
    except (OSError, ssl.SSLError) as error:
        raise FleetError(
            f"server.certificate: {certificate} and {key} cannot be used ({_reason(error)}); both must be readable "
            "PEM files that belong together, the key without a password"
        ) from error
    return context


def own_certificate(certificate: Path, key: Path, host: str, authority: Path | None = None) -> Certificate:
    """A certificate that the user brings, if devices that reach the server as ``host`` will take it.

    Args:
        certificate: PEM file, with the certificates between it and its authority.
        key: PEM file of its key, without a password.
        host: name or address in the devices' URL.
        authority: PEM file of the authority; if not given, the last certificate of the first file, which
            must be its own authority.

    Raises:
        FleetError: a file is unreadable, the key belongs to another certificate, it has expired, is for
            another host or from another authority.
    """
    context = serving(certificate, key)
    trusted = _last_certificate(certificate) if authority is None else _read(authority)
    check_trusted(context, certificate, trusted, host)
    return Certificate(certificate, key, trusted)


def check_trusted(context: ssl.SSLContext, certificate: Path, authority: str, host: str) -> None:
    """Refuse a certificate that devices would not take.

    Args:
        context: of ``serving``.
        certificate: the file that it was read from.
        authority: PEM of what devices trust.
        host: name or address in the devices' URL.

    Raises:
        FleetError: it has expired, is for another host or from another authority.
    """
    try:
        _shake_hands(context, trusting(authority), host)
    except ssl.SSLCertVerificationError as error:
        raise FleetError(
            f"server.certificate: devices that reach {host} would refuse {certificate} ({error.verify_message}); get "
            f"one for {host} that has not expired, and put the certificates up to its authority into the same file"
        ) from error
    except ssl.SSLError as error:
        raise FleetError(
            f"server.certificate: {certificate} cannot be used ({_reason(error)}); get another"
        ) from error


def self_made_certificate(directory: Path, hosts: Sequence[str]) -> Certificate:
    """The fleet's own authority, and a server certificate from it, made once and kept.

    The authority stays the same as long as its files do, since devices know the server by it. The
    certificate is made anew if it expires within 30 days or lacks one of the hosts.

    Args:
        directory: of ``ca.pem``, ``ca.key``, ``server.pem`` and ``server.key``.
        hosts: names and addresses that devices reach the server by, beside ``localhost`` and 127.0.0.1.

    Raises:
        FleetError: a host is neither a name nor an address; the authority's files are damaged, or one of
            them is missing.
    """
    names = [general_name(host) for host in dict.fromkeys((*hosts, *LOOPBACK))]
    authority, authority_key = _authority(directory / "ca.pem", directory / "ca.key")
    made = Certificate(directory / "server.pem", directory / "server.key", pem(authority))
    if not _still_good(made, names):
        certificate, key = issue(authority, authority_key, names)
        # If a kill comes between the two, they do not match, and both are made again.
        write_secret(made.key, key_pem(key))
        write_secret(made.certificate, pem(certificate))
        log.info("made the server's certificate %s", made.certificate)
    return made


def _authority(path: Path, key_path: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    """The authority of a directory; a key without a certificate was cut short before anybody trusted it."""
    if path.exists():
        return read_authority(path, key_path)
    authority, key = make_authority()
    write_secret(key_path, key_pem(key))
    write_secret(path, pem(authority))
    log.info("made the fleet's authority %s", path)
    return authority, key


def _still_good(made: Certificate, names: Sequence[x509.GeneralName]) -> bool:
    """Whether the server's certificate is there, lasts, covers all names and is taken by devices."""
    try:
        certificate = x509.load_pem_x509_certificate(made.certificate.read_bytes())
        covered = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        _shake_hands(serving(made.certificate, made.key), trusting(made.authority), "localhost")
    except (OSError, ValueError, x509.ExtensionNotFound, FleetError):  # ssl.SSLError is an OSError
        return False
    return lasts(certificate) and set(names) <= set(covered)


def lasts(certificate: x509.Certificate) -> bool:
    """Whether a certificate is valid now and need not be renewed yet."""
    renewed_at = certificate.not_valid_after_utc - datetime.timedelta(days=RENEW_DAYS)
    return certificate.not_valid_before_utc <= now() < renewed_at


def _shake_hands(server: ssl.SSLContext, device: ssl.SSLContext, host: str) -> None:
    """What happens when a device connects, in memory.

    Raises:
        ssl.SSLError: the device or the server refuses.
    """
    to_server, to_device = ssl.MemoryBIO(), ssl.MemoryBIO()
    sides = [
        device.wrap_bio(to_device, to_server, server_hostname=host),
        server.wrap_bio(to_server, to_device, server_side=True),
    ]
    for _ in range(10):
        for side in list(sides):
            with suppress(ssl.SSLWantReadError):
                side.do_handshake()
                sides.remove(side)
        if not sides:
            return
    raise ssl.SSLError("the handshake does not end")


def _last_certificate(path: Path) -> str:
    try:
        return pem(x509.load_pem_x509_certificates(path.read_bytes())[-1])
    except (OSError, ValueError) as error:
        raise FleetError(f"server.certificate: {path} cannot be read as PEM; give another file") from error


def _read(path: Path) -> str:
    try:
        return path.read_text("ascii")
    except (OSError, UnicodeDecodeError) as error:
        raise FleetError(f"{path}: cannot be read as PEM; give another file") from error


def _reason(error: OSError) -> str:
    return (getattr(error, "reason", None) or error.strerror or "unusable").replace("_", " ").lower()
