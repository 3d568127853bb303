"""A file is replaced whole or not at all."""

import pytest

from emutune.files import replacing


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
