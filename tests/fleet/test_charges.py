"""Training and energy in the ledger: measured beside predicted, what was spent, how fast devices are."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from ledgers import add_devices, decision, digest, report

from emutune.fleet.comparison import compare_steps, errors
from emutune.fleet.ledger import Ledger
from emutune.fleet.protocol import Result
from emutune.fleet.server.progress import ended

# A transfer of 2 s at 1.5 W, then 6 s of training at 10 W.
CHARGED = {
    "predicted_delay_s": 8.0,
    "predicted_training_s": 6.0,
    "transfer_w": 1.5,
    "training_w": 10.0,
    "situation": json.dumps({"tflops": 4.0, "gain": 1e-6}),
}


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger(tmp_path / "ledger.sqlite") as opened:
        add_devices(opened, "ue1", "ue2")
        yield opened


def step(ledger: Ledger, number: int, **changes: object) -> None:
    names = ("ue1", "ue2")
    for name in names:
        ledger.report(name, report(f"{name}-{number}"))
    ledger.begin_step(number, [decision(number, name, **CHARGED | changes) for name in names])


def trained(seconds: float) -> Result:
    return Result(outcome="trained", adapter=digest("a"), before=9.0, after=8.0, training_s=seconds)


def test_a_device_is_done_when_it_has_trained(ledger: Ledger) -> None:
    step(ledger, 0)
    ledger.transferred("0-ue1", 3.0, 1000)
    ledger.transferred("0-ue2", 1.0, 1000)
    assert [row.measured_delay_s for row in ledger.comparison()] == [None, None]
    assert [row.delay_s for row in ledger.step_leases(0)] == [None, None]
    ended(ledger, "ue1", "0-ue1", trained(0.5), time_scale=10.0)
    ended(ledger, "ue2", "0-ue2", trained(1.2), time_scale=10.0)
    # The first time counts.
    assert not ledger.trained_for("0-ue2", 99.0)
    one, two = ledger.comparison()
    assert (one.measured_delay_s, two.measured_delay_s) == (8.0, 13.0)
    assert [row.delay_s for row in ledger.step_leases(0)] == [8.0, 13.0]
    assert (one.measured_training_s, one.predicted_joules, two.measured_joules) == (5.0, 63.0, 121.5)
    assert json.loads(one.situation)["gain"] == 1e-6
    (compared,) = compare_steps([one, two])
    assert (compared.predicted_delay_s, compared.measured_delay_s) == (8.0, 13.0)
    apart = errors([one, two])
    assert apart.energy_percent == pytest.approx(50 * (abs(54.5 - 63) + abs(121.5 - 63)) / 63)
    assert apart.devices == 2


def test_where_training_takes_no_time_its_seconds_are_kept_and_charged_to_nobody(ledger: Ledger) -> None:
    step(ledger, 0, predicted_delay_s=2.0, predicted_training_s=0.0, training_w=0.0)
    ledger.transferred("0-ue1", 3.0, 1000)
    ledger.trained_for("0-ue1", 50.0)
    one, two = ledger.comparison()
    assert (one.measured_delay_s, one.measured_training_s, one.measured_joules) == (3.0, 50.0, 4.5)
    assert (two.measured_delay_s, two.measured_joules) == (None, None)


def test_what_an_episode_has_spent_is_measured_or_else_predicted(ledger: Ledger) -> None:
    for number in range(3):
        step(ledger, number)
    for number, training_s in ((0, 1.0), (1, 2.0)):
        ledger.transferred(f"{number}-ue1", 2.0, 1000)
        ledger.trained_for(f"{number}-ue1", training_s)
    assert ledger.spent_j("ue1", range(3)) == pytest.approx(13.0 + 23.0 + 63.0)
    assert ledger.spent_j("ue1", range(1, 2)) == pytest.approx(23.0)
    assert ledger.spent_j("ue1", range(3, 3)) == 0.0
    assert ledger.spent_j("ue2", range(2)) == pytest.approx(2 * 63.0)


def test_a_devices_speed_is_the_median_of_its_last_trainings(ledger: Ledger) -> None:
    assert ledger.speed("ue1") is None
    # 24 TFLOP each: at 12, 8, 2 and, of the other device, 24 TFLOP/s.
    for number, seconds in enumerate((2.0, 3.0, 12.0)):
        step(ledger, number)
        ledger.trained_for(f"{number}-ue1", seconds)
    ledger.trained_for("0-ue2", 1.0)
    assert ledger.speed("ue1") == pytest.approx(8.0)
    assert ledger.speed("ue2") == pytest.approx(24.0)
    # Where training was said to take no time, nothing is learnt of speed.
    step(ledger, 3, predicted_training_s=0.0)
    ledger.trained_for("3-ue2", 7.0)
    assert ledger.speed("ue2") == pytest.approx(24.0)


def test_who_takes_part_is_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from emutune.cli.devices import devices
    from emutune.errors import UsageError

    file, out = tmp_path / "fleet.toml", tmp_path / "devices.json"
    file.write_text('name = "test"\n[server]\ndirectory = "."\n')
    with pytest.raises(UsageError, match="emutune enroll"):
        devices(str(file))
    with Ledger(tmp_path / "ledger.sqlite") as opened:
        add_devices(opened, "ue1", "ue2", "ue3")
        opened.add_device("ue4", digest("token"))
        opened.report("ue1", report("old"))
        told = {
            "private": True,
            "memory_bytes": 3_000_000,
            "cache_bytes": 4_000_000,
            "emulator": "drop-0.5000",
        }
        opened.report("ue1", report("new").model_copy(update=told))
        step(opened, 0)
        opened.trained_for("0-ue1", 3.0)
        opened.close_lease("0-ue1", "done")
        opened.leave("ue2")
        opened.revoke("ue3")
    devices(str(file), out)
    one, two, three, four = json.loads(out.read_text())["devices"]
    assert [device["state"] for device in (one, two, three, four)] == ["here", "left", "revoked", "expected"]
    assert (one["leases"], two["leases"], four["leases"]) == ({"done": 1}, {"open": 1}, {})
    # The report of the step came last, and says neither memory nor privacy.
    assert (one["memory_bytes"], one["private"], one["holds"]) == (1 << 20, False, [])
    assert one["tflops"] == pytest.approx(8.0)
    assert four["memory_bytes"] is None
    printed = capsys.readouterr().out
    assert "expected" in printed
    assert all(len(line) <= 80 for line in printed.splitlines())
