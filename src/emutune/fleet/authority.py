"""Certificates (X.509, EC P-256) of the fleet's own authority: making, issuing, reading."""

from __future__ import annotations

import datetime
import ipaddress
import logging
import re
import secrets
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from emutune.errors import FleetError

log = logging.getLogger(__name__)

_AUTHORITY_DAYS, _SERVER_DAYS, RENEW_DAYS = 3650, 397, 30
_LABEL = re.compile("[0-9A-Za-z_]([0-9A-Za-z_-]{0,61}[0-9A-Za-z_])?")


def make_authority() -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    """A new authority, which signs servers' certificates and nothing else, for ten years."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"emutune fleet {secrets.token_hex(4)}")])
    certificate = (
        _builder(name, name, key.public_key(), _AUTHORITY_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return certificate, key


def read_authority(path: Path, key_path: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    """An authority that was kept.

    Raises:
        FleetError: a file is missing or damaged, or they do not belong together.
    """
    remedy = (
        f"restore {path.name} and {key_path.name} from a copy, or delete both and make all credentials again "
        "with emutune enroll"
    )
    try:
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
        key = serialization.load_pem_private_key(key_path.read_bytes(), None)
    except OSError as error:
        raise FleetError(f"{error.filename}: cannot be read ({error.strerror}); {remedy}") from error
    except (ValueError, TypeError) as error:
        raise FleetError(f"{path}: the authority's files are damaged; {remedy}") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
        raise FleetError(f"{path}: the authority's key belongs to another certificate; {remedy}")
    if certificate.not_valid_after_utc <= now() + datetime.timedelta(days=_SERVER_DAYS):
        log.warning("%s: expires at %s; %s", path, certificate.not_valid_after_utc, remedy)
    return certificate, key


def issue(
    authority: x509.Certificate,
    authority_key: ec.EllipticCurvePrivateKey,
    names: Sequence[x509.GeneralName],
) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    """A server's certificate for so many names, for 397 days, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "emutune fleet server")])
    certificate = (
        _builder(subject, authority.subject, key.public_key(), _SERVER_DAYS)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), critical=False
        )
        .sign(authority_key, hashes.SHA256())
    )
    return certificate, key


def general_name(host: str) -> x509.GeneralName:
    """A host as certificates name it.

    Raises:
        FleetError: it is neither a name nor an address.
    """
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    with suppress(UnicodeError):
        name = host.encode("idna").decode("ascii")
        if len(name) <= 253 and all(_LABEL.fullmatch(label) for label in name.split(".")):
            return x509.DNSName(name)
    raise FleetError(f"server.host: {host!r} is neither a host's name nor an address; correct it")


def pem(certificate: x509.Certificate) -> str:
    """A certificate as text."""
    return certificate.public_bytes(serialization.Encoding.PEM).decode("ascii")


def key_pem(key: ec.EllipticCurvePrivateKey) -> str:
    """A key as text; a secret."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode("ascii")


def now() -> datetime.datetime:
    """The time that certificates are compared with."""
    return datetime.datetime.now(datetime.UTC)


def _builder(
    subject: x509.Name, issuer: x509.Name, public: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    # A device whose clock is late by up to a day takes a certificate that was just made.
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now() - datetime.timedelta(days=1))
        .not_valid_after(now() + datetime.timedelta(days=days))
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )
