"""What response tokens attend to, against the specification's pseudo-code; and the steps of a response."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.arithmetic import Corpus, encode, stream
from data.spans import attended_tokens, read_steps
from data.vocab import Vocab
from selfspan_jax.spans import SpanVocab

# Labels lie below the text, apart and in another order, as in a tokenizer to which they were added.
APART = SpanVocab(pad_id=7, bos_id=6, eos_id=30, solve_id=31, seg_base=12, ref_base=20, num_labels=5)


def attended_positions(token_ids, vocab, header_view="span"):
    """The specification's pseudo-code: for each token of the response the positions that it attends to."""
    label, named, in_response, carries, tags, attended = 0, set(), False, [], [], []
    solve = list(token_ids).index(vocab.solve_id)
    for position, x in enumerate(token_ids):
        seg, ref = (base <= x < base + vocab.num_labels for base in (vocab.seg_base, vocab.ref_base))
        if x == vocab.solve_id and not in_response:
            in_response, label, named = True, 0, set()
        elif seg:
            label = x - vocab.seg_base
            named = set() if in_response else named
        elif ref and in_response:
            named = named | {x - vocab.ref_base}
        carries.append(label)
        tags += [position] if seg else []
        wider = {"span": [], "labels": tags, "prompt": range(solve + 1), "all": range(position + 1)}[header_view if seg or ref else "span"]
        attended.append([s for s in range(position + 1) if s in wider or carries[s] in {0, label} | named])
    return attended[solve + 1 :]


def check(token_ids, prompt_tokens, vocab):
    token_ids = np.array(token_ids, np.int32)
    for header_view in ("span", "labels", "prompt", "all"):
        expected = [len(positions) for positions in attended_positions(token_ids.tolist(), vocab, header_view)]
        assert attended_tokens(token_ids, prompt_tokens, vocab, header_view=header_view).tolist() == expected


@pytest.mark.parametrize("labelling", ["tree", "none", "plain"])
def test_attended_tokens_of_gold_responses(labelling):
    corpus = Corpus(labelling=labelling, num_labels=64, names_first_step=True)
    for example in itertools.islice(stream(corpus, seed=1), 40):
        check(example.token_ids, example.prompt_tokens, corpus.vocab)


structural = st.sampled_from([6, 7, 30, 31, *range(12, 17), *range(20, 25)])
tokens = st.lists(st.one_of(structural, st.integers(0, 40)), max_size=40)


@given(tokens, tokens)
def test_attended_tokens_of_any_tokens(prompt, response):
    """Malformed ones included: labels that are named twice, or that no token carries, or before any step is open; `<solve>` again."""
    prompt = [i for i in prompt if i != APART.solve_id]
    check([*prompt, APART.solve_id, *response], len(prompt) + 1, APART)


def test_attended_tokens_of_the_specification_s_example():
    example = encode("((51+75)-(95*3))")
    attended = attended_tokens(example.token_ids, example.prompt_tokens, Vocab()).tolist()
    assert attended[0] == 2 + 8 + 1  # <bos> <solve>, the tagged (51+75) and the step's own <seg:1>
    assert attended[-1] == 2 + 8 + 10 + 7 + 9 + 6 + 16  # sink; nodes 1 and 2 with their steps; node 3; this step


@pytest.mark.parametrize(
    ("response", "expected"),
    [  # (before the first step, steps, ended)
        ("<seg:1>1+2=3<seg:2><ref:1>3+<ref:0>4<eos>5<seg:3>", ("", [(1, set(), "1+2=3"), (2, {0, 1}, "3+4")], True)),
        ("<ref:1>5<solve><seg:3><pad>1<pad><pad>", ("<ref:1>5<solve>", [(3, set(), "<pad>1")], False)),
        ("<seg:3><pad><ref:1>", ("", [(3, {1}, "<pad>")], False)),
        ("<pad><eos>", ("<pad>", [], True)),
        ("", ("", [], False)),
        ("<seg:1>1<seg:1><seg:2>2<seg:2><ref:1>", ("", [(1, set(), "1"), (1, set(), ""), (2, set(), "2"), (2, {1}, "")], False)),
    ],
)
def test_the_steps_of_a_response(response, expected):
    vocab = Vocab()
    before, steps, ended = read_steps(vocab.encode(response), vocab)
    assert (vocab.decode(before), [(label, named, vocab.decode(body)) for label, named, body in steps], ended) == expected
    again = [place for place, (before, own) in enumerate(zip((None, *steps), steps)) if own.closes(before)]
    assert again == ([1] if "<seg:1><seg:2>" in response else [])  # the last one of label 2 names something
