"""Certificates that are out of date: on the server that renews them, and on the devices that wait for that."""

from __future__ import annotations

import asyncio
import datetime
import os
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from email.utils import format_datetime
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from cryptography import x509
from fake_server import credentials
from served import KEYS, served
from whole_fleet import DecidingHere, ThreadPool, catalogue_at, scenario_of

from emutune.errors import FleetError
from emutune.fleet import authority, security
from emutune.fleet.config import FleetConfig, Server
from emutune.fleet.device import clock
from emutune.fleet.device.client import Backoff, FleetClient
from emutune.fleet.device.clock import Dates, explained
from emutune.fleet.device.network import tls_transport
from emutune.fleet.security import Certificate, trusting
from emutune.fleet.server import renewal
from emutune.fleet.server.app import serve
from emutune.fleet.server.renewal import Renewal, certificate_of
from emutune.fleet.server.run import run_server

DAY = datetime.timedelta(days=1)
NOW = datetime.datetime(2026, 6, 1, 12, tzinfo=datetime.UTC)


@pytest.fixture
def set_clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[datetime.timedelta], None]:
    """Shift the clock by which certificates are made and judged; OpenSSL goes on by the real one."""

    def shift(by: datetime.timedelta) -> None:
        def shifted() -> datetime.datetime:
            return datetime.datetime.now(datetime.UTC) + by

        for module in (authority, security, clock):
            monkeypatch.setattr(module, "now", shifted)

    return shift


def config(folder: Path, **server: object) -> FleetConfig:
    return FleetConfig(name="fleet", server=Server(directory=folder, **server))


class Fleet:
    """An authority, and a server certificate of it for some time around now."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self.ca, self.ca_key = authority.make_authority()
        self.config = config(
            folder, certificate=folder / "own.pem", key=folder / "own.key", authority=folder / "ca.pem"
        )
        (folder / "ca.pem").write_text(authority.pem(self.ca))

    def issue(self, begin: datetime.timedelta, end: datetime.timedelta) -> Certificate:
        """Put a certificate where the server looks, valid from and to so long after now."""
        now = datetime.datetime.now(datetime.UTC)
        _, key = authority.issue(self.ca, self.ca_key, [])
        certificate = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([]))
            .issuer_name(self.ca.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + begin)
            .not_valid_after(now + end)
            .add_extension(x509.SubjectAlternativeName([authority.general_name("127.0.0.1")]), critical=True)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self.ca_key.public_key()), critical=False
            )
            .sign(self.ca_key, authority.hashes.SHA256())
        )
        paths = self.folder / "own.pem", self.folder / "own.key"
        for path, text in zip(paths, (authority.pem(certificate), authority.key_pem(key)), strict=True):
            path.write_text(text)
        return Certificate(*paths, authority.pem(self.ca))


@asynccontextmanager
async def asking(url: str, ca: str, remarks: list[str]) -> AsyncIterator[FleetClient]:
    backoff = Backoff(first_s=0.02, longest_s=0.05)
    client = FleetClient(
        credentials(ca=ca), tls_transport(trusting(ca)), url=url, backoff=backoff, remark=remarks.append
    )
    client._http.headers["Authorization"] = f"Bearer {KEYS['ue1']}"
    async with client, asyncio.timeout(20):
        yield client


@pytest.mark.parametrize(
    ("begin", "end", "said"),
    [
        (-2 * DAY, -DAY, "the server's certificate has expired"),
        (DAY, 2 * DAY, "the server's certificate is not valid yet"),
    ],
)
def test_a_device_waits_for_another_certificate(
    tmp_path: Path, begin: datetime.timedelta, end: datetime.timedelta, said: str
) -> None:
    """Over TLS: the device says what it is, goes on trying, and is in once the certificate was replaced."""
    fleet = Fleet(tmp_path / "own")
    out_of_date = fleet.issue(begin, end)

    async def run() -> None:
        with served(tmp_path) as app:
            server = await serve(app.app, "127.0.0.1", 0, out_of_date.certificate, out_of_date.key)
            remarks: list[str] = []
            async with asking(f"https://127.0.0.1:{server.port}", out_of_date.authority, remarks) as client:
                asked = asyncio.create_task(client.info())
                while not remarks:
                    await asyncio.sleep(0.01)
                assert not asked.done()
                # Whatever the server could not show at its start, it shows once it is there.
                looking = Renewal(fleet.config, out_of_date, server.show)
                fleet.issue(-DAY, DAY)
                looking.look()
                assert (await asked).name == "test"
            await server.stop()
            assert [row for row in app.ledger.audit_rows() if row.event == "refused"] == []
        first, last = remarks
        assert said in first
        assert "this device's clock says" in first
        assert "trying again" in first
        assert "answers again" in last

    asyncio.run(run())


def test_a_device_with_a_wrong_clock_says_so(
    tmp_path: Path, set_clock: Callable[[datetime.timedelta], None]
) -> None:
    """The server's clock is told from what it answers; here the certificate and that clock are years ahead."""
    fleet = Fleet(tmp_path / "own")
    ahead = fleet.issue(999 * DAY, 1001 * DAY)
    servers = format_datetime(datetime.datetime.now(datetime.UTC) + 1000 * DAY, usegmt=True)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(f"HTTP/1.1 200 OK\r\nDate: {servers}\r\nContent-Length: 0\r\n\r\n".encode())
        await writer.drain()
        writer.close()

    async def run() -> str:
        context = security.serving(ahead.certificate, ahead.key)
        server = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=context)
        remarks: list[str] = []
        async with server:
            url = f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            async with asking(url, ahead.authority, remarks) as client:
                asked = asyncio.create_task(client.info())
                while not remarks:
                    await asyncio.sleep(0.01)
                assert not asked.done()
                asked.cancel()
        (remark,) = remarks
        return remark

    assert "this device's clock is wrong" in asyncio.run(run())


CERTIFICATE, AUTHORITY = (NOW - DAY, NOW + DAY), (NOW - 100 * DAY, NOW + 100 * DAY)


@pytest.mark.parametrize(
    ("devices", "servers", "said"),
    [
        (
            -2 * DAY,
            0 * DAY,
            "this device's clock is wrong: this device's clock says 2026-05-30 12:00 UTC, the server's 2026",
        ),
        (2 * DAY, 0 * DAY, "this device's clock is wrong: this device's clock says 2026-06-03 12:00 UTC"),
        (
            2 * DAY,
            2 * DAY,
            "the server's certificate has expired: it is valid from 2026-05-31 12:00 UTC to 2026-06-02",
        ),
        (2 * DAY, None, "set this device's clock if that is wrong, or else renew it at the server"),
        (-2 * DAY, None, "is not valid yet"),
        (-2 * DAY, -2 * DAY, "set the server's clock"),
        (-20000 * DAY, 0 * DAY, "this device's clock is wrong: this device's clock says 1971"),
        (200 * DAY, 200 * DAY, "the certificate of the fleet's authority has expired"),
        (0 * DAY, 0 * DAY, "only just"),
    ],
)
def test_which_of_the_two_it_is(
    devices: datetime.timedelta, servers: datetime.timedelta | None, said: str
) -> None:
    dates = Dates(CERTIFICATE, AUTHORITY, None if servers is None else NOW + servers)
    assert said in explained(dates, NOW + devices)


def test_nobody_who_could_be_asked() -> None:
    assert asyncio.run(clock.what_is_wrong("https://127.0.0.1:1", "")) is None


# The server


class Shown:
    """What a renewal has shown."""

    def __init__(self, config: FleetConfig) -> None:
        self.config, self.contexts = config, []
        self.made = certificate_of(config)
        self.renewal = Renewal(config, self.made, self.contexts.append)

    def looked(self) -> int:
        """How many certificates were shown after another look."""
        self.renewal.look()
        return len(self.contexts)

    def valid_until(self) -> datetime.datetime:
        return x509.load_pem_x509_certificate(self.made.certificate.read_bytes()).not_valid_after_utc


def test_the_fleets_certificate_is_renewed_before_it_expires(
    tmp_path: Path, set_clock: Callable[[datetime.timedelta], None]
) -> None:
    shown = Shown(config(tmp_path))
    first = shown.valid_until()
    set_clock(366 * DAY)
    assert shown.looked() == 0
    set_clock(368 * DAY)
    assert shown.looked() == 1
    assert shown.valid_until() - first > 360 * DAY
    assert shown.looked() == 1


def test_a_certificate_that_cannot_get_valid_is_not_made_without_end(
    tmp_path: Path, set_clock: Callable[[datetime.timedelta], None]
) -> None:
    """As under a clock that runs backwards behind the authority's first day."""
    shown = Shown(config(tmp_path))
    set_clock(-10 * DAY)
    assert shown.looked() == 1
    inode = os.stat(shown.made.certificate).st_ino
    set_clock(-20 * DAY)
    assert [shown.looked() for _ in range(20)] == [1] * 20
    assert os.stat(shown.made.certificate).st_ino == inode


def test_files_that_are_gone_are_made_again(tmp_path: Path) -> None:
    shown = Shown(config(tmp_path))
    shown.made.certificate.unlink()
    assert shown.looked() == 1
    assert shown.made.certificate.exists()


def test_a_users_certificate_is_read_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fleet = Fleet(tmp_path / "own")
    fleet.issue(-DAY, 90 * DAY)
    shown = Shown(fleet.config)
    assert shown.looked() == 0
    fleet.issue(-DAY, 10 * DAY)
    assert shown.looked() == 1
    assert shown.looked() == 1
    assert caplog.text.count("replace it, it is read while the server runs") == 1
    # A new certificate whose key is still to come, and one that devices would not take.
    good = fleet.folder.joinpath("own.key").read_text()
    fleet.folder.joinpath("own.key").write_text(authority.key_pem(authority.make_authority()[1]))
    assert shown.looked() == 1
    assert shown.looked() == 1
    assert caplog.text.count("belong together") == 1
    fleet.folder.joinpath("own.key").write_text(good)
    assert shown.looked() == 2
    fleet.issue(-2 * DAY, -DAY)
    assert shown.looked() == 2
    assert "certificate has expired" in caplog.text


def test_a_certificate_of_another_authority_is_not_shown(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fleet = Fleet(tmp_path / "own")
    fleet.issue(-DAY, 90 * DAY)
    shown = Shown(fleet.config)
    fleet.ca, fleet.ca_key = authority.make_authority()
    (fleet.folder / "ca.pem").write_text(authority.pem(fleet.ca))
    fleet.issue(-DAY, 90 * DAY)
    assert shown.looked() == 0
    assert "devices that reach 127.0.0.1 would refuse" in caplog.text


def test_a_running_server_looks_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(renewal, "LOOK_AGAIN_S", 0.05)
    fleet = Fleet(tmp_path / "own")
    first = fleet.issue(-DAY, datetime.timedelta(seconds=2))

    async def run() -> None:
        with served(tmp_path) as app:
            server = await serve(app.app, "127.0.0.1", 0, first.certificate, first.key)
            looking = asyncio.create_task(Renewal(fleet.config, first, server.show).run())
            remarks: list[str] = []
            url = f"https://127.0.0.1:{server.port}"
            async with asking(url, first.authority, remarks) as client:
                await client.info()
                await asyncio.sleep(2.5)
            fleet.issue(-DAY, DAY)
            await asyncio.sleep(0.3)
            async with asking(url, first.authority, remarks) as client:
                await client.info()
            looking.cancel()
            await server.stop()
            assert remarks == []

    asyncio.run(run())


def test_a_whole_server_looks_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(renewal, "LOOK_AGAIN_S", 0.05)
    catalogue = catalogue_at(tmp_path)
    fleet = FleetConfig(name="fleet", server=Server(directory=tmp_path / "lab", port=0))
    file = tmp_path / "lab" / "tls" / "server.pem"

    async def run() -> None:
        url = asyncio.get_running_loop().create_future()
        decider = DecidingHere("fixed", scenario_of(catalogue))
        running = asyncio.create_task(
            run_server(fleet, [catalogue], decider, started=url.set_result, judge=ThreadPool())
        )
        await asyncio.wait({running, url}, return_when=asyncio.FIRST_COMPLETED)
        port = urlsplit(url.result()).port
        before = file.read_text()
        file.unlink()
        try:
            async with asyncio.timeout(20):
                while not file.exists() or (text := file.read_text()) == before:
                    await asyncio.sleep(0.02)
                while await asyncio.to_thread(ssl.get_server_certificate, ("127.0.0.1", port)) != text:
                    await asyncio.sleep(0.02)
        finally:
            running.cancel()
            await asyncio.wait({running})

    asyncio.run(run())


def test_a_users_certificate_that_has_expired_at_the_start(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path / "own")
    fleet.issue(-2 * DAY, -DAY)
    with pytest.raises(FleetError, match="has expired"):
        certificate_of(fleet.config)
