"""Where there is nothing to choose, or nobody to share with, a bound is what the best plan costs, to the last term."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from tiny import Drawn, draw_tiny, only_plan

import plain
from emutune.bounds import Prices, bound_at_prices, cost_bound

# One level of each family, of 5.4 and 4 GB.
BOTH_GB = 9.4
ONE_LEVEL = [
    "model.layers=4",
    "families.others=[{size_gb=8.0,layers=2,parameters_billion=1.0,"
    "curve={quadratic=0.0,linear=-9.0,constant=24.0}}]",
    "retention.min=0.45",
    "retention.max=0.55",
]
FORCED = {
    "on the UE": ({"privacy"}, ["privacy.share=1.0"]),
    "at the server": ({"memory"}, ["memory.device_gb={min=0.5,max=0.6}"]),
}
# Rooms for one of the two emulators and for both.
ALONE = [
    (set(), []),
    ({"computation", "budget"}, []),
    ({"computation", "energy", "trace", "activity"}, []),
    ({"computation", "delta"}, []),
    ({"budget", "ergodic", "delta"}, []),
    ({"cache", "budget"}, ["families.cache_gb=7.0"]),
    ({"cache", "computation", "energy"}, ["families.cache_gb=10.0"]),
]
TOGETHER = [
    (set(), []),
    ({"computation", "trace"}, []),
    ({"computation", "activity"}, []),
    ({"ergodic", "cache"}, ["families.cache_gb=7.0"]),
    ({"multicast"}, []),
    ({"multicast", "delta", "trace"}, []),
    ({"unshared"}, []),
    ({"unshared", "delta", "trace"}, []),
    ({"unshared", "computation"}, []),
]


def named(part: object) -> str:
    return "-".join(sorted(part)) or "plain" if isinstance(part, set) else ""


def forced(where: str, seed: int, features: set[str], *changes: str) -> Drawn:
    """An episode with one possible plan, in which delay, joules and perplexity all cost much."""
    needed, forcing = FORCED[where]
    weights = ["reward.delay_weight_per_min=-0.1"]
    if features & {"energy", "budget"}:
        weights += ["energy.receive_w=40.0", "energy.weight_per_j=-1e-4"]
    if "budget" in features:
        weights += ["energy.budget_j=900.0"]
    return draw_tiny(features | needed, seed, *ONE_LEVEL, *forcing, *weights, *changes)


def best_prices(drawn: Drawn, outcomes: list[dict]) -> Prices:
    """The dual solution: a second costs where the step waits; where one emulator fits, the one in use pays."""
    costs, energy = drawn.costs, drawn.scenario.energy
    tasks, ues, _ = costs.local_cost.shape
    own_time = ues == 1 and costs.rules.trains_in_time
    shares = np.zeros((tasks, ues + 2))
    for share, outcome in zip(shares, outcomes, strict=True):
        someone = 2 + int(np.argmax(outcome["perplexity"]))
        fetched = someone if costs.rules.multicast else 0
        share[
            someone if own_time else fetched if any(outcome["sent"]) else 1 if outcome["uploads"] else someone
        ] = 1.0
    exceeds = energy is not None and energy.budget_j is not None and joules_of(outcomes) > energy.budget_j
    rent = np.zeros((tasks, ues, len(costs.room.limits)))
    if (plain.cache_of(drawn.scenario) or BOTH_GB) < BOTH_GB:
        # Not more than one emulator, of which the one in use pays.
        rent[[not outcome["uploads"] for outcome in outcomes], :, 1:] = 100.0
    return Prices(shares[:, 0], shares[:, 1], shares[:, 2:], np.full(ues, float(exceeds)), rent)


def joules_of(outcomes: list[dict]) -> float:
    return sum(outcome["energy_j"][0] for outcome in outcomes)


@pytest.mark.parametrize("where", FORCED)
@pytest.mark.parametrize(("features", "changes"), ALONE, ids=named)
def test_a_ue_without_a_choice_is_charged_all_that_it_costs(
    where: str, features: set[str], changes: list[str]
) -> None:
    over = False
    for seed in range(3):
        drawn = forced(where, seed, features, "fleet.ues=1", *changes)
        cost, outcomes = only_plan(drawn)
        costs, prices = drawn.costs, best_prices(drawn, outcomes)
        over |= bool(np.any(prices.joule))
        for proved in (cost_bound(costs), cost_bound(costs, "integer"), bound_at_prices(costs, prices)):
            assert proved == pytest.approx(cost, rel=1e-5)
            assert proved <= cost * (1 + 1e-12)
    assert over == ("budget" in features)


@pytest.mark.parametrize("where", FORCED)
@pytest.mark.parametrize(("features", "changes"), TOGETHER, ids=named)
def test_ues_alike_without_a_choice_share_as_the_bound_says(
    where: str, features: set[str], changes: list[str]
) -> None:
    for seed in range(2):
        drawn = forced(where, seed, features, "fleet.ues=3", *changes).alike()
        cost, outcomes = only_plan(drawn)
        for proved in (cost_bound(drawn.costs), bound_at_prices(drawn.costs, best_prices(drawn, outcomes))):
            assert proved == pytest.approx(cost, rel=1e-5)
            assert proved <= cost * (1 + 1e-12)


@pytest.mark.parametrize("where", FORCED)
@pytest.mark.parametrize(
    "features",
    [{"computation"}, {"computation", "activity", "trace"}, {"computation", "unshared"}],
    ids=named,
)
def test_ues_unlike_without_a_choice_wait_for_the_slowest_pair_by_pair(
    where: str, features: set[str]
) -> None:
    for seed in range(3):
        drawn = forced(where, seed, features, "fleet.ues=3")
        cost, _ = only_plan(drawn)
        for method in ("linear", "integer"):
            proved = cost_bound(drawn.costs, method)
            assert proved == pytest.approx(cost, rel=1e-5)
            assert proved <= cost


@pytest.mark.parametrize(
    "features",
    [
        {"computation"},
        {"computation", "energy", "delta", "ergodic"},
        {"computation", "energy", "delta", "cache"},
        {"computation", "energy", "memory", "privacy", "activity", "cache", "trace"},
    ],
    ids=named,
)
def test_a_ue_that_shares_with_nobody_is_charged_its_best_plan(features: set[str]) -> None:
    best, dear = [], {"energy", "budget"} & features
    for seed, weight in itertools.product(range(3), (-0.001, -0.015, -0.1)):
        changes = [f"reward.delay_weight_per_min={weight}", "fleet.ues=1", "fleet.tasks=4"]
        changes += ["energy.receive_w=5.0", "energy.weight_per_j=-1e-5"] if dear else []
        # A cache that holds all there is has no rents.
        drawn = draw_tiny(
            features, seed, *changes, *(["families.cache_gb=50.0"] if "cache" in features else [])
        )
        tasks = np.zeros(4)
        prices = Prices(tasks, tasks, np.ones((4, 1)))
        best.append(-plain.best_return(drawn.scenario, drawn.tasks))
        assert bound_at_prices(drawn.costs, prices) == pytest.approx(best[-1], rel=1e-6)
    assert len(set(best)) == len(best)
