"""Slots and writes against plain Python lists, over many steps of random rules."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import ELSEWHERE, per_sequence, read_elements, read_largest, update_slots, write_elements
from pallas_kernels.slots import Rule
from pallas_kernels.slots.triton import AT_ONCE, LARGEST_TILE, TILE
from tests.pallas_kernels.budget import program
from tests.pallas_kernels.lowering import cuda_lowering

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")

# name -> (B, A), why
SHAPES = {
    "one token": (2, 1),
    "less than a warp": (6, 7),
    "one tile": (3, TILE),
    "a tile and one": (3, TILE + 1),
    "several tiles": (5, 2 * TILE + 300),
}
NUM_KEYS, NEVER = 9, 2**31 - 1

# XLA has no tiles, so that few shapes are enough.
RUNS = [(name, "xla", False) for name in ("one token", "a tile and one")] + [(name, "triton", True) for name in SHAPES]
SHAPES["more than run at once"] = (AT_ONCE + 6, TILE + 70)  # on a GPU only, where their programs have four warps
RUNS += [pytest.param(name, "triton", False, marks=pytest.mark.gpu) for name in SHAPES]


def slots_wanted(row, before, entries, keys, marks, rule):
    """The slots of one sequence, and how many of them go by the rule, as its docstring says."""
    newest = rule["end"] - 1
    chosen = {
        t
        for t in range(newest)
        if keys[t] in (0, rule["key"]) or marks[keys[t]] >= rule["since"] or t < rule["below"] or t >= rule["start"]
    }
    listed = [row[t] for t in (*sorted(chosen), newest) if t >= rule["first"] and row[t] != ELSEWHERE]
    beyond = [row[t] for t in entries[: rule["num_entries"]] if t not in chosen | {newest} and row[t] != ELSEWHERE]
    return before + listed + beyond, len(before) + len(listed)


def updated(state, *arguments):
    slots, counts, kept = update_slots(*state, *arguments)
    return (slots, kept), counts


@pytest.mark.parametrize("has_entries", [False, True], ids=["alone", "entries"])
@pytest.mark.parametrize(("name", "implementation", "interpret"), RUNS)
def test_slots_over_many_steps(name, implementation, interpret, has_entries):
    """Sequences begin anew, go on, append and rest independently of each other; each has the slots that its rule says, none twice.

    With entries a third of the tokens have no row here.
    """
    shape = batch, capacity = SHAPES[name]
    rng = np.random.default_rng(capacity)
    table = rng.permutation(batch * capacity).reshape(shape).astype(np.int32)
    table = np.where(has_entries & (rng.random(shape) < 0.3), np.int32(ELSEWHERE), table)
    keys = rng.integers(0, NUM_KEYS, shape).astype(np.int32)
    slots, kept = jnp.full((batch, capacity + 1), -7, jnp.int32), jnp.zeros(batch, jnp.int32)
    before, length = [[] for _ in range(batch)], np.ones(batch, int)
    update = program(functools.partial(per_sequence, updated, implementation=implementation, interpret=interpret), interpret)
    for step in range(6):
        rests, anew = (np.arange(batch) + step) % 6 == 5, (np.arange(batch) + step) % 3 == 0
        previous, length = length, np.where(rests, length, np.minimum(length + rng.integers(1, 1 + capacity // 3 + 1, batch), capacity))
        rests |= (previous == length) & ~anew  # no room: nothing newer
        entries = np.sort(np.argsort(rng.random(shape), axis=1)[:, : 1 + capacity // 5], axis=1).astype(np.int32)
        entries = np.minimum(entries, length[:, None] - 1)  # of tokens that there are; where they repeat, only the first are used
        distinct = np.array([len(np.unique(row[row < end - 1])) for row, end in zip(entries, length)])
        fields = {
            "end": length,
            "first": np.where(rests, length, np.where(anew, 0, previous)),
            "key": rng.integers(1, NUM_KEYS, batch),
            "since": rng.choice([3, 8, NEVER], batch),
            "below": rng.choice([0, 2, capacity], batch, p=[0.6, 0.3, 0.1]),
            "start": np.where(rng.random(batch) < 0.5, length, length - 5),
            "num_entries": np.where(rng.random(batch) < 0.6, distinct, 0) if has_entries else np.zeros(batch),
            "keep": rng.integers(0, 2, batch),
        }
        marks = rng.integers(-1, 10, (batch, NUM_KEYS)).astype(np.int32)
        rule = Rule(**{field: jnp.asarray(value, jnp.int32) for field, value in fields.items()})
        kept = jnp.where(jnp.asarray(anew), 0, kept)
        given = jnp.asarray(entries) if has_entries else None
        (slots, kept), counts = update((slots, kept), *map(jnp.asarray, (table, keys, marks)), given, rule)
        for b in range(batch):
            own = {field: int(value[b]) for field, value in fields.items()}
            go_on = [] if anew[b] else before[b]
            if rests[b]:
                assert (counts[b], kept[b]) == (0, len(go_on))
                before[b] = go_on
                continue
            wanted, by_rule = slots_wanted(table[b].tolist(), go_on, entries[b].tolist(), keys[b], marks[b], own)
            assert counts[b] == len(wanted) and kept[b] == by_rule * own["keep"]
            np.testing.assert_array_equal(np.asarray(slots)[b, : len(wanted)], wanted)
            before[b] = wanted[: int(kept[b])]


def counted(state, tokens, active, limit, scores):
    """A function of a sequence that reads and writes rows, and numbers of three dtypes."""
    number, is_odd, seen, last = state
    earlier = read_elements(seen, number - 1)
    seen, last = write_elements((seen, last), (jnp.where(active, number, -1), jnp.where(earlier > 4, earlier, -(2**31))), (tokens, number))
    number = jnp.minimum(number + active.astype(jnp.int32), limit)
    results = {"earlier": earlier, "new": active & (tokens != earlier), "likeliest": read_largest(scores)}
    return (number, is_odd ^ active, seen, last), results


@pytest.mark.parametrize(
    ("implementation", "interpret"), [("xla", False), ("triton", True), pytest.param("triton", False, marks=pytest.mark.gpu)]
)
@pytest.mark.parametrize("batch", [1, 5])
def test_a_function_of_each_sequence(batch, implementation, interpret):
    """Against plain Python, over some steps; rows of several widths, columns outside of them, a number for all.

    Scores of less than a tile, or two and a bit, with the largest several times, in other tiles too; or none above minus infinity.
    """
    rng, (width, labels) = np.random.default_rng(batch), (4, 9)
    step = program(functools.partial(per_sequence, counted, implementation=implementation, interpret=interpret), interpret)
    state = (
        jnp.zeros(batch, jnp.int32),
        jnp.zeros(batch, bool),
        jnp.full((batch, width), -1, jnp.int32),
        jnp.zeros((batch, labels), jnp.int32),
    )
    expected = [[0, False, [-1] * width, [0] * labels] for _ in range(batch)]
    for turn in range(6):
        tokens, active = rng.integers(0, labels + 3, batch).astype(np.int32), rng.random(batch) < 0.8
        scores = rng.integers(-30000, 7, (batch, 5 if batch == 1 else 2 * LARGEST_TILE + 5)).astype(np.float32)
        scores[0] = np.where(scores[0] > 0, scores[0], -np.inf) if turn % 2 else -np.inf
        state, results = step(state, jnp.asarray(tokens), jnp.asarray(active), jnp.int32(5), jnp.asarray(scores))
        for b, mine in enumerate(expected):
            number, _, seen, last = mine
            earlier = seen[min(max(number - 1, 0), width - 1)]
            if active[b] and number < width:
                seen[number] = int(tokens[b])
            if 4 < earlier < labels:
                last[earlier] = number
            mine[:2] = min(number + active[b], 5), mine[1] ^ active[b]
            assert (results["earlier"][b], results["new"][b]) == (earlier, active[b] and tokens[b] != earlier)
            assert results["likeliest"][b] == scores[b].tolist().index(scores[b].max())
            for found, wanted in zip(state, mine, strict=True):
                np.testing.assert_array_equal(np.asarray(found)[b], wanted)


def test_the_kernel_lowers_for_cuda(monkeypatch):
    """In one launch, of four warps where more sequences than run at once have no scores or few."""
    monkeypatch.setattr("pallas_kernels.slots.api.device_reason", lambda *_, **__: None)
    many, number = AT_ONCE + 1, jax.ShapeDtypeStruct((), jnp.int32)
    for batch, entries, num_scores, num_warps in [(4, None, None, 8), (many, 3000, None, 4), (many, None, 49157, 8)]:
        b, ba, bl, slots = (jax.ShapeDtypeStruct((batch, *rest), jnp.int32) for rest in ((), (3000,), (512,), (3001,)))
        flags, scores = jax.ShapeDtypeStruct((batch,), bool), jax.ShapeDtypeStruct((batch, num_scores or 1), jnp.float32)
        function, arguments = updated, ((slots, b), ba, ba, bl, entries and ba, Rule(*[b] * 8))
        if num_scores:
            function, arguments = counted, ((b, flags, ba, bl), b, flags, number, scores)
        text = cuda_lowering(functools.partial(per_sequence, function, implementation="triton"), *arguments)
        assert text.count("__gpu$xla.gpu.triton") == 1 and f"num_warps = {num_warps} " in text
    choice = functools.partial(per_sequence, lambda _, scores: (None, read_largest(scores)), implementation="triton")
    assert "num_warps = 8 " in cuda_lowering(choice, None, scores)  # which go through the scores, whether or not it writes rows


def test_what_does_not_fit_is_refused():
    b, table = jnp.zeros(2, jnp.int32), jnp.zeros((2, 5), jnp.int32)
    slots, rule = jnp.zeros((2, 6), jnp.int32), Rule(*[b] * 8)
    for arguments, message in [
        ((table, b, table, table, table, None, rule), r"slots must be int32\[2, 6\]"),
        ((slots, b[:1], table, table, table, None, rule), r"kept must be int32\[2\]"),
        ((slots, b, table, table[:, 1:], table, None, rule), r"keys must be int32\[2, 5\]"),
        ((slots, b, table, table, table, table[:1], rule), r"entries must be int32\[2, 5\]"),
        ((slots, b, table, table, table, None, rule._replace(since=b > 0)), r"since must be int32\[2\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            update_slots(*arguments)
    with pytest.raises(ValueError, match=r"expected int32 \[B, X\], \[B\] and \[B\]"):
        write_elements((table,), (b[:1],), (b,))
    with pytest.raises(ValueError, match=r"expected int32 or float32 \[B, X\], or int32 or bool \[B\], got float32\[2\]"):
        per_sequence(updated, (slots, b), b.astype(jnp.float32))
    with pytest.raises(ValueError, match="unknown implementation"):
        per_sequence(updated, (slots, b), table, table, table, None, rule, implementation="cuda")
