"""The policy in a process of its own, so that the server's process needs no JAX.

``python -m emutune.fleet.server.deciding`` reads questions from standard input, one a line, and writes an answer for
each. A decision depends on the policy's file, the seed, the step and the candidates, and not on the process that
makes it, nor on what that decided before.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from emutune.errors import FleetError
from emutune.fleet.server.child import ATTEMPTS, Child, answer_lines, errors_as_answers
from emutune.fleet.server.choices import Candidate, Choice, Deciding, Forecast, Opening
from emutune.scenario import Scenario

if TYPE_CHECKING:
    from emutune.fleet.server.decide import Decider

# Of devices. Each costs 20 MB for as long as its programmes are kept.
_KEPT_COUNTS = 4
_DIED = f"--policy: the process that decides died {ATTEMPTS} times; look above for why, or for lack of memory"


class _Message(BaseModel):
    # Forecasts may be infinite, which JSON has no word for.
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants")


class Open(_Message):
    """Which scenario does the policy know, and which file is it?"""

    kind: Literal["open"] = "open"
    opening: Opening


class Decide(_Message):
    """See ``Deciding.decide``."""

    kind: Literal["decide"] = "decide"
    opening: Opening
    step: int
    candidates: tuple[Candidate, ...]


class Predict(_Message):
    """See ``Deciding.forecast``."""

    kind: Literal["predict"] = "predict"
    opening: Opening
    step: int
    during: bool
    candidates: tuple[Candidate, ...]
    choices: tuple[Choice, ...]
    bytes_to_move: tuple[float, ...]


Question = Annotated[Open | Decide | Predict, Field(discriminator="kind")]
_QUESTION: TypeAdapter[Open | Decide | Predict] = TypeAdapter(Question)


# In the server


class ChildDecider:
    """A ``Deciding`` that asks a process; see ``deciding``."""

    def __init__(self, child: Child, opening: Opening, scenario: Scenario) -> None:
        self._child, self._opening, self.scenario = child, opening, scenario

    @property
    def pid(self) -> int | None:
        """Identifier of the process that decides, if it runs."""
        return self._child.pid

    async def decide(self, step: int, candidates: Sequence[Candidate]) -> list[Choice]:
        """See ``Deciding.decide``."""
        question = Decide(opening=self._opening, step=step, candidates=tuple(candidates))
        rows = (await _asked(self._child, question))["choices"]
        return [Choice(row["at_server"], row["layers"], tuple(row["keep"])) for row in rows]

    async def forecast(
        self,
        step: int,
        candidates: Sequence[Candidate],
        choices: Sequence[Choice],
        bytes_to_move: Sequence[float],
        during: bool = False,
    ) -> list[Forecast]:
        """See ``Deciding.forecast``."""
        question = Predict(
            opening=self._opening,
            step=step,
            during=during,
            candidates=tuple(candidates),
            choices=tuple(choices),
            bytes_to_move=tuple(bytes_to_move),
        )
        return [Forecast(**row) for row in (await _asked(self._child, question))["forecasts"]]


@asynccontextmanager
async def deciding(opening: Opening) -> AsyncIterator[ChildDecider]:
    """A policy in a process that ends with the block, and is started again if it dies before.

    Raises:
        FleetError: the policy is unknown, damaged, or not one for a fleet.
    """
    child = Child("emutune.fleet.server.deciding", quiet=False)
    try:
        answer = await _asked(child, Open(opening=opening))
        known = Scenario.model_validate_json(answer["scenario"])
        yield ChildDecider(child, opening.model_copy(update={"content": answer["content"]}), known)
    finally:
        await child.stop()


async def warm_up(decider: Deciding, ues: int) -> None:
    """Compile for so many devices, which takes longer than a step should wait."""
    candidates = [Candidate(f"device {number}", 1.0, 1.0) for number in range(ues)]
    await decider.forecast(0, candidates, await decider.decide(0, candidates), [1.0] * ues)


async def _asked(child: Child, question: Open | Decide | Predict) -> dict[str, Any]:
    return await child.ask(question.model_dump_json(), _DIED)


# In the process that decides


def answer_to(line: str) -> dict[str, Any]:
    """Answer a question given as JSON; see ``errors_as_answers`` for what goes wrong."""
    return errors_as_answers(lambda: _answer(_QUESTION.validate_json(line)))


def _answer(question: Open | Decide | Predict) -> dict[str, Any]:
    opening = question.opening
    opened = _opened(opening.model_copy(update={"content": None}).model_dump_json())
    if opening.content not in (None, opened.content):
        raise FleetError(
            f"--policy {opening.policy}: was changed while it decided; start emutune serve again"
        )
    if question.kind == "open":
        return {"scenario": opened.decider.scenario.model_dump_json(), "content": opened.content}
    decider = opened.decider_of(len(question.candidates))
    if question.kind == "decide":
        return {"choices": [asdict(row) for row in decider.decide(question.step, question.candidates)]}
    rows = decider.forecast(
        question.step, question.candidates, question.choices, question.bytes_to_move, question.during
    )
    return {"forecasts": [asdict(row) for row in rows]}


@dataclass
class _Opened:
    """A policy, the SHA-256 of its file, and for which numbers of devices programmes are kept."""

    decider: Decider
    content: str
    counts: set[int] = field(default_factory=set)

    def decider_of(self, count: int) -> Decider:
        """The policy for so many devices; makes room for their programmes if need be."""
        if count not in self.counts and len(self.counts) == _KEPT_COUNTS:
            import jax

            jax.clear_caches()
            self.counts.clear()
        self.counts.add(count)
        return self.decider


@lru_cache(maxsize=1)
def _opened(opening: str) -> _Opened:
    # Here, since the server imports this module too, and this process must first see whether there is a server.
    from emutune.fleet.server.decide import checkpoint_of, open_decider

    asked = Opening.model_validate_json(opening)
    checkpoint = checkpoint_of(asked.policy)
    content = "" if checkpoint is None else hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    return _Opened(open_decider(asked), content)


def main() -> None:
    """Decide until the server ends."""
    answer_lines(answer_to)


if __name__ == "__main__":
    main()
