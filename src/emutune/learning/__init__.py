"""Learning to orchestrate: networks, HMPPO and IPPO, training and checkpoints."""

from emutune.learning.agents import LearnedPolicy
from emutune.learning.checkpoint import CheckpointHeader
from emutune.learning.configuration import GuidedConfig, Settings, TrainingConfig
from emutune.learning.guided import Guided
from emutune.learning.learner import Learner
from emutune.learning.learners import register_learner
from emutune.learning.teachers import teacher_of
from emutune.learning.training import load_policy, train_seed, train_seeds

__all__ = [
    "CheckpointHeader",
    "Guided",
    "GuidedConfig",
    "LearnedPolicy",
    "Learner",
    "Settings",
    "TrainingConfig",
    "load_policy",
    "register_learner",
    "teacher_of",
    "train_seed",
    "train_seeds",
]
