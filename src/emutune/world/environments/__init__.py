"""The simulator behind Gymnasium's and PettingZoo's interfaces, for other people's learners.

``import emutune`` registers ``emutune/Orchestration-v0`` with Gymnasium, one environment at a time or
many at once.
"""

from emutune.world.environments.box_action import BoxAction, VectorBoxAction
from emutune.world.environments.parallel import OrchestrationParallelEnv, parallel_env
from emutune.world.environments.single import OrchestrationEnv
from emutune.world.environments.vector import OrchestrationVectorEnv

__all__ = [
    "BoxAction",
    "OrchestrationEnv",
    "OrchestrationParallelEnv",
    "OrchestrationVectorEnv",
    "VectorBoxAction",
    "parallel_env",
]
