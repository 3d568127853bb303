"""Processes that answer lines: whatever kills them, a question gets its own answer, or an error that says why."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from faulty_fleet import alive

from emutune.errors import FleetError
from emutune.fleet.disk import is_full
from emutune.fleet.server.child import ATTEMPTS, Child

DYING = "it died"


@pytest.fixture(autouse=True)
def found_by_children(monkeypatch: pytest.MonkeyPatch) -> None:
    before = os.environ.get("PYTHONPATH")
    paths = [str(Path(__file__).parent), *([before] if before else [])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))


def question(do: str = "say", what: Any = None) -> str:
    return json.dumps({"do": do, "what": what})


def with_child(steps: Callable[[Child], Awaitable[None]]) -> None:
    async def main() -> None:
        child = Child("answering", quiet=True)
        try:
            await asyncio.wait_for(steps(child), 60)
        finally:
            await child.stop()
        assert child.pid is None

    # Not in the loop of servers, which forks: JAX, which other tests have imported here, warns of that.
    asyncio.run(main())


def test_one_process_answers_all_questions() -> None:
    async def steps(child: Child) -> None:
        assert child.pid is None
        answers = [await child.ask(question(what=what), DYING) for what in (1, "zwei\n", ["drei"] * 200_000)]
        assert [answer["said"] for answer in answers] == [1, "zwei\n", ["drei"] * 200_000]
        assert {answer["by"] for answer in answers} == {child.pid}

    with_child(steps)


def test_errors_are_answers_and_the_process_lives_on() -> None:
    async def steps(child: Child) -> None:
        with pytest.raises(FleetError, match="choose another") as failed:
            await child.ask(question("fail"), DYING)
        assert not is_full(failed.value)
        with pytest.raises(FleetError, match="No space") as filled:
            await child.ask(question("fill"), DYING)
        assert is_full(filled.value)
        process = child.pid
        assert (await child.ask(question(), DYING))["by"] == process

    with_child(steps)


@pytest.mark.parametrize(
    ("do", "said"),
    [
        ("recurse", "RecursionError: maximum recursion depth"),
        ("leave", "SystemExit: no more"),
        ("assert", "AssertionError: never so"),
        ("look up", "KeyError: 'weight'"),
        ("allocate", "MemoryError"),
    ],
)
def test_whatever_is_raised_is_the_answer_to_its_question_alone(do: str, said: str) -> None:
    async def steps(child: Child) -> None:
        first = (await child.ask(question(), DYING))["by"]
        with pytest.raises(FleetError, match=said):
            await child.ask(question(do), DYING)
        # Who knows what the error left behind.
        assert not alive(first)
        assert (await child.ask(question(what=1), DYING))["said"] == 1

    with_child(steps)


def test_what_a_library_prints_is_no_answer() -> None:
    async def steps(child: Child) -> None:
        first = (await child.ask(question(), DYING))["by"]
        assert await child.ask(question("print", what=1), DYING) == {"said": 1, "by": first}
        with pytest.raises(FleetError, match=DYING):
            await child.ask(question("answer otherwise"), DYING)

    with_child(steps)


KILLED = """
import asyncio, os, signal, sys
from emutune.fleet.loop import run
from emutune.fleet.server.child import Child

async def main():
    child = Child("answering", quiet=True)
    await child.ask('{"do": "say", "what": 1}', "it died")
    # As it is when the pipe was heard to be closed, but not yet that the process has ended.
    child._process.stdin.transport.close()
    for number in range(8):
        answer = await child.ask('{"do": "say", "what": %d}' % number, "it died")
        assert answer["said"] == number
        os.kill(answer["by"], signal.SIGKILL)
        # How far its death has been heard of by then is a matter of chance.
        await asyncio.sleep(0.0002 * (number % 5))
    await child.stop()
    print("done")

(run if sys.argv[1] == "uvloop" else asyncio.run)(main())
"""


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_a_process_that_was_killed_between_questions_is_replaced(loop: str) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, loop], capture_output=True, text=True, check=False)
    assert done.stdout == "done\n", done.stderr


@pytest.mark.parametrize("words", [1, 200_000], ids=["short", "longer than a pipe"])
def test_a_question_over_which_its_process_is_killed_is_asked_again(words: int) -> None:
    async def steps(child: Child) -> None:
        first = (await child.ask(question(), DYING))["by"]
        os.kill(first, signal.SIGSTOP)
        asked = asyncio.ensure_future(child.ask(question(what=["a"] * words), DYING))
        done, _ = await asyncio.wait([asked], timeout=0.1)
        assert not done
        os.kill(first, signal.SIGKILL)
        answer = await asked
        assert answer["said"] == ["a"] * words
        assert answer["by"] != first

    with_child(steps)


@pytest.mark.parametrize("how", ["die", "die in the middle of an answer"])
def test_a_question_that_kills_is_given_up_at_last(how: str) -> None:
    asked = 0
    once = Child._ask_once

    async def counted(child: Child, text: str) -> dict[str, Any] | None:
        nonlocal asked
        asked += 1
        return await once(child, text)

    async def steps(child: Child) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Child, "_ask_once", counted)
            with pytest.raises(FleetError, match=DYING):
                await child.ask(question(how), DYING)
        assert asked == ATTEMPTS
        assert (await child.ask(question(what=1), DYING))["said"] == 1

    with_child(steps)


def test_the_answer_to_a_question_that_was_given_up_is_nobody_elses() -> None:
    async def steps(child: Child) -> None:
        first = (await child.ask(question(), DYING))["by"]
        os.kill(first, signal.SIGSTOP)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(child.ask(question(what="first"), DYING), 0.1)
        assert not alive(first)
        assert (await child.ask(question(what="second"), DYING))["said"] == "second"

    with_child(steps)


def test_an_interrupt_is_left_to_the_server() -> None:
    async def steps(child: Child) -> None:
        process = (await child.ask(question(), DYING))["by"]
        os.kill(process, signal.SIGINT)
        assert (await child.ask(question(), DYING))["by"] == process

    with_child(steps)


SERVER = """
import asyncio
from emutune.fleet.server.child import Child

async def main():
    child = Child("answering", quiet=True)
    print((await child.ask('{"do": "say", "what": 1}', ""))["by"], flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


def test_a_process_does_not_outlive_its_server() -> None:
    with subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        child = int(server.stdout.readline())
        # Deaf to the end of its input, as it would be in the middle of an answer.
        assert alive(child)
        server.kill()
        server.wait()
    until = time.monotonic() + 10
    while alive(child):
        assert time.monotonic() < until
        time.sleep(0.02)
