"""What a step computes, counted another way; and the peaks of devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pallas_kernels import TileMask, masked_attention
from pallas_kernels.sequence_attention import api as kernels_of_sequences
from selfspan_jax import training
from selfspan_jax.attention.policies import get_policy
from selfspan_jax.attention.sequences import attend_in_training, attend_under, split_and_rotate, training_implementation
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
    with pytest.raises(ValueError, match="implementation is 'cuda'; allowed: xla, cudnn, triton, mosaic"):
        training.loss_sums(model, batch, "cuda")


def test_rows_of_dense_masks_take_the_packed_kernels_where_there_are_any(monkeypatch):
    monkeypatch.setattr(kernels_of_sequences, "device_reason", lambda *_, **__: None)
    dense, span = (random_model(head_size=64, mask=mask, compute_dtype="bfloat16") for mask in ("dense", "span"))
    taken = {
        (model.config.mask, tokens): training_implementation(model.config, tokens)
        for model in (dense, span)
        for tokens in (1024, 1000, 512)
    }
    assert taken.pop(("dense", 1024)) == "mosaic" and {*taken.values()} == {"triton"}
    assert training_implementation(random_model(head_size=64, mask="dense").config, 1024) is None  # float32
    with pytest.raises(NotImplementedError, match="'mosaic': the mask must be dense"):
        training.loss_sums(span, DeviceBatch.of(batch_of(0)), "mosaic")


@pytest.mark.gpu
def test_packed_rows_train_through_the_kernels_as_through_xla():
    """Loss and gradients of a dense model, two documents and padding in a row of 256 tokens."""
    model = random_model(head_size=64, num_heads=6, num_kv_heads=2, mask="dense", compute_dtype="bfloat16", max_context_tokens=256)
    rng = np.random.default_rng(0)
    segments = np.repeat([[1, 2, 0], [1, 1, 2]], [100, 90, 66], axis=1)
    ids, positions = rng.integers(4, model.vocab_size, (2, 256)), np.broadcast_to(np.arange(256), (2, 256))
    batch = DeviceBatch(*(jnp.asarray(x, jnp.int32) for x in (ids, segments, positions)), jnp.asarray(segments > 0))
    graph, params = nnx.split(model, nnx.Param)

    def sums(params, implementation):
        return training.loss_sums(nnx.merge(graph, params), batch, implementation)

    both = jax.jit(jax.value_and_grad(sums, has_aux=True), static_argnums=1)
    with jax.numpy_dtype_promotion("standard"):  # the gradient of JAX's own attention mixes precisions
        (found, other), (expected, same) = both(params, "mosaic"), both(params, "xla")
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-2)
    assert found[1]["pairs"] == expected[1]["pairs"]
    for one, exact in zip(jax.tree.leaves(other), jax.tree.leaves(same), strict=True):
        assert np.sqrt(np.mean((one - exact) ** 2)) < 0.05 * np.sqrt(np.mean(exact**2))
