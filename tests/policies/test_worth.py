"""What a UE's cache is worth later, against plain recursion over its future, in every world that lookahead plans for.

A UE pays for each link by the second, and of perplexity and joules its part of the fleet's mean, so that the
recursion is over ``plain.serve`` of one UE at a time.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import plain
from emutune.policies import LaterPrices, plan_lookahead
from emutune.scenario import Scenario, load_scenario
from emutune.step import Situation, situation_of
from emutune.world import World, build_world
from holding import holding

OTHER = "{size_gb=5.4,layers=4,parameters_billion=1.0,curve={quadratic=0.0,linear=-9.0,constant=24.0}}"
UES, TASKS, UPLOAD, DOWNLOAD, BACKGROUND_S = 3, 4, 0.7, 0.4, 50.0
# Of later tasks only means count.
MEANS = {"complexity": 5.0, "data_bits": 3.2e9, "transmit_power_w": 0.6}
NEAR_M, FAR_M = 60.0, 400.0
EVERYTHING = {"computation", "energy", "memory", "privacy", "activity"}


def priced_world(features: set[str], *changes: str) -> Scenario:
    """A world in which transfers, training and joules cost about as much as perplexity."""
    return load_scenario(
        "families",
        [
            f"fleet.ues={UES}",
            f"fleet.tasks={TASKS}",
            "radio.fading_blocks=1000000",
            "families.persistence=0.3",
            "model.layers=6",
            f"families.others=[{OTHER}]",
            "tasks.complexity={min=3.0,max=7.0}",
            "tasks.data_mb={min=300.0,max=500.0}",
            "fleet.transmit_power_w={min=0.2,max=1.0}",
            *([] if "trace" in features else [f"fleet.distance_m={{min={NEAR_M},max={FAR_M}}}"]),
            "reward.delay_weight_per_min=-0.02",
            *plain.changes_for(features),
            *(["energy.receive_w=5.0", "energy.weight_per_j=-2e-4"] if "energy" in features else []),
            *(
                ["energy.compute_j_per_tflop={min=0.1,max=0.6}"]
                if features >= {"computation", "energy"}
                else []
            ),
            *(["memory.device_gb={min=3.7,max=9.0}"] if "memory" in features else []),
            *(["privacy.share=1.0"] if "privacy" in features else []),
            *changes,
        ],
    )


def ues_apart(scenario: Scenario) -> list[dict[str, Any]]:
    """UEs at the ends of what sets them apart, where a table of worths has points."""
    computation, energy, memory = scenario.computation, scenario.energy, scenario.memory
    consumes = energy is not None and energy.compute_j_per_tflop is not None
    ends = {
        "far": (False, True),
        "tflops": (0.3, 20.0) if computation else (None,),
        "joules": (0.1, 0.6) if consumes else (None,),
        "memory_bits": (8e9 * 3.7, 8e9 * 9.0) if memory else (math.inf,),
        "private": (False, True) if scenario.privacy else (False,),
    }
    ues = []
    for number, values in enumerate(itertools.product(*ends.values())):
        ue = dict(zip(ends, values, strict=True)) | MEANS | {"active": True}
        ue |= gains_of(scenario, far=ue.pop("far"))
        joules = ue.pop("joules")
        ue["compute_w"] = joules * ue["tflops"] if joules else None
        # Of many ends a part: each pair of them occurs.
        if number % 3 == 0 or scenario.memory is None:
            ues.append(ue)
    return ues


def gains_of(scenario: Scenario, far: bool) -> dict[str, float]:
    if scenario.trace is None:
        gain = (FAR_M if far else NEAR_M) ** -scenario.radio.path_loss_exponent
        return {"gain": gain, "downlink_gain": gain}
    radio, pick = scenario.radio, min if far else max
    noise = 10 ** (radio.noise_dbm_per_hz / 10) / 1000

    def gain_of(rates: list[float], bandwidth: float, power: float) -> float:
        return math.expm1(1e6 * pick(rates) / bandwidth * math.log(2)) * noise * bandwidth / power

    # Gains of the uplink reach as far as powers apart.
    power = 1.0 if far else 0.2
    return {
        "gain": gain_of(scenario.trace.uplink_mbps, radio.uplink_bandwidth_hz, power),
        "downlink_gain": gain_of(
            scenario.trace.downlink_mbps, radio.downlink_bandwidth_hz, radio.downlink_power_w
        ),
    }


def priced(
    scenario: Scenario, task: dict, carried: plain.Carried, plan: tuple[str, int], shadow_per_j: float
) -> tuple[Any, float]:
    """What a task costs a UE that pays for links by the second, and what it then carries."""
    (after,), out = plain.serve(scenario, [task], [carried], [plan])
    (delay_s,), (training_s,) = out["delay_s"], out["training_s"]
    if plan[0] == "server":
        seconds = UPLOAD * delay_s
    else:
        seconds = DOWNLOAD * (delay_s - training_s) + max(training_s - BACKGROUND_S, 0.0)
    cost = -scenario.reward.perplexity_weight * out["perplexity"][0] * share_of_mean(scenario)
    cost -= scenario.reward.delay_weight_per_min * seconds / 60
    if scenario.energy:
        cost -= scenario.energy.weight_per_j * out["energy_j"][0] / UES
        # Joules of a budget are missed later; lookahead counts those of training.
        cost += shadow_per_j * (training_s * (task["compute_w"] or 0.0) if plan[0] == "local" else 0.0) / UES
    return plain.Carried(after.emulators), cost


def share_of_mean(scenario: Scenario) -> float:
    """Of a task in the mean over all tasks of a step, on average over how many others there are."""
    active = scenario.activity.task_probability if scenario.activity else 1.0
    others = range(UES)
    chances = [math.comb(UES - 1, m) * active**m * (1 - active) ** (UES - 1 - m) for m in others]
    return sum(chance / (1 + m) for m, chance in zip(others, chances, strict=True))


def expected_later(scenario: Scenario, ue: dict[str, Any], shadow_per_j: float = 0.0) -> Any:
    """Expected cost of all steps after one, by step, family of its task, and what is carried after it."""
    persistence = scenario.families.persistence
    active = scenario.activity.task_probability if scenario.activity else 1.0

    @functools.cache
    def later(now: int, family: int, carried: plain.Carried) -> float:
        if now + 1 == TASKS:
            return 0.0
        total = 0.0
        for following in range(2):
            chance = persistence * (family == following) + (1 - persistence) / 2
            idle = later(now + 1, following, carried) if active < 1 else 0.0
            total += chance * (active * cost(now + 1, following, carried) + (1 - active) * idle)
        return total

    def cost(now: int, family: int, carried: plain.Carried) -> float:
        task = ue | {"family": family}
        served = (
            priced(scenario, task, carried, plan, shadow_per_j) for plan in plain.options(scenario, task)
        )
        return min(paid + later(now, family, after) for after, paid in served)

    return later


def situation_with(
    world: World, ue: dict[str, Any], now: int, family: int, carried: plain.Carried, spent_j: float = 0.0
) -> Situation:
    """The situation of a fleet of such UEs, all with a task of a family."""
    held_family, held = carried.emulators[0] if carried.emulators else (0, 0)
    kept = holding(world, [held_family] * UES, [held] * UES, spent_j)
    known = {name: None if value is None else jnp.full(UES, value) for name, value in ue.items()}
    family_of_each = jnp.full(UES, family, jnp.int32)
    return situation_of(progress=jnp.asarray(now / TASKS), family=family_of_each, **known, **kept._asdict())


@pytest.mark.parametrize(
    "features",
    [{"trace", "energy"}, EVERYTHING | {"delta"}],
    ids=lambda part: "-".join(sorted(part)),
)
def test_what_a_cache_is_worth_is_the_recursion_in_plain_numbers(features: set[str]) -> None:
    scenario = priced_world(features)
    world = build_world(scenario)
    prices = LaterPrices(*(jnp.float32(price) for price in (UPLOAD, DOWNLOAD, BACKGROUND_S)))
    policy = jax.jit(lambda world: plan_lookahead(world, prices))(world)
    worths = jax.jit(lambda situation: policy.later(world, situation))
    for ue in ues_apart(scenario):
        later = expected_later(scenario, ue)
        for now, family in itertools.product(range(TASKS), range(2)):
            possible = plain.possible_layers(scenario, ue | {"family": family})
            other = plain.carrying(1 - family, 3, 0.0)
            for held in [plain.Carried(), other, *(plain.carrying(family, k, 0.0) for k in possible)]:
                kept, renewed = worths(situation_with(world, ue, now, family, held))
                # Gains at the ends of a grid are a third of a percent beyond the nearest and farthest UEs.
                assert float(kept[0]) == pytest.approx(later(now, family, held), rel=4e-3, abs=1e-4)
            expected = [later(now, family, plain.carrying(family, k, 0.0)) for k in possible]
            np.testing.assert_allclose(renewed[np.array(possible), 0], expected, rtol=4e-3, atol=1e-4)


def test_a_joule_of_a_budget_is_worth_what_makes_later_costs_less_the_budget_highest() -> None:
    over, budget_j = 1e-3, 3000.0
    changes = ["energy.compute_j_per_tflop={min=0.1,max=0.6}", f"energy.budget_j={budget_j}"]
    scenario = priced_world({"computation", "budget"}, *changes, f"energy.over_budget_weight_per_j={-over}")
    world = build_world(scenario)
    prices = LaterPrices(*(jnp.float32(price) for price in (UPLOAD, DOWNLOAD, BACKGROUND_S)))
    policy = jax.jit(lambda world: plan_lookahead(world, prices))(world)
    shadow_of = jax.jit(lambda situation: policy.shadow_per_j(world, situation)[0])
    chosen = set()
    for ue in ues_apart(scenario):
        laters = {share: expected_later(scenario, ue, share * over) for share in (0.0, 0.1, 0.25, 0.5, 1.0)}
        for now, spent_j in itertools.product(range(TASKS), (0.0, 1500.0, 2900.0, 5000.0)):
            # This step's part of what is left is not for later.
            left_j = max(budget_j - spent_j, 0.0) * (1 - 1 / (TASKS - now))
            values = {
                share: later(now, 0, plain.Carried()) - share * over * left_j / UES
                for share, later in laters.items()
            }
            found = float(shadow_of(situation_with(world, ue, now, 0, plain.Carried(), spent_j))) / over
            share = min(values, key=lambda share: abs(share - found))
            assert found == pytest.approx(share, abs=1e-5)
            assert values[share] > max(values.values()) - 2e-3
            chosen.add(share)
    assert len(chosen) > 2
