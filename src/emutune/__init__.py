"""Learn to orchestrate emulator-assisted tuning of foundation models on fleets of edge devices."""

import gymnasium
import lazy_loader

from emutune import forking

__version__ = "0.1.0"

# Types are those of the stub, and so is what is imported once it is used: neither JAX nor torch before.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

# Entry points are strings, so registering imports neither JAX nor the simulator.
gymnasium.register(
    id="emutune/Orchestration-v0",
    entry_point="emutune.world.environments:OrchestrationEnv",
    vector_entry_point="emutune.world.environments:OrchestrationVectorEnv",
)

# JAX may be in use before the first of these is made.
forking.watch_forks()
