"""Training: one pure step, the loop around it, the optimizer, metrics, run directories."""

from selfspan_jax.training.loop import Stopped, TrainingDiverged, prefetch, train
from selfspan_jax.training.metrics import MetricsLog
from selfspan_jax.training.optimizer import learning_rate, make_optimizer
from selfspan_jax.training.step import (
    Batch,
    DeviceBatch,
    TrainState,
    check_mesh,
    count_tokens,
    device_batch,
    initial_state,
    loss_sums,
    num_trained,
    train_step,
)

__all__ = [
    "Batch",
    "DeviceBatch",
    "MetricsLog",
    "Stopped",
    "TrainState",
    "TrainingDiverged",
    "check_mesh",
    "count_tokens",
    "device_batch",
    "initial_state",
    "learning_rate",
    "loss_sums",
    "make_optimizer",
    "num_trained",
    "prefetch",
    "train",
    "train_step",
]
