"""Scenarios that installed packages offer."""

import pytest

from emutune.errors import ScenarioError
from emutune.scenario import dump_scenario, load_scenario


def test_a_packages_scenarios_have_names(tmp_path, monkeypatch):
    metadata = tmp_path / "harbours-1.0.dist-info"
    metadata.mkdir()
    paper = load_scenario("paper", ["name=quay"])
    (tmp_path / "harbours.toml").write_text(dump_scenario(paper))
    (tmp_path / "harbours.py").write_text(
        "from pathlib import Path\nfrom emutune.scenario import load_scenario\n"
        "FILE = Path(__file__).with_suffix('.toml')\nMADE = load_scenario('families')\nWRONG = 3\n"
    )
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: harbours\nVersion: 1.0\n")
    names = "".join(f"{name} = harbours:{name.upper()}\n" for name in ("file", "made", "wrong"))
    (metadata / "entry_points.txt").write_text(f"[emutune.scenarios]\n{names}")
    monkeypatch.syspath_prepend(tmp_path)
    assert load_scenario("file", ["fleet.ues=9"]) == load_scenario("paper", ["name=quay", "fleet.ues=9"])
    assert load_scenario("made") == load_scenario("families")
    with pytest.raises(ScenarioError, match="'wrong': its package offers 3"):
        load_scenario("wrong")
