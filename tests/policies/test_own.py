"""Policies of one's own: from files, modules and packages, beside the same ones of emutune's, and their errors."""

import sys
import textwrap

import jax.numpy as jnp
import numpy as np
import pytest

from emutune.errors import UsageError
from emutune.policies import baseline_policy, policy_of, register_policy
from emutune.policies.registry import policy_names
from emutune.scenario import load_scenario
from emutune.step import Plan
from emutune.study.evaluate import decision_time_ms, evaluate_policy, held_out_episodes

GREEDY = """
import numpy as np

class Largest:
    def decide(self, situation):
        here = np.zeros(len(situation.complexity), bool)
        return here, np.where(situation.usable_layers > 0, situation.usable_layers, situation.most_layers)
"""


@pytest.fixture(scope="module")
def small():
    return load_scenario("paper", ["fleet.ues=3", "fleet.tasks=4"])


@pytest.fixture(scope="module")
def drawn(small):
    return held_out_episodes(small, 5)


def assert_alike(one, other):
    """Equal but for rounding, which differs between programs."""
    np.testing.assert_allclose(one, other, rtol=1e-6)


def returns(scenario, policy, episodes):
    return evaluate_policy(scenario, policy, episodes).episode_return


def test_one_from_a_file_decides_as_the_same_one_of_jax(tmp_path, small, drawn):
    file = tmp_path / "greedy.py"
    file.write_text(GREEDY)
    policy = baseline_policy(f"{file}:Largest", small)
    assert_alike(returns(small, policy, drawn), returns(small, baseline_policy("fixed", small), drawn))
    assert decision_time_ms(small, policy, 3) > 0
    # A changed file is read anew.
    file.write_text(GREEDY.replace("most_layers)", "fewest_layers)").replace("Largest", "Smallest"))
    other = returns(small, baseline_policy(f"{file}:Smallest", small), drawn)
    assert_alike(other, returns(small, baseline_policy("fixed", small, 0.2), drawn))


def test_one_is_found_in_a_module_of_the_working_directory(tmp_path, monkeypatch, small, drawn):
    (tmp_path / "greedy_of_mine.py").write_text(GREEDY)
    monkeypatch.chdir(tmp_path)
    policy = baseline_policy("greedy_of_mine:Largest", small)
    assert returns(small, policy, drawn).shape == (5,)
    assert str(tmp_path) not in sys.path


def test_one_of_an_installed_package_has_a_name_and_its_scenario(tmp_path, monkeypatch, small, drawn):
    package, metadata = tmp_path / "somebodys", tmp_path / "somebodys-1.0.dist-info"
    package.mkdir()
    metadata.mkdir()
    (package / "__init__.py").write_text(
        "class Policy:\n"
        "    def __init__(self, scenario):\n        self.layers = scenario.model.layers\n"
        "    def decide(self, situation):\n"
        "        return ~situation.private, situation.most_layers * 0 + self.layers\n"
    )
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: somebodys\nVersion: 1.0\n")
    offers = "theirs = somebodys:Policy\nbroken = somebodys.nowhere:Policy\n"
    (metadata / "entry_points.txt").write_text(f"[emutune.policies]\n{offers}")
    monkeypatch.syspath_prepend(tmp_path)
    assert {"theirs", "broken"} <= set(policy_names())
    assert_alike(
        returns(small, baseline_policy("theirs", small), drawn),
        returns(small, baseline_policy("all_server", small), drawn),
    )
    with pytest.raises(
        UsageError, match=r"'broken' \(somebodys.nowhere:Policy\): cannot be imported: Module"
    ):
        baseline_policy("broken", small)


def test_a_registered_one_may_be_of_jax_and_may_be_replaced(small, drawn):
    register_policy("mine", lambda world, situation, key: Plan(~situation.private, jnp.zeros(3, jnp.int32)))
    everywhere = returns(small, baseline_policy("mine", small), drawn)
    assert_alike(everywhere, returns(small, baseline_policy("all_server", small), drawn))
    register_policy("mine", lambda situation: (situation.private, situation.most_layers))
    assert (returns(small, baseline_policy("mine", small), drawn) != everywhere).all()
    for name in ("hold", "", "a,b", "a:b"):
        with pytest.raises(UsageError, match="cannot be registered so"):
            register_policy(name, lambda situation: None)


def test_what_choices_take_is_what_the_step_charges():
    """One UE has the links to itself, so that a step takes what the situation says of its choice."""
    scenario = load_scenario("edge-compute", ["fleet.ues=1", "fleet.tasks=1"])
    drawn, told = held_out_episodes(scenario, 3), []

    def tell(there):
        def decide(situation):
            told.append(situation)
            return np.array([there]), situation.most_layers

        return decide

    charged = evaluate_policy(scenario, policy_of(tell(True), "away", scenario), drawn)
    np.testing.assert_allclose(charged.perplexity, [each.server_perplexity[0] for each in told], rtol=1e-5)
    told.clear()
    charged = evaluate_policy(scenario, policy_of(tell(False), "here", scenario), drawn)
    most = [(each, each.most_layers[0]) for each in told]
    np.testing.assert_allclose(charged.perplexity, [one.perplexity[0, k] for one, k in most], rtol=1e-5)
    # The gains are those of the task before, so seconds on the link are not compared; those of training are.
    assert all(one.training_s[0, k] > 0 and one.download_s[0, k] > 0 for one, k in most)
    assert all(one.download_s[0, 0] == 0 and (np.diff(one.perplexity[0, 8:12]) != 0).any() for one, _ in most)


def test_randomness_is_the_same_in_every_run(small, drawn):
    tossed = policy_of(lambda s: (s.random.random(3) < 0.5, s.most_layers), "coin", small)
    once = returns(small, tossed, drawn)
    np.testing.assert_array_equal(once, returns(small, tossed, drawn))
    assert len(set(once)) == 5


def numpy_policy(body):
    names = {"np": np}
    exec(f"def decide(s):\n{textwrap.indent(body, '    ')}", names)
    return names["decide"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return s.gian", "policy mine: decide raised AttributeError: .*'gian'.*line 2"),
        ("return 1 / 0", "policy mine: decide raised ZeroDivisionError: division by zero"),
        (
            "return s.most_layers",
            "must return two arrays of 3, at_server and layers, got ndarray; return them as",
        ),
        ("return s.private[:2], s.most_layers", r"at_server must be 3 numbers, one a UE, got bool \(2,\)"),
        ("return s.private, s.most_layers * np.nan", "layers of UE 0 must be finite; guard .* got nan"),
        ("return s.private, [20, 33, 20]", "layers of UE 1 must be 0 to 32, got 33"),
        ("return s.private, [20, 20, -1]", "layers of UE 2 must be 0 to 32, got -1"),
        ("return s.private, s.gain * 0 + 0.5", "layers of UE 0 must be whole; np.round.*, got 0.5"),
        ("return s.gain * 0 + 2, s.most_layers", "at_server of UE 0 must be true or false, got 2.0"),
    ],
)
def test_what_is_no_decision_is_one_line_that_names_the_policy(small, drawn, caplog, capfd, body, message):
    policy = policy_of(numpy_policy(body), "mine", small)
    with pytest.raises(UsageError, match=message) as told:
        evaluate_policy(small, policy, drawn)
    assert "\n" not in str(told.value)
    assert not caplog.records
    assert capfd.readouterr().err == ""


def test_what_is_no_policy_is_said(tmp_path, small, drawn):
    (tmp_path / "torn.py").write_text("def broken(:\n")
    (tmp_path / "whole.py").write_text(GREEDY)

    def wide(world, situation, key):
        return Plan(situation.private[None], situation.held[..., 0])

    class Needy:
        def __init__(self, one, two):
            pass

    for name, message in (
        (f"{tmp_path}/torn.py:broken", "torn.py:broken: cannot be imported: SyntaxError"),
        (f"{tmp_path}/whole.py:Small", "whole.py has no Small; it has Largest"),
        (f"{tmp_path}/none.py:Small", "none.py: no such file"),
        ("no_such_module:Small", "no_such_module:Small: cannot be imported: ModuleNotFoundError"),
        ("nonsense", "no policy 'nonsense' .* name your own as file.py:Class"),
    ):
        with pytest.raises(UsageError, match=message):
            baseline_policy(name, small)
    for thing, message in (
        (lambda: None, r"must have decide\(situation\)"),
        (3, r"must have decide\(situation\)"),
        (Needy, "cannot be made: TypeError"),
    ):
        with pytest.raises(UsageError, match=message):
            policy_of(thing, "mine", small)
    with pytest.raises(UsageError, match=r"mine: at_server must be bool \(3,\), one a UE, got bool \(1, 3\)"):
        evaluate_policy(small, policy_of(wide, "mine", small), drawn)
