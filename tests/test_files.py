"""A file is replaced whole or not at all."""

import pytest

from emutune.errors import UsageError
from emutune.files import check_writable, make_writable, replacing


def test_a_file_is_replaced_when_all_is_written(tmp_path):
    path = tmp_path / "figures.json"
    path.write_text("old")
    with replacing(path) as aside:
        aside.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("interruption", [OSError, KeyboardInterrupt])
def test_an_interrupted_writing_leaves_the_old_file_alone(tmp_path, interruption):
    path = tmp_path / "figures.json"
    path.write_text("old")

    def write_half():
        with replacing(path) as aside:
            aside.write_text("half")
            raise interruption

    with pytest.raises(interruption):
        write_half()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_could_not_be_written_is_told_before_the_work(tmp_path):
    make_writable("--out", tmp_path / "runs" / "first")
    check_writable("--json", tmp_path / "runs" / "figures.json")
    check_writable("--json", None)
    assert list(tmp_path.rglob("*")) == [tmp_path / "runs", tmp_path / "runs" / "first"]
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"--out .*file.inside: cannot be written: Not a directory; choose"):
        make_writable("--out", tmp_path / "file" / "inside")
    with pytest.raises(UsageError, match=r"--json .*runs: is a directory; name a file in it"):
        check_writable("--json", tmp_path / "runs")
    with pytest.raises(UsageError, match=r"there is no directory .*missing; make it first"):
        check_writable("--json", tmp_path / "missing" / "figures.json")
    with pytest.raises(UsageError, match="cannot be written: Not a directory"):
        check_writable("--json", tmp_path / "file" / "figures.json")
