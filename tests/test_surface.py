"""What users may rely on: each room exports that and nothing else, and the API reference documents it."""

from __future__ import annotations

import re
from importlib import import_module
from inspect import ismodule
from pathlib import Path
from pkgutil import iter_modules

import pytest

import emutune

API = (Path(__file__).parent.parent / "docs" / "api.md").read_text("utf-8")
ROOMS = [
    "emutune.scenario",
    "emutune.step",
    "emutune.world",
    "emutune.world.environments",
    "emutune.policies",
    "emutune.bounds",
    "emutune.learning",
    "emutune.study",
    "emutune.tuning",
    "emutune.fleet",
]


@pytest.mark.parametrize("name", ["emutune", *ROOMS])
def test_a_room_exports_what_it_has_and_nothing_else(name: str) -> None:
    room = import_module(name)
    exported = {public: getattr(room, public) for public in room.__all__}
    assert list(exported) == sorted(room.__all__)
    # Modules below a room are its attributes once somebody imports them.
    leaking = {public for public, thing in vars(room).items() if public[0] != "_" and not ismodule(thing)}
    assert leaking <= set(exported)


@pytest.mark.parametrize("name", ROOMS)
def test_the_reference_documents_what_a_room_exports(name: str) -> None:
    documented = re.findall(rf"^::: {re.escape(name)}\.(\w+)$", API, re.M)
    assert sorted(documented) == import_module(name).__all__


def test_the_reference_names_what_comes_with_the_package_and_documents_no_more() -> None:
    assert sorted(re.findall(r"`emutune\.(\w+)`", API)) == emutune.__all__
    rooms = {documented.rpartition(".")[0] for documented in re.findall(r"^::: (\S+)", API, re.M)}
    assert rooms == {*ROOMS, "emutune"}  # emutune.errors as a whole


@pytest.mark.parametrize("name", ROOMS)
def test_no_name_is_that_of_a_module_which_would_hide_it(name: str) -> None:
    room = import_module(name)
    shared = {module.name for module in iter_modules(room.__path__)} & set(room.__all__)
    assert all(ismodule(getattr(room, both)) for both in shared)
