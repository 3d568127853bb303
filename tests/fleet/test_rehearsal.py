"""A world made ready for this machine: every policy's fleet has the same tasks, as the world draws them."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from test_decide import untrained
from test_worlds import inventory

from emutune.errors import FleetError, UsageError
from emutune.fleet.config import load_fleet
from emutune.fleet.local import COMMAND
from emutune.fleet.rehearsal import Rehearsal, _part, _usual_step_s, rehearse
from emutune.fleet.server.drawn import Draws
from emutune.learning.configuration import TrainingConfig
from emutune.scenario import load_scenario
from emutune.world import build_world


def rehearsal(folder: Path, world: str) -> Rehearsal:
    """Of a catalogue without shards, which making ready does not read."""
    path = folder / "catalogues" / "reference"
    (path / "catalogue.json").write_text(inventory(path).info.model_dump_json())
    return rehearse(world, folder / world, [path], 3, 4, seed=5)


@pytest.mark.parametrize("world", ["reference", "private"])
def test_every_policy_meets_the_worlds_own_tasks(tmp_path: Path, world: str) -> None:
    made = rehearsal(tmp_path, world)
    assert load_scenario(tmp_path / world / "scenario.toml") == made.scenario
    prepared = {policy: made.prepare(policy) for policy in ("lookahead", "runs/mine")}
    names = [device.name for device in prepared["lookahead"][1]]
    sizes = np.asarray(Draws(build_world(made.scenario), 5).episode(0, names).data_bits) / 8
    texts = {}
    for policy, (config, devices) in prepared.items():
        assert load_fleet(made.fleet_file(policy)) == config
        assert config.scenario == str(made.fleet_file(policy).parent / "../scenario.toml")
        assert (config.steps.count, config.shaping.seed, config.steps.fresh) == (4, 5, True)
        assert {device.abilities.private for device in devices} == (
            {True, False} if world == "private" else {False}
        )
        for number, device in enumerate(devices):
            files = sorted(device.data.rglob("*.txt"))
            assert [path.name for path in files] == [f"{task:04}.txt" for task in range(4)]
            moved = np.array([path.stat().st_size for path in files]) * config.shaping.byte_scale
            assert moved == pytest.approx(sizes[:, number], abs=config.shaping.byte_scale)
            texts.setdefault(device.name, []).append([path.read_bytes() for path in files])
        for device in devices:
            held_back = config.acceptance.text_of(device.name)
            assert held_back is not None
            paragraphs = set(held_back.read_text().split("\n\n"))
            assert not any(
                part in paragraphs
                for text in texts[device.name][0]
                for part in text.decode().split("\n\n")[1:-1]
            )
    assert all(one == two for one, two in texts.values())
    assert len({text for per_policy in texts.values() for text in per_policy[0]}) == 12


def test_a_policy_of_another_world_is_refused_before_anything_runs(tmp_path: Path) -> None:
    made = rehearsal(tmp_path, "reference")
    untrained(tmp_path / "run", TrainingConfig())
    made.check("lookahead")
    with pytest.raises(
        FleetError, match=r"trained in the scenario 'paper', whose models are not .*scenario\.toml"
    ):
        made.check(str(tmp_path / "run"))
    with pytest.raises(UsageError, match="no policy 'no-such'"):
        made.check("no-such")


def test_a_step_lasts_a_few_seconds(tmp_path: Path) -> None:
    made = rehearsal(tmp_path, "reference")
    assert _usual_step_s(made.scenario, "best_fixed") / made.time_scale == pytest.approx(6.0, rel=0.01)


def test_a_text_without_end_repeats_and_is_as_long_as_asked() -> None:
    assert _part("abcde", 0, 12) == "abcdeabcdeab"
    assert _part("abcde", 1, 7) == "cdeabcd"
    assert len(_part("aé" * 50, 3, 101).encode()) == 101


@pytest.mark.slow
def test_a_world_of_two_models_runs_for_every_policy(tmp_path: Path) -> None:
    """Real processes: what was measured is near what was predicted, and near what the simulator charges."""
    command = (
        "fleet",
        "reference-families",
        "--devices",
        "2",
        "--steps",
        "3",
        "--policy",
        "random,lookahead",
    )
    done = subprocess.run(
        [*COMMAND, *command, "--json", "world.json"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "world.json").read_text())
    assert [row["policy"] for row in found["policies"]] == ["random", "lookahead"]
    for row in found["policies"]:
        assert row["steps"] == 3
        assert row["cost"] == pytest.approx(row["predicted_cost"], rel=0.2)
        assert row["cost"] == pytest.approx(row["simulated_cost"], rel=0.2)
        assert row["errors"]["bytes_percent"] in (0.0, None)
    # The same command finds everything done.
    again = subprocess.run(
        [*COMMAND, *command], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300
    )
    assert again.returncode == 0, again.stderr
