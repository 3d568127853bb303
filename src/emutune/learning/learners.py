"""What can learn, by the name of its algorithm: a line each, and learners of one's own."""

from __future__ import annotations

import json
from typing import Any

from emutune.errors import UsageError
from emutune.learning.configuration import Settings
from emutune.learning.guided import GuidedLearner
from emutune.learning.learner import Learner
from emutune.learning.ppo import PolicyLearner
from emutune.plugins import entry_names, load_entry

LEARNERS: dict[str, type[Learner[Any]]] = {
    "hmppo": PolicyLearner,
    "ippo": PolicyLearner,
    "guided": GuidedLearner,
}
_REGISTERED: dict[str, type[Learner[Any]]] = {}
_MEMBERS = ("settings", "programs", "template", "start", "done", "advance", "policy")


def register_learner(name: str, learner: type[Any]) -> None:
    """Make a learner selectable by name in this process, or put another in the place of an earlier one.

    Args:
        name: of the algorithm; its ``settings``, made without arguments, have it as ``algorithm``.
        learner: a class; see ``Learner``.

    Raises:
        UsageError: the name is that of a shipped learner, or the class is none.
    """
    if name in LEARNERS:
        raise UsageError(f"learner {name!r}: there is a shipped one of that name; choose another")
    _REGISTERED[name] = _checked(name, learner)


def learner_names() -> list[str]:
    """Names of the learners of one's own: those registered, and those of installed packages."""
    return list(dict.fromkeys([*_REGISTERED, *entry_names("emutune.learners")]))


def find_learner(name: str) -> type[Any]:
    """The learner of an algorithm.

    Raises:
        UsageError: there is none of that name, or a package's cannot be imported or is none.
    """
    known = LEARNERS | _REGISTERED
    if name in known:
        return known[name]
    if name not in entry_names("emutune.learners"):
        raise UsageError(
            f"learner: no learner {name!r}; choose from {', '.join([*LEARNERS, *learner_names()])}, register it "
            "with emutune.register_learner, or install the package that has it"
        )
    return _checked(name, load_entry("emutune.learners", name))


def read_settings(text: str) -> Settings:
    """Settings as they were written as JSON.

    Raises:
        UsageError: their learner is not known.
        ValueError: they are no settings of it.
    """
    told = json.loads(text)
    if not isinstance(told, dict):
        raise ValueError("settings: must be a table")
    return find_learner(str(told.get("algorithm"))).settings.model_validate_json(text)


def _checked(name: str, learner: Any) -> type[Any]:
    missing = [member for member in _MEMBERS if not hasattr(learner, member)]
    if missing or not issubclass(learner.settings, Settings):
        lacking = ", ".join(missing) or "settings of the class emutune.learning.Settings"
        raise UsageError(f"learner {name!r}: {learner!r} has no {lacking}; see emutune.learning.Learner")
    try:
        called = learner.settings().algorithm
    except ValueError as error:
        raise UsageError(f"learner {name!r}: its settings need a default for every field") from error
    if called != name:
        raise UsageError(f"learner {name!r}: its settings have algorithm {called!r}; give both one name")
    kind: type[Any] = learner
    return kind
