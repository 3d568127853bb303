"""The ledger as its callers see it: what counts, what counts once, and what is refused."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ledgers import add_devices, decision, digest, report, run_step

from emutune.errors import LedgerError
from emutune.fleet.ledger import Decision, LeaseRow, Ledger
from emutune.fleet.protocol import Result

DEVICES = ("ue1", "ue2")
STATES = ("open", "expired", "failed", "late", "done")


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    """A new ledger of two devices."""
    with Ledger(tmp_path / "ledger.sqlite") as opened:
        add_devices(opened, *DEVICES)
        yield opened


# Any marks, any number of times, in any order


class Mark(NamedTuple):
    """A call about a step or one of its leases."""

    step: int
    call: Callable[[Ledger], object]


class Story(NamedTuple):
    """Steps, and what was said about them."""

    steps: list[list[Decision]]
    marks: list[Mark]


@st.composite
def stories(draw: st.DrawFn) -> Story:
    """Each fact about a lease has one value, but results and states may contradict each other."""
    steps, marks = [], []
    for step in range(draw(st.integers(1, 3))):
        decided = []
        for device in draw(st.sets(st.sampled_from(DEVICES), min_size=1)):
            kind = draw(st.sampled_from(("train", "upload", "stop")))
            task = None if kind != "stop" else ""
            decided.append(decision(step, device, task, kind=kind, at_server=kind == "upload"))
            marks += [Mark(step, call) for call in draw(lease_marks(f"{step}-{device}"))]
        steps.append(decided)
        if draw(st.booleans()):
            marks.append(Mark(step, lambda ledger, step=step: ledger.end_step(step, 3.0)))
        marks.append(Mark(step, lambda ledger, step=step, decided=decided: ledger.begin_step(step, decided)))
    return Story(steps, marks)


@st.composite
def lease_marks(draw: st.DrawFn, lease: str) -> list[Callable[[Ledger], object]]:
    """Some of the calls about a lease."""
    size, before = draw(st.integers(0, 1 << 50)), draw(st.floats(1, 100))
    after, accepted = draw(st.floats(1, 100)), draw(st.booleans())
    calls: list[Callable[[Ledger], object]] = [
        lambda ledger: ledger.data_complete(lease),
        lambda ledger: ledger.transferred(lease, 1.5, size),
        lambda ledger: ledger.adapter(lease, digest(lease), 64),
        lambda ledger: ledger.evaluation(lease, before, after, accepted),
    ]
    calls += [
        lambda ledger, outcome=outcome: ledger.result(lease, Result(outcome=outcome))
        for outcome in ("trained", "received", "failed")
    ]
    calls += [lambda ledger, state=state: ledger.close_lease(lease, state) for state in STATES[1:]]
    return draw(st.lists(st.sampled_from(calls), unique=True))


def told(story: Story, marks: list[Mark]) -> tuple[object, ...]:
    """What a ledger says once it was told the marks, each step being begun before the first mark about it."""
    with Ledger(":memory:") as ledger:
        add_devices(ledger, *DEVICES)
        begun = 0
        for mark in [*marks, Mark(len(story.steps) - 1, lambda _: None)]:
            while begun <= mark.step:
                assert ledger.begin_step(begun, story.steps[begun])
                begun += 1
            mark.call(ledger)
        rows = [timeless(row) for step in range(begun) for row in ledger.step_leases(step)]
        ended = [ledger.step_ended(step) for step in range(begun)]
        return ledger.totals(), ledger.comparison(), rows, ended, ledger.last_step()


def timeless(row: LeaseRow) -> LeaseRow:
    """A row without the times of day."""
    return replace(row, opened_at="", closed_at=None)


@given(stories(), st.randoms(use_true_random=False))
@settings(max_examples=80)
def test_marks_count_once_in_whatever_order_they_come(story: Story, shuffle: random.Random) -> None:
    marks = story.marks + [mark for mark in story.marks if shuffle.random() < 0.7]
    shuffle.shuffle(marks)
    assert told(story, marks) == told(story, story.marks)


@given(stories())
@settings(max_examples=40)
def test_a_mark_is_news_once(story: Story) -> None:
    with Ledger(":memory:") as ledger:
        add_devices(ledger, *DEVICES)
        for step, decided in enumerate(story.steps):
            ledger.begin_step(step, decided)
        for mark in story.marks:
            mark.call(ledger)
            before = ledger.totals(), ledger.comparison()
            assert mark.call(ledger) is False
            assert (ledger.totals(), ledger.comparison()) == before


@given(st.lists(st.sampled_from(STATES[1:]), min_size=1))
def test_the_state_that_says_most_stays(states: list[str]) -> None:
    with Ledger(":memory:") as ledger:
        add_devices(ledger, "ue1")
        ledger.begin_step(0, [decision(0, "ue1")])
        for state in states:
            ledger.close_lease("0-ue1", state)
        row = ledger.lease("ue1", "0-ue1")
        assert row is not None
        assert row.state == max(states, key=STATES.index)
        assert ledger.open_lease("ue1") is None


def test_devices_of_a_step_by_the_state_of_their_leases() -> None:
    with Ledger(":memory:") as ledger:
        add_devices(ledger, "ue1", "ue2", "ue3")
        for step in range(2):
            ledger.begin_step(step, [decision(step, device) for device in ("ue1", "ue2", "ue3")])
        ledger.close_lease("0-ue2", "expired")
        assert ledger.devices_of(0, "open") == {"ue1", "ue3"}
        assert ledger.devices_of(0, "expired") == {"ue2"}
        assert ledger.devices_of(1, "open") == {"ue1", "ue2", "ue3"}
        assert ledger.devices_of(-1, "expired") == set()


def test_the_first_measurement_counts(ledger: Ledger) -> None:
    ledger.begin_step(0, [decision(0, "ue1")])
    assert ledger.transferred("0-ue1", 1.0, 10)
    assert not ledger.transferred("0-ue1", 2.0, 20)
    assert ledger.adapter("0-ue1", digest("first"), 5)
    assert not ledger.adapter("0-ue1", digest("second"), 6)
    assert ledger.evaluation("0-ue1", 30.0, 20.0, True)
    assert not ledger.evaluation("0-ue1", 30.0, 40.0, False)
    row = ledger.lease("ue1", "0-ue1")
    assert row is not None
    assert (row.transferred_s, row.transferred_bytes) == (1.0, 10)
    assert (row.adapter_sha256, row.adapter_bytes) == (digest("first"), 5)
    assert (row.before, row.after, row.accepted) == (30.0, 20.0, True)
    assert ledger.in_service("ue1") == digest("first")


def test_success_after_failure_is_kept(ledger: Ledger) -> None:
    ledger.begin_step(0, [decision(0, "ue1")])
    assert ledger.result("0-ue1", Result(outcome="failed", reason="disk full"))
    assert ledger.result("0-ue1", Result(outcome="trained", training_s=3.0))
    assert not ledger.result("0-ue1", Result(outcome="failed", reason="again"))
    row = ledger.lease("ue1", "0-ue1")
    assert row is not None
    assert row.result == Result(outcome="trained", training_s=3.0)


def test_the_adapter_accepted_last_serves(ledger: Ledger) -> None:
    ledger.begin_step(0, [decision(0, "ue1")])
    ledger.close_lease("0-ue1", "expired")
    run_step(ledger, 1, *DEVICES)
    assert ledger.in_service("ue1") == digest("1-ue1")
    # The late one was compared with the one in service, and is better.
    ledger.evaluation("0-ue1", 21.0, 20.0, True)
    assert ledger.in_service("ue1") == digest("1-ue1"), "its bytes are not known yet"
    assert ledger.adapter("0-ue1", digest("0-ue1"), 64)
    assert ledger.in_service("ue1") == digest("0-ue1")
    run_step(ledger, 2, "ue1", accepted=False)
    ledger.evaluation("1-ue1", 25.0, 21.0, True)
    assert ledger.in_service("ue1") == digest("0-ue1"), "neither a rejected one nor a repeated mark"
    assert ledger.in_service("ue2") == digest("1-ue2")
    assert ledger.close_lease("0-ue1", "late")
    assert ledger.totals()["leases.train.late"] == 1
    run_step(ledger, 3, "ue1")
    assert ledger.in_service("ue1") == digest("3-ue1")


def test_a_perplexity_that_is_not_finite_is_noted_as_none(ledger: Ledger) -> None:
    ledger.begin_step(0, [decision(0, "ue1")])
    ledger.adapter("0-ue1", digest("diverged"), 64)
    assert ledger.evaluation("0-ue1", 25.0, float("nan"), False)
    row = ledger.lease("ue1", "0-ue1")
    assert row is not None
    assert (row.before, row.after, row.accepted) == (25.0, None, False)
    assert ledger.in_service("ue1") is None


# Steps


def test_a_step_is_begun_once_with_its_leases(ledger: Ledger) -> None:
    decided = [decision(0, "ue1"), decision(0, "ue2", kind="upload", at_server=True, retention=None)]
    assert ledger.last_step() == -1
    assert ledger.begin_step(0, decided)
    assert not ledger.begin_step(0, decided)
    assert ledger.last_step() == 0
    assert [row.lease for row in ledger.open_leases()] == ["0-ue1", "0-ue2"]
    row = ledger.lease("ue2", "0-ue2")
    assert row is not None
    assert (row.kind, row.at_server, row.retention, row.state) == ("upload", True, None, "open")
    assert row.message.model_dump_json() == decided[1].lease_json
    assert ledger.open_lease("ue2") == row.message
    assert ledger.lease("ue1", "0-ue2") is None


def test_a_step_is_not_begun_again_with_other_leases(ledger: Ledger) -> None:
    ledger.begin_step(0, [decision(0, "ue1")])
    with pytest.raises(LedgerError, match="step 0: is recorded with other leases"):
        ledger.begin_step(0, [decision(0, "ue2")])
    assert ledger.totals() == {"steps": 1, "leases.train.open": 1}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (decision(1, "ue1", "ue1-0", lease="again"), "the lease of each task, is recorded once"),
        (decision(1, "nobody"), "device nobody: is not in"),
        (decision(1, "ue2").model_copy(update={"task": "other"}), "lease 1-ue2: step, lease, kind and task"),
        (decision(0, "ue2"), "lease 0-ue2: step, lease, kind and task"),
        (decision(1, "ue2").model_copy(update={"lease_json": "{}"}), "lease 1-ue2: lease_json is no Lease"),
    ],
)
def test_a_step_with_one_wrong_decision_is_not_begun(ledger: Ledger, wrong: Decision, message: str) -> None:
    ledger.begin_step(0, [decision(0, "ue1")])
    with pytest.raises(LedgerError, match=message):
        ledger.begin_step(1, [decision(1, "ue1"), wrong])
    assert ledger.last_step() == 0
    assert ledger.totals() == {"steps": 1, "leases.train.open": 1}
    assert ledger.begin_step(1, [decision(1, "ue1")])


def test_what_is_unknown_is_named(ledger: Ledger) -> None:
    with pytest.raises(LedgerError, match="lease 7-ue1: is not in"):
        ledger.transferred("7-ue1", 1.0, 1)
    with pytest.raises(LedgerError, match="step 7: is not in"):
        ledger.end_step(7, 1.0)
    for call in (ledger.revoke, ledger.leave, lambda name: ledger.report(name, report("a"))):
        with pytest.raises(LedgerError, match="device ue9: is not in"):
            call("ue9")
    with pytest.raises(LedgerError, match="lease 7-ue1: is not in"):
        ledger.close_lease("7-ue1", "done")


# Devices and their reports


def test_a_key_is_bound_once(ledger: Ledger) -> None:
    token, key = digest("token ue1"), digest("key ue1")
    assert ledger.enrol("ue1", token, key)
    assert not ledger.enrol("ue1", token, digest("another key"))
    assert not ledger.enrol("ue1", digest("another token"), key)
    assert not ledger.enrol("ue2", token, key)
    assert not ledger.enrol("ue9", token, key)
    ledger.add_device("ue3", digest("token ue3"))
    assert not ledger.enrol("ue3", digest("token ue3"), key), "the key of another device"
    assert ledger.device_of_key(key) == "ue1"
    assert ledger.device_of_key(digest("another key")) is None


def test_new_credentials_replace_earlier_ones_for_good(ledger: Ledger) -> None:
    old = digest("token ue1"), digest("key ue1")
    ledger.revoke("ue1")
    assert ledger.device_of_key(old[1]) is None
    assert not ledger.enrol("ue1", *old)
    assert not ledger.add_device("ue1", old[0])
    assert ledger.device_of_key(old[1]) is None, "issuing a revoked token again does not revive it"
    assert ledger.add_device("ue1", digest("new token"))
    assert not ledger.enrol("ue1", *old)
    assert ledger.enrol("ue1", digest("new token"), digest("new key"))
    assert ledger.device_of_key(digest("new key")) == "ue1"
    assert ledger.device_of_key(old[1]) is None
    with pytest.raises(LedgerError, match="device ue2: its token belongs to another device"):
        ledger.add_device("ue2", digest("new token"))
    row = ledger.devices()[0]
    assert (row.name, row.key_sha256, row.revoked, row.left) == ("ue1", digest("new key"), False, False)


def test_reports_are_open_until_decided(ledger: Ledger) -> None:
    assert ledger.report("ue2", report("a"))
    assert ledger.report("ue1", report("a"))
    assert not ledger.report("ue1", report("a"))
    assert ledger.report("ue1", report("b"))
    assert ledger.open_reports() == [("ue2", report("a")), ("ue1", report("b"))]
    ledger.begin_step(0, [decision(0, "ue1", "b"), decision(0, "ue2", "", kind="stop")])
    assert ledger.open_reports() == [("ue2", report("a"))], "a device's earlier report stays superseded"
    ledger.begin_step(1, [decision(1, "ue2", "a")])
    assert ledger.open_reports() == []


def test_what_was_reported_and_moved_last_is_found(ledger: Ledger) -> None:
    ledger.report("ue1", report("a"))
    assert ledger.report_of("ue1", "a") == report("a")
    with pytest.raises(LedgerError, match="device ue2: reported no task a"):
        ledger.report_of("ue2", "a")
    assert ledger.transfers("ue1", "train") == []
    for step, size in enumerate((10, 20, 0, *[30] * 40)):
        # Of the first step's devices two are to move something.
        moves = [
            decision(step, "ue1", predicted_bytes=5),
            decision(step, "ue2", predicted_bytes=0 if step else 5),
        ]
        ledger.begin_step(step, moves)
        ledger.transferred(f"{step}-ue1", 1.0 + step, size)
        if step == 3:
            assert ledger.transfers("ue1", "train") == [(10, 1.0), (20, 2.0), (30, 4.0)]
            assert ledger.transfers("ue1", "train", shared=True) == [(20, 1.0), (20, 2.0), (30, 4.0)]
    assert ledger.transfers("ue1", "train") == [(30, 1.0 + step) for step in range(19, 43)]
    assert ledger.transfers("ue1", "upload") == ledger.transfers("ue2", "train") == []


def test_devices_that_left_or_were_revoked_are_left_out(ledger: Ledger) -> None:
    for device in DEVICES:
        ledger.report(device, report("a"))
    ledger.leave("ue1")
    ledger.leave("ue1")
    assert [device for device, _ in ledger.open_reports()] == ["ue2"]
    assert not ledger.report("ue1", report("a"))
    assert [device for device, _ in ledger.open_reports()] == ["ue2"], "an old report does not bring it back"
    ledger.report("ue1", report("b"))
    assert [device for device, _ in ledger.open_reports()] == ["ue2", "ue1"]
    ledger.leave("ue1")
    add_devices(ledger, "ue1")
    ledger.revoke("ue2")
    assert [device for device, _ in ledger.open_reports()] == ["ue1"]


# Facts, audit, order


def test_facts_are_noted(ledger: Ledger) -> None:
    assert ledger.meta("base") is None
    ledger.set_meta("base", "1")
    ledger.set_meta("base", "2")
    assert ledger.meta("base") == "2"


def test_the_audit_notes_what_is_about_a_lease_once(ledger: Ledger) -> None:
    for _ in range(2):
        ledger.audit("data deleted", "ue1", "0-ue1", "1000 bytes")
        ledger.audit("key refused", None, None, "unknown")
    ledger.audit("data deleted", "ue2", "0-ue2", "1000 bytes")
    noted = [(row.event, row.device, row.lease) for row in ledger.audit_rows()]
    assert noted == [
        ("data deleted", "ue1", "0-ue1"),
        ("key refused", None, None),
        ("key refused", None, None),
        ("data deleted", "ue2", "0-ue2"),
    ]


def test_the_clock_decides_nothing(tmp_path: Path) -> None:
    years = iter(range(2300, 1900, -1))
    with Ledger(tmp_path / "ledger.sqlite", lambda: datetime(next(years), 1, 1, tzinfo=UTC)) as ledger:
        add_devices(ledger, *DEVICES)
        for step in range(3):
            run_step(ledger, step, *DEVICES)
        for task in ("x", "y"):
            ledger.report("ue1", report(task))
        ledger.report("ue2", report("x"))
        assert [device for device, _ in ledger.open_reports()] == ["ue1", "ue2"]
        ledger.begin_step(3, [decision(3, "ue2", "x")])
        ledger.audit("first", None, None, "")
        ledger.audit("second", None, None, "")
        assert ledger.last_step() == 3
        assert [row.step for row in ledger.comparison()] == [0, 0, 1, 1, 2, 2, 3]
        assert [ledger.in_service(device) for device in DEVICES] == [digest("2-ue1"), digest("2-ue2")]
        assert ledger.open_reports() == [("ue1", report("y"))]
        assert [row.event for row in ledger.audit_rows()] == ["first", "second"]
        opened = [row.opened_at for step in range(4) for row in ledger.step_leases(step)]
        assert opened == sorted(opened, reverse=True), "the clock did run backwards"


def test_totals(ledger: Ledger) -> None:
    assert ledger.totals() == {"steps": 0}
    run_step(ledger, 0, *DEVICES)
    run_step(ledger, 1, "ue1", accepted=False)
    ledger.begin_step(2, [decision(2, "ue2", kind="upload", at_server=True)])
    ledger.transferred("2-ue2", 9.0, 5)
    ledger.close_lease("2-ue2", "expired")
    assert ledger.totals() == {
        "steps": 3,
        "leases.train.done": 3,
        "leases.upload.expired": 1,
        "bytes.train": 1000 + 1001 + 1000,
        "bytes.upload": 5,
        "bytes.adapter": 3 * 64,
        "adapters.accepted": 2,
        "adapters.rejected": 1,
    }
