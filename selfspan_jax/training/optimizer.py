"""The optimizer: AdamW with linear warm-up and cosine decay, on gradients clipped by their global norm."""

from __future__ import annotations

import jax
import optax

from selfspan_jax.config import TrainConfig


def learning_rate(config: TrainConfig) -> optax.Schedule:
    """Return the learning rate by step: linear to its peak, then a cosine down to a fraction of it."""
    return optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, config.warmup, config.steps, config.final_learning_rate_fraction * config.learning_rate
    )


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """Make AdamW (1711.05101) on clipped gradients; weight decay is on the matrices of the layers only."""

    def decays(params):
        return jax.tree.map_with_path(lambda path, _: any(getattr(key, "key", None) == "weight" for key in path), params)

    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(learning_rate(config), config.beta1, config.beta2, weight_decay=config.weight_decay, mask=decays),
    )
