"""What may import what, and what a package promises to export."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import emutune

ROOT = Path(__file__).parent.parent
PACKAGES = ["emutune"] + [
    module.name for module in pkgutil.walk_packages(emutune.__path__, "emutune.") if module.ispkg
]


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter: this one has imported everything already."""
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120
    )


def test_import_rules_hold() -> None:
    linted = run_python(
        "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    )
    assert linted.returncode == 0, linted.stdout + linted.stderr


def test_a_scenario_is_read_without_jax() -> None:
    used = run_python(
        "import sys\n"
        "from emutune.scenario import dump_scenario, load_scenario, parse_scenario\n"
        "parse_scenario(dump_scenario(load_scenario('paper', ['fleet.ues=9'])))\n"
        "print(*{'jax', 'jaxlib', 'scipy', 'matplotlib', 'torch'} & set(sys.modules))"
    )
    assert used.returncode == 0, used.stderr
    assert used.stdout.split() == []


@pytest.mark.parametrize("name", PACKAGES)
def test_every_public_name_exists(name: str) -> None:
    package = importlib.import_module(name)
    exported = getattr(package, "__all__", [])
    assert len(exported) == len(set(exported))
    for public in exported:
        assert hasattr(package, public), public
        assert not public.startswith("_") or public == "__version__", public


@pytest.mark.parametrize("name", ["emutune.scenario", "emutune.world"])
def test_packages_with_a_public_face_declare_it(name: str) -> None:
    assert importlib.import_module(name).__all__
