"""Infini-attention: the scan over segments and the steps of decoding against plain NumPy, in float64, and against each other in a model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfspan_jax.neighbours.memory import scan_segments

RULES = ("delta", "linear")
B, T, K, G, H, S = 2, 23, 2, 3, 4, 5
RNG = np.random.default_rng(0)
Q, KEYS, V = (RNG.normal(size=(B, T, *heads, H)) for heads in ((K, G), (K,), (K,)))


def numpy_recalled(q, k, v, rule, before=0):
    """What the queries of one head recall, [t, G, H]: one token at a time, as the formulas stand.

    `before` tokens of a first, shorter segment: those that a packed row has left in the segment in which a sequence begins.
    """

    def s(x):
        return np.where(x > 0, x, np.expm1(x)) + 1

    matrix, total, out, waiting = np.zeros((H, H)), np.zeros(H), [], []
    for t in range(len(k)):
        if t >= before and (t - before) % S == 0:  # a segment begins: that before it is added, every key to the same matrix
            more = np.zeros((H, H))
            for key, value in waiting:
                known = s(key) @ matrix / (s(key) @ total) if total.any() and rule == "delta" else 0
                more += np.outer(s(key), value - known)
            matrix, total, waiting = matrix + more, total + sum((s(key) for key, _ in waiting), np.zeros(H)), []
        out.append([s(one) @ matrix / (s(one) @ total) if total.any() else np.zeros(H) for one in q[t]])
        waiting.append((k[t], v[t]))
    return np.array(out)


def recalled(rule, **rows):
    with jax.enable_x64(True):
        return np.asarray(scan_segments(*map(jnp.asarray, (Q, KEYS, V)), rule=rule, segment_tokens=S, **rows)[0])


@pytest.mark.parametrize("rule", RULES)
def test_the_scan_is_the_formulas(rule):
    found = recalled(rule)
    assert found.dtype == np.float64
    for b, head in np.ndindex(B, K):
        np.testing.assert_allclose(found[b, :, head], numpy_recalled(Q[b, :, head], KEYS[b, :, head], V[b, :, head], rule), atol=1e-12)
    # teeth: the rules differ, and only from the third segment on; a segment shorter by one token shows at once
    other = recalled("linear" if rule == "delta" else "delta")
    np.testing.assert_array_equal(found[:, : 2 * S], other[:, : 2 * S])
    assert np.abs(found - other)[:, 2 * S :].max() > 1e-2
    assert not found[:, :S].any() and np.abs(found[:, S]).min() > 1e-6


@pytest.mark.parametrize("rule", RULES)
def test_packed_sequences_recall_themselves_alone(rule):
    """Sequences that begin within segments, at a segment's first token, and that end within the segment in which they begin."""
    starts = np.array([0, 3, 4, 10, 22])
    ids = np.searchsorted(starts, np.arange(T), side="right")
    with jax.enable_x64(True):
        found = recalled(rule, segment_ids=jnp.asarray(np.stack([ids, np.full(T, 7)]), jnp.int32))
    for head in range(K):
        for first, end in zip(starts, [*starts[1:], T]):
            parts = (x[0, first:end, head] for x in (Q, KEYS, V))
            np.testing.assert_allclose(found[0, first:end, head], numpy_recalled(*parts, rule, before=-first % S), atol=1e-12)
    np.testing.assert_allclose(found[1], recalled(rule)[1], atol=1e-12)


@pytest.mark.parametrize("rule", RULES)
def test_steps_are_the_scan(rule):
    """One token at a time from a state that a scan has left after 7 and 10 tokens; a sequence may take no token."""
    with jax.enable_x64(True):
        q, k, v = map(jnp.asarray, (Q, KEYS, V))
        lengths = jnp.array([7, 10], jnp.int32)
        _, kept = scan_segments(q[:, :12], k[:, :12], v[:, :12], rule=rule, segment_tokens=S, lengths=lengths)
        expected, found = recalled(rule), []
        for step in range(13):
            active, at = jnp.array([True, step != 4]), lengths[:, None]
            now = (jnp.take_along_axis(x, at.reshape(2, *[1] * (x.ndim - 1)), axis=1) for x in (q, k, v))
            own_q, own_k, own_v = now
            found.append(np.asarray(kept.memory.recall(own_q))[:, 0])
            for b in range(2):
                np.testing.assert_allclose(found[-1][b], expected[b, int(lengths[b])], atol=1e-12)
            news = kept.memory.news(own_k, own_v, rule, active[:, None])
            kept, before = kept.after(news, active, active & (lengths % S == S - 1)), kept
            lengths = lengths + active.astype(jnp.int32)
            if step == 4:
                jax.tree.map(lambda new, old: np.testing.assert_array_equal(new[1], old[1]), kept, before)
