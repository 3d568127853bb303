"""The dashboard's data, key and headers, over the application in memory."""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
import stat
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import httpx2
import pytest
from ledgers import add_devices, decision, digest, report, run_step
from served import DASHBOARD_KEY, KEYS, SHA, SHARD, Served, board_of, served

from emutune.cli.serve import announce_dashboard
from emutune.errors import FleetError
from emutune.fleet.comparison import compare_steps, errors
from emutune.fleet.figures import FAILED
from emutune.fleet.ledger import Ledger
from emutune.fleet.protocol import Result
from emutune.fleet.security import new_secret, secret_sha256
from emutune.fleet.server.dashboard.access import dashboard_key, dashboard_url
from emutune.fleet.server.dashboard.board import Board
from emutune.fleet.server.dashboard.messages import LeaseDetail, Overview, StepDetail
from emutune.fleet.server.dashboard.reading import Reading

OVERVIEW = "/v1/dashboard"


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Served]:
    with served(tmp_path) as fleet:
        yield fleet


def ask(fleet: Served, path: str, key: str | None = DASHBOARD_KEY, **headers: str) -> httpx2.Response:
    async def send() -> httpx2.Response:
        async with fleet.client(key=key) as client:
            return await client.get(path, headers=headers)

    return asyncio.run(send())


def overview(fleet: Served) -> Overview:
    """As it is now, not as it was half a second ago."""
    fleet.board._read_again = 0.0
    answer = ask(fleet, OVERVIEW)
    assert answer.status_code == 200
    return Overview.model_validate_json(answer.content)


# The key


def test_the_key_is_made_once_and_for_its_owner_alone(tmp_path: Path) -> None:
    key = dashboard_key(tmp_path / "server")
    path = tmp_path / "server" / "dashboard.key"
    assert len(key) == 64
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert dashboard_key(tmp_path / "server") == key
    assert dashboard_key(tmp_path / "other") != key


@pytest.mark.parametrize("content", ["", "a" * 63, "A" * 64, "a" * 64 + "b", "\0" * 64, "ä" * 64])
def test_a_damaged_key_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "dashboard.key").write_text(content, "utf-8")
    with pytest.raises(FleetError, match=r"dashboard\.key: is no key; remove it"):
        dashboard_key(tmp_path)


def test_a_key_that_others_can_read_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    key = dashboard_key(tmp_path)
    (tmp_path / "dashboard.key").chmod(0o644)
    assert dashboard_key(tmp_path) == key
    assert "chmod 600" in caplog.text
    assert key not in caplog.text


def test_the_key_stands_where_no_browser_sends_it() -> None:
    url = httpx2.URL(dashboard_url("https://fleet:8443", "k" * 64))
    assert (url.path, url.query, url.fragment) == ("/dashboard", b"", f"key={'k' * 64}")
    assert dashboard_url("https://fleet:8443") == "https://fleet:8443/dashboard"


@pytest.mark.parametrize("terminal", [True, False])
def test_only_a_terminal_is_shown_the_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    key = dashboard_key(tmp_path)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    announce_dashboard("https://fleet:8443", tmp_path)
    said = capsys.readouterr().out
    assert said.startswith("dashboard: https://fleet:8443/dashboard")
    assert (key in said) is terminal
    assert (str(tmp_path / "dashboard.key") in said) is not terminal


def test_who_has_no_key_sees_the_page_and_nothing_of_the_fleet(fleet: Served) -> None:
    page = ask(fleet, "/dashboard", None)
    assert page.status_code == 200
    for secret in ("ue1", "test", *KEYS.values(), DASHBOARD_KEY):
        assert f">{secret}<" not in page.text
    for key in (None, KEYS["ue1"], "0" * 64, secret_sha256(DASHBOARD_KEY)):
        answer = ask(fleet, OVERVIEW, key)
        assert answer.status_code == 401
        assert answer.headers["WWW-Authenticate"] == "Bearer"
        assert list(answer.json()) == ["detail"]
    assert [row.event for row in fleet.ledger.audit_rows()] == ["refused"] * 4


def test_a_key_in_the_query_opens_nothing(fleet: Served) -> None:
    assert ask(fleet, f"{OVERVIEW}?key={DASHBOARD_KEY}", None).status_code == 401
    assert DASHBOARD_KEY not in "".join(row.detail for row in fleet.ledger.audit_rows())


def test_the_key_is_not_logged(fleet: Served, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    ask(fleet, OVERVIEW)
    ask(fleet, "/v1/fleet")
    assert caplog.records
    assert DASHBOARD_KEY not in caplog.text
    assert DASHBOARD_KEY not in "".join(row.detail for row in fleet.ledger.audit_rows())


# Headers


@pytest.mark.parametrize(
    "path",
    [
        "/dashboard",
        "/dashboard/app.js",
        "/dashboard/tables.js",
        "/dashboard/charts.js",
        "/dashboard/style.css",
        OVERVIEW,
        f"{OVERVIEW}/steps/0",
        f"{OVERVIEW}/steps/99",
    ],
)
def test_nothing_foreign_may_run_and_nothing_is_kept(fleet: Served, path: str) -> None:
    headers = ask(fleet, path).headers
    policy = dict(part.strip().split(" ", 1) for part in headers["Content-Security-Policy"].split(";"))
    assert policy["default-src"] == policy["frame-ancestors"] == policy["form-action"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["img-src"] == "data: 'self'"
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Referrer-Policy"] == "no-referrer"
    assert headers["Cache-Control"] == "no-store"


def test_the_page_needs_nothing_from_elsewhere(fleet: Served) -> None:
    page = ask(fleet, "/dashboard", None).text
    assert "style=" not in page
    assert "onclick" not in page
    for end in ("", "/app.js", "/tables.js", "/charts.js", "/style.css"):
        answer = ask(fleet, f"/dashboard{end}", None)
        text = answer.text.replace("http://www.w3.org/2000/svg", "")
        assert answer.status_code == 200
        assert "http:" not in text
        assert "https:" not in text
        assert "@import" not in text
        for way in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval("):
            assert way not in text, end


# Data


def fill(ledger: Ledger) -> None:
    """A step in which not all goes well, one under way, and a device that did not join."""
    add_devices(ledger, "ue3", "ue4")
    ledger.close_lease("train-1", "expired")
    ledger.result("upload-1", Result(outcome="failed", reason="the disk is full"))
    ledger.close_lease("upload-1", "failed")
    ledger.end_step(0, 0.0)
    run_step(ledger, 1, "ue3")
    ledger.report("ue3", report("ue3-2"))
    ledger.report("ue4", report("ue4-2"))
    uploads = {"kind": "upload", "at_server": True, "retention": None, "emulator_name": None}
    ledger.begin_step(2, [decision(2, "ue3"), decision(2, "ue4", **uploads)])
    ledger.transferred("2-ue3", 2.5, 1100)
    ledger.adapter("2-ue3", digest("late"), 64)
    ledger.evaluation("2-ue3", 21.0, 22.0, False)
    ledger.audit("data deleted", "ue2", "upload-1", "after training")
    ledger.audit("refused", None, None, "401 GET /v1/fleet: no")
    ledger.audit("refused", "ue1", None, "422 PUT: no")


def test_all_is_as_the_ledger_compares_it(fleet: Served) -> None:
    fill(fleet.ledger)
    seen, leases = overview(fleet), fleet.ledger.comparison()
    assert seen.totals == fleet.ledger.totals()
    assert errors(leases) == seen.errors
    steps = compare_steps(leases)
    assert [asdict(step) for step in steps] == [
        {name: getattr(step, name) for name in asdict(steps[0])} for step in seen.steps
    ]
    for step in seen.steps:
        answer = ask(fleet, f"{OVERVIEW}/steps/{step.step}")
        detail = StepDetail.model_validate_json(answer.content)
        assert detail.summary == step
        rows = [row for row in leases if row.step == step.step]
        for shown, row in zip(detail.leases, rows, strict=True):
            for name in LeaseDetail.model_fields:
                assert getattr(shown, name) == getattr(row, name), name
    reasons = [
        lease.reason for lease in StepDetail.model_validate(ask(fleet, f"{OVERVIEW}/steps/0").json()).leases
    ]
    assert reasons == ["", "the disk is full"]


def test_steps_at_a_glance(fleet: Served) -> None:
    fill(fleet.ledger)
    first, second, third = overview(fleet).steps
    assert (first.leases, first.at_server, first.expired, first.failed, first.accepted) == (2, 1, 1, 1, 0)
    assert (second.predicted_perplexity, second.measured_perplexity, second.perplexity_before) == (20, 21, 25)
    assert (second.known_delay_s, second.measured_delay_s, second.predicted_delay_s) == (1.0, 1.0, 2.0)
    assert (second.emulator_bytes, second.data_bytes, second.adapter_bytes) == (1000, 0, 64)
    assert (third.measured_delay_s, third.known_delay_s, third.ended_at) == (None, None, None)
    assert (third.refused, third.open, third.emulator_bytes) == (1, 2, 1100)


def test_what_was_refused_deleted_and_failed(fleet: Served) -> None:
    fill(fleet.ledger)
    seen = overview(fleet)
    assert [(fault.device, fault.state, fault.reason) for fault in seen.faults] == [
        ("ue2", "failed", "the disk is full"),
        ("ue1", "expired", ""),
    ]
    assert (seen.audit.strangers, seen.audit.of_devices, seen.audit.deleted) == (1, 1, 1)
    assert [row.detail for row in seen.audit.refusals] == ["422 PUT: no", "401 GET /v1/fleet: no"]
    assert [(row.device, row.lease) for row in seen.audit.deletions] == [("ue2", "upload-1")]
    for number in range(60):
        fleet.ledger.audit("refused", None, None, f"401 number {number}")
    seen = overview(fleet)
    assert (seen.audit.strangers, seen.audit.of_devices) == (61, 1)
    assert [row.detail for row in seen.audit.refusals] == [f"401 number {n}" for n in range(59, 9, -1)]


def test_the_fleet_itself(fleet: Served) -> None:
    seen = overview(fleet)
    assert (seen.name, seen.policy, seen.scenario, seen.models[0].base) == (
        "test",
        "fixed",
        "reference",
        "b" * 64,
    )
    assert (seen.state, seen.step, seen.steps_ended, seen.steps_total) == ("running", 0, 0, 5)
    assert [device.name for device in seen.devices] == ["ue1", "ue2", "gone", "new"]
    doing = {device.name: device.doing for device in seen.devices}
    assert doing == {"ue1": "downloading", "ue2": "uploading", "gone": "revoked", "new": "expected"}
    assert [device.joined_at is None for device in seen.devices] == [False, False, False, True]


def test_what_a_training_device_does(fleet: Served) -> None:
    ledger, told = fleet.ledger, []

    def note() -> None:
        device = next(device for device in overview(fleet).devices if device.name == "ue3")
        told.append(
            (device.doing, device.work and device.work.moved_bytes, device.cached and device.cached.retention)
        )

    def then(change: Callable[..., object], *arguments: object) -> None:
        change(*arguments)
        note()

    add_devices(ledger, "ue3")
    note()
    then(ledger.report, "ue3", report("ue3-1"))
    then(ledger.begin_step, 1, [decision(1, "ue3")])
    then(ledger.transferred, "1-ue3", 1.0, 900)
    then(ledger.adapter, "1-ue3", digest("a"), 64)
    then(ledger.result, "1-ue3", Result(outcome="trained"))
    ledger.evaluation("1-ue3", 25.0, 21.0, True)
    then(ledger.close_lease, "1-ue3", "done")
    then(ledger.leave, "ue3")
    then(ledger.revoke, "ue3")
    assert told == [
        ("idle", None, None),
        ("reported", None, None),
        ("downloading", 0, None),
        ("training", 900, 0.5),
        ("returning", 900, 0.5),
        ("judging", 900, 0.5),
        ("idle", 900, 0.5),
        ("left", 900, 0.5),
        ("revoked", 900, 0.5),
    ]


def test_what_is_held_and_trained_is_shown_with_its_model(fleet: Served) -> None:
    add_devices(fleet.ledger, "ue3", "ue4")
    fleet.ledger.begin_step(1, [decision(1, "ue3", base="c" * 64), decision(1, "ue4")])
    for device in ("ue3", "ue4"):
        fleet.ledger.transferred(f"1-{device}", 1.0, 900)
    held = {device.name: device.cached and device.cached.base for device in overview(fleet).devices}
    assert (held["ue3"], held["ue4"]) == ("c" * 64, "b" * 64)
    with Reading(fleet.ledger.path) as reading, reading.moment():
        detail = reading.step_detail(1)
    assert detail is not None
    assert [lease.base for lease in detail.leases] == ["c" * 64, None]


def test_what_an_uploading_device_does(fleet: Served) -> None:
    def now() -> tuple[str, int]:
        device = next(device for device in overview(fleet).devices if device.name == "ue2")
        assert device.work is not None
        return device.doing, device.work.moved_bytes

    async def send() -> None:
        async with fleet.client("ue2") as client:
            await client.patch("/v1/leases/upload-1/data?offset=0", content=b"x" * 700)

    asyncio.run(send())
    assert now() == ("uploading", 700)
    fleet.ledger.data_complete("upload-1")
    assert now()[0] == "server trains"
    fleet.ledger.adapter("upload-1", digest("a"), 64)
    assert now()[0] == "fetching"
    fleet.ledger.close_lease("upload-1", "expired")
    assert now()[0] == "fetching", "a late device goes on"
    fleet.ledger.result("upload-1", Result(outcome="received"))
    assert now()[0] == "idle"


def test_bytes_on_their_way_and_who_was_heard(fleet: Served) -> None:
    async def send() -> None:
        async with fleet.client("ue1") as client:
            assert len((await client.get(f"/v1/shards/{SHA}")).content) == len(SHARD)
            await client.get(f"/v1/shards/{SHA}", headers={"Range": "bytes=0-99"})
            await client.get(f"/v1/shards/{'0' * 64}")

    before = overview(fleet)
    asyncio.run(send())
    first, second = overview(fleet).devices[:2]
    assert first.work is not None
    assert first.work.moved_bytes == len(SHARD) + 100
    assert "ue1" in fleet.board.watch.heard
    assert second == before.devices[1]


def test_a_restarted_server_knows_when_a_device_reported_last(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        add_devices(ledger, "ue1")
        run_step(ledger, 0, "ue1")
        board = board_of(ledger, tmp_path)
        page = asyncio.run(board.overview())
        (device,) = Overview.model_validate_json(page.body).devices
        assert device.joined_at is not None
        assert device.heard_at is not None
        assert device.heard_at >= device.joined_at
        board.close()


@pytest.mark.parametrize(
    ("ended", "stopped", "state"), [(0, False, "waiting"), (1, False, "running"), (2, True, "done")]
)
def test_how_a_run_stands(tmp_path: Path, ended: int, stopped: bool, state: str) -> None:
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        add_devices(ledger, "ue1")
        for step in range(ended):
            run_step(ledger, step, "ue1")
        board = board_of(ledger, tmp_path, steps_total=2)
        board._stopped = stopped
        assert json.loads(asyncio.run(board.overview()).body)["state"] == state
        board.close()


# Polling


def test_what_has_not_changed_is_not_sent_again(fleet: Served) -> None:
    for path in (OVERVIEW, f"{OVERVIEW}/steps/0"):
        first = ask(fleet, path)
        tag = first.headers["ETag"]
        for known in (tag, f'"other", {tag}', "*"):
            again = ask(fleet, path, **{"If-None-Match": known})
            assert (again.status_code, again.content, again.headers["ETag"]) == (304, b"", tag)
        fleet.ledger.transferred("train-1", 2.0, len(path))
        fleet.board._read_again = 0.0
        assert ask(fleet, path, **{"If-None-Match": tag}).status_code == (200 if path == OVERVIEW else 304)
    assert ask(fleet, OVERVIEW, **{"If-None-Match": tag}).status_code == 200


def test_steps_that_stayed_as_they_were_are_not_told_again(fleet: Served) -> None:
    def told(since: int) -> tuple[int, list[int]]:
        fleet.board._read_again = 0.0
        answer = Overview.model_validate_json(ask(fleet, f"{OVERVIEW}?since={since}").content)
        assert answer.first_step == 0
        return answer.revision, [step.step for step in answer.steps]

    fleet.ledger.begin_step(1, [decision(1, "ue1")])
    first, steps = told(0)
    assert steps == [0, 1]
    assert told(first)[1] == []
    fleet.ledger.close_lease("train-1", "late")
    second, steps = told(first)
    assert steps == [0]
    fleet.ledger.begin_step(2, [decision(2, "ue2")])
    assert told(second)[1] == [2]
    assert told(first)[1] == [0, 2], "another page is told of all that it missed"
    assert told(second + 10**6)[1] == [0, 1, 2], "a revision that this server never had is nobody's"
    assert ask(fleet, f"{OVERVIEW}?since=-1").status_code == 422
    assert ask(fleet, f"{OVERVIEW}?since=-1", new_secret()).status_code == 401


def test_it_is_compressed_for_who_understands_that(fleet: Served) -> None:
    plain = ask(fleet, OVERVIEW, **{"Accept-Encoding": "identity"})
    page = asyncio.run(fleet.board.overview())
    assert "Content-Encoding" not in plain.headers
    assert plain.content == page.body == gzip.decompress(page.zipped)
    assert ask(fleet, OVERVIEW, **{"Accept-Encoding": "gzip"}).headers["Content-Encoding"] == "gzip"


def test_the_ledger_is_read_once_for_all_who_look(fleet: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    read, reads = Board._read_overview, []

    def counted(self: Board, reading: Reading) -> object:
        reads.append(1)
        time.sleep(0.05)
        return read(self, reading)

    monkeypatch.setattr(Board, "_read_overview", counted)

    async def many() -> None:
        async with fleet.client(key=DASHBOARD_KEY) as client:
            answers = await asyncio.gather(*(client.get(OVERVIEW) for _ in range(20)))
        assert {answer.status_code for answer in answers} == {200}

    asyncio.run(many())
    assert len(reads) == 1


def test_reading_keeps_nobody_waiting(fleet: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    read = Board._read_overview

    def slow(self: Board, reading: Reading) -> object:
        time.sleep(0.5)
        return read(self, reading)

    monkeypatch.setattr(Board, "_read_overview", slow)

    async def both() -> int:
        async with fleet.client(key=DASHBOARD_KEY) as operator, fleet.client("ue1") as device:
            looking, answered = asyncio.create_task(operator.get(OVERVIEW)), 0
            while not looking.done():
                answered += (await device.get("/v1/lease")).status_code == 200
                # A request in memory gives nobody else a turn.
                await asyncio.sleep(0.001)
            assert (await looking).status_code == 200
        return answered

    assert asyncio.run(both()) > 5


def test_a_step_is_read_again_only_when_a_lease_got_further(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        add_devices(ledger, "ue1", "ue2")
        for step in range(3):
            run_step(ledger, step, "ue1")
        ledger.begin_step(3, [decision(3, "ue2")])
        with Reading(tmp_path / "ledger.sqlite") as reading:
            asked: list[int | None] = []
            compare = Reading.comparison

            def noted(self: Reading, step: int | None = None) -> object:
                asked.append(step)
                return compare(self, step)

            monkeypatch.setattr(Reading, "comparison", noted)

            def changed(change: Callable[..., object], *arguments: object) -> list[int | None]:
                asked.clear()
                change(*arguments)
                reading.steps()
                return list(asked)

            reading.steps()
            assert asked == [0, 1, 2, 3]
            assert changed(lambda: None) == []
            assert changed(ledger.transferred, "3-ue2", 1.0, 5) == [3]
            assert changed(ledger.adapter, "3-ue2", digest("a"), 64) == [3]
            assert changed(ledger.evaluation, "3-ue2", 30.0, 29.0, False) == [3]
            assert changed(ledger.result, "3-ue2", Result(outcome="trained")) == [3]
            assert changed(ledger.close_lease, "3-ue2", "expired") == [3]
            assert changed(ledger.close_lease, "3-ue2", "late") == [3]
            assert changed(ledger.end_step, 3, 1.0) == [3]
            assert changed(ledger.close_lease, "1-ue1", "late") == []
            assert errors(ledger.comparison()) == reading.errors()


def test_nobody_writes_to_the_ledger_from_here(tmp_path: Path) -> None:
    Ledger(tmp_path / "ledger.sqlite").close()
    with Reading(tmp_path / "ledger.sqlite") as reading, pytest.raises(Exception, match="readonly"):
        reading.audit("refused", None, None, "no")


# The end


def test_who_looks_hears_that_the_server_ends(fleet: Served) -> None:
    async def run() -> str:
        board = fleet.board
        begin = time.monotonic()
        await board.say_farewell()
        assert time.monotonic() - begin < 0.5, "nobody looks, so nobody is waited for"
        board._stopped = False
        await board.overview()
        farewell = asyncio.create_task(board.say_farewell())
        await asyncio.sleep(0)
        assert not farewell.done()
        last = await board.overview()
        await farewell
        return str(json.loads(last.body)["state"])

    assert asyncio.run(run()) == "stopped"


def test_a_server_without_dashboard_has_none(fleet: Served) -> None:
    from emutune.fleet.config import Limits
    from emutune.fleet.server.app import create_app

    fleet.app = create_app(fleet.hub, fleet.asked, {}, fleet.work, Limits(), lambda *_: None)
    assert ask(fleet, "/dashboard").status_code == 404
    assert ask(fleet, OVERVIEW).status_code == 404


def test_why_the_server_failed_a_lease(fleet: Served) -> None:
    fleet.ledger.audit(FAILED, "ue1", "train-1", "judge: was not done in 600 s")
    fleet.ledger.audit(FAILED, "ue2", "train-1", "of another device")
    # A device that succeeded says no reason, and one that failed its own.
    fleet.ledger.result("train-1", Result(outcome="trained", adapter="2" * 64))
    fleet.ledger.result("upload-1", Result(outcome="failed", reason="the disk is full"))
    for lease in ("train-1", "upload-1"):
        fleet.ledger.close_lease(lease, "failed")
    expected = {"ue1": "judge: was not done in 600 s", "ue2": "the disk is full"}
    seen = overview(fleet)
    assert {fault.device: fault.reason for fault in seen.faults} == expected
    assert {row.device: row.reason for row in fleet.ledger.comparison()} == expected
    assert seen.audit.refusals == []
