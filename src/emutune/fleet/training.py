"""How a fleet trains, as the trainer takes it: the same on a device, at the server, and for a calibration."""

from __future__ import annotations

from emutune.fleet.protocol import Training
from emutune.tuning.trainer import TrainerConfig


def trainer_config(training: Training) -> TrainerConfig:
    """Settings of the trainer; it scores an adapter halfway and at the end."""
    return TrainerConfig(
        steps=training.steps,
        batch=training.batch,
        learning_rate=training.learning_rate,
        seed=training.seed,
        score_every=max(1, training.steps // 2),
    )
