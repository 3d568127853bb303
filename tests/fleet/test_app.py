from __future__ import annotations

import asyncio
import hashlib
import json
import os
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import httpx2
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ledgers import AskedHere
from served import (
    DATA,
    KEYS,
    SHA,
    SHARD,
    TOKENIZER,
    TOKENS,
    UNLEASED,
    Served,
    emulator,
    report,
    safetensors,
    served,
)

from emutune.errors import FleetError
from emutune.fleet.config import Limits
from emutune.fleet.protocol import FleetInfo, Lease
from emutune.fleet.rows import Decision
from emutune.fleet.security import Certificate, self_made_certificate, trusting
from emutune.fleet.server import bodies, intake, refusals
from emutune.fleet.server.app import serve

DATA_URL, ADAPTER_URL = "/v1/leases/upload-1/data", "/v1/leases/train-1/adapter"


@pytest.fixture
def fleet(tmp_path: Path):
    with served(tmp_path) as fleet:
        yield fleet


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return self_made_certificate(tmp_path_factory.mktemp("tls"), [])


def ask(fleet: Served, method: str, path: str, device: str | None = "ue1", **more: object) -> httpx2.Response:
    """One request in memory."""

    async def send() -> httpx2.Response:
        async with fleet.client(device) as client:
            return await client.request(method, path, **more)

    return asyncio.run(send())


def over_tls(
    fleet: Served, tls: Certificate, act: Callable[[httpx2.AsyncClient, int], Awaitable[None]]
) -> None:
    """Do something to a real server."""

    async def run() -> None:
        server = await serve(fleet.app, "127.0.0.1", 0, tls.certificate, tls.key)
        try:
            async with httpx2.AsyncClient(
                verify=trusting(tls.authority), base_url=f"https://127.0.0.1:{server.port}"
            ) as client:
                await act(client, server.port)
        finally:
            await server.stop()

    asyncio.run(run())


# Messages


def test_enrolment_may_be_repeated(fleet: Served) -> None:
    key = "a" * 64
    message = {
        "device": "new",
        "token": TOKENS["new"],
        "key_sha256": hashlib.sha256(key.encode()).hexdigest(),
    }
    for _ in range(2):
        assert ask(fleet, "POST", "/v1/enrolment", None, json=message).status_code == 204

    async def send() -> int:
        async with fleet.client(key=key) as client:
            return (await client.get("/v1/fleet")).status_code

    assert asyncio.run(send()) == 200


def test_a_device_whose_key_is_revoked_is_out_at_once(fleet: Served) -> None:
    assert ask(fleet, "GET", "/v1/fleet").status_code == 200
    fleet.ledger.revoke("ue1")
    answer = ask(fleet, "GET", "/v1/fleet")
    assert answer.status_code == 401
    assert answer.headers["WWW-Authenticate"] == "Bearer"


def test_what_a_device_has_to_know(fleet: Served) -> None:
    assert FleetInfo.model_validate_json(ask(fleet, "GET", "/v1/fleet").content) == fleet.hub.info()


def test_reports_and_leases(fleet: Served) -> None:
    for _ in range(2):
        assert ask(fleet, "POST", "/v1/reports", json=report()).status_code == 204
    assert [device for device, _ in fleet.ledger.open_reports()] == ["ue1"]
    lease = Lease.model_validate_json(ask(fleet, "GET", "/v1/lease?wait=1").content)
    assert lease == fleet.ledger.open_lease("ue1")
    fleet.ledger.close_lease("train-1", "done")
    empty = ask(fleet, "GET", "/v1/lease")
    assert (empty.status_code, empty.content) == (204, b"")


def test_progress_reaches_the_hub(fleet: Served) -> None:
    for _ in range(2):
        sent = ask(fleet, "POST", "/v1/leases/train-1/transferred", json={"seconds": 2.5, "bytes": 7})
        assert sent.status_code == 204
        sent = ask(fleet, "POST", "/v1/leases/train-1/result", json={"outcome": "failed", "reason": "hot"})
        assert sent.status_code == 204
    row = fleet.ledger.lease("ue1", "train-1")
    assert (row.transferred_s, row.transferred_bytes, row.result.reason) == (2.5, 7, "hot")
    assert ask(fleet, "POST", "/v1/leave").status_code == 204
    assert [row.left for row in fleet.ledger.devices() if row.name == "ue1"] == [True]


# Downloads


def test_a_shard(fleet: Served) -> None:
    answer = ask(fleet, "GET", f"/v1/shards/{SHA}")
    assert answer.status_code == 200
    assert answer.content == SHARD
    assert answer.headers["ETag"] == f'"{SHA}"'
    assert answer.headers["Accept-Ranges"] == "bytes"
    assert answer.headers["Content-Length"] == str(len(SHARD))


def test_the_tokenizer(fleet: Served) -> None:
    assert ask(fleet, "GET", "/v1/tokenizer/tokenizer.json").content == TOKENIZER


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(data=st.data())
def test_any_range(fleet: Served, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, len(SHARD) - 1))
    last = data.draw(st.none() | st.integers(first, len(SHARD) + 10))
    answer = ask(
        fleet, "GET", f"/v1/shards/{SHA}", headers={"Range": f"bytes={first}-{'' if last is None else last}"}
    )
    expected = SHARD[first : None if last is None else last + 1]
    assert answer.status_code == 206
    assert answer.content == expected
    assert answer.headers["Content-Range"] == f"bytes {first}-{first + len(expected) - 1}/{len(SHARD)}"


@pytest.mark.parametrize(
    ("asked", "status", "length"),
    [
        ("bytes=-10", 206, 10),
        (f"bytes=-{10**12}", 206, len(SHARD)),
        (f"bytes={len(SHARD)}-", 416, None),
        ("bytes=-0", 416, None),
        (f"bytes={10**15}-", 416, None),
        ("bytes=5-4", 200, len(SHARD)),
        ("bytes=0-1,4-5", 200, len(SHARD)),
        ("bytes=-", 200, len(SHARD)),
        ("items=0-1", 200, len(SHARD)),
        ("bytes=0x0-", 200, len(SHARD)),
        (f"bytes={'9' * 5000}-", 200, len(SHARD)),
    ],
)
def test_odd_ranges(fleet: Served, asked: str, status: int, length: int | None) -> None:
    answer = ask(fleet, "GET", f"/v1/shards/{SHA}", headers={"Range": asked})
    assert answer.status_code == status
    if length is None:
        assert answer.headers["Content-Range"] == f"bytes */{len(SHARD)}"
    else:
        assert len(answer.content) == length


@pytest.mark.parametrize(("tag", "status"), [(f'"{SHA}"', 206), ('"other"', 200)])
def test_a_range_of_another_content_is_not_taken(fleet: Served, tag: str, status: int) -> None:
    headers = {"Range": "bytes=5-", "If-Range": tag}
    assert ask(fleet, "GET", f"/v1/shards/{SHA}", headers=headers).status_code == status


def test_an_empty_file(fleet: Served) -> None:
    (fleet.catalogue / "shards" / f"{'0' * 64}.safetensors").touch()
    assert ask(fleet, "GET", f"/v1/shards/{'0' * 64}").status_code == 200
    (fleet.catalogue / "shards" / f"{'1' * 64}.safetensors").mkdir()
    assert ask(fleet, "GET", f"/v1/shards/{'1' * 64}").status_code == 404


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/leases/upload-1/result", {"outcome": "failed", "reason": "no text"}),
        ("/v1/leave", None),
    ],
)
def test_data_of_an_upload_that_nobody_goes_on_with_are_deleted(
    fleet: Served, path: str, body: dict | None
) -> None:
    part = fleet.work / "uploads" / "upload-1.part"
    assert ask(fleet, "PATCH", f"{DATA_URL}?offset=0", device="ue2", content=DATA[:1000]).status_code == 200
    assert part.exists()
    # As after a kill between the check of the whole data and their being taken over.
    whole = part.with_suffix(".data")
    whole.write_bytes(DATA)
    assert ask(fleet, "POST", path, device="ue2", json=body).status_code == 204
    assert not part.exists()
    assert not whole.exists()
    deleted = [row for row in fleet.ledger.audit_rows() if row.event == "data deleted"]
    assert [(row.device, row.lease) for row in deleted] == [("ue2", "upload-1")]


def test_shards_of_a_late_lease_still_come(fleet: Served) -> None:
    fleet.ledger.close_lease("train-1", "expired")
    assert ask(fleet, "GET", f"/v1/shards/{SHA}").content == SHARD


def test_only_the_last_emulators_shards_come(fleet: Served) -> None:
    assert ask(fleet, "GET", f"/v1/shards/{SHA}").status_code == 200
    fleet.ledger.close_lease("train-1", "done")
    lease = Lease(lease="train-2", step=1, kind="train", task="t2", emulator=emulator([UNLEASED]))
    decision = {"device": "ue1", "task": "t2", "lease": lease.lease, "kind": "train", "at_server": False}
    fleet.ledger.begin_step(1, [Decision(**decision, lease_json=lease.model_dump_json())])
    assert ask(fleet, "GET", f"/v1/shards/{UNLEASED}").status_code == 200
    assert ask(fleet, "GET", f"/v1/shards/{SHA}").status_code == 404


def test_shards_come_at_the_links_rate(tmp_path: Path, tls: Certificate) -> None:
    with served(tmp_path, rate_bps=8 * len(SHARD) / 0.5) as fleet:
        fleet.bucket.start()

        async def act(client: httpx2.AsyncClient, port: int) -> None:
            client.headers["Authorization"] = f"Bearer {KEYS['ue1']}"
            half = len(SHARD) // 2
            begin = time.monotonic()
            fleet.bucket.start()
            first, second = await asyncio.gather(
                client.get(f"/v1/shards/{SHA}", headers={"Range": f"bytes=0-{half - 1}"}),
                client.get(f"/v1/shards/{SHA}", headers={"Range": f"bytes={half}-"}),
            )
            assert time.monotonic() - begin > 0.48
            assert first.content + second.content == SHARD
            # A lease that became late does not make its link any faster.
            fleet.ledger.close_lease("train-1", "expired")
            begin = time.monotonic()
            await client.get(f"/v1/shards/{SHA}", headers={"Range": f"bytes=-{half}"})
            assert time.monotonic() - begin > 0.2
            # Not on a lease that fetches: nothing is shaped.
            client.headers["Authorization"] = f"Bearer {KEYS['ue2']}"
            begin = time.monotonic()
            await client.get(f"/v1/shards/{SHA}")
            assert time.monotonic() - begin < 0.45

        over_tls(fleet, tls, act)


def test_the_adapter_to_start_from(fleet: Served, tmp_path: Path) -> None:
    assert ask(fleet, "GET", ADAPTER_URL).status_code == 204
    begin = time.monotonic()
    assert ask(fleet, "GET", f"{ADAPTER_URL}?wait=5").status_code == 204
    assert time.monotonic() - begin < 2, "a lease that starts from nothing does not wait"
    fleet.hub.trained = tmp_path / "adapter"
    fleet.hub.trained.write_bytes(b"adapter")
    assert ask(fleet, "GET", ADAPTER_URL).content == b"adapter"


def test_an_adapter_is_waited_for(fleet: Served, tmp_path: Path) -> None:
    path = tmp_path / "adapter"
    path.write_bytes(b"adapter")

    async def run() -> tuple[int, bytes]:
        async with fleet.client("ue2") as client:
            url = "/v1/leases/upload-1/adapter"
            none = await client.get(f"{url}?wait=0.1")
            asyncio.get_running_loop().call_later(0.2, setattr, fleet.hub, "trained", path)
            return none.status_code, (await client.get(f"{url}?wait=10")).content

    assert asyncio.run(run()) == (204, b"adapter")


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_memory_stays_constant_and_files_are_closed(fleet: Served, tls: Certificate) -> None:
    """A large shard is neither held in memory nor kept open for a device that went away."""
    size = 256 << 20
    big = fleet.catalogue / "shards" / f"{'5' * 64}.safetensors"
    with big.open("wb") as file:
        file.truncate(size)

    def open_files() -> int:
        links = [Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd")]
        return sum(os.readlink(link) == str(big) for link in links if link.is_symlink())

    async def act(client: httpx2.AsyncClient, port: int) -> None:
        client.headers["Authorization"] = f"Bearer {KEYS['ue1']}"
        before, most, arrived = resident_bytes(), 0, 0
        async with client.stream("GET", f"/v1/shards/{'5' * 64}") as answer:
            async for piece in answer.aiter_raw():
                arrived += len(piece)
                most = max(most, resident_bytes() - before)
        assert arrived == size
        assert most < 48 << 20
        async with client.stream("GET", f"/v1/shards/{'5' * 64}") as answer:
            async for _ in answer.aiter_raw():
                break
            assert open_files() == 1
        for _ in range(100):
            if not open_files():
                break
            await asyncio.sleep(0.02)
        assert open_files() == 0

    over_tls(fleet, tls, act)


# Uploads


def test_data_in_pieces(fleet: Served) -> None:
    at = 0
    for end in (1, 1000, 50_000, len(DATA)):
        assert ask(fleet, "GET", DATA_URL, "ue2").json() == {"bytes": at, "complete": False}
        answer = ask(fleet, "PATCH", f"{DATA_URL}?offset={at}", "ue2", content=DATA[at:end])
        assert answer.json() == {"bytes": end, "complete": end == len(DATA)}
        at = end
    assert not fleet.app.state.fleet.uploads._open, "of an upload that is whole nothing stays in memory"
    assert fleet.hub.told == [("data", "ue2", "upload-1", DATA)]
    for _ in range(2):
        assert ask(fleet, "GET", DATA_URL, "ue2").json() == {"bytes": len(DATA), "complete": True}
    again = ask(fleet, "PATCH", f"{DATA_URL}?offset={len(DATA)}", "ue2", content=b"")
    assert again.json() == {"bytes": len(DATA), "complete": True}
    assert len(fleet.hub.told) == 1
    assert list((fleet.work / "uploads").iterdir()) == []


@pytest.mark.parametrize("offset", [1, 999, 1001, 1 << 40])
def test_pieces_that_do_not_fit_are_refused(fleet: Served, offset: int) -> None:
    ask(fleet, "PATCH", f"{DATA_URL}?offset=0", "ue2", content=DATA[:1000])
    before = fleet.state()
    answer = ask(fleet, "PATCH", f"{DATA_URL}?offset={offset}", "ue2", content=b"x" * 10)
    assert answer.status_code == 409
    assert "1000" in answer.json()["detail"]
    assert fleet.state() == before
    assert fleet.ledger.audit_rows() == [], "a device that lost an answer is no intruder"


def test_more_than_the_upload_lacks_is_refused_and_nothing_of_it_kept(fleet: Served) -> None:
    ask(fleet, "PATCH", f"{DATA_URL}?offset=0", "ue2", content=DATA[:1000])
    before = fleet.state()

    async def more() -> AsyncIterator[bytes]:
        for _ in range(4):
            yield DATA

    assert ask(fleet, "PATCH", f"{DATA_URL}?offset=1000", "ue2", content=more()).status_code == 413
    assert fleet.state() == before


def test_data_of_another_hash_start_again(fleet: Served) -> None:
    wrong = DATA[:-1] + b"!"
    answer = ask(fleet, "PATCH", f"{DATA_URL}?offset=0", "ue2", content=wrong)
    assert answer.json() == {"bytes": 0, "complete": False}
    assert fleet.hub.told == []
    assert [row.event for row in fleet.ledger.audit_rows()] == ["damaged upload"]
    answer = ask(fleet, "PATCH", f"{DATA_URL}?offset=0", "ue2", content=DATA)
    assert answer.json() == {"bytes": len(DATA), "complete": True}


def test_a_broken_connection_keeps_what_arrived(fleet: Served) -> None:
    async def broken() -> None:
        messages = iter(
            [{"type": "http.request", "body": DATA[:3000], "more_body": True}, {"type": "http.disconnect"}]
        )
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "PATCH",
            "scheme": "https",
            "path": DATA_URL,
            "raw_path": DATA_URL.encode(),
            "query_string": b"offset=0",
            "root_path": "",
            "headers": [
                (b"authorization", f"Bearer {KEYS['ue2']}".encode()),
                (b"transfer-encoding", b"chunked"),
            ],
            "client": ("10.0.0.1", 1),
            "server": ("fleet", 443),
            "state": {},
        }

        async def receive() -> dict[str, object]:
            return next(messages, {"type": "http.disconnect"})

        async def send(message: dict[str, object]) -> None:
            pass

        await fleet.app(scope, receive, send)

    asyncio.run(broken())
    assert ask(fleet, "GET", DATA_URL, "ue2").json() == {"bytes": 3000, "complete": False}


def test_a_restarted_server_goes_on(tmp_path: Path) -> None:
    with served(tmp_path) as fleet:
        ask(fleet, "PATCH", f"{DATA_URL}?offset=0", "ue2", content=DATA[:5000])
    with served(tmp_path) as fleet:
        assert ask(fleet, "GET", DATA_URL, "ue2").json()["bytes"] == 5000
        # As if killed after the last byte, before the check.
        (fleet.work / "uploads" / "upload-1.part").write_bytes(DATA)
    with served(tmp_path) as fleet:
        assert ask(fleet, "GET", DATA_URL, "ue2").json() == {"bytes": len(DATA), "complete": True}
        assert len(fleet.hub.told) == 1
    with served(tmp_path) as fleet:
        # As if killed between the taking over and the removal.
        (fleet.work / "uploads" / "upload-1.data").write_bytes(DATA)
        assert ask(fleet, "GET", DATA_URL, "ue2").json()["complete"]
        assert fleet.hub.told == []
        assert list((fleet.work / "uploads").iterdir()) == []


def test_the_hub_is_told_again_if_it_was_killed_before_it_noted_it(
    fleet: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def killed(device: str, lease: str, path: Path) -> None:
        raise FleetError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(fleet.hub, "data_received", killed)
        assert ask(fleet, "PATCH", f"{DATA_URL}?offset=0", "ue2", content=DATA).status_code == 503
    assert ask(fleet, "GET", DATA_URL, "ue2").json() == {"bytes": len(DATA), "complete": True}
    assert fleet.hub.told == [("data", "ue2", "upload-1", DATA)]


def test_a_request_that_hangs_gives_way_to_the_next(fleet: Served, tls: Certificate) -> None:
    """A link that died without a word must not keep its device from going on over another."""

    async def act(client: httpx2.AsyncClient, port: int) -> None:
        client.headers["Authorization"] = f"Bearer {KEYS['ue2']}"
        released = asyncio.Event()

        async def hanging() -> AsyncIterator[bytes]:
            yield DATA[:70_000]
            await released.wait()
            yield DATA[70_000:]

        first = asyncio.create_task(client.patch(f"{DATA_URL}?offset=0", content=hanging()))
        await asyncio.sleep(0.3)
        have = (await client.get(DATA_URL)).json()["bytes"]
        second = await client.patch(f"{DATA_URL}?offset={have}", content=DATA[have:])
        assert second.json() == {"bytes": len(DATA), "complete": True}
        released.set()
        assert (await first).status_code == 409
        assert fleet.hub.told == [("data", "ue2", "upload-1", DATA)]

    over_tls(fleet, tls, act)


def test_silence_ends_a_request_and_keeps_what_arrived(
    fleet: Served, tls: Certificate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bodies, "SILENCE_S", 0.2)

    async def act(client: httpx2.AsyncClient, port: int) -> None:
        client.headers["Authorization"] = f"Bearer {KEYS['ue2']}"

        async def silent() -> AsyncIterator[bytes]:
            yield DATA[:70_000]
            await asyncio.sleep(2)

        answer = await client.patch(f"{DATA_URL}?offset=0", content=silent())
        assert answer.status_code == 408
        assert (await client.get(DATA_URL)).json()["bytes"] == 70_000

    over_tls(fleet, tls, act)


def test_a_full_disk_loses_nothing(fleet: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    ask(fleet, "PATCH", f"{DATA_URL}?offset=0", "ue2", content=DATA[:1000])
    write = intake._write_all

    def full(file: int, piece: bytes, at: int) -> None:
        write(file, piece[:500], at)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(intake, "_write_all", full)
        answer = ask(fleet, "PATCH", f"{DATA_URL}?offset=1000", "ue2", content=DATA[1000:])
        assert answer.status_code == 507
        before = fleet.state()
        assert ask(fleet, "PUT", ADAPTER_URL, content=safetensors()).status_code == 507
        assert fleet.state() == before
    have = ask(fleet, "GET", DATA_URL, "ue2").json()["bytes"]
    assert have == 1500
    answer = ask(fleet, "PATCH", f"{DATA_URL}?offset={have}", "ue2", content=DATA[have:])
    assert answer.json()["complete"]
    assert fleet.hub.told == [("data", "ue2", "upload-1", DATA)]


def test_a_task_that_is_too_large(tmp_path: Path) -> None:
    with served(tmp_path, Limits(data_mb=0.05)) as fleet:
        assert ask(fleet, "PATCH", f"{DATA_URL}?offset=0", "ue2", content=b"a").status_code == 413


def test_only_uploads_take_data_and_only_training_takes_adapters(fleet: Served) -> None:
    assert ask(fleet, "GET", "/v1/leases/train-1/data").status_code == 409
    assert ask(fleet, "PATCH", "/v1/leases/train-1/data?offset=0", content=b"a").status_code == 409
    wrong = ask(fleet, "PUT", "/v1/leases/upload-1/adapter", "ue2", content=safetensors())
    assert wrong.status_code == 409
    assert fleet.hub.told == []


# Adapters


def test_an_adapter_is_named_by_its_content(fleet: Served) -> None:
    fleet.hub.shapes = {"weight": (3000,)}
    content = safetensors({"weight": 3000})
    for _ in range(2):
        assert ask(fleet, "PUT", ADAPTER_URL, content=content).status_code == 204
    path = fleet.work / "adapters" / f"{hashlib.sha256(content).hexdigest()}.safetensors"
    assert path.read_bytes() == content
    assert fleet.hub.told == [("adapter", "ue1", "train-1", path)] * 2
    assert list(path.parent.iterdir()) == [path]


def test_an_adapter_that_was_not_asked_for_is_refused_by_its_header(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []
    write = intake._write_all

    def counted(file: int, piece: bytes, at: int) -> None:
        written.append(len(piece))
        write(file, piece, at)

    monkeypatch.setattr(intake, "_write_all", counted)
    with served(tmp_path, Limits(adapter_mb=50)) as fleet:
        whole = safetensors({"weight": 2_000_000})
        answer = ask(fleet, "PUT", ADAPTER_URL, content=whole)
        assert answer.status_code == 422
        assert "tensor weight is 'F32' [2000000], asked for was 'F32' [8]" in answer.json()["detail"]
        assert written == []
        fleet.hub.shapes = {"weight": (2_000_000,)}
        assert ask(fleet, "PUT", ADAPTER_URL, content=whole).status_code == 204
        assert sum(written) == len(whole)


@pytest.mark.parametrize("size", [1, 7, 100, 1000])
def test_a_header_may_come_in_pieces(fleet: Served, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(bodies, "_GATHERED_BYTES", 1)
    whole = safetensors()

    async def stream() -> AsyncIterator[bytes]:
        for at in range(0, len(whole), size):
            yield whole[at : at + size]

    assert ask(fleet, "PUT", ADAPTER_URL, content=stream()).status_code == 204
    (path,) = (fleet.work / "adapters").iterdir()
    assert path.read_bytes() == whole


def test_a_second_adapter_does_not_count(fleet: Served) -> None:
    ask(fleet, "PUT", ADAPTER_URL, content=safetensors())
    before = fleet.state()
    assert ask(fleet, "PUT", ADAPTER_URL, content=safetensors(number=1)).status_code == 204
    assert fleet.state() == before


def test_an_adapter_that_belongs_elsewhere_is_not_kept(fleet: Served) -> None:
    fleet.hub.refuses = True
    before = fleet.state()
    answer = ask(fleet, "PUT", ADAPTER_URL, content=safetensors())
    assert answer.status_code == 422
    assert "another model" in answer.json()["detail"]
    assert fleet.state() == before
    assert [row.device for row in fleet.ledger.audit_rows()] == ["ue1"]


def test_what_a_kill_left_of_an_adapter_is_cleared_away(tmp_path: Path) -> None:
    with served(tmp_path) as fleet:
        (fleet.work / "adapters" / "1234.partial").write_bytes(b"cut short")
    with served(tmp_path) as fleet:
        assert list((fleet.work / "adapters").iterdir()) == []


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(data=st.data())
def test_adapters_with_a_damaged_byte_never_pass_as_another_shape(fleet: Served, data: st.DataObject) -> None:
    fleet.hub.shapes = {"weight": (4,)}
    whole = safetensors({"weight": 4})
    length = 8 + int.from_bytes(whole[:8], "little")
    at = data.draw(st.integers(0, length - 1))
    damaged = bytearray(whole)
    damaged[at] ^= 1 << data.draw(st.integers(0, 7))
    answer = ask(fleet, "PUT", ADAPTER_URL, content=bytes(damaged))
    assert answer.status_code in (204, 422)
    if answer.status_code == 204:
        header = json.loads(bytes(damaged)[8:length])
        sizes = [
            entry["data_offsets"]
            for name, entry in header.items()
            if isinstance(entry, dict) and "dtype" in entry
        ]
        assert max(end for _, end in sizes) == len(whole) - length


# Refusals


def test_refusals_without_pause_do_not_fill_the_ledger(fleet: Served) -> None:
    now = [0.0]
    audit = refusals._Audit(AskedHere(fleet.ledger), lambda: now[0])

    async def knock() -> None:
        for _ in range(1000):
            await audit.write(None, "401")

    asyncio.run(knock())
    assert len(fleet.ledger.audit_rows()) == 600
    now[0] = 61.0
    asyncio.run(audit.write("ue1", "404"))
    assert [(row.device, row.detail) for row in fleet.ledger.audit_rows()[600:]] == [
        (None, "400 more requests within a minute"),
        ("ue1", "404"),
    ]


def test_a_hub_that_cannot_now(fleet: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fails(device: str, message: object) -> None:
        raise FleetError("ledger: something private")

    monkeypatch.setattr(fleet.hub, "reported", fails)
    answer = ask(fleet, "POST", "/v1/reports", json=report())
    assert answer.status_code == 503
    assert "private" not in answer.text


# The socket


def test_a_port_in_use(fleet: Served, tls: Certificate) -> None:
    async def act(client: httpx2.AsyncClient, port: int) -> None:
        with pytest.raises(FleetError, match=rf"server\.port: 127\.0\.0\.1:{port} cannot be had"):
            await serve(fleet.app, "127.0.0.1", port, tls.certificate, tls.key)

    over_tls(fleet, tls, act)


@pytest.mark.parametrize("host", ["192.0.2.1", "no.such.host.invalid"])
def test_an_address_of_another_machine(fleet: Served, tls: Certificate, host: str) -> None:
    with pytest.raises(FleetError, match=host):
        asyncio.run(serve(fleet.app, host, 0, tls.certificate, tls.key))


def test_a_certificate_that_cannot_be_used_frees_the_port(fleet: Served, tls: Certificate) -> None:
    with pytest.raises(FleetError, match=r"server\.certificate"):
        asyncio.run(serve(fleet.app, "127.0.0.1", 0, tls.key, tls.certificate))


def test_devices_of_another_fleet_and_old_tls_are_turned_away(
    fleet: Served, tls: Certificate, tmp_path: Path
) -> None:
    other = self_made_certificate(tmp_path / "other", [])

    async def act(client: httpx2.AsyncClient, port: int) -> None:
        async with httpx2.AsyncClient(verify=trusting(other.authority)) as stranger:
            with pytest.raises(httpx2.ConnectError, match="certificate verify failed"):
                await stranger.get(f"https://127.0.0.1:{port}/v1/fleet")
        with pytest.raises(httpx2.TransportError):
            async with httpx2.AsyncClient() as plain:
                await plain.get(f"http://127.0.0.1:{port}/v1/fleet")

    over_tls(fleet, tls, act)


def test_endless_headers_are_cut_off(fleet: Served, tls: Certificate) -> None:
    async def act(client: httpx2.AsyncClient, port: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=trusting(tls.authority))
        writer.write(b"GET /v1/fleet HTTP/1.1\r\nHost: fleet\r\n")
        sent, more = 0, b"X-More: " + b"a" * 1000 + b"\r\n"
        try:
            # Some of it fits into the buffers of the two sockets.
            while sent < 1 << 26 and not reader.at_eof():
                writer.write(more)
                sent += len(more)
                await writer.drain()
        except ConnectionError:
            pass
        assert sent < 1 << 24
        writer.close()

    over_tls(fleet, tls, act)


def test_a_body_without_end_is_cut_off(fleet: Served, tls: Certificate) -> None:
    async def act(client: httpx2.AsyncClient, port: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=trusting(tls.authority))
        writer.write(b"POST /v1/enrolment HTTP/1.1\r\nHost: fleet\r\nTransfer-Encoding: chunked\r\n\r\n")
        begin, sent = time.monotonic(), 0
        answer = asyncio.create_task(reader.read())
        try:
            while not answer.done() and time.monotonic() - begin < 10:
                writer.write(b"10000\r\n" + b"a" * 0x10000 + b"\r\n")
                sent += 0x10000
                await writer.drain()
                await asyncio.sleep(0.01)
        except ConnectionError:
            pass
        assert time.monotonic() - begin < 5
        assert b"413" in (await answer).split(b"\r\n")[0]
        writer.close()

    over_tls(fleet, tls, act)


def test_stopping_ends_requests_under_way(fleet: Served, tls: Certificate) -> None:
    async def run() -> float:
        server = await serve(fleet.app, "localhost", 0, tls.certificate, tls.key)
        async with httpx2.AsyncClient(
            verify=trusting(tls.authority), headers={"Authorization": f"Bearer {KEYS['ue2']}"}
        ) as client:
            url = f"https://localhost:{server.port}/v1/leases/upload-1/adapter?wait=25"
            waiting = asyncio.create_task(client.get(url))
            await asyncio.sleep(0.2)
            begin = time.monotonic()
            await server.stop()
            with pytest.raises(httpx2.HTTPError):
                (await waiting).raise_for_status()
        with pytest.raises(OSError), socket.create_connection(("localhost", server.port), 1):
            pass
        return time.monotonic() - begin

    assert asyncio.run(run()) < 10
