"""Training: one pure step, the loop around it, the optimizer, run directories."""

from selfspan_jax.training.loop import (
    DeviceBatch,
    MetricsLog,
    Stopped,
    TrainingDiverged,
    TrainState,
    initial_state,
    prefetched,
    train,
    train_step,
)

__all__ = [
    "DeviceBatch",
    "MetricsLog",
    "Stopped",
    "TrainState",
    "TrainingDiverged",
    "initial_state",
    "prefetched",
    "train",
    "train_step",
]
