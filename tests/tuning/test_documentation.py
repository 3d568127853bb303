"""The text of Python's own documentation, and what is kept from the reference model."""

from __future__ import annotations

import hashlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

from emutune.errors import DataError
from emutune.tuning import documentation
from emutune.tuning.documentation import REFERENCE, REFERENCE_CODE, TASKS, reference_text, task_text


@pytest.fixture(scope="module")
def reference() -> str:
    return reference_text()


@pytest.fixture(scope="module")
def tasks() -> dict[str, str]:
    return {task: task_text(task) for task in TASKS}


def test_sizes_are_plausible(reference, tasks):
    assert 1_000_000 < len(reference) < 5_000_000
    assert all(30_000 < len(text) < 300_000 for text in tasks.values())


def test_texts_are_deterministic(reference, tasks):
    program = (
        "import hashlib; from emutune.tuning.documentation import reference_text, task_text;"
        "print(hashlib.sha256((reference_text() + task_text('xml')).encode()).hexdigest())"
    )
    elsewhere = subprocess.run(
        [sys.executable, "-c", program],
        env={"PYTHONHASHSEED": "1"},
        check=True,
        capture_output=True,
        text=True,
    )
    assert elsewhere.stdout.strip() == hashlib.sha256((reference + tasks["xml"]).encode()).hexdigest()
    assert task_text("http") == tasks["http"]


@pytest.mark.parametrize(
    ("task", "name"),
    [
        ("asyncio", "asyncio.events.AbstractEventLoop"),
        ("email", "email.message.Message"),
        ("http", "http.cookiejar.Cookie"),
        ("unittest", "unittest.case.TestCase"),
        ("xml", "xml.etree.ElementTree.Element"),
    ],
)
def test_a_task_holds_its_packages_docstrings(tasks, reference, task, name):
    module, _, cls = name.rpartition(".")
    methods = vars(getattr(__import__(module, fromlist=[cls]), cls)).values()
    docstrings = [inspect.getdoc(m) for m in methods if inspect.isfunction(m) and m.__doc__]
    long = [text for text in docstrings if len(text) > 100] or docstrings
    for docstring in long:
        assert docstring in tasks[task] or name == "xml.etree.ElementTree.Element"
        assert docstring not in reference


def test_tasks_are_kept_from_the_reference(reference, tasks):
    root = documentation._library()
    for task in TASKS:
        docstrings = list(documentation._texts(root / task, REFERENCE))
        assert len(docstrings) > 50
        long = {text for text in docstrings if len(text) > 150}
        assert not [text for text in long if text in reference]
        others = [text for other, text in tasks.items() if other != task]
        assert sum(text in other for other in others for text in long) == 0


def test_the_reference_has_the_language_and_the_library(reference):
    import argparse
    import collections

    assert inspect.getdoc(argparse.ArgumentParser) in reference
    assert inspect.getdoc(collections.OrderedDict.move_to_end) in reference
    assert 'The "try" statement' in reference


def test_tests_and_installed_packages_stay_out(tmp_path, monkeypatch):
    def write(name: str, docstring: str) -> None:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'"""{docstring}"""\n\ndef f():\n    """Inner of {docstring}"""\n', "utf-8")

    for name in (
        "wanted.py",
        "package/wanted_too.py",
        "package/test/unwanted.py",
        "package/deep/tests/unwanted.py",
        "test/unwanted.py",
        "site-packages/numpy/unwanted.py",
        "idlelib/unwanted.py",
        "config-3.11-x86_64-linux-gnu/unwanted.py",
        "package/unwanted.txt",
        *(f"{task}/unwanted.py" for task in TASKS),
    ):
        write(name, Path(name).stem)
    monkeypatch.setattr(documentation, "_library", lambda: tmp_path)
    text = reference_text()
    assert text.endswith("wanted_too\n\nInner of wanted_too\n\nwanted\n\nInner of wanted")
    assert "unwanted" not in text
    # Where the task's own package has tests, they are no part of the task.
    write("xml/tests/other.py", "other")
    assert task_text("xml") == "unwanted\n\nInner of unwanted"


def test_the_model_of_code_reads_the_librarys_sources_and_none_of_its_tasks():
    text = reference_text(REFERENCE_CODE)
    assert "class OrderedDict(dict):" in text
    for task in TASKS:
        source = task_text(task, REFERENCE_CODE)
        long = [part for part in source.split("\n\n") if len(part) > 600]
        assert len(long) > 5
        assert not [part for part in long if part in text]


def test_the_root_may_lie_under_a_directory_named_tests(tmp_path, monkeypatch):
    root = tmp_path / "tests" / "site-packages"
    (root / "http").mkdir(parents=True)
    (root / "http" / "a.py").write_text('"""Found."""', "utf-8")
    monkeypatch.setattr(documentation, "_library", lambda: root)
    assert task_text("http") == "Found."


def test_an_unknown_task_is_refused():
    with pytest.raises(DataError, match=r"task 'json': there is none .* asyncio, email, http, unittest, xml"):
        task_text("json")


def test_an_installation_without_sources_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(documentation, "_library", lambda: tmp_path)
    with pytest.raises(DataError, match="task 'xml': this Python has no sources"):
        task_text("xml")
