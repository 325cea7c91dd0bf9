"""What a step computes, counted another way; and the peaks of devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pallas_kernels import TileMask, masked_attention
from selfspan_jax import training
from selfspan_jax.attention.policies import get_policy
from selfspan_jax.attention.sequences import attend_in_training, attend_under, split_and_rotate
from selfspan_jax.training import DeviceBatch, metrics
from tests.selfspan_jax.models import random_model
from tests.selfspan_jax.training.test_loop import batch_of


def test_operations_are_those_of_the_compiled_model():
    """XLA's own count for the whole forward pass, of which matrix products and attention are nearly all, tripled."""
    model = random_model(hidden_size=256, intermediate_size=512, num_layers=2, num_heads=4, num_kv_heads=2, head_size=64)
    ids = jnp.zeros((1, 128), jnp.int32)

    def forward(ids):
        hidden, _ = model(ids, ids, attend_under(jnp.ones((1, 128, 128), bool), "xla"))
        return model.logits(hidden)

    counted = jax.jit(forward).lower(ids).compile().cost_analysis()["flops"]
    # XLA computes every pair, whatever the mask allows.
    assert metrics.step_flops(model, 128, 128 * 128) == pytest.approx(3 * counted, rel=0.03)


@pytest.mark.parametrize("mask", ["span", "dense"])
def test_pairs_are_counted_without_padding(mask):
    model, batch = random_model(mask=mask), DeviceBatch.of(batch_of(0))
    _, pairs = attend_in_training(batch.token_ids, model.vocab, model.config, segment_ids=batch.segment_ids)
    allowed = np.asarray(get_policy(mask).mask(batch.token_ids, model.vocab, model.config, segment_ids=batch.segment_ids))
    assert int(pairs) == allowed[np.asarray(batch.segment_ids) > 0].sum()
    if mask == "dense":
        lengths = [np.sum(row == segment) for row in np.asarray(batch.segment_ids) for segment in (1, 2)]
        assert int(pairs) == sum(n * (n + 1) // 2 for n in lengths)


def test_peaks_are_of_the_device_that_is_named():
    assert metrics.bf16_peak("NVIDIA H200") == metrics.bf16_peak("NVIDIA H100 80GB HBM3") == 989.4e12
    assert metrics.bf16_peak("NVIDIA H100 PCIe") == 756e12
    assert metrics.bf16_peak("cpu") is None and metrics.mfu(random_model(), 1e12) is None


def test_gradients_through_the_kernels_are_those_of_xla():
    """The whole model under a span mask, with the kernels in the interpreter, against attention as XLA computes it."""
    model, batch = random_model(head_size=32, header_view="labels"), DeviceBatch.of(batch_of(1, rows=2))
    mask = get_policy("span").mask(batch.token_ids, model.vocab, model.config, segment_ids=batch.segment_ids)

    def kernels(qkv, norms, angles, cache):
        return masked_attention(*split_and_rotate(qkv, angles), TileMask.of(mask), implementation="triton", interpret=True), cache

    graph, params = nnx.split(model, nnx.Param)

    def loss(params, attend):
        model = nnx.merge(graph, params)
        logits = model.logits(model(batch.token_ids, batch.positions, attend)[0])
        return jnp.sum(jnp.where(batch.target_mask, jax.nn.logsumexp(logits, axis=-1) - logits[:, :, 5], 0.0))

    found, expected = (jax.jit(jax.grad(functools.partial(loss, attend=attend)))(params) for attend in (kernels, attend_under(mask, "xla")))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5 * float(jnp.max(jnp.abs(other))) + 1e-7)


def test_the_kernels_are_refused_where_they_cannot_run():
    batch = DeviceBatch.of(batch_of(0))
    model = random_model(head_size=16)
    with pytest.raises(NotImplementedError, match="'triton'"):
        training.loss_sums(model, batch, "triton")
    with pytest.raises(ValueError, match="implementation is 'cuda'; allowed: xla, cudnn, triton"):
        training.loss_sums(model, batch, "cuda")
