"""The distributions, the splits and the reproducibility of the endless streams, with and without workers."""

import collections
import dataclasses
import itertools
import os
import re
import signal
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest

from data import workers
from data.arithmetic import Corpus, encode, parse, stream, verify
from data.arithmetic.oracle import relabel

ROOT = Path(__file__).parents[2]


def take(corpus, count, **arguments):
    examples = stream(corpus, **{"seed": 0, **arguments})
    taken = list(itertools.islice(examples, count))
    examples.close()
    return taken


PROTOCOL = Corpus(label_jumps=0, jumps_at="any", names_first_step=False)  # the protocol's own form: labels that follow one another


def fingerprint(examples):
    return [(e.expression.text, e.first_label, e.prompt_tokens, e.token_ids.tobytes()) for e in examples]


def assert_uniform(counts, keys, weights=None):
    """Pearson's chi-square below the 99.99% point of its distribution (Wilson and Hilferty's approximation)."""
    keys = list(keys)
    weights = weights or [1] * len(keys)
    assert set(counts) <= set(keys)
    total, freedom = sum(counts.values()), len(keys) - 1
    expected = [total * weight / sum(weights) for weight in weights]
    assert min(expected) >= 5, "too few draws to judge"
    statistic = sum((counts[key] - e) ** 2 / e for key, e in zip(keys, expected, strict=True))
    assert statistic < freedom * (1 - 2 / (9 * freedom) + 3.719 * (2 / (9 * freedom)) ** 0.5) ** 3


def shape(expression):
    return "".join("x" if isinstance(node, int) else "o" for node in expression)


def all_shapes(num_ops):
    if num_ops == 0:
        return ["x"]
    return [left + right + "o" for size in range(num_ops) for left in all_shapes(size) for right in all_shapes(num_ops - 1 - size)]


@pytest.fixture(scope="module")
def examples():
    return take(PROTOCOL, 4096)


# --- distributions


def test_examples_are_the_oracle_s(examples):
    for example in examples[:300]:
        again = encode(example.expression.text, first_label=example.first_label)
        assert fingerprint([again]) == fingerprint([example])
        assert parse(example.expression.text) == example.expression
        assert verify(example.expression, example.response_ids, first_label=example.first_label).steps_right


def test_number_of_operators_is_uniform(examples):
    assert_uniform(collections.Counter(e.expression.num_ops for e in examples), range(2, 23))


def test_every_binary_tree_is_equally_likely():
    corpus = Corpus(min_ops=4, max_ops=4, balanced_weight=0, left_comb_weight=0)
    assert len(all_shapes(4)) == 14
    assert_uniform(collections.Counter(shape(e.expression) for e in take(corpus, 4000)), all_shapes(4))


def test_shape_weights():
    corpus = Corpus(min_ops=5, max_ops=5, uniform_weight=0.5, balanced_weight=0.2, left_comb_weight=0.3)
    expected = dict.fromkeys(all_shapes(5), 0.5 / 42)
    expected["xxoxoxoxoxo"] += 0.3
    expected["xxoxoxxoxoo"] += 0.2
    assert_uniform(collections.Counter(shapes(corpus, 4000)), expected, list(expected.values()))


def shapes(corpus, count):
    return [shape(e.expression) for e in take(corpus, count)]


def depth(postfix):
    stack = []
    for node in postfix:
        stack.append(0 if node == "x" else 1 + max(stack.pop(), stack.pop()))
    return stack[0]


@pytest.mark.parametrize("num_ops", [1, 2, 3, 4, 7, 8, 15, 16, 31, 32])
def test_balanced_trees_have_the_least_depth(num_ops):
    corpus = Corpus(min_ops=num_ops, max_ops=num_ops, uniform_weight=0, balanced_weight=1, left_comb_weight=0)
    assert 2 ** (depth(shapes(corpus, 1)[0]) - 1) <= num_ops < 2 ** depth(shapes(corpus, 1)[0])


def test_operands(examples):
    leaves = [node for e in examples[:1000] for node in e.expression if isinstance(node, int)]
    magnitudes = collections.Counter(map(abs, leaves))
    assert_uniform(magnitudes, range(100), [1 / 10] * 10 + [1 / 90] * 90)
    signs = collections.Counter(leaf < 0 for leaf in leaves if leaf)
    assert_uniform(signs, (False, True), [0.9, 0.1])


def test_operators_are_uniform_among_those_within_the_bound(examples):
    chosen = collections.defaultdict(collections.Counter)
    for example in examples[:2000]:
        for left, symbol, right, value in steps(example):
            results = {"+": left + right, "-": left - right, "*": left * right}
            allowed = "".join(s for s, v in results.items() if -999 <= v <= 999)
            assert symbol in allowed and results[symbol] == value
            chosen[allowed][symbol] += 1
    assert {"+-*", "+-", "+", "-"} <= set(chosen)
    for allowed, counts in chosen.items():
        if len(allowed) > 1 and counts.total() > 50:
            assert_uniform(counts, allowed)


def steps(example):
    text = PROTOCOL.vocab.decode(example.response_ids)
    for left, symbol, right, value in re.findall(r">(-?\d+)([-+*])(-?\d+)=(-?\d+)(?=<)", text):
        yield int(left), symbol, int(right), int(value)


def test_bound_and_digits_are_settings():
    corpus = Corpus(max_value=99_999, max_digits=4, negative_fraction=0)
    found = take(corpus, 300)
    values = [abs(value) for e in found for *_, value in steps(e)]
    leaves = [node for e in found for node in e.expression if isinstance(node, int)]
    assert 9_999 < max(values) <= 99_999
    assert min(leaves) >= 0 and 999 < max(leaves) <= 9_999


def test_labels_are_consecutive_and_the_outermost_as_frequent_as_the_others():
    corpus = dataclasses.replace(PROTOCOL, min_ops=3, max_ops=3, num_labels=24)
    found = take(corpus, 4000)
    assert_uniform(collections.Counter(e.first_label for e in found), range(1, 22), [3, *[1] * 19, 3])
    seen = collections.Counter(label for e in found for label in range(e.first_label, e.first_label + 3))
    assert_uniform({label: seen[label] for label in (1, 6, 12, 18, 23)}, (1, 6, 12, 18, 23))
    for example in found[:200]:
        labels = re.findall(r"<seg:(\d+)>", corpus.vocab.decode(example.response_ids))
        assert list(map(int, labels)) == list(range(example.first_label, example.first_label + 3))


def test_labels_jump_at_places_that_are_not_to_be_predicted():
    """In all else an example is the one with consecutive labels: the oracle is the verifier, after the labels are closed up."""
    corpus = Corpus(min_ops=6, max_ops=6, num_labels=100, label_jumps=3, jumps_at="any", names_first_step=True)
    vocab = corpus.vocab
    found, sizes, places, numbers = take(corpus, 1500), [], collections.Counter(), collections.Counter()
    for example in found:
        text = vocab.decode(example.token_ids)
        steps = re.findall(r"<seg:(\d+)>", vocab.decode(example.response_ids))
        labels = list(map(int, steps))
        assert labels[0] == example.first_label >= 1 and labels == sorted(set(labels)) and labels[-1] < 100
        assert text[: text.index("<solve>")].endswith(f"<ref:{labels[0]}>")
        closed = {str(label): str(number) for number, label in enumerate(labels, 1)}
        again = re.sub(r"(?<=[gf]:)\d+", lambda match, closed=closed: closed[match[0]], text)
        assert again == vocab.decode(encode(example.expression.text, vocab=vocab, names_first_step=True).token_ids)
        jumps = {place: after - before - 1 for place, (before, after) in enumerate(itertools.pairwise(labels), 1) if after - before > 1}
        written = [vocab.tokens[i] for i in example.token_ids]
        at = [i for i in range(example.prompt_tokens, len(written)) if written[i].startswith("<seg")]
        assert [at.index(i) for i in example.unpredictable] == list(jumps)
        sizes += jumps.values()
        places.update(jumps)
        numbers[len(jumps)] += 1
    assert numbers.keys() == {0, 1, 2, 3} and places.keys() == {1, 2, 3, 4, 5} and min(places.values()) > max(places.values()) / 2
    assert min(sizes) == 1 and max(sizes) > 60 and 4 < np.median(sizes) < 16  # as many from 1 to 10 as from 10 to 93
    assert {e.first_label for e in found} >= {1, 2, 50}


def test_labels_that_jump_at_leaves_leave_a_right_child_the_label_before_its_parents():
    """Read from the responses: a step after a jump names nothing, and all such steps are jumped to alike."""
    corpus = Corpus(min_ops=8, max_ops=8, num_labels=100, label_jumps=3, jumps_at="leaves", left_comb_weight=0)
    vocab = corpus.vocab
    jumped, started, rights = 0, 0, 0
    for example in take(corpus, 1500):
        steps = re.findall(r"<seg:(\d+)>((?:<ref:\d+>)*)", vocab.decode(example.response_ids))
        labels, names = [int(label) for label, _ in steps], [[int(i) for i in re.findall(r"\d+", refs)] for _, refs in steps]
        for before, label, refs in zip(labels, labels[1:], names[1:]):
            assert label > before and (label == before + 1 or not refs)
            started += not refs
            jumped += label > before + 1
            if len(refs) == 2:
                assert refs[1] == label - 1
                rights += refs[0] < label - 20  # while the left one may be anywhere
        assert len(example.unpredictable) == sum(after - before > 1 for before, after in itertools.pairwise(labels))
    assert 0.2 < jumped / started < 0.8 and rights > 200
    combs = take(Corpus(min_ops=5, max_ops=5, label_jumps=3, jumps_at="leaves", uniform_weight=0, balanced_weight=0), 50)
    assert not any(len(example.unpredictable) for example in combs)  # whose only step that names nothing is the first


@pytest.mark.parametrize("labels", [[1, 2], [1, 2, 2], [0, 1, 2], [3, 2, 1], [1, 2, 512]])
def test_labels_that_cannot_be_are_refused(labels):
    with pytest.raises(ValueError, match="expected 3 that grow, from 1 to 511"):
        relabel(encode("1+2+3+4"), labels, PROTOCOL.vocab)


@pytest.mark.parametrize(
    "settings", [{"labelling": "none"}, {"labelling": "plain"}, {"label_jumps": 3}, {"label_jumps": 3, "jumps_at": "leaves"}]
)
def test_variants_of_an_experiment_draw_the_same_expressions(settings):
    tagged, other = take(PROTOCOL, 200), take(Corpus(**settings), 200)
    assert [e.expression for e in tagged] == [e.expression for e in other]
    assert {e.labelling for e in other} == {settings.get("labelling", "tree")}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"min_ops": 0}, "min_ops is 0 and max_ops 22"),
        ({"min_ops": 5, "max_ops": 4}, "min_ops is 5 and max_ops 4"),
        ({"max_ops": 512}, "max_ops is 512: 512 labels allow at most 511"),
        ({"num_labels": 1}, "num_labels is 1"),
        ({"uniform_weight": -0.1}, "uniform_weight is -0.1"),
        ({"balanced_weight": float("nan")}, "balanced_weight is nan"),
        ({"left_comb_weight": float("inf")}, "left_comb_weight is inf"),
        ({"uniform_weight": 0, "balanced_weight": 0, "left_comb_weight": 0}, "every shape weight is 0"),
        ({"negative_fraction": 1.1}, "negative_fraction is 1.1; allowed: 0 to 1"),
        ({"max_digits": 0}, "max_digits is 0"),
        ({"label_jumps": -1}, "label_jumps is -1; allowed: 0 to 512"),
        ({"jumps_at": "roots"}, "jumps_at is 'roots'; allowed: any, leaves"),
        ({"max_digits": 3, "max_value": 998}, "max_value is 998; allowed: from the largest operand on, 999"),
        ({"labelling": "flat"}, "labelling is 'flat'; allowed: tree, none"),
    ],
)
def test_corpus_is_checked(fields, message):
    with pytest.raises(ValueError, match=message):
        Corpus(**fields)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "dev"}, "split is 'dev'"),
        ({"start": -1}, "start is -1"),
        ({"num_workers": -1}, "workers is -1"),
        ({"num_workers": 9999}, "0 to 256"),
    ],
)
def test_stream_is_checked_before_it_is_read(arguments, message):
    with pytest.raises(ValueError, match=message):
        stream(PROTOCOL, seed=0, **arguments)


# --- splits


def test_train_and_test_share_nothing():
    corpus = Corpus(min_ops=2, max_ops=2, max_digits=1)
    train = take(corpus, 6000)
    test = take(corpus, 3000, split="test")
    train_texts, test_texts = {e.expression.text for e in train}, {e.expression.text for e in test}
    assert len(train_texts) > 3000 and len(test_texts) > 1000, "expressions this small repeat, so a leak would show"
    assert not train_texts & test_texts
    assert all(zlib.crc32(text.encode()) % 8 == 0 for text in test_texts)
    assert not any(zlib.crc32(text.encode()) % 8 == 0 for text in train_texts)


def test_the_split_does_not_change_the_number_of_operators():
    found = take(Corpus(min_ops=1, max_ops=6), 1500, split="test")
    assert_uniform(collections.Counter(e.expression.num_ops for e in found), range(1, 7))


# --- reproducibility


def test_seeds_splits_and_starts(examples):
    assert fingerprint(take(PROTOCOL, 600)) == fingerprint(examples[:600])
    for start in (1, 511, 512, 513, 1500):
        assert fingerprint(take(PROTOCOL, 20, start=start)) == fingerprint(examples[start : start + 20])
    assert fingerprint(take(PROTOCOL, 20, seed=1)) != fingerprint(examples[:20])
    assert len({e.expression for e in examples if e.expression.num_ops > 4}) > 3400


def test_shards_of_a_stream_are_its_chunks_in_turn(examples):
    size = Corpus.chunk_examples
    chunks = [fingerprint(examples[begin : begin + size]) for begin in range(0, 4 * size, size)]
    for part in range(2):
        assert [fingerprint(take(PROTOCOL, size, start=start, shard=(part, 2))) for start in (0, size)] == chunks[part::2]
    assert fingerprint(take(PROTOCOL, 20, start=size + 7, shard=(1, 2))) == fingerprint(examples[3 * size + 7 : 3 * size + 27])


def test_the_stream_of_a_seed_is_for_ever():
    """What checkpoints rely on: the same examples on every version of Python and on every machine."""
    digest = zlib.crc32(b"".join(e.token_ids.astype("<i4").tobytes() for e in take(PROTOCOL, 600, seed=7)))
    assert digest == 2685868879


@pytest.mark.slow
def test_workers_give_the_same_stream(examples):
    assert fingerprint(take(PROTOCOL, 2500, start=100, num_workers=3)) == fingerprint(examples[100:2600])


@pytest.mark.slow
def test_closing_the_stream_ends_its_workers(monkeypatch):
    processes = spied_processes(monkeypatch)
    examples = stream(PROTOCOL, seed=0, num_workers=2)
    next(examples)
    assert len(processes) == 2 and all(process.poll() is None for process in processes)
    examples.close()
    assert all(process.returncode is not None for process in processes)


@pytest.mark.slow
def test_a_worker_that_ends_is_an_error(monkeypatch):
    processes = spied_processes(monkeypatch)
    examples = stream(PROTOCOL, seed=0, num_workers=1)
    next(examples)
    processes[0].kill()
    with pytest.raises(RuntimeError, match="a data worker ended with exit status -9"):
        for _ in range(5 * Corpus.chunk_examples):
            next(examples)


def spied_processes(monkeypatch):
    processes = []

    class Spied(subprocess.Popen):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            processes.append(self)

    monkeypatch.setattr(workers.subprocess, "Popen", Spied)
    return processes


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_a_signal_leaves_no_orphans(sent):
    program = """if True:
        import itertools, signal, time
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what runs in its background deaf to it
        from data import arithmetic, sources
        examples = arithmetic.stream(arithmetic.Corpus(), seed=0, num_workers=2)
        next(examples)
        made = sources.make_all(str, itertools.count(), 2)
        next(made)
        print("ready", flush=True)
        time.sleep(60)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    with process:
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(sent)
        # The workers inherit stderr: it ends when the last of them has.
        _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert b"data/workers.py" not in errors, "a worker complained"


@pytest.mark.parametrize("corpus", [Corpus(max_ops=3), PROTOCOL, Corpus(max_ops=40, labelling="plain", names_first_step=True)])
def test_the_likely_longest_example_is_not_exceeded_and_not_far_off(corpus):
    bound = corpus.likely_longest_tokens()
    longest = max(len(example.token_ids) for example in take(corpus, 4000))
    assert longest <= bound < 1.3 * longest
