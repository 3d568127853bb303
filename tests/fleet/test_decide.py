"""Decisions and forecasts against the equations, computed here once more; links; who may not decide."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emutune.errors import FleetError
from emutune.fleet.server.choices import Candidate, Choice, Opening
from emutune.fleet.server.decide import Decider, open_decider
from emutune.fleet.server.drawn import Draws
from emutune.fleet.server.rates import LinkEstimate
from emutune.learning.checkpoint import CheckpointHeader, save_checkpoint
from emutune.learning.configuration import TrainingConfig
from emutune.learning.ppo import initial_state
from emutune.policies import policy_pytree
from emutune.scenario import Scenario, load_scenario
from emutune.step import Plan, Situation, plan_of_wish
from emutune.world import Carried, World, build_world, draw_episode, serve, situation_at
from emutune.world.dynamics import during

PAPER = load_scenario("paper")
NOISE = 10 ** (-174 / 10) / 1000
CANDIDATES = [
    Candidate("ue1", 3.0, 4e8, held=(0,), gain=1e-5, transmit_power_w=0.5),
    Candidate("ue2", 7.0, 3e8, held=(20,), gain=4e-6, transmit_power_w=0.9),
    Candidate("ue3", 1.0, 5e8, held=(25,), gain=2e-5, transmit_power_w=0.3),
    Candidate("ue4", 2.0, 5e8, held=(0,), gain=3e-5, transmit_power_w=0.4),
]


def opened(policy: str, scenario: Scenario = PAPER, **rest: Any) -> Decider:
    return open_decider(Opening(policy=policy, scenario=scenario, **rest))


def rate(bandwidth: float, power: float, gain: float, sharers: int) -> float:
    """Eq. 2 and 6."""
    share = bandwidth / sharers
    return share * math.log2(1 + power * gain / (NOISE * share))


def test_forecast_is_that_of_the_equations() -> None:
    choices = [Choice(True, 25), Choice(True, 25), Choice(False, 25), Choice(False, 16)]
    moved = [4e8, 3e8, 0.0, 5.4e9]
    forecasts = opened("best_fixed").forecast(0, CANDIDATES, choices, moved)
    uplinks = [rate(1e5, c.transmit_power_w, c.gain, 2) for c in CANDIDATES[:2]]
    # A device that needs nothing shares no band: the fourth has the downlink for itself.
    downlink = rate(1e6, 60.0, CANDIDATES[3].gain, 1)
    delays = [8 * 4e8 / uplinks[0], 8 * 3e8 / uplinks[1], 0.0, 8 * 5.4e9 / downlink]
    curve = PAPER.quality.curve
    retentions = [1.0, 1.0, 25 / 32, 16 / 32]
    for forecast, delay, retention, candidate in zip(forecasts, delays, retentions, CANDIDATES, strict=True):
        assert forecast.delay_s == pytest.approx(delay, rel=1e-4)
        assert forecast.perplexity == pytest.approx(
            curve(retention) * (candidate.complexity + 10) / 10, rel=1e-4
        )
    assert [forecasts[i].rate_bps for i in (0, 1, 3)] == pytest.approx([*uplinks, downlink], rel=1e-4)


@pytest.mark.parametrize("policy", ["best_fixed", "all_server", "random"])
def test_rules_decide_the_same_for_the_same_step(policy: str) -> None:
    decider = opened(policy, seed=3)
    for count in range(1, 5):
        choices = decider.decide(7, CANDIDATES[:count])
        assert choices == decider.decide(7, CANDIDATES[:count])
        low, high = PAPER.level_bounds
        assert all(low <= choice.layers <= high for choice in choices)
        if policy != "random":
            assert {choice.at_server for choice in choices} == {policy == "all_server"}


@policy_pytree
@dataclass(frozen=True)
class Above:
    """Uploads where a field of the situation is above a limit."""

    name: str = field(metadata={"static": True})
    limit: jax.Array

    def decide(self, world: World, situation: Situation, key: jax.Array) -> Plan:
        seen = situation.held[..., 0] if self.name == "held" else getattr(situation, self.name)
        half = jnp.full_like(situation.complexity, 0.5)
        return plan_of_wish(world.rules, situation, jnp.broadcast_to(seen > self.limit, half.shape), half)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("gain", [candidate.gain for candidate in CANDIDATES]),
        ("complexity", [candidate.complexity for candidate in CANDIDATES]),
        ("data_bits", [8 * candidate.data_bytes for candidate in CANDIDATES]),
        ("held", [candidate.held[0] for candidate in CANDIDATES]),
        ("transmit_power_w", [candidate.transmit_power_w for candidate in CANDIDATES]),
        # The paper's episodes have 50 tasks; the next begins after them.
        ("progress", [(107 - 100) / 50] * len(CANDIDATES)),
    ],
)
def test_a_policy_sees_the_candidates_in_its_own_units(name: str, values: list[float]) -> None:
    for limit in {(1 + part) * value for value in values for part in (-1e-3, 1e-3)}:
        choices = Decider(PAPER, Above(name, jnp.float32(limit))).decide(107, CANDIDATES)
        assert [choice.at_server for choice in choices] == [value > limit for value in values]


def untrained(directory: Path, config: TrainingConfig) -> None:
    """A run's checkpoint before its first update."""
    directory.mkdir()
    save_checkpoint(
        directory / "checkpoint.safetensors",
        CheckpointHeader(PAPER, config, 0),
        initial_state(config, build_world(PAPER), 0),
    )


def test_learned_policy_decides_for_any_number_of_devices(tmp_path: Path) -> None:
    untrained(tmp_path / "run", TrainingConfig())
    decider = opened(str(tmp_path / "run"), load_scenario("reference"))
    assert decider.scenario == PAPER
    for count in (1, 4):
        assert len(decider.decide(0, CANDIDATES[:count])) == count


def test_policy_of_fixed_size_networks_is_refused(tmp_path: Path) -> None:
    untrained(tmp_path / "run", TrainingConfig(network="flat"))
    with pytest.raises(FleetError, match="train with --network set"):
        opened(str(tmp_path / "run"))


def test_directory_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FleetError, match="no checkpoint"):
        opened(str(tmp_path))


OTHERS = (
    "{size_gb=5.4, layers=8, curve={quadratic=30.0, linear=-50.0, constant=40.0}}, {size_gb=21.6, layers=32}"
)


def of_several(cache: str = "") -> Scenario:
    """A world of three models that differ in their sizes, layers and curves."""
    return load_scenario("families", [f"families={{persistence=0.5, others=[{OTHERS}]{cache}}}"])


def test_a_task_is_decided_and_predicted_by_its_own_model() -> None:
    scenario = of_several()
    held = ((5, 0, 0), (0, 0, 20), (0, 4, 0), (0, 0, 0))
    candidates = [
        replace(candidate, family=number % 3, held=layers)
        for number, (candidate, layers) in enumerate(zip(CANDIDATES, held, strict=True))
    ]
    for policy in ("best_fixed", "hold", "lookahead", "random"):
        for choice, candidate in zip(opened(policy, scenario).decide(3, candidates), candidates, strict=True):
            model = scenario.models[candidate.family]
            assert model.fewest <= choice.layers <= model.most
            assert choice.keep == (), "a device without room for several keeps one"
    layers = [choice.layers for choice in opened("hold", scenario).decide(3, candidates)]
    choices = [Choice(False, count) for count in layers]
    forecasts = opened("hold", scenario).forecast(0, candidates, choices, [0.0] * 4)
    for forecast, choice, candidate in zip(forecasts, choices, candidates, strict=True):
        model = scenario.models[candidate.family]
        expected = model.curve(choice.layers / model.layers) * (candidate.complexity + 10) / 10
        assert forecast.perplexity == pytest.approx(expected, rel=1e-4)
    whole = opened("hold", scenario).forecast(0, candidates, [Choice(True, 3)] * 4, [0.0] * 4)
    assert whole[1].perplexity == pytest.approx(scenario.models[1].curve(1.0) * 17 / 10, rel=1e-4)


def test_no_more_than_fits_is_trained_with_of_any_model() -> None:
    scenario = of_several()
    for family, model in enumerate(scenario.models):
        most = model.fewest + 1
        limited = replace(CANDIDATES[0], held=(0, 0, 0), family=family, most_layers=most, private=True)
        for policy in ("best_fixed", "random", "lookahead"):
            (choice,) = opened(policy, scenario).decide(0, [limited])
            assert not choice.at_server
            assert model.fewest <= choice.layers <= most


@given(
    family=st.integers(0, 2),
    held=st.tuples(st.integers(0, 13), st.integers(0, 6), st.integers(0, 26)),
    order=st.permutations(range(3)),
)
@settings(max_examples=40, deadline=None)
def test_what_stays_on_a_device_is_what_fits_with_all_that_was_used_later(
    family: int, held: tuple[int, int, int], order: list[int]
) -> None:
    scenario = of_several(", cache_gb=20.0")
    candidate = replace(CANDIDATES[0], family=family, held=held, private=True)
    candidate = replace(candidate, age=tuple(order.index(one) for one in range(3)))
    (choice,) = LARGEST.decide(0, [candidate])
    room = 20.0 - scenario.models[family].emulator_gb(choice.layers)
    expected = []
    for other in order:
        if other != family:
            room -= scenario.models[other].emulator_gb(held[other])
            if held[other] and room >= -1e-6:
                expected.append(other)
    assert sorted(choice.keep) == sorted(expected)
    (sent,) = SENDING.decide(0, [replace(candidate, private=False)])
    assert (sent.at_server, sent.keep) == (True, ())


LARGEST, SENDING = (opened(policy, of_several(", cache_gb=20.0")) for policy in ("best_fixed", "all_server"))


@pytest.mark.parametrize("sharing", ["equal", "none"])
def test_what_is_predicted_of_measured_links_is_their_latency_and_bytes_over_their_rate(sharing: str) -> None:
    """Also at rates that the scenario's bands could not carry; a bottleneck that is shared is split equally."""
    links = [LinkEstimate(3e6, 0.2, 0.1), LinkEstimate(4e8, 0.05, 0.1), LinkEstimate(2e4, 0.0, 0.1), None]
    candidates = [
        replace(candidate, uplink=link, downlink=link and replace(link, rate_bps=7 * link.rate_bps))
        for candidate, link in zip(CANDIDATES, links, strict=True)
    ]
    decider = opened("best_fixed", sharing=sharing)
    assert decider.scenario.radio.sharing == sharing
    parts = 2 if sharing == "equal" else 1
    for there, factor in ((True, 1), (False, 7)):
        # The third device moves nothing, the fourth's link was never measured.
        choices = [Choice(there, 16), Choice(there, 25), Choice(there, 16), Choice(not there, 16)]
        forecasts = decider.forecast(0, candidates, choices, [1e6, 8e7, 0.0, 1e9])
        for moved, link, forecast in zip((1e6, 8e7, 0.0), links, forecasts, strict=False):
            expected = link.latency_s + parts * 8 * moved / (factor * link.rate_bps) if moved else 0.0
            assert forecast.delay_s == pytest.approx(expected, rel=1e-4)
            if moved:
                assert forecast.rate_bps == pytest.approx(factor * link.rate_bps / parts, rel=1e-4)
        power, gain = CANDIDATES[3].transmit_power_w, CANDIDATES[3].gain
        band = 4e8 / 50 if not there else 28e8 / 50
        alone = rate(band, power if not there else 60.0, gain, 1)
        assert forecasts[3].delay_s == pytest.approx(8e9 / alone, rel=1e-3)


def test_a_policy_sees_the_gain_at_which_the_step_has_the_measured_rate() -> None:
    link, limit = LinkEstimate(2e6, 0.3, 0.1), (2 ** (2e6 / 1e5) - 1) * NOISE * 1e5 / 0.5
    measured = replace(CANDIDATES[0], uplink=link)
    for factor, above in ((1 - 1e-3, True), (1 + 1e-3, False)):
        (choice,) = Decider(PAPER, Above("gain", jnp.float32(factor * limit))).decide(0, [measured])
        assert choice.at_server == above


WORLDS = ("paper", "edge-compute", "private", "urban", "trace", "city")


def alone(name: str) -> Scenario:
    """A shipped world of one foundation model."""
    return load_scenario(name).model_copy(update={"families": None})


@pytest.mark.parametrize("name", WORLDS)
def test_what_is_drawn_for_a_device_is_an_episode_of_the_world_whoever_else_takes_part(name: str) -> None:
    world = build_world(alone(name))
    draws = Draws(world, 1)
    both, other = draws.episode(0, ["ue1", "ue2"]), draws.episode(0, ["ue2", "ue3", "ue1"])
    for one, two in zip(jax.tree.leaves(both), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(one[..., 0], two[..., 2])
        np.testing.assert_array_equal(one[..., 1], two[..., 0])
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(1), 0), digest_of("ue2"))
    expected = draw_episode(key, replace(world, ues=1))
    for one, two in zip(jax.tree.leaves(both), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one[..., 1], two[..., 0], rtol=1e-4)
    again = [Draws(world, seed).episode(number, ["ue1"]).gain for seed, number in ((1, 0), (1, 1), (2, 0))]
    assert len({part.tobytes() for part in map(np.asarray, again)}) == 3


def digest_of(name: str) -> np.uint32:
    return np.uint32(int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little"))


@pytest.mark.parametrize("name", WORLDS)
def test_a_shaped_fleet_is_charged_as_the_simulator_charges(name: str) -> None:
    """Every step of two episodes: what a fleet predicts at the drawn gains is what the world serves."""
    scenario = alone(name)
    decider = opened("random", scenario, shaped=True, episode=3, seed=5)
    world = decider.world(len(CANDIDATES))
    names = [candidate.device for candidate in CANDIDATES]
    told = [replace(candidate, gain=None, transmit_power_w=None, spent_j=7.0) for candidate in CANDIDATES]
    lookup = np.asarray(world.rules.models.missing_bits[0])
    delta = lookup.shape[0] > 1
    for step in range(6):
        choices = decider.decide(step, told)
        moved = [
            candidate.data_bytes if choice.at_server
            else 0.0 if choice.layers in (0, candidate.held[0])
            else lookup[candidate.held[0] if delta else 0, choice.layers] / 8
            for candidate, choice in zip(told, choices, strict=True)
        ]  # fmt: skip
        forecasts = decider.forecast(step, told, choices, moved, during=True)
        episode = decider._draws.episode(step // 3, names)
        carried = Carried(
            jnp.asarray([[candidate.held[0]] for candidate in told]),
            jnp.zeros((4, 1), jnp.int32),
            jnp.full(4, 7.0),
        )
        known = situation_at(world, episode, jnp.asarray(step % 3), carried)._replace(
            complexity=jnp.asarray([candidate.complexity for candidate in told]),
            data_bits=8 * jnp.asarray([candidate.data_bytes for candidate in told]),
            private=jnp.zeros(4, bool),
            memory_bits=jnp.full(4, jnp.inf),
        )
        plan = Plan(
            jnp.asarray([choice.at_server for choice in choices]),
            jnp.asarray([choice.layers for choice in choices]),
        )
        _, outcome = serve(world, during(episode, jnp.asarray(step % 3), known), plan)
        taken = outcome.charge.taken
        assert [forecast.delay_s for forecast in forecasts] == pytest.approx(
            np.asarray(taken.delay_s), rel=1e-4
        )
        assert [forecast.training_s for forecast in forecasts] == pytest.approx(
            np.asarray(taken.training_s), rel=1e-4
        )
        assert [forecast.perplexity for forecast in forecasts] == pytest.approx(
            np.asarray(taken.perplexity), rel=1e-4
        )
        joules = [one.transfer_w * one.transfer_s + one.training_w * one.training_s for one in forecasts]
        assert joules == pytest.approx(np.asarray(taken.joules), rel=1e-4)
        assert [choice.idle for choice in choices] == [not active for active in known.active]
        assert [one.situation["tflops"] for one in forecasts if "tflops" in one.situation] == pytest.approx(
            np.asarray(known.tflops[jnp.isfinite(known.tflops)])
        )


def test_a_real_device_is_as_fast_as_was_measured_and_always_has_a_task() -> None:
    scenario = load_scenario("edge-compute", ["activity={task_probability=0.01}"]).model_copy(
        update={"families": None}
    )
    decider = opened("best_fixed", scenario)
    slow, fast = (replace(CANDIDATES[0], tflops=speed) for speed in (1.0, 4.0))
    choices = [Choice(False, 8)] * 2
    one, other = decider.forecast(0, [slow, fast], choices, [0.0, 0.0])
    tokens = 4e8 / 175.0
    assert one.training_s == pytest.approx(4e-3 * 1.24 * tokens * 0.5 / 1.0, rel=1e-4)
    assert one.training_s == pytest.approx(4 * other.training_s)
    # An operation takes as much energy, so a faster one more power.
    assert other.training_w == pytest.approx(4 * one.training_w)
    (told,) = decider.forecast(0, [replace(slow, compute_w=7.0)], choices[:1], [0.0])
    assert (told.training_w, told.situation["compute_w"]) == (7.0, 7.0)
    assert not any(choice.idle for choice in decider.decide(0, [slow, fast]))


def test_what_devices_can_and_may_limits_every_policy_in_every_world() -> None:
    low, high = PAPER.level_bounds
    limited = [
        replace(CANDIDATES[0], most_layers=low),
        replace(CANDIDATES[1], most_layers=0),
        replace(CANDIDATES[2], most_layers=low + 2, private=True),
        replace(CANDIDATES[3], private=True),
    ]
    for policy in ("best_fixed", "all_server", "random", "lookahead"):
        for scenario in (
            PAPER,
            load_scenario("paper", ["memory={device_gb={min=3.0,max=9.0}}", "privacy={share=0.5}"]),
        ):
            small, none, both, private = opened(policy, scenario).decide(1, limited)
            assert small.at_server or small.layers == low
            assert none.at_server
            assert not both.at_server
            assert low <= both.layers <= low + 2
            assert not private.at_server
            assert low <= private.layers <= high
