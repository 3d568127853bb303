from __future__ import annotations

import datetime
import logging
import stat
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from emutune.errors import FleetError
from emutune.fleet import authority, security
from emutune.fleet.security import (
    Certificate,
    Credentials,
    new_secret,
    own_certificate,
    read_credentials,
    secret_sha256,
    self_made_certificate,
    serving,
    trusting,
    write_credentials,
    write_secret,
)

TLS_FILES = ("ca.pem", "ca.key", "server.pem", "server.key")


def accepted(made: Certificate, host: str) -> bool:
    """Whether a device that knows the authority takes the certificate, by a handshake."""
    try:
        security._shake_hands(serving(made.certificate, made.key), trusting(made.authority), host)
    except OSError:
        return False
    return True


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# Certificates


def test_devices_take_the_fleets_certificate_for_its_hosts_alone(tmp_path: Path) -> None:
    made = self_made_certificate(tmp_path / "tls", ["fleet.example", "10.1.2.3", "::1"])
    hosts = ("fleet.example", "10.1.2.3", "::1", "localhost", "127.0.0.1")
    assert [host for host in hosts if not accepted(made, host)] == []
    assert not accepted(made, "other.example")
    assert not accepted(made, "10.1.2.4")
    other = self_made_certificate(tmp_path / "other", ["fleet.example"])
    assert not accepted(Certificate(made.certificate, made.key, other.authority), "fleet.example")
    assert {mode(tmp_path / "tls" / name) for name in TLS_FILES} == {0o600}


def test_the_curve_is_p256_and_the_authority_signs_no_other(tmp_path: Path) -> None:
    self_made_certificate(tmp_path, [])
    for name, is_authority in (("ca.pem", True), ("server.pem", False)):
        certificate = x509.load_pem_x509_certificate((tmp_path / name).read_bytes())
        public = certificate.public_key()
        assert isinstance(public, ec.EllipticCurvePublicKey)
        assert public.curve.name == "secp256r1"
        constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
        assert constraints.ca is is_authority


def test_a_restart_keeps_everything(tmp_path: Path) -> None:
    first = self_made_certificate(tmp_path, ["fleet.example"])
    files = {name: (tmp_path / name).read_bytes() for name in TLS_FILES}
    assert self_made_certificate(tmp_path, ["fleet.example"]) == first
    assert {name: (tmp_path / name).read_bytes() for name in TLS_FILES} == files


def test_another_host_gets_another_certificate_from_the_same_authority(tmp_path: Path) -> None:
    first = self_made_certificate(tmp_path, ["a.example"])
    second = self_made_certificate(tmp_path, ["b.example"])
    assert second.authority == first.authority
    assert accepted(second, "b.example")


def test_a_certificate_about_to_expire_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = self_made_certificate(tmp_path, [])
    before = first.certificate.read_bytes()
    later = authority.now() + datetime.timedelta(days=380)
    monkeypatch.setattr(security, "now", lambda: later)
    monkeypatch.setattr(authority, "now", lambda: later)
    second = self_made_certificate(tmp_path, [])
    assert second.certificate.read_bytes() != before
    assert second.authority == first.authority


@pytest.mark.parametrize("name", ["server.pem", "server.key"])
@pytest.mark.parametrize("damage", ["missing", "damaged", "of another"])
def test_a_server_certificate_that_is_lost_is_made_anew(tmp_path: Path, name: str, damage: str) -> None:
    first = self_made_certificate(tmp_path / "tls", [])
    path = tmp_path / "tls" / name
    if damage == "missing":
        path.unlink()
    elif damage == "damaged":
        path.write_bytes(path.read_bytes()[:60])
    else:
        self_made_certificate(tmp_path / "other", [])
        path.write_bytes((tmp_path / "other" / name).read_bytes())
    second = self_made_certificate(tmp_path / "tls", [])
    assert second.authority == first.authority
    assert accepted(second, "localhost")


def test_an_authority_cut_short_before_anybody_knew_it_is_made_again(tmp_path: Path) -> None:
    self_made_certificate(tmp_path, [])
    for name in ("ca.pem", "server.pem", "server.key"):
        (tmp_path / name).unlink()
    assert accepted(self_made_certificate(tmp_path, []), "localhost")


@pytest.mark.parametrize(
    "damage", ["ca.pem damaged", "ca.key damaged", "ca.key missing", "ca.key of another"]
)
def test_an_authority_that_devices_know_is_never_replaced(tmp_path: Path, damage: str) -> None:
    self_made_certificate(tmp_path / "tls", [])
    path = tmp_path / "tls" / damage.split()[0]
    if damage.endswith("missing"):
        path.unlink()
    elif damage.endswith("another"):
        self_made_certificate(tmp_path / "other", [])
        path.write_bytes((tmp_path / "other" / "ca.key").read_bytes())
    else:
        path.write_bytes(b"-----BEGIN")
    left = {file.name: file.read_bytes() for file in (tmp_path / "tls").iterdir()}
    with pytest.raises(FleetError, match=r"restore ca\.pem and ca\.key from a copy"):
        self_made_certificate(tmp_path / "tls", [])
    assert {file.name: file.read_bytes() for file in (tmp_path / "tls").iterdir()} == left


@pytest.mark.parametrize("host", ["bad host", "", "a" * 300, "-"])
def test_hosts_that_are_none(tmp_path: Path, host: str) -> None:
    with pytest.raises(FleetError, match=r"server\.host"):
        self_made_certificate(tmp_path, [host])


# A user's certificate


def test_a_users_certificate(tmp_path: Path) -> None:
    made = self_made_certificate(tmp_path, ["fleet.example"])
    own = own_certificate(made.certificate, made.key, "fleet.example", tmp_path / "ca.pem")
    assert own == made
    chain = tmp_path / "chain.pem"
    chain.write_bytes(made.certificate.read_bytes() + (tmp_path / "ca.pem").read_bytes())
    assert own_certificate(chain, made.key, "fleet.example").authority == made.authority


@pytest.mark.parametrize(
    ("certificate", "key", "host", "says"),
    [
        ("missing.pem", "server.key", "fleet.example", "cannot be used"),
        ("server.pem", "missing.key", "fleet.example", "cannot be used"),
        ("server.pem", "ca.key", "fleet.example", "belong together"),
        ("server.pem", "locked.key", "fleet.example", "without a password"),
        ("text", "server.key", "fleet.example", "PEM files"),
        ("server.pem", "server.key", "other.example", "other.example would refuse"),
        ("server.pem", "server.key", "fleet.example", "up to its authority"),
    ],
)
def test_users_certificates_that_devices_would_refuse(
    tmp_path: Path, certificate: str, key: str, host: str, says: str
) -> None:
    self_made_certificate(tmp_path, ["fleet.example"])
    (tmp_path / "text").write_text("no certificate")
    private = serialization.load_pem_private_key((tmp_path / "server.key").read_bytes(), None)
    (tmp_path / "locked.key").write_bytes(
        private.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"password"),
        )
    )
    with pytest.raises(FleetError, match=says):
        own_certificate(tmp_path / certificate, tmp_path / key, host)


def test_a_users_certificate_that_has_expired(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    past = authority.now() - datetime.timedelta(days=500)
    monkeypatch.setattr(authority, "now", lambda: past)
    made = self_made_certificate(tmp_path, ["fleet.example"])
    with pytest.raises(FleetError, match="expired"):
        own_certificate(made.certificate, made.key, "fleet.example", tmp_path / "ca.pem")


# Secrets and credentials


@pytest.fixture(scope="module")
def credentials(tmp_path_factory: pytest.TempPathFactory) -> Credentials:
    made = self_made_certificate(tmp_path_factory.mktemp("tls"), [])
    return Credentials(
        fleet="test", device="ue1", url="https://127.0.0.1:8443", token=new_secret(), ca=made.authority
    )


def test_secrets_are_never_the_same_and_their_hash_is_of_the_digits() -> None:
    assert len({new_secret() for _ in range(100)}) == 100
    assert secret_sha256("ab") == "fb8e20fc2e4c3f248c60c39bd652f3c1347298bb977b8b4d5903b85055620603"


def test_credentials_are_read_as_they_were_written(tmp_path: Path, credentials: Credentials) -> None:
    path = tmp_path / "new" / "ue1.json"
    write_credentials(path, credentials)
    assert read_credentials(path) == credentials
    assert mode(path) == 0o600
    assert [file.name for file in path.parent.iterdir()] == ["ue1.json"]


def test_secrets_are_not_shown(tmp_path: Path, credentials: Credentials) -> None:
    assert credentials.token not in repr(credentials) + str(credentials)
    path = tmp_path / "ue1.json"
    write_credentials(path, credentials)
    text = path.read_text()
    for damaged in (text.replace('"ue1"', '"UE 1"'), text[:-30], text.replace('"token"', '"taken"')):
        path.write_text(damaged)
        with pytest.raises(FleetError) as caught:
            read_credentials(path)
        assert credentials.token not in str(caught.value)
        assert caught.value.__cause__ is None


def test_a_file_that_others_can_read_is_remarked(
    tmp_path: Path, credentials: Credentials, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "ue1.json"
    write_credentials(path, credentials)
    path.chmod(0o644)
    with caplog.at_level(logging.WARNING):
        read_credentials(path)
    assert "chmod 600" in caplog.text


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("url", "http://127.0.0.1:8443"),
        ("url", "https://"),
        ("url", "https://host:99999"),
        ("url", "https://user@host:1"),
        ("url", "https://host:1/path"),
        ("token", "1234"),
        ("device", "../ue1"),
        ("ca", "no certificate"),
        ("fleet", ""),
        ("format_version", "2"),
        ("more", "?"),
    ],
)
def test_credentials_that_are_refused(
    tmp_path: Path, credentials: Credentials, field: str, value: str
) -> None:
    path = tmp_path / "ue1.json"
    write_credentials(path, credentials.model_copy(update={field: value}))
    if field == "more":
        path.write_text(path.read_text().replace("{", '{"more": 1,', 1))
    with pytest.raises(FleetError, match=rf"{field}: .*emutune enroll"):
        read_credentials(path)


def test_credentials_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(FleetError, match="no such file"):
        read_credentials(tmp_path / "none")
    with pytest.raises(FleetError, match="cannot be read"):
        read_credentials(tmp_path)
    big = tmp_path / "big"
    big.write_bytes(bytes(1 << 20))
    with pytest.raises(FleetError, match="too large"):
        read_credentials(big)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(data=st.data())
def test_damaged_credentials_are_refused(
    tmp_path: Path, credentials: Credentials, data: st.DataObject
) -> None:
    path = tmp_path / "ue1.json"
    whole = credentials.model_dump_json(indent=1).encode()
    at = data.draw(st.integers(0, len(whole) - 1))
    path.write_bytes(whole[:at] + data.draw(st.sampled_from([b"\x00", b"\xff"])) + whole[at + 1 :])
    with pytest.raises(FleetError):
        read_credentials(path)
    path.write_bytes(whole[:at])
    with pytest.raises(FleetError):
        read_credentials(path)


def test_a_secret_that_cannot_be_written_leaves_the_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "secret"
    write_secret(path, "first")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(FleetError, match="No space left on device"):
        write_secret(path, "second")
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]
