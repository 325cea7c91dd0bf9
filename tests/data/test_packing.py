import collections
import contextlib
import dataclasses
import functools
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import packing, workers
from data.arithmetic import ArithmeticTask, Corpus, stream
from data.packing import batches_from, pack
from data.vocab import Vocab

QUICK = settings(derandomize=True, deadline=None, database=None, max_examples=60)
VOCAB = Vocab()
GAP_SCALES = (0, 1, 4, 16, 64)


@dataclasses.dataclass
class Made:
    """An example of given lengths whose tokens tell where they come from."""

    token_ids: np.ndarray
    prompt_tokens: int
    unpredictable: np.ndarray
    predictable: tuple[int, ...] = ()


def made(lengths):
    rng = np.random.default_rng(0)
    prompts = [int(rng.integers(1, n)) for n in lengths]
    left_out = [rng.integers(prompt, n, rng.integers(3)) for prompt, n in zip(prompts, lengths)]
    also = [tuple(rng.integers(0, prompt, rng.integers(3)).tolist()) for prompt in prompts]
    return [Made(rng.integers(1, VOCAB.size, n).astype(np.int32), *places) for n, *places in zip(lengths, prompts, left_out, also)]


@pytest.fixture(scope="module")
def examples():
    return list(itertools.islice(stream(Corpus(label_jumps=0), seed=0), 3000))


def unpack(batch):
    """(token_ids, positions, target_mask) of every segment, checking that segments are contiguous and from 1 on."""
    for row in range(len(batch.token_ids)):
        segments = batch.segment_ids[row]
        used = int((segments > 0).sum())
        assert (segments[used:] == 0).all() and (np.diff(segments[:used]) >= 0).all()
        assert sorted(set(segments[:used].tolist())) == list(range(1, segments.max() + 1))
        padding = segments == 0
        assert (batch.token_ids[row, padding] == VOCAB.pad_id).all()
        assert not batch.positions[row, padding].any() and not batch.target_mask[row, padding].any()
        for segment in range(1, segments.max() + 1):
            inside = segments == segment
            yield batch.token_ids[row, inside], batch.positions[row, inside], batch.target_mask[row, inside]


def check(batch, expected):
    """The batch holds exactly these examples, each whole and alone in its segment."""
    left = collections.Counter(example.token_ids.tobytes() for example in expected)
    own = {name: [list(getattr(x, name, ())) for x in expected] for name in ("unpredictable", "predictable")}
    targets = {x.token_ids.tobytes(): (x.prompt_tokens, *places) for x, *places in zip(expected, *own.values())}
    for token_ids, positions, target_mask in unpack(batch):
        left[token_ids.tobytes()] -= 1
        assert positions.tolist() == list(range(len(token_ids)))
        first, left_out, also = targets[token_ids.tobytes()]
        assert target_mask.tolist() == [(t >= first and t not in left_out) or t in also for t in range(len(token_ids))]
    assert not any(left.values())


def same(a, b):
    return all(np.array_equal(x, y) and np.asarray(x).dtype == np.asarray(y).dtype for x, y in zip(a, b, strict=True))


def test_dtypes_and_shapes(examples):
    batch = next(pack(examples, VOCAB, batch_size=4, sequence_tokens=512))
    assert [array.dtype for array in batch[:4]] == [np.int32, np.int32, np.int32, np.bool_]
    assert {array.shape for array in batch[:4]} == {(4, 512)}
    assert type(batch.next_example) is int


def test_every_example_is_packed_once_in_order_of_batches(examples):
    start = 1000
    for batch in pack(examples, VOCAB, batch_size=16, sequence_tokens=512, start=start):
        check(batch, examples[start - 1000 : batch.next_example - 1000])
        assert batch.next_example > start
        start = batch.next_example
    assert start == 1000 + len(examples)


@QUICK
@given(st.lists(st.integers(2, 20), max_size=60), st.integers(1, 4))
def test_any_lengths(lengths, batch_size):
    found = made(lengths)
    start = 0
    for batch in pack(found, VOCAB, batch_size=batch_size, sequence_tokens=20):
        check(batch, found[start : batch.next_example])
        start = batch.next_example
    assert start == len(found)


def test_the_target_is_the_response(examples):
    batch = next(pack(examples, VOCAB, batch_size=4, sequence_tokens=512))
    for token_ids, _, target_mask in unpack(batch):
        solve = token_ids.tolist().index(VOCAB.solve_id)
        assert not target_mask[: solve + 1].any() and target_mask[solve + 1 :].all()
        assert token_ids[target_mask][-1] == VOCAB.eos_id


@pytest.mark.parametrize("gap_scales", [(), GAP_SCALES])
def test_resuming_is_exact(gap_scales):
    options = {"batch_size": 8, "sequence_tokens": 512, "gap_scales": gap_scales, "gap_seed": 3}
    batches = list(itertools.islice(pack(stream(Corpus(), seed=5), VOCAB, **options), 12))
    for done in (1, 4, 11):
        start = batches[done - 1].next_example
        resumed = pack(stream(Corpus(), seed=5, start=start), VOCAB, start=start, **options)
        for expected, found in zip(batches[done:], resumed, strict=False):
            assert same(expected, found)


def rows_of(batch, rows):
    return [array[rows] for array in batch[:4]]


@pytest.mark.parametrize("num_workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_shards_are_packed_from_examples_of_their_own_wherever_they_are_packed(num_workers):
    """All parts in one place, or each in its own: the same rows; no example is in two parts; resuming is exact."""
    source = functools.partial(stream, Corpus(), seed=5)
    options = {"batch_size": 8, "sequence_tokens": 512, "gap_scales": GAP_SCALES, "gap_seed": 3, "num_workers": num_workers}
    together = batches_from(source, VOCAB, num_shards=2, **options)(0)
    apart = [batches_from(source, VOCAB, num_shards=2, shards=[part], **options)(0) for part in range(2)]
    prompts, batches = [set(), set()], []
    for _ in range(6):
        batches.append(next(together))
        for part, rows in enumerate((slice(0, 4), slice(4, 8))):
            own = next(apart[part])
            assert same(rows_of(batches[-1], rows), rows_of(own, slice(None)))
            assert own.next_example[part] == batches[-1].next_example[part] and own.next_example[1 - part] == 0
            prompts[part] |= {token_ids.tobytes() for token_ids, *_ in unpack(own) if len(token_ids) > 100}
    assert min(map(len, prompts)) > 30 and not prompts[0] & prompts[1]
    resumed = batches_from(source, VOCAB, num_shards=2, **options)(list(batches[1].next_example))
    for expected, found in zip(batches[2:], resumed, strict=False):
        assert same(expected[:4], found[:4]) and expected.next_example == found.next_example
    for iterator in (together, resumed, *apart):
        iterator.close()


def test_shards_that_do_not_divide_the_rows_are_refused():
    with pytest.raises(ValueError, match="num_shards is 3; allowed: divisors of 8 rows"):
        batches_from(stream, VOCAB, num_shards=3, batch_size=8, sequence_tokens=512)


@pytest.mark.parametrize(("batch_size", "least"), [(16, 0.92), (64, 0.97)])
def test_rows_are_well_filled(batch_size, least):
    batches = itertools.islice(pack(stream(Corpus(names_first_step=False), seed=0), VOCAB, batch_size=batch_size, sequence_tokens=512), 8)
    assert np.mean([(batch.segment_ids > 0).mean() for batch in batches]) > least


def test_gaps_open_at_seg_tokens_only_and_belong_to_the_example(examples):
    options = {"sequence_tokens": 512, "gap_scales": GAP_SCALES, "gap_seed": 1}
    known = {example.token_ids.tobytes(): number for number, example in enumerate(examples)}
    largest_jumps, smallest_jumps, positions_of = {}, {}, {}
    for batch in pack(examples, VOCAB, batch_size=32, **options):
        for token_ids, positions, _ in unpack(batch):
            jumps = np.diff(positions, prepend=-1) - 1
            is_seg = (token_ids >= VOCAB.seg_base) & (token_ids < VOCAB.ref_base)
            assert (jumps >= 0).all() and not jumps[~is_seg].any()
            number = known[token_ids.tobytes()]
            positions_of[number] = positions
            if is_seg.sum() > 30:
                largest_jumps[number], smallest_jumps[number] = int(jumps.max()), int(jumps[is_seg].min())
    # With more than 30 draws, a fifth or more from 0..2s and none from beyond, the largest tells s; and what is near occurs beside it.
    assert set(smallest_jumps.values()) == {0}
    scales = collections.Counter(next(s for s in GAP_SCALES if largest <= 2 * s) for largest in largest_jumps.values())
    assert set(scales) == set(GAP_SCALES)
    assert all(abs(count / scales.total() - 0.2) < 0.06 for count in scales.values())

    start = 700
    for batch in itertools.islice(pack(examples[start:], VOCAB, batch_size=3, start=start, **options), 5):
        for token_ids, positions, _ in unpack(batch):
            assert np.array_equal(positions, positions_of[known[token_ids.tobytes()]])
    other = next(pack(examples, VOCAB, batch_size=32, **{**options, "gap_seed": 2}))
    assert not np.array_equal(other.positions, next(pack(examples, VOCAB, batch_size=32, **options)).positions)


def test_gap_sizes_are_uniform(examples):
    counts = collections.Counter()
    for batch in pack(examples[:600], VOCAB, batch_size=8, sequence_tokens=512, gap_scales=(2,)):
        for token_ids, positions, _ in unpack(batch):
            is_seg = (token_ids >= VOCAB.seg_base) & (token_ids < VOCAB.ref_base)
            counts.update((np.diff(positions, prepend=-1) - 1)[is_seg].tolist())
    assert set(counts) == {0, 1, 2, 3, 4}
    assert all(abs(count / counts.total() - 0.2) < 0.02 for count in counts.values())


def test_each_tag_draws_its_scale_among_those_up_to_its_example_s(examples):
    """Of two scales, a half of the examples have jumps of either kind, in like parts."""
    shares = []
    for batch in pack(examples[:600], VOCAB, batch_size=8, sequence_tokens=512, gap_scales=(1000, 0)):
        for token_ids, positions, _ in unpack(batch):
            is_seg = (token_ids >= VOCAB.seg_base) & (token_ids < VOCAB.ref_base)
            if is_seg.sum() > 20:
                shares.append(((np.diff(positions, prepend=-1) - 1)[is_seg] > 0).mean())
    none = [share for share in shares if share == 0]
    some = [share for share in shares if share > 0]
    assert abs(len(none) / len(shares) - 0.5) < 0.1 and abs(np.mean(some) - 0.5) < 0.03


@pytest.mark.parametrize("labelling", ["none", "plain"])
def test_gaps_open_where_a_text_without_tags_has_its_pieces(labelling):
    corpus = Corpus(labelling=labelling)
    written = list(itertools.islice(stream(corpus, seed=0), 200))
    seen = set()
    for batch in pack(written, VOCAB, batch_size=4, sequence_tokens=512, gap_scales=(16,), gap_ids=ArithmeticTask.of(corpus).step_ids):
        for token_ids, positions, _ in unpack(batch):
            seen |= set(token_ids[np.diff(positions, prepend=-1) > 1].tolist())
    pieces = {VOCAB.ids["("], VOCAB.ids[")"]}
    assert (
        seen == pieces | {VOCAB.solve_id} if labelling == "plain" else pieces < seen <= pieces | set(range(VOCAB.seg_base, VOCAB.ref_base))
    )


def test_an_example_longer_than_a_row_is_named():
    packed = pack(made([5, 6, 21]), VOCAB, batch_size=2, sequence_tokens=20, start=40)
    with pytest.raises(ValueError, match=r"^example 42 has 21 tokens, a row only 20: raise --sequence-tokens$"):
        next(packed)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "a batch of 0 rows of 8 tokens"),
        ({"sequence_tokens": 0}, "a batch of 2 rows of 0 tokens"),
        ({"gap_scales": (1, -1)}, r"gap_scales are \(1, -1\)"),
        ({"gap_seed": -1}, "gap_seed is -1"),
    ],
)
def test_sizes_are_checked_before_anything_is_read(options, message):
    with pytest.raises(ValueError, match=message):
        pack(iter(()), VOCAB, **{"batch_size": 2, "sequence_tokens": 8, **options})


def test_no_examples_no_batches():
    assert list(pack([], VOCAB, batch_size=2, sequence_tokens=8)) == []


def test_batches_packed_by_another_process_are_the_same():
    corpus = Corpus(max_ops=6)
    make = functools.partial(
        packing.pack_stream,
        functools.partial(stream, corpus, seed=0, num_workers=1),
        corpus.vocab,
        batch_size=4,
        sequence_tokens=256,
        gap_scales=(0, 4),
        start=7,
    )
    here = pack(stream(corpus, seed=0, start=7), corpus.vocab, batch_size=4, sequence_tokens=256, gap_scales=(0, 4), start=7)
    with contextlib.closing(workers.remote(make)) as batches:
        for expected, there in zip(itertools.islice(here, 3), batches):
            for name, array in expected._asdict().items():
                np.testing.assert_array_equal(getattr(there, name), array, err_msg=name)


def test_what_goes_wrong_in_the_process_is_raised_here():
    corpus = Corpus(max_ops=6)
    make = functools.partial(packing.pack_stream, functools.partial(stream, corpus, seed=0), corpus.vocab, batch_size=2, sequence_tokens=20)
    with pytest.raises(ValueError, match="a row only 20"):
        next(workers.remote(make))
