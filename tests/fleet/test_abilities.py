"""What a device can, and may: what it tells, what is drawn for it, and what it does not do whoever asks."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from emutune.fleet.config import load_fleet
from emutune.fleet.device.errand import Errand
from emutune.fleet.device.telling import Telling
from emutune.fleet.local import local_devices, with_drawn_abilities
from emutune.fleet.protocol import Lease
from emutune.scenario import load_scenario


def test_private_device_sends_nothing_whatever_a_lease_says(tmp_path: Path) -> None:
    lease = Lease(lease="0-ue1", step=0, kind="upload", task="t-0")
    nothing: Any = None
    errand = Errand(nothing, tmp_path, nothing, nothing, Telling(), lease, private=True)
    result = asyncio.run(errand.result(tmp_path / "work"))
    assert result.outcome == "failed"
    assert "stay on the device" in result.reason


def test_devices_of_this_machine_can_what_the_scenario_draws(tmp_path: Path) -> None:
    file = tmp_path / "fleet.toml"
    file.write_text('name = "drawn"\n[shaping]\nbyte_scale = 100.0\nseed = 3\n')
    config, count = load_fleet(file), 8
    devices = local_devices(config, count)
    plain = load_scenario("reference")
    assert with_drawn_abilities(config, plain, devices) == devices
    smallest = plain.model.size_gb * plain.level_bounds[0] / plain.model.layers
    limits = f"memory={{device_gb={{min={smallest},max={plain.model.size_gb}}}}}"
    scenario = load_scenario("reference", [limits, "privacy={share=0.25}"])
    drawn = with_drawn_abilities(config, scenario, devices)
    assert drawn == with_drawn_abilities(config, scenario, devices)
    assert sum(device.abilities.private for device in drawn) == 2
    room = [device.abilities.memory_bytes * 100 / 1e9 for device in drawn]
    assert smallest * 0.999 <= min(room) < max(room) <= plain.model.size_gb * 1.001
    assert len(set(room)) == count
    for device in drawn:
        command = device.command("https://localhost:1")
        assert ("--private" in command) == device.abilities.private
        assert float(command[command.index("--memory-gb") + 1]) * 1e9 == pytest.approx(
            device.abilities.memory_bytes
        )
