"""A UE alone in a world without chance: lookahead's prices are exact there, so it does the best there is."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

import plain
from emutune.policies import LaterPrices, plan_lookahead
from emutune.scenario import load_scenario
from emutune.study.evaluate import evaluate_policy, held_out_episodes
from emutune.world import build_world

OTHER = "{size_gb=5.4,layers=4,parameters_billion=1.0,curve={quadratic=0.0,linear=-9.0,constant=24.0}}"
CERTAIN = [
    "fleet.ues=1",
    "fleet.tasks=4",
    "families.persistence=1.0",
    "radio.fading_blocks=1000000",
    "model.layers=5",
    f"families.others=[{OTHER}]",
    "tasks.complexity={min=5.0,max=5.0}",
    "tasks.data_mb={min=400.0,max=400.0}",
    "fleet.transmit_power_w={min=0.001,max=0.001}",
]
# Every joule is beyond the budget, so that it has one price. Only training takes many.
OVER = ["energy.receive_w=0.0", "energy.compute_j_per_tflop={min=0.1,max=0.6}", "energy.budget_j=1.0"]
DEAR = ["energy.over_budget_weight_per_j=-2e-4", "computation.server_tflops=3.0"]


def test_a_ue_alone_in_a_world_without_chance_does_the_best_there_is() -> None:
    features = plain.changes_for({"computation", "budget", "delta"})
    scenario = load_scenario("families", [*CERTAIN, *features, *OVER, *DEAR])
    prices = LaterPrices(*map(jnp.float32, (1.0, 1.0, 0.0)))
    policy = jax.jit(lambda world: plan_lookahead(world, prices))(build_world(scenario))
    drawn = held_out_episodes(scenario, 24)
    mine = evaluate_policy(scenario, policy, drawn)
    episodes = [jax.tree.map(lambda leaf, n=n: leaf[n], drawn) for n in range(24)]
    best = [plain.best_return(scenario, plain.tasks_of(episode)) for episode in episodes]
    np.testing.assert_allclose(mine.episode_return, best, rtol=1e-3)
    # Some hold an emulator and some upload.
    assert set(mine.server_share) == {0.0, 1.0}
