"""The command as a user meets it: real processes, exit statuses, one-line errors."""

import json
import subprocess
import sys

import pytest
from commands import assert_refused, emutune

SMALL = ("--set", "fleet.ues=2", "--set", "fleet.tasks=5")
WRONG = {
    ("check", "nowhere.toml"): "no such file",
    (
        "check",
        "paper",
        "--set",
        "radio.uplink_bandwidth_hz=-1",
    ): "radio.uplink_bandwidth_hz: must be positive",
    (
        "evaluate",
        "paper",
        "--policy",
        "fixed",
        "--retention",
        "0.95",
    ): "retention: must be between 0.2 and 0.8",
    ("evaluate", "empty"): "holds no checkpoint",
    ("compare", "paper", "--policies", "best"): "no policy 'best'",
    ("compare", "paper", "--policies", "random,nowhere.py:Mine"): "nowhere.py: no such file",
    ("train", "paper", "--algorithm", "dqn", "--out", "run"): "--algorithm",
    ("train", "paper", "--settings", "random", "--out", "run"): "--settings: 'random' is no policy that",
    ("train", "paper", "--teacher", "hold", "--out", "run"): "--teacher",
    ("train", "paper", "--steps", "500", "--out", "/dev/null/run"): "/dev/null/run/seed-000: cannot be",
    ("reproduce", "--quick", "--out", "/dev/null/run"): "cannot be",
    ("check", "paper", "--json", "/dev/null/figures"): "--json /dev/null/figures: cannot be written",
}


def process(cwd, program, *arguments):
    return subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, cwd=cwd, check=False
    )


def test_help_does_not_import_jax(tmp_path):
    shown = process(tmp_path, "import sys; import emutune.cli.main; print('jax' in sys.modules)")
    assert shown.stdout.strip() == "False"


def test_a_process_ends_with_the_status_of_its_command(tmp_path):
    ended = process(tmp_path, "from emutune.cli.main import run; run()", "check", "nowhere.toml")
    assert ended.returncode == 2
    assert ended.stderr.count("\n") == 1


@pytest.fixture(scope="module")
def wrong(tmp_path_factory):
    """How each command of ``WRONG`` ended."""
    return dict(zip(WRONG, emutune(tmp_path_factory.mktemp("wrong"), *WRONG), strict=True))


@pytest.mark.parametrize("command", WRONG, ids=" ".join)
def test_bad_input_is_one_line_and_status_two(wrong, command):
    assert_refused(wrong[command], WRONG[command])


def test_compare_writes_its_documented_keys(tmp_path):
    compare = ("compare", "paper", *SMALL, "--policies", "random,fixed,hmppo", "--seeds", "2")
    (ended,) = emutune(tmp_path, (*compare, "--steps", "500", "--episodes", "4", "--json", "figures.json"))
    assert ended.status == 0, ended.err
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert set(figures["policies"]) == {"random", "fixed", "hmppo"}
    assert figures["bound"]["episodes"] == 4
    for row in figures["policies"].values():
        assert row["worst_seed_cost_over_bound_percent"] >= row["cost_over_bound_percent"] > 0
        assert row["return_ci"][0] <= row["return_mean"] <= row["return_ci"][1]
        assert {"delay_ratio_to_random", "perplexity_mean", "changes_per_ue", "decision_ms"} <= set(row)
    assert figures["policies"]["random"]["delay_ratio_to_random"] == 1
    (evaluated,) = emutune(tmp_path, ("evaluate", figures["policies"]["hmppo"]["run"], "--episodes", "4"))
    assert evaluated.status == 0, evaluated.err
    assert evaluated.out.count("episode_return") == 2
