"""The decoder against Llama written out in numpy (float64), and gradients against what the mask lets through (invariant 3)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from selfspan_jax.attention.sequences import attend_under
from selfspan_jax.config import PRESETS, ModelConfig
from selfspan_jax.model import Decoder
from selfspan_jax.weights import models
from tests.selfspan_jax.models import TINY, forward, random_model
from tests.selfspan_jax.reference import Reference
from tests.selfspan_jax.streams import NAMED, VIEWS, VOCAB, VOCAB_SIZE


def llama(weights, config, token_ids, positions, mask):
    """Logits [T, V] of one sequence, as Llama's reference code computes them: x @ W.T, pairs (i, i + H/2), repeated kv heads."""

    def norm(x, name):
        return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + config.rms_norm_eps) * weights[name]

    def heads(x, name, count):
        return (x @ weights[name].T).reshape(len(token_ids), count, config.head_size).transpose(1, 0, 2)

    def rope(x):
        inverse = 1.0 / config.rope_theta ** (np.arange(0, config.head_size, 2) / config.head_size)
        angles = np.concatenate([np.outer(positions, inverse)] * 2, axis=-1)
        half = config.head_size // 2
        return x * np.cos(angles) + np.concatenate([-x[..., half:], x[..., :half]], axis=-1) * np.sin(angles)

    x = weights["model.embed_tokens.weight"][token_ids]
    for i in range(config.num_layers):
        layer = f"model.layers.{i}."
        y = norm(x, layer + "input_layernorm.weight")
        q = rope(heads(y, layer + "self_attn.q_proj.weight", config.num_heads))
        k = rope(heads(y, layer + "self_attn.k_proj.weight", config.num_kv_heads))
        v = heads(y, layer + "self_attn.v_proj.weight", config.num_kv_heads)
        k, v = (np.repeat(z, config.num_heads // config.num_kv_heads, axis=0) for z in (k, v))
        scores = np.where(mask, q @ k.transpose(0, 2, 1) / np.sqrt(config.head_size), -np.inf)
        shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
        out = (shares / shares.sum(axis=-1, keepdims=True)) @ v
        x = x + out.transpose(1, 0, 2).reshape(len(token_ids), -1) @ weights[layer + "self_attn.o_proj.weight"].T
        y = norm(x, layer + "post_attention_layernorm.weight")
        gate = y @ weights[layer + "mlp.gate_proj.weight"].T
        up = y @ weights[layer + "mlp.up_proj.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * up) @ weights[layer + "mlp.down_proj.weight"].T
    head = "model.embed_tokens.weight" if config.tie_embeddings else "lm_head.weight"
    return norm(x, "model.norm.weight") @ weights[head].T


def weights_of(model):
    """float64 arrays by Llama's names."""
    arrays = models.to_llama(model)
    return {name: np.asarray(array, np.float64) for name, array in arrays.items()}


def logits_of(model, token_ids, positions, mask):
    return np.asarray(compute(model, *(jnp.asarray(x, jnp.int32)[None] for x in (token_ids, positions)), jnp.asarray(mask)[None])[0])


@nnx.jit
def compute(model, token_ids, positions, mask):
    hidden, _ = model(token_ids, positions, attend_under(mask))
    return model.logits(hidden)


CHAIN = NAMED["span widens late"][0][:12]
SHAPES = {
    "grouped": dict(),
    "one kv head": dict(num_kv_heads=1),
    "a kv head each": dict(num_kv_heads=4),
    "untied": dict(tie_embeddings=False),
    "other base and eps": dict(rope_theta=500.0, rms_norm_eps=1e-2),
    "remat": dict(remat=True),
}


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
def test_the_decoder_is_llama(changes):
    model = random_model(seed=1, **changes)
    for layer in model.layers:  # scales of 1 would hide a norm that forgets its scale
        layer.input_layernorm.scale[...] = jnp.linspace(0.5, 1.5, 32)
        layer.post_attention_layernorm.scale[...] = jnp.linspace(1.5, 0.5, 32)
    model.norm.scale[...] = jnp.linspace(0.7, 1.3, 32)
    token_ids = np.array(NAMED["specification"][0])
    positions = np.cumsum(np.arange(len(token_ids)) % 7)  # with gaps
    mask = np.array(Reference(token_ids, VOCAB).mask())
    expected = llama(weights_of(model), model.config, token_ids, positions, mask)
    # float32 against float64, measured at 3e-6 of the logits' scale of about 10.
    np.testing.assert_allclose(logits_of(model, token_ids, positions, mask), expected, atol=1e-4)
    assert np.abs(expected).max() > 1


@pytest.mark.parametrize("changes", [dict(rope_theta=9_000.0), dict(rms_norm_eps=1e-2)])
def test_the_comparison_with_llama_has_teeth(changes):
    model = random_model(seed=1)
    token_ids = np.array(NAMED["specification"][0])
    mask = np.tri(len(token_ids), dtype=bool)
    positions = 5 * np.arange(len(token_ids))
    wrong = llama(weights_of(model), dataclasses.replace(model.config, **changes), token_ids, positions, mask)
    assert np.abs(logits_of(model, token_ids, positions, mask) - wrong).max() > 1e-3


def test_bfloat16_differs_by_its_rounding_and_no_more():
    """Same weights, both precisions; the error must be that of bfloat16 (2^-9 relative per rounding), not that of a bug."""
    exact, rounded = random_model(), random_model(compute_dtype="bfloat16")
    token_ids = np.array([NAMED["specification"][0]], np.int32)
    mask = jnp.tri(token_ids.shape[1], dtype=bool)[None]
    expected, found = (np.asarray(forward(model, jnp.asarray(token_ids), mask)) for model in (exact, rounded))
    assert found.dtype == np.float32
    relative = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert 1e-4 < relative < 3e-2  # measured 0.9e-2


def test_parameters_are_float32_and_activations_what_the_config_says():
    model = random_model(compute_dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))} == {np.dtype("float32")}
    ids = jnp.zeros((1, 4), jnp.int32)
    hidden, logits = nnx.eval_shape(lambda: ((hidden := model(ids, ids, attend_under(jnp.ones((1, 4, 4), bool)))[0]), model.logits(hidden)))
    assert hidden.dtype == jnp.bfloat16 and logits.dtype == jnp.float32


def test_remat_changes_no_gradient():
    token_ids = jnp.array([NAMED["specification"][0]], jnp.int32)
    mask = jnp.tri(token_ids.shape[1], dtype=bool)[None]
    gradients = [
        nnx.grad(lambda model: jnp.sum(jnp.square(forward(model, token_ids, mask))))(random_model(remat=remat)) for remat in (False, True)
    ]
    for plain, recomputed in zip(*map(jax.tree.leaves, gradients), strict=True):
        np.testing.assert_allclose(plain, recomputed, rtol=1e-4, atol=1e-4 * float(jnp.abs(plain).max()))


def test_a_model_with_remat_runs_in_a_compiled_loop():
    """Decoding runs it so; flax writes parameters back from its own checkpointing, which a loop refuses."""
    model, token_ids = random_model(remat=True), jnp.array([NAMED["specification"][0]], jnp.int32)
    attend = attend_under(jnp.tri(token_ids.shape[1], dtype=bool)[None])

    def hidden():
        return model(token_ids, jnp.arange(token_ids.shape[1], dtype=jnp.int32)[None], attend)[0]

    expected = hidden()
    found = jax.lax.fori_loop(0, 1, lambda _, x: x + hidden(), jnp.zeros_like(expected))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def influence():
    """A function of a mask, compiled once: of the last hidden state at t the derivative by the embedding at s is not exactly zero."""
    model, token_ids = random_model(), np.array(CHAIN)
    vocab_size, width = model.embed_tokens.embedding.shape
    num_tokens = len(token_ids)
    table = model.embed_tokens.embedding[...][token_ids]  # every position its own row, so that rows are positions
    graph, params = nnx.split(model, nnx.Param)

    def hidden_states(rows, mask):
        replaced = dict(nnx.to_flat_state(params))
        replaced["embed_tokens", "embedding"] = nnx.Param(jnp.zeros((vocab_size, width)).at[:num_tokens].set(rows))
        copy = nnx.merge(graph, nnx.from_flat_state(list(replaced.items())))
        ids = jnp.arange(num_tokens, dtype=jnp.int32)[None]
        hidden, _ = copy(ids, ids, attend_under(mask[None]))
        return hidden[0]

    # One backward pass per position, as training runs it. (A whole jacobian in one program, jit(jacrev), comes out wrong for
    # a norm before a product on the CPU of JAX 0.10.2; 0.11.2 has it right.)
    cotangents = jax.random.normal(jax.random.key(1), (num_tokens, width))
    backward = jax.jit(lambda at, mask: jax.vjp(functools.partial(hidden_states, mask=mask), table)[1](at)[0])
    each = [jnp.zeros_like(table).at[t].set(cotangents[t]) for t in range(num_tokens)]
    return lambda mask: np.stack([np.any(np.asarray(backward(at, jnp.asarray(mask))) != 0, axis=1) for at in each])


@pytest.mark.parametrize("views", VIEWS, ids=["-".join(map(str, views.values())) for views in VIEWS])
def test_gradients_flow_along_chains_of_the_mask_and_nowhere_else(influence, views):
    """Exactly zero where no chain of at most num_layers steps leads, and not zero where one does."""
    reference = Reference(CHAIN, VOCAB, **views)
    mask = np.array(reference.mask())
    found = influence(mask)
    reachable = np.array([[s in reference.reaches(t) for s in range(12)] for t in range(12)])
    within_depth = np.linalg.matrix_power(mask.astype(int) + np.eye(12, dtype=int), TINY["num_layers"]) > 0
    assert not np.any(found & ~reachable)
    np.testing.assert_array_equal(found, within_depth)


def test_presets_have_the_sizes_that_they_are_named_for():
    sizes = {}
    for name, preset in PRESETS.items():
        model = nnx.eval_shape(lambda config=preset.model: Decoder(config, vocab=VOCAB, vocab_size=1042, rngs=nnx.Rngs(0)))
        sizes[name] = model.num_parameters
    assert sizes["arithmetic-tiny"] == pytest.approx(5e6, rel=0.05)
    assert sizes["arithmetic-small"] == pytest.approx(25e6, rel=0.05)
    assert sizes["arithmetic-base"] == pytest.approx(110e6, rel=0.05)


def test_every_parameter_is_a_leaf_of_its_own_layer():
    """Stacked layers would be sliced in every decode step."""
    model = random_model()
    paths = [path for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))]
    assert len(paths) == 2 * 6 + 2
    assert ("layers", 1, "self_attn", "qkv_proj", "weight") in paths and ("norm", "scale") in paths


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(num_kv_heads=3), "num_kv_heads is 3; allowed: divisors of num_heads=4"),
        (dict(head_size=7), "head_size is 7; allowed: even"),
        (dict(num_layers=0), "num_layers is 0"),
        (dict(mask="sparse"), "mask is 'sparse'; allowed: span, dense"),
        (dict(header_view="none"), "header_view is 'none'; allowed: span, labels, prompt, all"),
        (dict(compute_dtype="float64"), "compute_dtype is 'float64'"),
    ],
)
def test_configs_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**{**TINY, **changes})


def test_a_vocabulary_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="vocab_size is 19, but the structural tokens need ids up to 19"):
        Decoder(ModelConfig(**TINY), vocab=VOCAB, vocab_size=VOCAB_SIZE - 1, rngs=nnx.Rngs(0))
