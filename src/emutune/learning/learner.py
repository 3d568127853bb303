"""What every way to learn has in common, and which of them a configuration asks for."""

from __future__ import annotations

from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

from emutune.errors import UsageError
from emutune.learning.configuration import Settings
from emutune.policies import Policy
from emutune.scenario import Scenario

State = TypeVar("State")
Record = dict[str, Any]


@runtime_checkable
class Learner(Protocol[State]):
    """Learning from nothing to the end, in advances after each of which it can be stopped and taken up again.

    States are pytrees, which checkpoints hold; a state and the scenario, the configuration and the seed that a learner
    was made of determine all that follows.

    Attributes:
        settings: the class of its settings, which all have defaults.
        programs: what is compiled anew for every scenario and configuration.
        length: updates or rounds of the whole learning; each leaves a record.
        steps_each: environment steps of one.
    """

    settings: ClassVar[type[Settings]]
    programs: ClassVar[tuple[Any, ...]]
    length: int
    steps_each: int

    def __init__(self, scenario: Scenario, config: Any, seed: int) -> None: ...

    def template(self) -> State:
        """A state of the right shapes, to read a checkpoint into."""
        ...

    def start(self, teacher: Policy | None) -> State:
        """The state before the first update.

        Raises:
            UsageError: the configuration needs a teacher, and there is none or another kind.
        """
        ...

    def done(self, state: State) -> int:
        """How many of ``length`` are over."""
        ...

    def advance(self, state: State) -> tuple[State, list[Record]]:
        """The state some updates later, and a record of each: lines of ``metrics.jsonl``."""
        ...

    def policy(self, state: State) -> Policy:
        """What has been learned so far, on JAX's default device."""
        ...


def wanted_teacher(config: Settings, teacher: Policy | None) -> Policy:
    """The teacher that a configuration names.

    Raises:
        UsageError: there is none.
    """
    if teacher is None:
        raise UsageError(
            f"teacher: the configuration names {config.teacher}; pass that policy, or use 'none'"
        )
    return teacher
