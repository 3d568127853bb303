"""What a command says where the extra that it needs is not installed, or only in part."""

from __future__ import annotations

import re
import subprocess
import tomllib
import venv
from collections.abc import Collection, Sequence
from pathlib import Path

import pytest
from commands import Ended, emutune

from emutune.extras import MODULES
from emutune.fleet.ledger import Ledger

ROOT = Path(__file__).parent.parent.parent
TUNING = {
    "tune": ("tune", "catalogue", "--data", "text.txt"),
    "calibrate": ("calibrate", "catalogue", "--data", "text.txt"),
    "plug": ("plug", "reference", "adapter.safetensors", "--out", "plugged"),
    "catalogue build": ("catalogue", "build", "reference", "--out", "catalogue"),
    "catalogue show": ("catalogue", "show", "catalogue"),
    "reference build": ("reference", "build", "--out", "reference"),
}
FLEET = {
    "serve": ("serve", "demo", "--catalogue", "catalogue", "--policy", "hold"),
    "fleet": ("fleet", "demo"),
    "enroll": ("enroll", "demo", "ue1"),
    "revoke": ("revoke", "demo", "ue1"),
    "join": ("join", "https://localhost:1", "--credentials", "ue1.json", "--data", "texts"),
}
EVERY = [("tuning", name, line) for name, line in TUNING.items()] + [
    ("fleet", name, line) for name, line in FLEET.items()
]
# A finder that knows nothing of some packages, before anything of emutune is imported.
WITHOUT = """
import sys
class Forbidding:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {absent!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Forbidding())
"""


def without(absent: Collection[str], lines: Sequence[tuple[str, ...]], cwd: Path) -> list[Ended]:
    """How some commands end, where packages are absent."""
    return emutune(cwd, *lines, prelude=WITHOUT.format(absent=sorted(absent)))


def refused(ended: Ended, command: str, extra: str) -> None:
    assert (ended.status, ended.out) == (2, "")
    assert re.fullmatch(rf"emutune: {command}: needs .* pip install 'emutune\[{extra}\]'\n", ended.err), ended


def test_commands_without_their_extra_name_it_in_one_line(tmp_path: Path) -> None:
    Ledger(tmp_path / "ledger.sqlite").close()
    lines = [*(line for _, _, line in EVERY), ("ledger", "ledger.sqlite")]
    *answers, printed = without(MODULES["ray"], lines, tmp_path)
    for (extra, command, _), answer in zip(EVERY, answers, strict=True):
        refused(answer, command, extra)
    # A ledger is read without any.
    assert (printed.status, "steps: 0" in printed.out) == (0, True)
    assert [path.name for path in tmp_path.iterdir()] == ["ledger.sqlite"]


def test_with_a_part_of_the_extras_the_right_one_is_named(tmp_path: Path) -> None:
    absent = set(MODULES["fleet"]) - set(MODULES["tuning"])
    for command, answer in zip(FLEET, without(absent, list(FLEET.values()), tmp_path), strict=True):
        refused(answer, command, "fleet")
    (answer,) = without({"accelerate"}, [TUNING["tune"]], tmp_path)
    refused(answer, "tune", "tuning")


def test_the_modules_are_those_of_the_project_file() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    for extra, modules in MODULES.items():
        named = {re.match(r"[\w-]+", line)[0] for line in declared[extra] if not line.startswith("emutune[")}
        assert named <= set(modules), extra
    assert set(MODULES["tuning"]) < set(MODULES["fleet"]) < set(MODULES["ray"])


@pytest.mark.slow
def test_a_wheel_without_extras(tmp_path: Path) -> None:
    python = tmp_path / "base" / "bin" / "python"
    venv.create(tmp_path / "base", with_pip=True)
    pip = [str(python), "-m", "pip", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "-w", "wheel", str(ROOT)], cwd=tmp_path, check=True)
    (wheel,) = (tmp_path / "wheel").glob("emutune-*.whl")
    constraints = ROOT / "constraints.txt"
    subprocess.run([*pip, "install", "--constraint", str(constraints), str(wheel)], check=True)
    command = str(python.with_name("emutune"))
    for extra, name, line in EVERY:
        ended = subprocess.run(
            [command, *line], capture_output=True, text=True, cwd=tmp_path, check=False, env={}
        )
        refused(Ended(ended.returncode, ended.stdout, ended.stderr), name, extra)
    checked = subprocess.run([command, "check", "paper"], capture_output=True, text=True, cwd=tmp_path)
    assert checked.returncode == 0, checked.stderr
