"""Pack examples into [B, T] batches: several a row, each with its own segment and its own positions."""

import contextlib
import functools
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from data import workers
from data.errors import UserError
from data.streams import Example, Shard
from data.vocab import Vocab

Ids = npt.NDArray[np.int32]


class Batch(NamedTuple):
    """A batch of packed examples, and the position in the data after it.

    token_ids      int32 [B, T]  padded with `pad_id`
    segment_ids    int32 [B, T]  0 is padding, 1, 2, ... the examples within the row: no token may see another's
    positions      int32 [B, T]  rotary positions, from 0 in every example; padding has 0
    target_mask    bool  [B, T]  True where the token is to be predicted: the response with `<eos>`, but for an example's `unpredictable`;
                   also its `predictable`, of the prompt
    next_example   number of the first example that is in no batch yet: packing resumes from it exactly;
                   of rows that are packed in shards a number for each shard, 0 for those that are packed elsewhere
    """

    token_ids: Ids
    segment_ids: Ids
    positions: Ids
    target_mask: npt.NDArray[np.bool_]
    next_example: int | tuple[int, ...]


def pack(
    examples: Iterable[Example],
    vocab: Vocab,
    *,
    batch_size: int,
    sequence_tokens: int,
    start: int = 0,
    gap_scales: Sequence[int] = (),
    gap_seed: int | tuple[int, ...] = 0,
    gap_ids: Collection[int] | None = None,
) -> Generator[Batch, None, None]:
    """Pack examples, the first of which has number `start`, into batches of `batch_size` rows (B) of T tokens.

    A batch takes as many examples as the next ones in order allow, none left out, and arranges them in its rows. So
    a batch depends on nothing but the examples from its first on: `pack(stream(start=n), start=n)`, with n the
    `next_example` of a batch, continues exactly. When the examples end, the last batch has what is left.

    Args:
      sequence_tokens: T, the length of a row.
      gap_scales: none, or scales. Each example draws one, and each of its `<seg>` tokens one up to that, s:
        there the rotary position jumps by a uniform number in 0..2s. So what is near and what is far occur together, as
        in a text that is longer. Draws depend on (gap_seed, number of the example) alone.
      gap_ids: the tokens at which positions jump, where they are not the `<seg>` ones.

    Raises:
      UserError: an example longer than a row, or sizes or scales out of range.
    """
    if batch_size < 1 or sequence_tokens < 1:
        raise UserError(f"a batch of {batch_size} rows of {sequence_tokens} tokens; allowed: 1 and above of each")
    if any(scale < 0 for scale in gap_scales):
        raise UserError(f"gap_scales are {tuple(gap_scales)}; allowed: 0 and above")
    gap_seeds = (gap_seed,) if isinstance(gap_seed, int) else gap_seed
    if min(gap_seeds) < 0 or start < 0:
        raise UserError(f"gap_seed is {gap_seed} and start {start}; allowed: 0 and above")
    ids = list(range(vocab.seg_base, vocab.seg_base + vocab.num_labels) if gap_ids is None else gap_ids)
    jumps_at = np.zeros(max(ids, default=0) + 2, np.bool_)  # by id; the last is for all ids beyond
    jumps_at[ids] = True
    positions = functools.partial(_positions, jumps_at, np.sort(np.array(gap_scales, np.int64)), gap_seeds)
    return _batches(iter(examples), vocab.pad_id, batch_size, sequence_tokens, start, positions)


def pack_stream(
    stream: Callable[..., Iterable[Example]], vocab: Vocab, *, start: int = 0, shard: Shard | None = None, **options: Any
) -> Generator[Batch, None, None]:
    """Pack `stream(start=start)`, or a shard of it: all that a process needs to make its batches. Options are those of `pack`."""
    examples = stream(start=start) if shard is None else stream(start=start, shard=shard)
    return pack(examples, vocab, start=start, **options)


def batches_from(
    stream: Callable[..., Iterable[Example]],
    vocab: Vocab,
    *,
    batch_size: int,
    num_workers: int = 0,
    num_shards: int = 1,
    shards: Sequence[int] | None = None,
    gap_seed: int = 0,
    **options: Any,
) -> Callable[[Any], Iterator[Batch]]:
    """Return the function from a position in a stream to the endless batches from there on. With workers one process more packs.

    In `num_shards` shards, each packs its share of the rows from examples of its own, so that several hosts can each pack and
    read some of them; which host packs which shard changes nothing. A position is a batch's `next_example`, or 0.

    Args:
      stream: takes `start=`, and `shard=` where there are several; pickles.
      shards: those to pack here, by default all; a batch has their rows only.
      options: of `pack`.

    Raises:
      UserError: a number of shards that does not divide the rows.
    """
    if num_shards < 1 or batch_size % num_shards:
        raise UserError(f"num_shards is {num_shards}; allowed: divisors of {batch_size} rows")
    make = functools.partial(pack_stream, stream, vocab, batch_size=batch_size // num_shards, **options)
    chosen = range(num_shards) if shards is None else shards

    def packed(**options: Any) -> Generator[Batch, None, None]:
        return workers.remote(functools.partial(make, **options)) if num_workers else make(**options)

    def batches(position: Any) -> Iterator[Batch]:
        if num_shards == 1:
            return packed(start=position, gap_seed=gap_seed)
        starts = [position] * num_shards if isinstance(position, int) else position
        made = {i: packed(start=starts[i], gap_seed=(gap_seed, i), shard=(i, num_shards)) for i in chosen}
        return _side_by_side(made, num_shards)

    return batches


def _side_by_side(shards: Mapping[int, Generator[Batch, None, None]], num_shards: int) -> Iterator[Batch]:
    """Concatenate the rows of the shards' batches. Closing it closes them."""
    with contextlib.ExitStack() as stack:
        for batches in shards.values():
            stack.enter_context(contextlib.closing(batches))
        for own in zip(*shards.values(), strict=True):
            next_examples = dict(zip(shards, (batch.next_example for batch in own), strict=True))
            arrays = [np.concatenate(rows) for rows in zip(*(batch[:-1] for batch in own), strict=True)]
            yield Batch(*arrays, tuple(next_examples.get(i, 0) for i in range(num_shards)))  # type: ignore[arg-type, call-arg]


def _batches(
    examples: Iterator[Example], pad_id: int, batch_size: int, sequence_tokens: int, start: int, positions: Callable[[Ids, int], Ids]
) -> Generator[Batch, None, None]:
    ahead: list[Example] = []  # read, in no batch yet
    total_tokens = 0
    while True:
        while total_tokens <= batch_size * sequence_tokens:
            if (example := next(examples, None)) is None:
                break
            if (size := len(example.token_ids)) > sequence_tokens:
                name = f"example {start + len(ahead)}"
                raise UserError(f"{name} has {size} tokens, a row only {sequence_tokens}: raise --sequence-tokens")
            ahead.append(example)
            total_tokens += size
        if not ahead:
            return
        lengths = [len(example.token_ids) for example in ahead]
        num_taken = len(ahead)
        while (rows := _arrange(lengths[:num_taken], batch_size, sequence_tokens)) is None:
            num_taken -= 1

        shape = (batch_size, sequence_tokens)
        batch = Batch(
            token_ids=np.full(shape, pad_id, np.int32),
            segment_ids=np.zeros(shape, np.int32),
            positions=np.zeros(shape, np.int32),
            target_mask=np.zeros(shape, np.bool_),
            next_example=start + num_taken,
        )
        for row, members in enumerate(rows):
            begin = 0
            for segment, index in enumerate(members, 1):
                example, end = ahead[index], begin + lengths[index]
                batch.token_ids[row, begin:end] = example.token_ids
                batch.segment_ids[row, begin:end] = segment
                batch.positions[row, begin:end] = positions(example.token_ids, start + index)
                batch.target_mask[row, begin + example.prompt_tokens : end] = True
                for name, is_target in (("predictable", True), ("unpredictable", False)):
                    batch.target_mask[row, [begin + place for place in getattr(example, name, ())]] = is_target
                begin = end
        start += num_taken
        total_tokens -= sum(lengths[:num_taken])
        del ahead[:num_taken]
        yield batch


def _arrange(lengths: list[int], num_rows: int, row_tokens: int) -> list[list[int]] | None:
    """Distribute examples to rows, best fit, longest first: the indices that each row gets, or None where they do not all fit."""
    rows: list[list[int]] = [[] for _ in range(num_rows)]
    free = np.full(num_rows, row_tokens)
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        left = free - lengths[index]
        row = int(np.where(left < 0, row_tokens, left).argmin())
        if left[row] < 0:
            return None
        free[row] = left[row]
        rows[row].append(index)
    return rows


def _positions(jumps_at: npt.NDArray[np.bool_], scales: npt.NDArray[np.int64], seeds: tuple[int, ...], token_ids: Ids, number: int) -> Ids:
    """Count rotary positions, int32 [n], with a jump at the ids of `jumps_at` where there are scales."""
    positions = np.arange(len(token_ids), dtype=np.int32)
    if not len(scales):
        return positions
    generator = np.random.default_rng((*seeds, number))
    largest = int(generator.integers(len(scales)))
    places = np.flatnonzero(jumps_at[np.minimum(token_ids, len(jumps_at) - 1)])
    scale = scales[generator.integers(largest + 1, size=len(places))]
    jumps = np.zeros_like(positions)
    jumps[places] = generator.random(len(places)) * (2 * scale + 1)  # rounded down: 0..2 scale
    return positions + np.cumsum(jumps, dtype=np.int32)
