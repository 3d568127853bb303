"""Decisions and forecasts against the equations, computed here once more; links; who may not decide."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from emutune.errors import FleetError
from emutune.fleet.server.decide import Candidate, Choice, Decider, open_decider
from emutune.fleet.server.links import DrawnLink, middle_gain
from emutune.fleet.server.rates import LinkEstimate
from emutune.learning.checkpoint import CheckpointHeader, save_checkpoint
from emutune.learning.configuration import TrainingConfig
from emutune.learning.ppo import initial_state
from emutune.policies import AllServer, policy_pytree
from emutune.scenario import Scenario, load_scenario
from emutune.step import Plan, Situation, plan_of_wish
from emutune.world import World, build_world

PAPER = load_scenario("paper")
NOISE = 10 ** (-174 / 10) / 1000
CANDIDATES = [
    Candidate(gain=1e-5, complexity=3.0, data_bytes=4e8, cached_layers=0, transmit_power_w=0.5),
    Candidate(gain=4e-6, complexity=7.0, data_bytes=3e8, cached_layers=20, transmit_power_w=0.9),
    Candidate(gain=2e-5, complexity=1.0, data_bytes=5e8, cached_layers=25, transmit_power_w=0.3),
    Candidate(gain=3e-5, complexity=2.0, data_bytes=5e8, cached_layers=0, transmit_power_w=0.4),
]


def rate(bandwidth: float, power: float, gain: float, sharers: int) -> float:
    """Eq. 2 and 6."""
    share = bandwidth / sharers
    return share * math.log2(1 + power * gain / (NOISE * share))


def test_forecast_is_that_of_the_equations() -> None:
    choices = [Choice(True, 25), Choice(True, 25), Choice(False, 25), Choice(False, 16)]
    moved = [4e8, 3e8, 0.0, 5.4e9]
    forecasts = open_decider("best_fixed", PAPER).forecast(CANDIDATES, choices, moved)
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
    decider = open_decider(policy, PAPER, seed=3)
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
        ("held", [candidate.cached_layers for candidate in CANDIDATES]),
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
    decider = open_decider(str(tmp_path / "run"), load_scenario("reference"))
    assert decider.scenario == PAPER
    for count in (1, 4):
        assert len(decider.decide(0, CANDIDATES[:count])) == count


def test_policy_of_fixed_size_networks_is_refused(tmp_path: Path) -> None:
    untrained(tmp_path / "run", TrainingConfig(network="flat"))
    with pytest.raises(FleetError, match="train with --network set"):
        open_decider(str(tmp_path / "run"), PAPER)


def test_directory_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FleetError, match="no checkpoint"):
        open_decider(str(tmp_path), PAPER)


def test_world_of_several_models_is_refused() -> None:
    with pytest.raises(FleetError, match="a fleet serves one"):
        Decider(load_scenario("families"), open_decider("all_server", PAPER)._policy)


@pytest.mark.parametrize(
    "changes",
    [
        ["radio.rate=ergodic"],
        ["mobility={speed_mps={min=1, max=2}, interval_s=30}"],
        ["fleet.tasks=1", "trace={interval_s=9, downlink_mbps=[1, 1], uplink_mbps=[1, 1]}"],
    ],
)
def test_links_that_a_fleet_cannot_shape_are_refused(changes: list[str]) -> None:
    scenario = load_scenario("paper", changes)
    with pytest.raises(
        FleetError, match=r"a fleet.s follow radio\.path_loss_exponent and radio\.fading_blocks"
    ):
        Decider(scenario, open_decider("all_server", PAPER)._policy)
    with pytest.raises(FleetError, match="use a policy for such a scenario"):
        middle_gain(scenario)


@pytest.mark.parametrize("sharing", ["equal", "none"])
def test_what_is_predicted_of_measured_links_is_their_latency_and_bytes_over_their_rate(sharing: str) -> None:
    """Also at rates that the scenario's bands could not carry; a bottleneck that is shared is split equally."""
    links = [LinkEstimate(3e6, 0.2, 0.1), LinkEstimate(4e8, 0.05, 0.1), LinkEstimate(2e4, 0.0, 0.1), None]
    candidates = [
        replace(candidate, uplink=link, downlink=link and replace(link, rate_bps=7 * link.rate_bps))
        for candidate, link in zip(CANDIDATES, links, strict=True)
    ]
    decider = open_decider("best_fixed", PAPER, sharing=sharing)
    assert decider.scenario.radio.sharing == sharing
    parts = 2 if sharing == "equal" else 1
    for there, factor in ((True, 1), (False, 7)):
        # The third device moves nothing, the fourth's link was never measured.
        choices = [Choice(there, 16), Choice(there, 25), Choice(there, 16), Choice(not there, 16)]
        forecasts = decider.forecast(candidates, choices, [1e6, 8e7, 0.0, 1e9])
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


def drawn(seed: int, device: str, scenario: Scenario = PAPER) -> list[float]:
    link = DrawnLink(scenario, seed, device)
    return [link.transmit_power_w, *(link.gain(step) for step in range(-1, 60))]


def test_links_are_drawn_from_the_scenario_and_nothing_else() -> None:
    assert drawn(1, "ue1") == drawn(1, "ue1")
    assert len({tuple(drawn(seed, name)) for seed in (1, 2) for name in ("ue1", "ue2")}) == 4
    power, *gains = drawn(1, "ue1")
    assert 0.2 <= power <= 1.0
    # Fading is that of 100 blocks: a tenth of the mean, around a path loss that stays.
    mean = sum(gains) / len(gains)
    assert 500.0**-2 * 0.9 < mean < 50.0**-2 * 1.1
    spread = math.sqrt(sum((gain - mean) ** 2 for gain in gains) / len(gains)) / mean
    assert 0.06 < spread < 0.15
    assert middle_gain(PAPER) == pytest.approx(275.0**-2)


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
            small, none, both, private = open_decider(policy, scenario).decide(1, limited)
            assert small.at_server or small.layers == low
            assert none.at_server
            assert not both.at_server
            assert low <= both.layers <= low + 2
            assert not private.at_server
            assert low <= private.layers <= high


@pytest.mark.parametrize(
    "section",
    [
        "computation={device_tflops={min=0.3,max=20.0},server_tflops=5.0,bytes_per_token=2000.0}",
        "energy={receive_w=1.5,weight_per_j=-1e-5}",
    ],
)
def test_a_fleet_refuses_worlds_of_what_devices_do_not_report(section):
    scenario = load_scenario("paper", [section, "model.parameters_billion=2.7"])
    name = section.partition("=")[0]
    with pytest.raises(FleetError, match=f"has the section {name}, which devices of a fleet do not report"):
        Decider(scenario, AllServer())
