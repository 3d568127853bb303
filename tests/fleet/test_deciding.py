"""The policy in its own process: the same decisions, whatever becomes of the process, and the same errors."""

from __future__ import annotations

import asyncio
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from faulty_fleet import alive
from hypothesis import given
from hypothesis import strategies as st
from test_decide import CANDIDATES, PAPER, opened, untrained

from emutune.errors import FleetError
from emutune.fleet.local import COMMAND
from emutune.fleet.server import deciding as module
from emutune.fleet.server.choices import Candidate, Choice, Opening
from emutune.fleet.server.decide import Decider
from emutune.fleet.server.deciding import ChildDecider, Decide, Open, Predict, answer_to, deciding
from emutune.learning.configuration import TrainingConfig
from emutune.policies.registry import baseline_policy
from emutune.scenario import load_scenario

RANDOM = Opening(policy="random", scenario=PAPER, seed=3)


class Inline:
    """Answers in this process, but by the same lines."""

    pid = None

    async def ask(self, question: str, dying: str) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(json.dumps(answer_to(question)))
        if "error" in answer:
            raise FleetError(answer["error"])
        return answer


def inline(opening: Opening = RANDOM) -> ChildDecider:
    return ChildDecider(Inline(), opening, opening.scenario)  # type: ignore[arg-type]


positive = st.floats(1e-30, 1e30)
candidates = st.builds(
    Candidate,
    st.sampled_from(["ue1", "ue2"]),
    st.floats(-1, 1e4),
    positive,
    held=st.tuples(st.integers(0, 32)),
    gain=st.none() | positive,
    transmit_power_w=st.none() | positive,
)


@given(
    st.lists(candidates, min_size=2, max_size=2),
    st.integers(0, 10**6),
    st.lists(positive, min_size=2, max_size=2),
)
def test_lines_carry_every_bit(given_: list[Candidate], step: int, moved: list[float]) -> None:
    async def steps() -> None:
        choices = await inline().decide(step, given_)
        assert choices == HERE.decide(step, given_)
        forecasts = await inline().forecast(step, given_, choices, moved)
        assert repr(forecasts) == repr(HERE.forecast(step, given_, choices, moved))

    asyncio.run(steps())


HERE = opened("random", seed=3)


def test_lines_carry_what_has_no_end() -> None:
    async def steps() -> None:
        endless = [Candidate("ue1", 1.0, math.inf, gain=math.inf), Candidate("ue2", math.nan, 1.0, gain=1e-5)]
        choices = [Choice(True, 25), Choice(False, 25)]
        forecasts = await inline().forecast(0, endless, choices, [math.inf, 1.0])
        assert repr(forecasts) == repr(HERE.forecast(0, endless, choices, [math.inf, 1.0]))
        assert not all(math.isfinite(value) for row in forecasts for value in (row.delay_s, row.perplexity))

    asyncio.run(steps())


def test_decisions_are_the_same_when_programmes_were_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_KEPT_COUNTS", 1)
    opening = Opening(policy="random", scenario=PAPER, seed=4)

    async def steps() -> list[list[Choice]]:
        decider = inline(opening)
        return [await decider.decide(7, CANDIDATES[:count]) for count in (4, 3, 4)]

    first, second, third = asyncio.run(steps())
    assert first == third
    assert len(second) == 3


def test_a_policy_that_changes_under_way_is_refused(tmp_path: Path) -> None:
    untrained(tmp_path / "run", TrainingConfig())
    opening = Opening(policy=str(tmp_path / "run"), scenario=load_scenario("reference"))
    answer = answer_to(Open(opening=opening).model_dump_json())
    assert type(PAPER).model_validate_json(answer["scenario"]) == PAPER
    known = opening.model_copy(update={"content": answer["content"]})
    question = Decide(opening=known, step=0, candidates=tuple(CANDIDATES)).model_dump_json()
    decided = answer_to(question)
    assert len(decided["choices"]) == len(CANDIDATES)
    # As after a kill, when the file is read again.
    module._opened.cache_clear()
    assert answer_to(question) == decided
    shutil.rmtree(tmp_path / "run")
    untrained(tmp_path / "run", TrainingConfig(width=16))
    module._opened.cache_clear()
    assert "was changed" in answer_to(question)["error"]


def test_questions_are_refused_that_are_none() -> None:
    with pytest.raises(ValueError, match="kind"):
        answer_to("{}")
    with pytest.raises(ValueError, match="choices"):
        answer_to(json.dumps({"kind": "predict", "opening": RANDOM.model_dump(), "candidates": []}))
    assert (
        Predict(opening=RANDOM, step=0, during=False, candidates=(), choices=(), bytes_to_move=()).kind
        == "predict"
    )


BAD = {
    "no-such": "choose from",
    "empty": "no checkpoint",
    "flat": "train with --network set",
    "damaged": "damaged",
}


def test_errors_of_a_policy_are_those_of_open_decider(tmp_path: Path) -> None:
    for policy, message in bad_policies(tmp_path).items():
        answer = answer_to(Open(opening=Opening(policy=policy, scenario=PAPER)).model_dump_json())
        with pytest.raises(Exception, match=message) as raised:
            opened(policy)
        assert answer["error"] == str(raised.value)


def bad_policies(folder: Path) -> dict[str, str]:
    (folder / "empty").mkdir()
    untrained(folder / "flat", TrainingConfig(network="flat"))
    (folder / "damaged").mkdir()
    (folder / "damaged" / "checkpoint.safetensors").write_bytes(b"no safetensors")
    return {str(folder / name) if name != "no-such" else name: message for name, message in BAD.items()}


# In a process of its own


@pytest.mark.slow
def test_a_process_decides_as_this_one_whatever_kills_it(tmp_path: Path) -> None:
    untrained(tmp_path / "run", TrainingConfig())
    here = opened(str(tmp_path / "run"), seed=3)
    opening = Opening(policy=str(tmp_path / "run"), scenario=load_scenario("reference"), seed=3)
    moved = [1e6] * len(CANDIDATES)
    choices = here.decide(7, CANDIDATES)

    async def steps() -> int:
        async with deciding(opening) as decider:
            assert decider.scenario == PAPER
            assert await decider.decide(7, CANDIDATES) == choices
            assert await decider.forecast(7, CANDIDATES, choices, moved) == here.forecast(
                7, CANDIDATES, choices, moved
            )
            first = decider.pid
            assert first is not None
            os.kill(first, signal.SIGSTOP)
            asked = asyncio.ensure_future(decider.decide(7, CANDIDATES))
            await asyncio.wait([asked], timeout=0.1)
            assert not asked.done()
            os.kill(first, signal.SIGKILL)
            assert await asked == choices
            last = decider.pid
            assert last not in (None, first)
            return int(last or 0)

    assert not alive(asyncio.run(steps()))


@pytest.mark.slow
@pytest.mark.parametrize("what", ["policy", "scenario", "retention"])
def test_serve_says_what_is_wrong_with_a_policy(tmp_path: Path, what: str) -> None:
    from whole_fleet import catalogue_at, scenario_of

    from emutune.scenario import dump_scenario

    catalogue = catalogue_at(tmp_path)
    scenario = scenario_of(catalogue)
    if what == "scenario":
        scenario = scenario.model_copy(update={"model": scenario.model.model_copy(update={"base": "0" * 64})})
    (tmp_path / "scenario.toml").write_text(dump_scenario(scenario))
    (tmp_path / "fleet.toml").write_text('name = "test"\nscenario = "scenario.toml"\n[server]\nport = 0\n')
    policy, message = {
        "policy": (["no-such"], "policy: no policy 'no-such' that needs no training; choose from random"),
        "scenario": (["fixed"], "was made from the model"),
        "retention": (["fixed", "--retention", "0.01"], "retention: must be between"),
    }[what]
    command = ("serve", "fleet.toml", "--catalogue", catalogue.directory, "--policy", *policy)
    if what == "scenario":
        command = ("serve", tmp_path / "fleet.toml", *command[2:])
    done = subprocess.run(
        [*COMMAND, *map(str, command)], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert done.stderr.startswith("emutune: ")
    assert len(done.stderr.splitlines()) == 1


def test_the_rule_fixed_keeps_its_retention() -> None:
    decider = Decider(PAPER, baseline_policy("fixed", PAPER, 0.5))

    async def steps() -> list[Choice]:
        return await inline(Opening(policy="fixed", scenario=PAPER, retention=0.5)).decide(0, CANDIDATES)

    assert asyncio.run(steps()) == decider.decide(0, CANDIDATES)


IMPORTS = """
import sys
import emutune.cli.main
import emutune.fleet.config, emutune.fleet.loop, emutune.fleet.server.deciding, emutune.fleet.server.run
from emutune.scenario import load_scenario
from emutune.tuning.inventory import open_inventory
print(*sorted({"jax", "jaxlib", "torch", "transformers", "peft", "scipy"} & sys.modules.keys()))
"""


def test_what_a_server_imports_is_neither_jax_nor_torch() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
