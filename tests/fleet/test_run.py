"""A fleet's file against how devices reach its server."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography import x509
from pydantic import ValidationError
from served import KEYS, served

from emutune.errors import FleetError
from emutune.fleet import authority
from emutune.fleet.config import FleetConfig, Server, load_fleet
from emutune.fleet.device.client import FleetClient
from emutune.fleet.device.network import tls_transport
from emutune.fleet.local import free_port, wait_for_server
from emutune.fleet.security import read_credentials, trusting
from emutune.fleet.server.app import serve
from emutune.fleet.server.run import certificate_of, enrol_device


def config(folder: Path, **server: object) -> FleetConfig:
    return FleetConfig(name="lab", server=Server(directory=folder / "lab", **server))


def named_in(path: Path) -> list[str]:
    certificate = x509.load_pem_x509_certificate(path.read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return [str(name.value) for name in names]


def test_the_first_name_is_in_the_credentials_and_all_are_in_the_certificate(tmp_path: Path) -> None:
    lab = config(tmp_path, host="0.0.0.0", names=("edge.example", "10.0.0.7"))
    url = enrol_device(lab, "ue1", tmp_path / "ue1.json")
    assert url == read_credentials(tmp_path / "ue1.json").url == "https://edge.example:8443"
    assert named_in(certificate_of(lab).certificate) == ["edge.example", "10.0.0.7", "localhost", "127.0.0.1"]


@pytest.mark.parametrize("url", ["https://10.0.0.7:9000", "https://EDGE.example", "https://localhost:1"])
def test_another_url_of_a_named_host(tmp_path: Path, url: str) -> None:
    lab = config(tmp_path, names=("edge.example", "10.0.0.7"))
    assert enrol_device(lab, "ue1", tmp_path / "ue1.json", url) == url


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("https://10.0.0.8:8443", "add it to server.names"),
        ("http://10.0.0.7:8443", "give https://HOST:PORT"),
        ("10.0.0.7", "give https://HOST:PORT"),
    ],
)
def test_urls_that_devices_would_not_trust(tmp_path: Path, url: str, message: str) -> None:
    lab = config(tmp_path, names=("10.0.0.7",))
    with pytest.raises(FleetError, match=message):
        enrol_device(lab, "ue1", tmp_path / "ue1.json", url)
    assert not list(tmp_path.iterdir())


def test_every_address_needs_a_name(tmp_path: Path) -> None:
    with pytest.raises(FleetError, match=r"say in server\.names"):
        enrol_device(config(tmp_path, host="0.0.0.0"), "ue1", tmp_path / "ue1.json")


def test_an_address_may_be_spelt_otherwise(tmp_path: Path) -> None:
    url = "https://[0:0:0:0:0:0:0:1]:9000"
    assert enrol_device(config(tmp_path, host="::1"), "ue1", tmp_path / "ue1.json", url) == url
    lab = config(tmp_path, names=("2001:DB8::A",))
    assert (
        enrol_device(lab, "ue1", tmp_path / "ue1.json", "https://[2001:db8::a]:1")
        == "https://[2001:db8::a]:1"
    )
    assert "2001:db8::a" in named_in(certificate_of(lab).certificate)


def test_a_device_reaches_an_address_of_six(tmp_path: Path) -> None:
    """Bound, found by those who wait for it, certified and asked, all by its address."""
    six = config(tmp_path, host="::1", port=free_port("::1"))
    url = enrol_device(six, "ue1", tmp_path / "ue1.json")
    shown = certificate_of(six)

    async def run() -> str:
        with served(tmp_path) as fleet:
            server = await serve(fleet.app, six.server.host, six.server.port, shown.certificate, shown.key)
            running = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, text=True)
            await asyncio.to_thread(wait_for_server, running, tmp_path / "log", url)
            running.communicate("\n")
            loaded = read_credentials(tmp_path / "ue1.json")
            async with FleetClient(loaded, tls_transport(trusting(loaded.ca)), url=url) as client:
                client._http.headers["Authorization"] = f"Bearer {KEYS['ue1']}"
                name = (await client.info()).name
            await server.stop()
            return name

    assert asyncio.run(run()) == "test"


def test_addresses_of_six_stand_in_brackets(tmp_path: Path) -> None:
    assert enrol_device(config(tmp_path, host="::1"), "ue1", tmp_path / "ue1.json") == "https://[::1]:8443"


def test_a_certificate_of_a_kept_authority(tmp_path: Path) -> None:
    """The authority may stand in a file of its own; a certificate that lacks a name is refused."""
    ca, ca_key = authority.make_authority()
    certificate, key = authority.issue(ca, ca_key, [authority.general_name("edge.example")])
    for name, text in (
        ("ca", authority.pem(ca)),
        ("server", authority.pem(certificate)),
        ("key", authority.key_pem(key)),
    ):
        (tmp_path / f"{name}.pem").write_text(text)
    file = tmp_path / "fleet.toml"
    file.write_text(
        'name = "lab"\n[server]\nnames = ["edge.example"]\n'
        'certificate = "server.pem"\nkey = "key.pem"\nauthority = "ca.pem"\n'
    )
    found = certificate_of(load_fleet(file))
    assert found.authority == authority.pem(ca)
    with pytest.raises(FleetError, match="would not trust a server at localhost"):
        enrol_device(load_fleet(file), "ue1", tmp_path / "ue1.json", "https://localhost:8443")
    file.write_text(file.read_text().replace('"edge.example"]', '"edge.example", "10.0.0.7"]'))
    with pytest.raises(FleetError, match=r"devices that reach 10\.0\.0\.7 would refuse"):
        certificate_of(load_fleet(file))


def test_an_authority_without_a_certificate(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="give certificate and key too"):
        config(tmp_path, authority=tmp_path / "ca.pem")
