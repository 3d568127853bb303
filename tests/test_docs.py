"""The documentation's code runs, its links exist, and the functions it names are there."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from emutune.learning.configuration import TrainingConfig
from emutune.learning.training import train_seeds
from emutune.scenario import load_scenario, shipped_scenarios

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]


def resolve(name):
    """The object behind a dotted name."""
    parts = name.split(".")
    for split in range(len(parts), 0, -1):
        try:
            thing = importlib.import_module(".".join(parts[:split]))
        except ModuleNotFoundError:
            continue
        for part in parts[split:]:
            thing = getattr(thing, part)
        return thing
    raise ModuleNotFoundError(name)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text("utf-8")):
        assert (page.parent / target).exists(), target


def test_every_shipped_scenario_has_a_page_whose_commands_name_fields_that_exist():
    for name in shipped_scenarios():
        page = (ROOT / "docs" / "scenarios" / f"{name}.md").read_text("utf-8")
        commands = [shlex.split(line) for line in re.findall(r"^    emutune check (.*)$", page, re.M)]
        assert len(commands) == 2
        for source, *rest in commands:
            assert source == name
            load_scenario(source, [change for change in rest if change != "--set"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_objects_exist(page):
    text = page.read_text("utf-8")
    for name in {*re.findall(r"`(emutune(?:\.\w+)+)", text), *re.findall(r"^::: (\S+)", text, re.M)}:
        resolve(name)


def test_code_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = TrainingConfig(steps=500, evaluation_episodes=1)
    train_seeds(load_scenario("paper"), config, [0], Path("runs/first"))
    blocks = []
    for page in PAGES:
        blocks += re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.S)
    assert len(blocks) >= 3
    names = {}
    for block in blocks:
        exec(block, names)
