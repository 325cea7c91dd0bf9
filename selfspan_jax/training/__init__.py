"""Training: one pure step, the loop around it, the optimizer, metrics, run directories."""

from selfspan_jax.training.loop import Stopped, TrainingDiverged, prefetch, train
from selfspan_jax.training.metrics import MetricsLog
from selfspan_jax.training.optimizer import learning_rate
from selfspan_jax.training.step import Batch, DeviceBatch, check_mesh, count_tokens, initial_state, loss_sums, num_trained, train_step
