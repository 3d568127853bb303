"""What may import what, and what waits until it is used."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


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


def test_rooms_whose_names_are_lazy_wait_with_what_is_heavy() -> None:
    used = run_python(
        "import sys\n"
        "import emutune.fleet, emutune.study, emutune.tuning\n"
        "emutune.fleet.load_fleet, emutune.fleet.Ledger, emutune.tuning.open_inventory, emutune.load_scenario\n"
        "print(*{'jax', 'jaxlib', 'scipy', 'matplotlib', 'torch', 'transformers'} & set(sys.modules))"
    )
    assert used.returncode == 0, used.stderr
    assert used.stdout.split() == []
