"""Selectors of tiles and the mass that tiles retain, against plain numpy from the descriptions, one head of one prompt at a time."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import PromptMask, prompt_attention
from pallas_kernels.prompt_attention import BLOCK, BlockMeans, Retained, SampleAttention, WindowTiles, mass, means, retained_mass, tile_mass
from pallas_kernels.prompt_attention.selectors import fewest_reaching
from tests.pallas_kernels.budget import INTERPRET
from tests.pallas_kernels.lowering import cuda_lowering

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
NUM_QUERIES, NUM_KEYS, NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE = 384, 768, 4, 2, 8
LENGTHS = np.array([768, 500, 300])  # the last ends in the first tile of the chunk at 256, and before the one at 384
OFFSETS = (0, 256, 384)
NUM_TILES = NUM_KEYS // BLOCK


def make_problem(seed=0):
    """Queries of a chunk and all keys; every second tile of keys points somewhere, so that the softmax has something to prefer."""
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(len(LENGTHS), NUM_QUERIES, NUM_HEADS, HEAD_SIZE)) * 2
    k = rng.normal(size=(len(LENGTHS), NUM_KEYS, NUM_KV_HEADS, HEAD_SIZE))
    towards = rng.normal(size=(len(LENGTHS), NUM_TILES, NUM_KV_HEADS, HEAD_SIZE))
    towards[:, 1::2] *= 0.1
    q += rng.normal(size=(len(LENGTHS), 1, NUM_HEADS, HEAD_SIZE))
    return q.astype(np.float32), (k + np.repeat(towards, BLOCK, axis=1)).astype(np.float32)


Q, K = make_problem()


def softmax(b, n, first):
    """The probabilities [T, S] of a head's queries, a query at a time; zeros for those after the end of the prompt."""
    found = np.zeros((NUM_QUERIES, NUM_KEYS))
    keys = K[b, :, n // (NUM_HEADS // NUM_KV_HEADS)].astype(np.float64)
    for t in range(min(NUM_QUERIES, max(LENGTHS[b] - first, 0))):
        scores = np.exp(keys[: first + t + 1] @ Q[b, t, n].astype(np.float64) / HEAD_SIZE**0.5)
        found[t, : first + t + 1] = scores / scores.sum()
    return found


def of_tiles(mass):
    return mass.reshape(*mass.shape[:-1], NUM_TILES, BLOCK).sum(axis=-1)


def largest(mass, share):
    """The fewest indices whose mass reaches the share, the largest first."""
    chosen, total = set(), 0.0
    for index in sorted(range(len(mass)), key=lambda i: -mass[i]):
        if total >= share * mass.sum():
            break
        chosen.add(index)
        total += mass[index]
    return chosen


def expect_sample_1(s, b, n, first, i, j):
    probabilities, length = softmax(b, n, first), LENGTHS[b]
    rows = [t for t in range(NUM_QUERIES) if t % round(1 / s.sampled_fraction) == round(1 / s.sampled_fraction) - 1]
    nearest = max(first + i * BLOCK - (j * BLOCK + BLOCK - 1), 0)  # distance of the nearest pair of the two tiles
    last = any(length - s.last_tokens <= first + i * BLOCK + t for t in range(BLOCK))
    return j in largest(of_tiles(probabilities[rows]).sum(axis=0), s.share) or nearest < s.window_fraction * length or last


def expect_sample_2(s, b, n, first, i, j):
    mass, rows = of_tiles(softmax(b, n, first)), []
    inside = min(max(LENGTHS[b] - first, 0), NUM_QUERIES)
    for start in range(0, NUM_QUERIES, s.segment_tokens):
        end = min(start + s.segment_tokens, inside)
        rows += [t for t in range(max(start, end - round(s.segment_tokens * s.sampled_fraction)), end)]
    columns, diagonals = np.zeros(NUM_TILES), np.zeros(NUM_TILES)
    for t in rows:
        for tile in range((first + t) // BLOCK + 1):
            columns[tile] += mass[t, tile]
            diagonals[(first + t) // BLOCK - tile] += mass[t, tile]
    return j in largest(columns, s.share) or first // BLOCK + i - j in largest(diagonals, s.diagonal_share)


def expect_blocks(s, b, n, first, i, j):
    own = first // BLOCK + i
    if j < s.first_tiles or own - j < s.near_tiles or own >= -(-LENGTHS[b] // BLOCK) - s.last_rows:
        return True
    keys, scores = K[b, : LENGTHS[b], n // 2].astype(np.float64), []
    for tile in range(own + 1):
        mean = keys[tile * BLOCK : (tile + 1) * BLOCK].mean(axis=0)
        real = [t for t in range(i * BLOCK, (i + 1) * BLOCK) if first + t < LENGTHS[b]]
        scores.append(sum(np.exp(Q[b, t, n] @ mean / HEAD_SIZE**0.5) for t in real))
    return scores[j] >= s.alpha * max(scores)


def expect_window(s, b, n, first, i, j):
    return j < s.first_tiles or first // BLOCK + i - j < s.near_tiles


FEW = dict(first_tiles=0, near_tiles=1, last_rows=0)
CASES = {
    "columns": (SampleAttention(version=1, share=0.5, window_fraction=0.0, last_tokens=0), expect_sample_1),
    "columns, window, last": (SampleAttention(version=1, share=0.3, window_fraction=0.3, last_tokens=40), expect_sample_1),
    "columns and diagonals": (SampleAttention(share=0.3, diagonal_share=0.5, segment_tokens=160, sampled_fraction=0.1), expect_sample_2),
    "diagonals only": (SampleAttention(share=0.0, diagonal_share=0.8, segment_tokens=384), expect_sample_2),
    "means": (BlockMeans(alpha=0.6, **FEW), expect_blocks),
    "means, first, near, last": (BlockMeans(alpha=0.9, first_tiles=1, near_tiles=2, last_rows=1), expect_blocks),
    "window": (WindowTiles(first_tiles=1, near_tiles=2), expect_window),
}
CASES = {name: (dataclasses.replace(selector, dense_below_tokens=0), expect) for name, (selector, expect) in CASES.items()}


@functools.cache
def chooser(selector):
    return jax.jit(lambda q, k, first_query, lengths: selector.choose(q, k, first_query=first_query, lengths=lengths))


def mask_of(selector, first, q=Q, k=K, lengths=LENGTHS):
    lengths = jnp.asarray(lengths, jnp.int32)
    tiles, counts = chooser(selector)(jnp.asarray(q), jnp.asarray(k), jnp.int32(first), lengths)
    causal = PromptMask.causal(first, lengths, num_keys=NUM_KEYS)
    return dataclasses.replace(causal, key_tiles=tiles, key_counts=counts, blocks=(BLOCK, BLOCK))


def kept(selector, first, **arrays):
    """Which tiles are listed [B, N, I, J], of the tiles of queries that a prompt has."""
    return np.asarray(mask_of(selector, first, **arrays).kept_tiles()) & real_tiles(first)


def real_tiles(first):
    return (first + np.arange(0, NUM_QUERIES, BLOCK)[None] < LENGTHS[:, None])[:, None, :, None]


@pytest.mark.parametrize("name", CASES)
def test_tiles_are_those_of_the_description(name):
    selector, expect = CASES[name]
    some_left_out = False
    for first in OFFSETS:
        found, counts = kept(selector, first), np.asarray(mask_of(selector, first).key_counts)
        for b, n, i, j in np.argwhere(np.broadcast_to(real_tiles(first), found.shape)):
            own = first // BLOCK + i
            expected = j <= own and (j == own or expect(selector, b, n, first, i, j))
            assert found[b, n, i, j] == expected, (first, b, n, i, j)
            assert counts[b, n, i, 0] == 1, "the tile on the diagonal alone is cut"
            some_left_out |= j <= own and not expected
    assert some_left_out, "a case that keeps everything shows nothing"


def test_an_offset_within_a_tile_has_two_cut_tiles():
    mask = mask_of(dataclasses.replace(CASES["window"][0], near_tiles=1, first_tiles=0), 192)
    for i in range(3):
        assert mask.key_counts[0, 0, i].tolist() == [2, 2]
        assert sorted(np.asarray(mask.key_tiles[0, 0, i, :2])) == [1 + i, 2 + i]


@pytest.mark.parametrize("name", ["columns", "columns and diagonals", "means"])
def test_what_is_not_of_a_prompt_does_not_matter(name):
    """NaN in queries and keys after the end of each prompt, and other prompts in the batch, change no choice."""
    selector, _ = CASES[name]
    for first in OFFSETS:
        clean, q, k = kept(selector, first), Q.copy(), K.copy()
        for b, length in enumerate(LENGTHS):
            q[b, max(length - first, 0) :], k[b, length:] = np.nan, np.nan
        np.testing.assert_array_equal(kept(selector, first, q=q, k=k), clean)
        q[0], k[0] = np.nan, np.nan
        np.testing.assert_array_equal(kept(selector, first, q=q, k=k)[1:], clean[1:])


MONOTONE = {
    "columns": [dict(share=x) for x in (0.0, 0.3, 0.6, 0.9, 1.0)],
    "columns and diagonals": [dict(diagonal_share=x) for x in (0.0, 0.5, 0.8, 1.0)],
    "means": [dict(alpha=x) for x in (1.0, 0.8, 0.5, 0.0)],
}


@pytest.mark.parametrize("name", MONOTONE)
def test_a_lower_threshold_keeps_a_part(name):
    """Of what a higher one keeps; the last one keeps everything, whose attention is that of no lists, to the bit."""
    steps = [dataclasses.replace(CASES[name][0], **change) for change in MONOTONE[name]]
    found = [kept(selector, 256) for selector in steps]
    for fewer, more in itertools.pairwise(found):
        assert (more | ~fewer).all() and fewer.sum() < more.sum()
    q, k = jnp.asarray(Q), jnp.asarray(K.reshape(-1, NUM_KV_HEADS, HEAD_SIZE))
    attend = functools.partial(prompt_attention, q, k, k[::-1], implementation="reference")
    causal = PromptMask.causal(256, jnp.asarray(LENGTHS, jnp.int32), num_keys=NUM_KEYS)
    np.testing.assert_array_equal(attend(mask_of(steps[-1], 256)), attend(causal))
    assert np.abs(attend(mask_of(steps[0], 256)) - attend(causal))[0].max() > 0.1


def test_short_prompts_are_read_densely():
    selector = dataclasses.replace(CASES["window"][0], first_tiles=0, near_tiles=1, dense_below_tokens=501)
    share = kept(selector, 256).sum(axis=(1, 3))
    assert share.tolist() == [[4, 4, 4], [12, 16, 0], [12, 0, 0]]  # tiles of four heads: one; all three, four; all three


def test_tile_mass_and_retained_mass_are_the_softmax():
    """Of all queries, and of some, each with tiles of its own; in one step and in several over the keys."""
    rng, first = np.random.default_rng(5), 256
    mask = mask_of(CASES["columns"][0], first)
    some = jnp.asarray(rng.choice(NUM_QUERIES, 20, replace=False), jnp.int32)
    found, sampled = retained_mass(jnp.asarray(Q), jnp.asarray(K), mask), retained_mass(jnp.asarray(Q), jnp.asarray(K), mask, some)
    positions = jnp.broadcast_to(first + jnp.arange(NUM_QUERIES, dtype=jnp.int32), Q.shape[:2])
    by_tile, tiles = np.asarray(tile_mass(jnp.asarray(Q), jnp.asarray(K), positions)), np.asarray(mask.kept_tiles())
    assert found.dtype == jnp.float32 and sampled.shape == (3, NUM_HEADS, 20)
    for b, n in np.ndindex(len(LENGTHS), NUM_HEADS):
        real = np.arange(NUM_QUERIES) < LENGTHS[b] - first
        exact = of_tiles(softmax(b, n, first))
        np.testing.assert_allclose(by_tile[b, n][real], exact[real], atol=1e-5)
        expected = (exact * np.repeat(tiles[b, n], BLOCK, axis=0)).sum(axis=1)
        np.testing.assert_allclose(found[b, n][real], expected[real], atol=1e-5)
        np.testing.assert_allclose(sampled[b, n][real[some]], expected[some][real[some]], atol=1e-5)
    assert found[0].min() < 0.9, "a mask that leaves out nothing shows nothing"
    causal = PromptMask.causal(first, jnp.asarray(LENGTHS, jnp.int32), num_keys=NUM_KEYS)
    np.testing.assert_allclose(retained_mass(jnp.asarray(Q), jnp.asarray(K), causal)[0], 1, atol=1e-6)


@pytest.mark.parametrize("interpret", INTERPRET)
def test_the_kernel_finds_the_same_mass(interpret):
    """More rows than a tile has, at positions in no order; the tiles after a query hold nothing."""
    rng, size = np.random.default_rng(1), HEAD_SIZE if interpret else 64
    q, k = (jnp.asarray(np.concatenate([x] * (size // HEAD_SIZE), axis=3)) for x in (Q[:, :70], K))
    positions = jnp.asarray(rng.integers(0, NUM_KEYS, (3, 70)), jnp.int32)
    found, expected = (tile_mass(q, k, positions, implementation=name, interpret=interpret) for name in ("triton", "xla"))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    after = np.arange(NUM_TILES) * BLOCK > np.asarray(positions)[:, None, :, None]
    assert not np.asarray(found)[np.broadcast_to(after, found.shape)].any() and after.any()


@pytest.mark.parametrize("interpret", INTERPRET)
def test_the_kernel_of_scores_finds_the_same(interpret, monkeypatch):
    """At an offset, with queries after the end of a prompt; more means than the kernel takes at once, some after the last query."""
    monkeypatch.setattr(means, "BLOCK_MEANS", 64 if not interpret else 4)
    q, k = (jnp.asarray(np.concatenate([x] * (1 if interpret else 64 // HEAD_SIZE), axis=3)) for x in (Q, K[:, ::BLOCK]))
    arguments = q, k, jnp.int32(256), jnp.asarray(LENGTHS, jnp.int32)
    found, expected = (means.tile_scores(*arguments, implementation=name, interpret=interpret) for name in ("triton", "xla"))
    before = np.arange(NUM_TILES)[None, :] <= 2 + np.arange(NUM_QUERIES // BLOCK)[:, None]
    np.testing.assert_allclose(*(np.where(before, x, 0) for x in (found, expected)), atol=1e-5 if interpret else 2e-3)
    assert np.isneginf(np.asarray(expected)[2, :, 1:]).all() and np.isfinite(np.asarray(expected)[:2, :, 0]).all()


def test_the_kernels_lower_for_cuda(monkeypatch):
    monkeypatch.setattr(mass, "device_reason", lambda *_: None)
    scores = functools.partial(means.tile_scores, implementation="triton")
    halves = [jax.ShapeDtypeStruct((1, tokens, heads, 64), jnp.bfloat16) for tokens, heads in ((256, 4), (70, 2))]
    numbers = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((), (1,))]
    assert "__gpu$xla.gpu.triton" in cuda_lowering(scores, *halves, *numbers)
    q, k = jax.ShapeDtypeStruct((2, 100, 4, 64), jnp.bfloat16), jax.ShapeDtypeStruct((2, 1024, 2, 64), jnp.bfloat16)
    positions = jax.ShapeDtypeStruct((2, 100), jnp.int32)
    assert "__gpu$xla.gpu.triton" in cuda_lowering(functools.partial(tile_mass, implementation="triton"), q, k, positions)
    with pytest.raises(NotImplementedError, match="head size must be 32, 64 or 128, got 8"):
        tile_mass(jnp.asarray(Q), jnp.asarray(K), jnp.zeros((3, NUM_QUERIES), jnp.int32), implementation="triton")


def test_mass_is_the_same_in_pieces(monkeypatch):
    positions = jnp.broadcast_to(jnp.arange(0, NUM_QUERIES, 24, dtype=jnp.int32), (3, 16))
    whole = tile_mass(jnp.asarray(Q[:, :16]), jnp.asarray(K), positions)
    monkeypatch.setattr(mass, "MAX_SCORES", 1)
    np.testing.assert_allclose(tile_mass(jnp.asarray(Q[:, :16]), jnp.asarray(K), positions), whole, atol=1e-6)
    monkeypatch.setattr(means, "MAX_SCORES", 1)
    selector = CASES["means"][0]
    _, counts = selector.choose(jnp.asarray(Q), jnp.asarray(K), first_query=256, lengths=jnp.asarray(LENGTHS, jnp.int32))
    np.testing.assert_array_equal(counts, mask_of(selector, 256).key_counts)


def test_retained_adds_up_over_chunks():
    """Every fifth query of two chunks; queries and tiles after the end of a prompt do not count."""
    lengths, every = jnp.asarray(LENGTHS, jnp.int32), 5
    total, pool = Retained.nothing(3, NUM_HEADS, every), jnp.asarray(K.reshape(-1, NUM_KV_HEADS, HEAD_SIZE))
    expected = {name: np.zeros((3, NUM_HEADS)) for name in ("total", "queries", "kept", "tiles")} | {"least": np.ones((3, NUM_HEADS))}
    for first in (0, 384):
        mask = mask_of(CASES["columns"][0], first, lengths=lengths)
        total = total.after(jnp.asarray(Q), pool, mask)
        held, tiles = np.asarray(retained_mass(jnp.asarray(Q), jnp.asarray(K), mask)), kept(CASES["columns"][0], first)
        for b, n in np.ndindex(3, NUM_HEADS):
            rows = [t for t in range(NUM_QUERIES) if t % every == every - 1 and first + t < LENGTHS[b]]
            expected["total"][b, n] += held[b, n, rows].sum()
            expected["least"][b, n] = min([expected["least"][b, n], *held[b, n, rows]])
            expected["queries"][b, n] += len(rows)
            expected["kept"][b, n] += tiles[b, n].sum()
            expected["tiles"][b, n] += sum(t // BLOCK + 1 for t in range(first, min(first + NUM_QUERIES, LENGTHS[b]), BLOCK))
    for name, values in expected.items():
        np.testing.assert_allclose(getattr(total, name), values, rtol=1e-5, err_msg=name)
    labels = jnp.zeros((3, NUM_QUERIES), jnp.int32)
    with pytest.raises(ValueError, match="measured of prompts that are read causally"):
        total.after(jnp.asarray(Q), pool, dataclasses.replace(mask, query_labels=labels))


SABOTAGE = {
    "an offset of one tile more": dict(first=384),
    "keys of the other kv head": dict(k=K[:, :, ::-1]),
    "keys of another prompt": dict(k=np.roll(K, 1, axis=0)),
    "queries of another prompt": dict(q=np.roll(Q, 1, axis=0)),
}


@pytest.mark.parametrize("wrong", SABOTAGE)
@pytest.mark.parametrize("name", ["columns", "columns and diagonals", "means"])
def test_the_comparison_has_teeth(name, wrong):
    selector, _ = CASES[name]
    arrays = {"first": 256, **SABOTAGE[wrong]}
    assert (kept(selector, **arrays)[0] != kept(selector, 256)[0]).any()


def test_the_fewest_reach_a_share_at_its_edges():
    mass = jnp.asarray([[0.5, 0.25, 0.25, 0.0], [0.0, 0.0, 0.0, 0.0]])
    for share, expected in [(0.0, 0), (0.5, 1), (0.51, 2), (0.75, 2), (0.76, 3), (1.0, 4)]:
        assert np.asarray(fewest_reaching(mass, share)).sum(axis=1).tolist() == [expected, 4 if share == 1 else 0], share


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: SampleAttention(version=3), "version must be 1 or 2, got 3"),
        (lambda: SampleAttention(share=1.5), "share must be 0 to 1, got 1.5"),
        (lambda: SampleAttention(sampled_fraction=0), "sampled_fraction must be above 0"),
        (lambda: BlockMeans(alpha=-0.1), "alpha must be 0 to 1, got -0.1"),
        (lambda: BlockMeans(near_tiles=-1), "near_tiles must be from 0, got -1"),
        (lambda: BlockMeans(near_tiles=1.5), "near_tiles must be a whole number, got 1.5"),
        (lambda: WindowTiles(dense_below_tokens=-1), "dense_below_tokens must be from 0"),
        (lambda: WindowTiles().choose(jnp.asarray(Q[:, :100]), jnp.asarray(K)), "T and S multiples of 128"),
    ],
)
def test_wrong_settings_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
