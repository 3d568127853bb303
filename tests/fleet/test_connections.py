"""Who may stay connected, with a clock that is set by hand; the ledger is the real one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import httpx2
import pytest
from ledgers import AskedHere
from served import KEYS, SHA, SHARD, Served, served

from emutune.fleet.addresses import place_of, same_host, url_of
from emutune.fleet.config import Limits
from emutune.fleet.ledger import Ledger
from emutune.fleet.security import secret_sha256, self_made_certificate, trusting
from emutune.fleet.server import connections as module
from emutune.fleet.server.app import serve
from emutune.fleet.server.connections import PER_DEVICE, Connection, Connections
from emutune.fleet.server.places import Places


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Room:
    """Connections that note which of them were closed."""

    def __init__(self, ledger: Ledger, room: int = 100, **limits: float) -> None:
        self.clock, self.closed = Clock(), set[Connection]()
        self.all = Connections(Limits(**limits), AskedHere(ledger), self.clock)
        self.all.room = room

    def come(self, address: str = "10.0.0.1") -> Connection:
        connection = self.all.admit(address)
        connection.close = lambda: self.closed.add(connection)
        return connection

    def after(self, seconds: float) -> None:
        self.clock.now += seconds
        asyncio.run(self.all.sweep())


@pytest.fixture
def ledger(tmp_path: Path):
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        for name in ("ue1", "ue2"):
            ledger.add_device(name, secret_sha256(f"token of {name}"))
            assert ledger.enrol(name, secret_sha256(f"token of {name}"), secret_sha256(KEYS[name]))
        yield ledger


def details(ledger: Ledger) -> list[str]:
    return [row.detail for row in ledger.audit_rows()]


def test_a_head_that_does_not_end(ledger: Ledger) -> None:
    room = Room(ledger, request_s=10)
    slow, served_, idle = room.come(), room.come(), room.come()
    served_.heard()
    idle.heard()
    room.after(9)
    idle.begins()
    room.after(2)
    assert room.closed == {slow}
    room.after(9)
    assert room.closed == {slow, idle}, "a later request has the same time"
    # A word a minute, not one a connection.
    assert details(ledger) == ["1 connections closed, no complete request within 10 s: 10.0.0.1 (1)"]
    room.after(60)
    assert len(details(ledger)) == 2


def test_bytes_that_go_on_do_not_prolong_a_head(ledger: Ledger) -> None:
    room = Room(ledger, request_s=10)
    slow = room.come()
    for _ in range(11):
        slow.begins()
        room.after(1)
    assert room.closed == {slow}


def test_one_address_may_not_have_all(ledger: Ledger) -> None:
    room = Room(ledger, connections_per_address=5)
    crowd = [room.come() for _ in range(20)]
    other = room.come("10.0.0.2")
    room.after(1)
    assert not room.closed, "devices behind one address may come at once"
    room.after(3)
    assert room.closed == set(crowd[:15])
    assert other in room.all


def test_whoever_comes_gets_in_and_devices_stay(ledger: Ledger) -> None:
    room = Room(ledger, room=20)
    device = room.come()
    assert device.identified("ue1", secret_sha256(KEYS["ue1"]))
    few = room.come("10.0.0.2")
    crowd = [room.come("10.0.0.3") for _ in range(18)]
    room.clock.now = 1
    crowd[0].heard()
    late = room.come("10.0.0.4")
    assert room.closed == {crowd[1]}, "the one that was silent the longest of the address that has most"
    assert {device, few, late} <= set(room.all)
    assert len(room.all) == 20


def test_devices_leave_room_for_those_who_come(ledger: Ledger) -> None:
    room = Room(ledger, room=16)
    let_in = [room.come(f"10.0.0.{number}").identified(f"ue{number}", "") for number in range(16)]
    assert let_in == [True] * 14 + [False] * 2
    assert room.come() in room.all


def test_a_device_has_so_many_connections(ledger: Ledger) -> None:
    room = Room(ledger)
    own = []
    for number in range(PER_DEVICE + 2):
        own.append(room.come(f"10.0.{number}.1"))
        own[-1].identified("ue1", secret_sha256(KEYS["ue1"]))
        room.clock.now += 1
    assert room.closed == set(own[:2]), "what a bad link has left behind"


def test_a_revoked_key_closes_what_is_open(ledger: Ledger) -> None:
    room = Room(ledger)
    mine, other, stranger = room.come(), room.come(), room.come()
    mine.identified("ue1", secret_sha256(KEYS["ue1"]))
    other.identified("ue2", secret_sha256(KEYS["ue2"]))
    room.after(1)
    assert not room.closed
    ledger.revoke("ue1")
    room.after(1)
    assert room.closed == {mine}
    assert {other, stranger} == set(room.all)
    assert [(row.event, row.device) for row in ledger.audit_rows()] == [("refused", "ue1")]
    # New credentials end the earlier ones too.
    ledger.add_device("ue2", secret_sha256("another token"))
    room.after(1)
    assert room.closed == {mine, other}


def test_connections_that_end_are_forgotten(ledger: Ledger) -> None:
    room = Room(ledger)
    stranger, device = room.come(), room.come()
    device.identified("ue1", "")
    for connection in (stranger, device, device):
        connection.ended()
    assert len(room.all) == 0
    assert not room.all.make_room()


def during(tmp_path: Path, rate_bps: float, act: Callable[[Served], None], method: str) -> None:
    """Do something while a device is in the midst of a transfer; it must end within two seconds."""
    tls = self_made_certificate(tmp_path / "tls", [])

    async def endless():
        for _ in range(500):
            yield b"a" * 100
            await asyncio.sleep(0.02)

    async def run() -> None:
        with served(tmp_path, rate_bps=rate_bps) as fleet:
            server = await serve(fleet.app, "127.0.0.1", 0, tls.certificate, tls.key)
            device = "ue1" if method == "GET" else "ue2"
            async with httpx2.AsyncClient(
                verify=trusting(tls.authority),
                base_url=f"https://127.0.0.1:{server.port}",
                headers={"Authorization": f"Bearer {KEYS[device]}"},
            ) as client:

                async def transfer() -> int:
                    if method == "GET":
                        return len((await client.get(f"/v1/shards/{SHA}")).content)
                    path = "/v1/leases/upload-1/data?offset=0"
                    return (await client.patch(path, content=endless())).status_code

                moving = asyncio.create_task(transfer())
                await asyncio.sleep(1.2)
                assert not moving.done()
                act(fleet)
                async with asyncio.timeout(3):
                    with pytest.raises(httpx2.TransportError):
                        await moving
                assert (await client.get("/v1/fleet")).status_code == 401
            await server.stop()

    asyncio.run(run())


@pytest.mark.parametrize(("method", "device"), [("GET", "ue1"), ("PATCH", "ue2")])
def test_transfers_of_a_revoked_device_end(tmp_path: Path, method: str, device: str) -> None:
    def revoke(fleet: Served) -> None:
        # As ``emutune revoke`` does it, from another process.
        with Ledger(fleet.ledger.path) as other:
            other.revoke(device)

    during(tmp_path, 8 * len(SHARD) / 20, revoke, method)


def test_no_room_for_another_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("emutune.fleet.server.listen.room_for_connections", lambda: 1)
    tls = self_made_certificate(tmp_path / "tls", [])

    async def run() -> None:
        with served(tmp_path) as fleet:
            server = await serve(fleet.app, "127.0.0.1", 0, tls.certificate, tls.key)
            url, statuses = f"https://127.0.0.1:{server.port}/v1/fleet", []
            async with (
                httpx2.AsyncClient(verify=trusting(tls.authority)) as one,
                httpx2.AsyncClient(verify=trusting(tls.authority)) as two,
            ):
                for client, device in ((one, "ue1"), (two, "ue2"), (one, "ue1")):
                    headers = {"Authorization": f"Bearer {KEYS[device]}"}
                    answer = await client.get(url, headers=headers)
                    statuses.append((answer.status_code, answer.headers.get("retry-after")))
            await server.stop()
            assert statuses == [(200, None), (503, "10"), (200, None)]

    asyncio.run(run())


def test_the_limit_of_open_files_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    limits = (1024, 4096)
    changed = []
    monkeypatch.setattr(resource, "getrlimit", lambda which: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda which, value: changed.append(value))
    assert module.room_for_connections() == 4096 - 128
    assert changed == [(4096, 4096)]
    limits = (1024, 1024)
    assert module.room_for_connections() == 1024 - 128
    limits = (1024, resource.RLIM_INFINITY)
    assert module.room_for_connections() == 8192 - 128
    limits = (100_000, 100_000)
    assert module.room_for_connections() == 8192 - 128
    limits = (64, 64)
    assert module.room_for_connections() == 32
    assert changed == [(4096, 4096), (8192, resource.RLIM_INFINITY)]


# From where


async def used(places: Places, clock: Clock, *uses: tuple[str, float]) -> None:
    for address, at in uses:
        clock.now = at
        places.end(await places.begin("ue1", address))


A, B, C = "10.0.0.1", "10.0.0.2", "2001:db8::1"


@pytest.mark.parametrize(
    ("uses", "rows"),
    [
        ([(A, 0), (A, 20), (A, 40)], 0),
        # A device that changes networks, even from moment to moment, as long as it does not come back.
        ([(A, 0), (B, 1), (B, 2), (C, 3), (C, 4)], 0),
        ([(A, 0), (B, 1), (A, 70)], 0),
        ([(A, 0), (B, 1), (A, 2)], 1),
        ([(A, 0), (B, 20), (A, 40), (B, 60), (A, 80)], 1),
        # Half a day of that is one occurrence; a day later it is another.
        ([(place, 20.0 * time) for time in range(2000) for place in (A, B)], 1),
        ([(A, 0), (B, 1), (A, 2), (A, 90000), (B, 90001), (A, 90002)], 2),
        # A subscriber's network of IPv6 is one place.
        ([(C, 0), ("2001:db8::2", 1), (C, 2)], 0),
        ([(C, 0), ("2001:db8:1::2", 1), (C, 2)], 1),
    ],
)
def test_a_key_in_two_places(ledger: Ledger, uses: list[tuple[str, float]], rows: int) -> None:
    clock = Clock()
    asyncio.run(used(Places(AskedHere(ledger), clock), clock, *uses))
    noted = ledger.audit_rows()
    assert len(noted) == rows
    assert {(row.event, row.device) for row in noted} <= {("key in two places", "ue1")}


def test_a_key_that_is_used_elsewhere_during_a_long_request(ledger: Ledger) -> None:
    clock = Clock()
    places = Places(AskedHere(ledger), clock)

    async def run() -> None:
        long = await places.begin("ue1", A)
        await used(places, clock, (B, 300.0))
        clock.now = 900.0
        places.end(long)
        await used(places, clock, (A, 901.0))

    asyncio.run(run())
    assert f"{A} and {B}" in ledger.audit_rows()[0].detail


def test_a_key_in_two_places_over_tls(tmp_path: Path) -> None:
    tls = self_made_certificate(tmp_path / "tls", [])

    async def run() -> None:
        with served(tmp_path) as fleet:
            server = await serve(fleet.app, "127.0.0.1", 0, tls.certificate, tls.key)
            for source in ("127.0.0.1", "127.0.0.9") * 3:
                transport = httpx2.AsyncHTTPTransport(verify=trusting(tls.authority), local_address=source)
                headers = {"Authorization": f"Bearer {KEYS['ue1']}"}
                async with httpx2.AsyncClient(transport=transport, headers=headers) as client:
                    await client.get(f"https://127.0.0.1:{server.port}/v1/fleet")
            await server.stop()
            (row,) = fleet.ledger.audit_rows()
            assert (row.event, row.device) == ("key in two places", "ue1")
            assert "127.0.0.1 and 127.0.0.9" in row.detail

    asyncio.run(run())


# Addresses


@pytest.mark.parametrize(
    ("address", "place"),
    [
        ("10.0.0.1", "10.0.0.1"),
        ("2001:db8::1", "2001:db8::/64"),
        ("2001:db8:0:0:ffff::1", "2001:db8::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("::ffff:10.0.0.1", "10.0.0.1"),
        ("::1", "::1"),
        ("testclient", "testclient"),
    ],
)
def test_places(address: str, place: str) -> None:
    assert place_of(address) == place


def test_urls_and_spellings() -> None:
    assert url_of("::1", 8443) == "https://[::1]:8443"
    assert url_of("edge.example", 1) == "https://edge.example:1"
    assert same_host("0:0:0:0:0:0:0:1") == same_host("::1") == "::1"
    assert same_host("EDGE.example") == "edge.example"
