"""The client against a server that breaks connections, fails, and answers nonsense."""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path

import httpx2
import pytest
from fake_server import FakeServer, client_of, enrolled, fleet_info, sha256
from hypothesis import given
from hypothesis import strategies as st

from emutune.errors import FleetError
from emutune.fleet.device.client import Backoff, FleetClient, RefusedError
from emutune.fleet.protocol import Lease, Report, Result
from emutune.fleet.shaping import TokenBucket

REPORT = Report(task="t-0", data_bytes=5, data_sha256="0" * 64, cache_bytes=10)


def test_what_fails_for_a_while_is_repeated() -> None:
    async def go() -> None:
        remarks: list[str] = []
        server = FakeServer(fleet_info(), unreachable=3, failing=[("POST", "/v1/enrolment", 503)] * 2)
        client = client_of(server, remarks)
        await client.enrol("k", sha256(b"k"))
        assert await client.info() == server.info
        assert server.calls["POST /v1/enrolment"] == 6
        assert len(remarks) == 2
        assert "trying again" in remarks[0]
        assert "answers again" in remarks[1]

    asyncio.run(go())


def test_a_device_with_too_many_tasks_waits() -> None:
    async def go() -> None:
        remarks: list[str] = []
        server = FakeServer(fleet_info())
        client = client_of(server, remarks)
        await client.enrol("k", sha256(b"k"))
        server.failing = [("POST", "/v1/reports", 429)] * 3
        await client.report(REPORT)
        assert server.calls["POST /v1/reports"] == 4
        assert ["429" in remark for remark in remarks] == [True, False]

    asyncio.run(go())


def test_an_answer_that_is_lost_is_asked_for_again() -> None:
    async def go() -> None:
        server = FakeServer(fleet_info())
        client = await enrolled(server)
        server.twice = True
        await client.result("l", Result(outcome="failed", reason="x"))
        assert server.calls["POST /v1/leases/l/result"] == 2
        assert server.results["l"]["reason"] == "x"

    asyncio.run(go())


@pytest.mark.parametrize(
    ("status", "text"), [(401, "revoked"), (403, "another device"), (422, "refused with 422")]
)
def test_what_is_refused_is_said_once(status: int, text: str) -> None:
    async def go() -> None:
        server = FakeServer(fleet_info())
        client = await enrolled(server)
        server.failing.append(("POST", "/v1/reports", status))
        with pytest.raises(RefusedError, match=text) as caught:
            await client.report(REPORT)
        assert caught.value.status == status
        assert server.calls["POST /v1/reports"] == 1

    asyncio.run(go())


def test_a_token_that_was_used_is_refused() -> None:
    async def go() -> None:
        server = FakeServer(fleet_info(), key="0" * 64)
        with pytest.raises(FleetError, match="used by another device"):
            await client_of(server).enrol("k", sha256(b"k"))

    asyncio.run(go())


def test_nonsense_is_no_fleet() -> None:
    async def go() -> None:
        transport = httpx2.MockTransport(lambda request: httpx2.Response(200, text="<html>"))
        client = FleetClient(client_of(FakeServer(fleet_info())).credentials, transport)
        with pytest.raises(FleetError, match="not an answer of a fleet's server"):
            await client.info()

    asyncio.run(go())


def test_a_foreign_certificate_is_not_tried_again() -> None:
    def refuse(request: httpx2.Request) -> httpx2.Response:
        error = ssl.SSLCertVerificationError("certificate verify failed")
        error.verify_message = "unable to get local issuer certificate"
        raise httpx2.ConnectError("tls") from error

    async def go() -> None:
        client = FleetClient(client_of(FakeServer(fleet_info())).credentials, httpx2.MockTransport(refuse))
        with pytest.raises(FleetError, match="not of the fleet 'fleet'"):
            await client.info()

    asyncio.run(go())


def test_attempts_may_be_limited() -> None:
    async def go() -> None:
        server = FakeServer(fleet_info(), unreachable=10)
        client = FleetClient(
            client_of(server).credentials,
            httpx2.MockTransport(server),
            backoff=Backoff(first_s=0.001, attempts=3),
        )
        with pytest.raises(FleetError, match="is the server running"):
            await client.info()
        assert server.unreachable == 7

    asyncio.run(go())


@given(failures=st.integers(1, 10_000), longest=st.floats(0.2, 100))
def test_waits_grow_to_a_limit(failures: int, longest: float) -> None:
    backoff = Backoff(first_s=0.1, longest_s=longest)
    assert 0.05 <= backoff.wait_s(failures) <= longest


def test_a_lease_arrives_while_it_is_waited_for() -> None:
    async def go() -> float:
        server = FakeServer(fleet_info())
        client = await enrolled(server)
        assert await client.lease(0.05) is None
        waiting = asyncio.create_task(client.lease(20))
        await asyncio.sleep(0.1)
        lease = Lease(lease="l-1", step=0, kind="stop")
        server.leases.append(lease)
        begun = asyncio.get_running_loop().time()
        assert await waiting == lease
        return asyncio.get_running_loop().time() - begun

    assert asyncio.run(go()) < 1


@pytest.mark.parametrize("breaks", [[], [7000], [3000, 2000, 9000, 1]])
def test_an_upload_arrives_once_whatever_breaks(tmp_path: Path, breaks: list[int]) -> None:
    text = bytes(range(256)) * 80
    path = tmp_path / "a.txt"
    path.write_bytes(text)

    async def go() -> None:
        server = FakeServer(fleet_info(), break_after=breaks)
        server.sizes["l"] = (len(text), sha256(text))
        client = await enrolled(server)
        seen: list[int] = []
        await client.upload("l", path, len(text), TokenBucket(8e9), seen.append)
        assert bytes(server.data["l"]) == text
        assert seen == sorted(seen)
        assert seen[-1] == len(text)
        # Again: nothing is left to send.
        before = server.calls["PATCH /v1/leases/l/data"]
        await client.upload("l", path, len(text), None, seen.append)
        assert server.calls["PATCH /v1/leases/l/data"] == before

    asyncio.run(go())


def test_a_changed_file_is_not_sent_for_ever(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"other")

    async def go() -> None:
        server = FakeServer(fleet_info())
        server.sizes["l"] = (5, sha256(b"right"))
        client = await enrolled(server)
        path.write_bytes(b"wrong")
        with pytest.raises(FleetError, match="arrived damaged"):
            await client.upload("l", path, 5, None, lambda done: None)
        path.write_bytes(b"sho")
        with pytest.raises(FleetError, match="shorter"):
            await client.upload("l", path, 5, None, lambda done: None)

    asyncio.run(go())


def test_uploads_keep_to_the_rate(tmp_path: Path) -> None:
    text = b"x" * 60_000
    path = tmp_path / "a.txt"
    path.write_bytes(text)

    async def go() -> float:
        server = FakeServer(fleet_info())
        server.sizes["l"] = (len(text), sha256(text))
        client = await enrolled(server)
        begun = asyncio.get_running_loop().time()
        await client.upload("l", path, len(text), TokenBucket(8 * 100_000), lambda done: None)
        return asyncio.get_running_loop().time() - begun

    assert 0.55 <= asyncio.run(go()) < 1.5
