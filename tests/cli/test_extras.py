"""What a command says where the extra that it needs is not installed, or only in part."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import venv
from collections.abc import Sequence
from pathlib import Path

import pytest

from emutune.extras import MODULES

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
# A finder that knows nothing of some packages, before the command is imported.
WITHOUT = """
import sys
class Forbidding:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in sys.argv[1].split(","):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Forbidding())
del sys.argv[1]
from emutune.cli.main import run
run()
"""


def emutune(arguments: Sequence[str], cwd: Path, absent: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", WITHOUT, ",".join(absent), *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        check=False,
        timeout=120,
    )


def refused(ended: subprocess.CompletedProcess[str], command: str, extra: str) -> None:
    assert (ended.returncode, ended.stdout) == (2, "")
    assert re.fullmatch(rf"emutune: {command}: .* pip install 'emutune\[{extra}\]'\n", ended.stderr)


@pytest.mark.parametrize(("extra", "command", "line"), EVERY, ids=[name for _, name, _ in EVERY])
def test_a_command_without_its_extra_names_it_in_one_line(
    tmp_path: Path, extra: str, command: str, line: Sequence[str]
) -> None:
    refused(emutune(line, tmp_path, MODULES["ray"]), command, extra)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", FLEET)
def test_with_tuning_alone_a_fleets_command_names_fleet(tmp_path: Path, command: str) -> None:
    absent = set(MODULES["fleet"]) - set(MODULES["tuning"])
    refused(emutune(FLEET[command], tmp_path, sorted(absent)), command, "fleet")


def test_one_package_of_an_extra_is_missed(tmp_path: Path) -> None:
    refused(emutune(TUNING["tune"], tmp_path, ["accelerate"]), "tune", "tuning")


def test_a_ledger_is_printed_without_any_extra(tmp_path: Path) -> None:
    from emutune.fleet.ledger import Ledger

    Ledger(tmp_path / "ledger.sqlite").close()
    ended = emutune(["ledger", "ledger.sqlite"], tmp_path, MODULES["ray"])
    assert ended.returncode == 0, ended.stderr
    assert "steps: 0" in ended.stdout


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
        refused(ended, name, extra)
    checked = subprocess.run([command, "check", "paper"], capture_output=True, text=True, cwd=tmp_path)
    assert checked.returncode == 0, checked.stderr
