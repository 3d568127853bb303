"""Files that nobody needs any more are deleted in time, and no other."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from ledgers import AskedHere, add_devices, decision, digest, report, run_step

from emutune.fleet.config import FleetConfig
from emutune.fleet.ledger import Ledger
from emutune.fleet.protocol import Lease
from emutune.fleet.server.housekeeping import Housekeeping

DAY_S = 86400
DAYS = 10


class Shop:
    """A ledger whose clock can be set, and the files of its server."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.ago_days = directory, 0.0
        self.ledger = Ledger(directory / "ledger.sqlite", self.now)
        self.at_work: set[str] = set()
        self.forgotten: list[tuple[str | None, str]] = []

    def now(self) -> datetime:
        return datetime.now(UTC) - timedelta(days=self.ago_days)

    def step(self, ago_days: float, step: int, *devices: str, accepted: bool = True) -> None:
        """A step some days ago, with the files that come of it."""
        self.ago_days = ago_days
        run_step(self.ledger, step, *devices, accepted=accepted)
        for device in devices:
            self.write(ago_days, f"adapters/{digest(f'{step}-{device}')}.safetensors")

    def write(self, ago_days: float, name: str) -> Path:
        path = self.directory / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"content")
        moment = time.time() - ago_days * DAY_S
        os.utime(path, (moment, moment))
        return path

    def tidy(self) -> set[str]:
        """What is left."""

        async def forget(device: str | None, lease: str, reason: str) -> None:
            self.forgotten.append((device, lease))

        self.ago_days = 0.0
        asyncio.run(
            Housekeeping(AskedHere(self.ledger), self.directory, DAYS, lambda: self.at_work, forget).tidy()
        )
        return {path.stem for path in self.directory.glob("adapters/*")}


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Shop]:
    opened = Shop(tmp_path)
    add_devices(opened.ledger, "ue1", "ue2", "ue3")
    yield opened
    opened.ledger.close()


def test_superseded_and_rejected_adapters_go_in_time(shop: Shop) -> None:
    shop.step(100, 0, "ue1", "ue2")
    shop.step(90, 1, "ue1", accepted=False)
    shop.step(50, 2, "ue1")
    shop.step(9, 3, "ue1")
    shop.step(8, 4, "ue1", accepted=False)
    # The first was superseded 50 days ago, the second was rejected; the third was in service until 9 days ago.
    assert shop.tidy() == {digest(name) for name in ("0-ue2", "2-ue1", "3-ue1", "4-ue1")}
    assert [shop.ledger.in_service(device) for device in ("ue1", "ue2")] == [digest("3-ue1"), digest("0-ue2")]


def test_what_a_running_lease_starts_from_stays(shop: Shop) -> None:
    shop.step(100, 0, "ue1", "ue2", "ue3")
    shop.step(90, 1, "ue1", "ue2", "ue3")
    shop.ago_days = 80
    begun = []
    for device in ("ue1", "ue2", "ue3"):
        decided = decision(2, device, kind="upload", at_server=True)
        start = Lease.model_validate_json(decided.lease_json).model_copy(
            update={"start": digest(f"0-{device}")}
        )
        begun.append(decided.model_copy(update={"lease_json": start.model_dump_json()}))
    shop.ledger.begin_step(2, begun)
    # One works on, one came late and may still come, one failed.
    shop.ledger.close_lease("2-ue2", "expired")
    shop.ledger.close_lease("2-ue3", "failed")
    served = {digest(f"1-{device}") for device in ("ue1", "ue2", "ue3")}
    assert shop.tidy() == served | {digest("0-ue1"), digest("0-ue2")}
    shop.ledger.close_lease("2-ue1", "done")
    assert digest("0-ue1") not in shop.tidy()


def test_an_adapter_that_is_not_judged_yet_stays(shop: Shop) -> None:
    shop.ago_days = 80
    shop.ledger.begin_step(0, [decision(0, "ue1"), decision(0, "ue2")])
    for lease in ("0-ue1", "0-ue2"):
        shop.ledger.adapter(lease, digest(lease), 7)
        shop.write(80, f"adapters/{digest(lease)}.safetensors")
    shop.ledger.close_lease("0-ue1", "expired")
    shop.ledger.close_lease("0-ue2", "failed")
    assert shop.tidy() == {digest("0-ue1")}


def test_an_adapter_that_two_devices_have_made_stays_while_one_needs_it(shop: Shop) -> None:
    shop.ago_days = 80
    shop.ledger.begin_step(0, [decision(0, "ue1"), decision(0, "ue2")])
    for lease in ("0-ue1", "0-ue2"):
        shop.ledger.adapter(lease, digest("same"), 7)
        shop.ledger.evaluation(lease, 2.0, 1.0, lease == "0-ue1")
        shop.ledger.close_lease(lease, "done")
    shop.write(80, f"adapters/{digest('same')}.safetensors")
    assert shop.tidy() == {digest("same")}
    shop.step(70, 1, "ue1")
    assert shop.tidy() == {digest("1-ue1")}


def test_a_file_that_has_just_come_stays_whatever_the_ledger_says(shop: Shop) -> None:
    shop.step(100, 0, "ue1")
    shop.step(90, 1, "ue1")
    # Put again, and not yet recorded; and one of which a kill came before it was.
    shop.write(0, f"adapters/{digest('0-ue1')}.safetensors")
    shop.write(0, f"adapters/{digest('unknown')}.safetensors")
    shop.write(20, f"adapters/{digest('forgotten')}.safetensors")
    assert shop.tidy() == {digest(name) for name in ("0-ue1", "1-ue1", "unknown")}


def test_uploads_that_nobody_goes_on_with_are_forgotten(shop: Shop) -> None:
    shop.ago_days = 80
    for device in ("ue1", "ue2", "ue3"):
        shop.ledger.report(device, report(f"{device}-0"))
    shop.ledger.begin_step(
        0, [decision(0, device, kind="upload", at_server=True) for device in ("ue1", "ue2", "ue3")]
    )
    shop.ledger.close_lease("0-ue2", "expired")
    shop.ledger.close_lease("0-ue3", "expired")
    for name, ago in (("0-ue1", 80), ("0-ue2", 80), ("0-ue3", 1)):
        shop.write(ago, f"uploads/{name}.part")
    shop.tidy()
    assert shop.forgotten == [("ue2", "0-ue2")]


def test_data_of_a_lease_that_is_over_are_deleted_and_that_is_noted(shop: Shop) -> None:
    shop.step(1, 0, "ue1", "ue2", "ue3")
    shop.ledger.begin_step(1, [decision(1, "ue1", kind="upload", at_server=True)])
    left = {name: shop.write(0, f"data/{name}.txt") for name in ("0-ue1", "0-ue2", "1-ue1")}
    (shop.directory / "work" / "0-ue3").mkdir(parents=True)
    (shop.directory / "work" / "0-ue3" / "adapter.safetensors").touch()
    shop.at_work = {"0-ue2"}
    shop.tidy()
    assert {name for name, path in left.items() if path.exists()} == {"0-ue2", "1-ue1"}
    assert not (shop.directory / "work" / "0-ue3").exists()
    assert [(row.event, row.device, row.lease) for row in shop.ledger.audit_rows()] == [
        ("data deleted", "ue1", "0-ue1")
    ]


def test_the_time_is_in_the_fleets_file() -> None:
    assert FleetConfig(name="lab").keep.days == 30
    assert FleetConfig.model_validate({"name": "lab", "keep": {"days": 7}}).keep.days == 7
    with pytest.raises(ValueError, match=r"keep\.days"):
        FleetConfig.model_validate({"name": "lab", "keep": {"days": 0}})
