"""Learning to orchestrate: networks, HMPPO and IPPO, training and checkpoints."""

from emutune.learning.agents import LearnedPolicy
from emutune.learning.checkpoint import CheckpointHeader
from emutune.learning.configuration import GuidedConfig, TrainingConfig
from emutune.learning.guided import Guided
from emutune.learning.teachers import teacher_of
from emutune.learning.training import load_policy, train_seed, train_seeds

__all__ = [
    "CheckpointHeader",
    "Guided",
    "GuidedConfig",
    "LearnedPolicy",
    "TrainingConfig",
    "load_policy",
    "teacher_of",
    "train_seed",
    "train_seeds",
]
