"""The commands under ``emutune trace``, as a user runs them."""

import json

from commands import assert_refused, emutune

from emutune.scenario.trace import read_trace

WORLD = (
    *("--set", "trace.file=back.csv", "--set", "trace.interval_s=10", "--set", "fleet.tasks=5"),
    *("--set", "radio.uplink_bandwidth_hz=2e7", "--set", "radio.downlink_bandwidth_hz=2e7"),
)


def test_a_trace_goes_in_and_out_and_into_a_scenario(tmp_path):
    every = emutune(
        tmp_path,
        ("trace", "synthesize", "--out", "drive.csv", "--seconds", "120", "--seed", "4"),
        ("trace", "export", "drive.csv", "--mahimahi"),
        ("trace", "import", "mahimahi", "drive.down", "--out", "back.csv", "--json", "figures.json"),
        ("check", "paper", *WORLD),
    )
    for ended in every:
        assert ended.status == 0, ended.err
    made, _, back, checked = every
    assert "120 intervals of 1 s" in made.out
    assert "kept" in back.out
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["intervals"] == 120
    assert figures["kept"] == figures["rows"]
    before, after = read_trace(tmp_path / "drive.csv"), read_trace(tmp_path / "back.csv")
    for mine, theirs in zip(before[1:], after[1:], strict=True):
        assert max(abs(one - other) for one, other in zip(mine, theirs, strict=True)) < 0.03
    assert "links in the first held-out episode" in checked.out


def test_bad_input_is_one_line_and_status_two(tmp_path):
    (tmp_path / "t.csv").write_text("a,b\n1,2\n")
    wrong = {
        ("import", "csv", "t.csv", "--out", "o.csv"): "t.csv: has no column time_s",
        ("import", "pcap", "t.csv", "--out", "o.csv"): "no form 'pcap'",
        ("export", "t.csv"): "name the form to write: --mahimahi",
        ("export", "t.csv", "--mahimahi"): "its first line must be time_s,downlink_mbps,uplink_mbps",
        ("synthesize", "--out", "/dev/null/x", "--seconds", "9"): "cannot be written",
    }
    every = emutune(tmp_path, *(("trace", *command) for command in wrong))
    for ended, message in zip(every, wrong.values(), strict=True):
        assert_refused(ended, message)
    assert not (tmp_path / "o.csv").exists()
