import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.vocab import Vocab

QUICK = settings(derandomize=True, deadline=None, database=None, max_examples=100)


def test_token_ids_are_the_documented_ones():
    vocab = Vocab(num_labels=3)
    written = ["<pad>", "<bos>", "<eos>", "<solve>", *"0123456789+-*()="]
    written += ["<seg:0>", "<seg:1>", "<seg:2>", "<ref:0>", "<ref:1>", "<ref:2>"]
    assert vocab.tokens == tuple(written)
    assert vocab.size == len(written)
    assert vocab.span_ids() == {"pad_id": 0, "bos_id": 1, "eos_id": 2, "solve_id": 3, "seg_base": 20, "ref_base": 23, "num_labels": 3}


def test_encode_reads_tokens_and_ignores_spaces():
    ids = Vocab().encode("<bos> <seg:3>(<seg:1>(51 + 75)\n<ref:511>")
    assert ids.dtype == np.int32
    assert ids.tolist() == [1, 23, 17, 21, 17, 9, 5, 14, 11, 9, 18, 20 + 512 + 511]


@QUICK
@given(st.integers(2, 600).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.integers(0, 19 + 2 * n)))))
def test_decode_inverts_encode(case):
    num_labels, ids = case
    vocab = Vocab(num_labels)
    text = vocab.decode(ids)
    assert " " not in text
    assert vocab.encode(text).tolist() == ids


@pytest.mark.parametrize(
    ("text", "column"),
    [
        ("12x", 3),
        ("<seg:512>", 1),
        ("1 <seg:01>", 3),
        ("<seg:-1>", 1),
        ("1<", 2),
        ("<bos><unk>", 6),
        ("<seg:" + "9" * 5000 + ">", 1),
        ("٣", 1),
    ],
)
def test_encode_names_the_column(text, column):
    with pytest.raises(ValueError, match=rf"^column {column}: .{{1,60}} is not a token of the vocabulary$"):
        Vocab().encode(text)


@pytest.mark.parametrize("token_id", [-1, 1044, 2**40])
def test_decode_refuses_ids_outside(token_id):
    with pytest.raises(ValueError, match=rf"^id {token_id} at position 1 is outside the vocabulary of 1044 tokens$"):
        Vocab().decode([0, token_id])


@pytest.mark.parametrize("num_labels", [1, 0, -5, 65_537, 10**12, 4.0, True, "8"])
def test_num_labels_is_checked(num_labels):
    with pytest.raises(ValueError, match=r"num_labels is .*; allowed: whole numbers from 2 to 65536"):
        Vocab(num_labels)


def test_json_round_trip():
    assert Vocab.from_json(json.loads(json.dumps(Vocab(77).to_json()))) == Vocab(77)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra": 1}, "unknown key 'extra'"),
        ({"version": 2}, "version is 2"),
        ({"version": True}, "version is True"),
        ({"kind": "bytes"}, "kind is 'bytes'"),
        ({"num_labels": "512"}, "num_labels is '512'"),
    ],
)
def test_json_is_strict(change, message):
    with pytest.raises(ValueError, match=message):
        Vocab.from_json({**Vocab().to_json(), **change})


@pytest.mark.parametrize("fields", [None, [], "x", {"version": 1, "kind": "characters"}])
def test_json_that_is_not_a_vocabulary(fields):
    with pytest.raises(ValueError, match=r"expected a JSON object|missing key 'num_labels'"):
        Vocab.from_json(fields)
