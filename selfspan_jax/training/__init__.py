"""Training: one pure step, the loop around it, the optimizer, metrics, run directories."""

from selfspan_jax.parallel.interrupts import Interrupts
from selfspan_jax.training.loop import Stopped, TrainingDiverged, prefetch, train
from selfspan_jax.training.metrics import MetricsLog, read_scores
from selfspan_jax.training.optimizer import learning_rate
from selfspan_jax.training.step import (
    Batch,
    DeviceBatch,
    check_mesh,
    count_tokens,
    describe,
    initial_state,
    loss_sums,
    num_trained,
    train_step,
)
