"""Learn to orchestrate emulator-assisted tuning of foundation models on fleets of edge devices."""

import gymnasium

from emutune.forking import watch_forks

__version__ = "0.1.0"

# Entry points are strings, so registering imports neither JAX nor the simulator.
gymnasium.register(
    id="emutune/Orchestration-v0",
    entry_point="emutune.world.environments:OrchestrationEnv",
    vector_entry_point="emutune.world.environments:OrchestrationVectorEnv",
)

# JAX may be in use before the first of these is made.
watch_forks()
