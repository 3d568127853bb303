"""The commands under ``emutune trace``, as a user runs them."""

import json

from test_cli import emutune

from emutune.scenario.trace import read_trace


def test_a_trace_goes_in_and_out_and_into_a_scenario(tmp_path):
    made = emutune(
        "trace", "synthesize", "--out", "drive.csv", "--seconds", "120", "--seed", "4", cwd=tmp_path
    )
    assert made.returncode == 0, made.stderr
    assert "120 intervals of 1 s" in made.stdout
    out = emutune("trace", "export", "drive.csv", "--mahimahi", cwd=tmp_path)
    assert out.returncode == 0, out.stderr
    back = emutune(
        "trace",
        "import",
        "mahimahi",
        "drive.down",
        "--out",
        "back.csv",
        "--json",
        "figures.json",
        cwd=tmp_path,
    )
    assert back.returncode == 0, back.stderr
    assert "kept" in back.stdout
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["intervals"] == 120
    assert figures["kept"] == figures["rows"]
    before, after = read_trace(tmp_path / "drive.csv"), read_trace(tmp_path / "back.csv")
    for mine, theirs in zip(before[1:], after[1:], strict=True):
        assert max(abs(one - other) for one, other in zip(mine, theirs, strict=True)) < 0.03
    checked = emutune(
        *("check", "paper", "--set", "trace.file=back.csv", "--set", "trace.interval_s=10"),
        *(
            "--set",
            "fleet.tasks=5",
            "--set",
            "radio.uplink_bandwidth_hz=2e7",
            "--set",
            "radio.downlink_bandwidth_hz=2e7",
        ),
        cwd=tmp_path,
    )
    assert checked.returncode == 0, checked.stderr
    assert "links in the first held-out episode" in checked.stdout


def test_bad_input_is_one_line_and_status_two(tmp_path):
    (tmp_path / "t.csv").write_text("a,b\n1,2\n")
    for arguments, message in (
        (["import", "csv", "t.csv", "--out", "o.csv"], "t.csv: has no column time_s"),
        (["import", "pcap", "t.csv", "--out", "o.csv"], "no form 'pcap'"),
        (["export", "t.csv"], "name the form to write: --mahimahi"),
        (["export", "t.csv", "--mahimahi"], "its first line must be time_s,downlink_mbps,uplink_mbps"),
        (["synthesize", "--out", "/dev/null/x", "--seconds", "9"], "cannot be written"),
    ):
        ended = emutune("trace", *arguments, cwd=tmp_path)
        assert ended.returncode == 2
        assert message in ended.stderr
        assert ended.stderr.count("\n") == 1
    assert not (tmp_path / "o.csv").exists()
