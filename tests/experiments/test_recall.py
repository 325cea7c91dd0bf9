"""The corpus of key retrieval against a reading of its text, what its masks can and cannot reach, and the tables of its results."""

import itertools
import json

import numpy as np
import pytest
from flax import nnx

from experiments import recall
from experiments.recall import PIECE, SEGMENT, VOCAB, Corpus
from selfspan_jax.config import AttentionViews
from selfspan_jax.model import Decoder
from selfspan_jax.spans import attention_mask
from tests.selfspan_jax.reference import Reference

KEY, ITEM = range(4, 36), range(36, 36 + 32 * 16)


def made(segments, spans, **options):
    return Corpus(**options).make(np.random.default_rng(3), 5, segments, spans=spans, scales=(0, 4))


@pytest.mark.parametrize("spans", [False, True])
@pytest.mark.parametrize("segments, items", [(1, 8), (3, 24), (9, 32)])
def test_every_question_has_its_answer_in_the_context(segments, items, spans):
    """A reading of the text alone finds the item of each key, how far back it stands, and the label of its piece."""
    found = made(segments, spans)
    assert found["distance"].max() >= segments - 1
    for ids, targets, distances in zip(found["token_ids"], found["target_mask"], found["distance"]):
        (solve,) = np.flatnonzero(ids == VOCAB.solve_id)
        assert ids[0] == VOCAB.bos_id and ids[-1] == VOCAB.eos_id and solve == 1 + segments * SEGMENT
        told = {4 + (int(ids[t]) - 36) // 16: t for t in range(solve) if ids[t] in ITEM}  # by their key
        assert len(told) == sum(x in ITEM for x in ids[:solve]) == items and not any(x in KEY for x in ids[:solve])
        assert len({(t - 1) // PIECE for t in told.values()}) == items
        places = found["places"]
        assert len(places) == min(16, items) and len({int(ids[t - (3 if spans else 1)]) for t in places}) == len(places)
        for place, distance in zip(places, distances):
            at = told[int(ids[place - (3 if spans else 1)])]
            assert ids[place] == ids[at] and distance == (place - at) // SEGMENT
            if spans:  # the piece begins and ends with its label, which the step names
                first = 1 + (at - 1) // PIECE * PIECE
                label = ids[first] - VOCAB.seg_base
                assert ids[first + PIECE - 1] == ids[first] and ids[place - 1] == VOCAB.ref_base + label
        asked = solve + 5 * np.arange(1, 17)  # every value, the first time or again
        assert [*places] == [*asked[: len(places)]] and {*ids[asked]} == {*ids[places]}
        assert {*np.flatnonzero(targets)} == ({*asked, *(asked - 1)} if spans else {*asked})
    assert (np.diff(found["positions"]) > 1).any() and (np.diff(found["positions"]) >= 1).all()


def test_a_step_of_spans_reads_the_named_piece_and_no_other():
    found = made(2, True)
    ids, place = found["token_ids"][0], int(found["places"][2])
    views = {"header_view": "labels", "prompt_view": "local", "prompt_window_tokens": AttentionViews.prompt_window_tokens}
    mask = np.asarray(attention_mask(ids[None], VOCAB, **views))[0]
    np.testing.assert_array_equal(mask[place - 1], Reference(ids, VOCAB, **views).mask()[place - 1])
    (asked,) = np.flatnonzero(ids[: 2 * SEGMENT] == ids[place])
    assert [t for t in np.flatnonzero(mask[place - 1]) if ids[t] in ITEM] == [asked]  # by the token that predicts the answer


def test_rows_hold_examples_of_one_length():
    corpus = Corpus(items=8, queries=4)
    batches = list(itertools.islice(corpus.batches(7, rows=2, seed=0, spans=True, scales=(0,)), 9))
    kinds = set()
    for number, batch in zip(range(8, 17), batches, strict=True):
        assert batch.next_example == number and batch.token_ids.shape == (2, corpus.row_tokens)
        examples = int(batch.segment_ids.max())
        kinds.add(examples)
        for row, ids in zip(batch.token_ids, batch.segment_ids):
            starts = np.flatnonzero(row == VOCAB.bos_id)
            assert len(starts) == examples and [*ids[starts]] == [*range(1, examples + 1)] and not (row[ids == 0]).any()
    assert kinds == {5, 2, 1}
    again = next(corpus.batches(12, rows=2, seed=0, spans=True, scales=(0,)))  # from any number on
    np.testing.assert_array_equal(again.token_ids, batches[5].token_ids)
    short = itertools.islice(corpus.batches(7, rows=2, seed=0, spans=True, scales=(0,), short=14), 9)
    examples = [int(batch.segment_ids.max()) for batch in short]
    assert examples[:7] == [5] * 7 and examples[7:] == [int(batch.segment_ids.max()) for batch in batches[7:]]


def test_steps_of_training_may_name_nothing():
    """Then an answer follows the label of its step, the only target; shares of batches are as they are asked for."""
    named = 0
    for batch in itertools.islice(Corpus(unnamed=0.5).batches(0, rows=1, seed=0, spans=True, scales=(0,)), 16):
        ids, targets = (x[0][batch.segment_ids[0] == 1] for x in (batch.token_ids, batch.target_mask))
        (solve,) = np.flatnonzero(ids == VOCAB.solve_id)
        for step, asked in zip(ids[solve + 1 : -1].reshape(-1, 5), targets[solve + 1 : -1].reshape(-1, 5), strict=True):
            told = step[3] >= VOCAB.ref_base
            assert step[0] == step[2] and (told or step[3] == step[0]) and (step[4] - 36) // 16 == step[1] - 4
            assert [*asked] == [False, False, False, told, True]
        named += told
    assert 4 <= named <= 12


@pytest.mark.parametrize("option, value", [("segments", 300), ("segments", 0), ("unnamed", 2), ("gap-scales", -1)])
def test_what_has_no_labels_is_refused_before_training(option, value, tmp_path, call):
    status, _, err = call(recall.main, "train", "--system", "spans", "--json", tmp_path / "own.json", f"--{option}", value)
    assert status == 2 and err.startswith(f"error: --{option} is {value}") and len(err.splitlines()) == 1


def test_names_begin_as_their_labels():
    """The embedding of each name is its label's, and a vector that is the same for all; nothing else changes."""
    sizes = {"hidden_size": 8, "num_layers": 1, "num_heads": 1, "num_kv_heads": 1, "head_size": 8, "intermediate_size": 8}
    config = recall.model_config("spans", max_context_tokens=128, **sizes)
    model = Decoder(config, vocab=VOCAB, vocab_size=VOCAB.min_vocab_size, rngs=nnx.Rngs(0))
    before = np.asarray(model.embed_tokens.embedding[...])
    recall.begin_as_labels(model, 0)
    after = np.asarray(model.embed_tokens.embedding[...])
    names = slice(VOCAB.ref_base, VOCAB.ref_base + VOCAB.num_labels)
    more = after[names] - before[VOCAB.seg_base : VOCAB.seg_base + VOCAB.num_labels]
    np.testing.assert_allclose(more, np.broadcast_to(more[0], more.shape), atol=1e-6)
    assert np.abs(more[0]).max() > 1e-3
    np.testing.assert_array_equal(np.delete(after, names, axis=0), np.delete(before, names, axis=0))


def test_shares_are_of_the_queries_of_a_distance():
    rows = [(8, 0, 10, 1.0), (8, 2, 30, 0.5), (8, 3, 10, 0.1), (16, 2, 10, 0.0)]
    report = {"recall": [dict(zip(("segments", "distance", "queries", "right"), row)) for row in rows]}
    assert recall.right(report, 8, 2) == pytest.approx(0.4) and recall.right(report, 8, 0, 0) == 1
    assert recall.right(report, 8, 4) is None


def test_the_page_has_what_was_run(tmp_path):
    """Of each kind of file a table; and none, where there is no file."""
    assert recall.sections(tmp_path) == {}
    rows = [dict(zip(("segments", "distance", "queries", "right"), row)) for row in ((8, 0, 10, 1.0), (8, 2, 10, 0.5), (64, 40, 10, 0.25))]
    settings, device = {"steps": 1200, "rows": 16, "corpus": {}}, {"device": "H100", "jax": "0.11.2", "parameters": 3_238_656}
    for system, seed, more in (
        ("delta", 1, {}),
        ("spans", 0, {}),
        ("delta", 0, {}),
        ("spans", 1, {"short_steps": 400, "header_view": "all"}),
    ):
        report = device | {"system": system, "settings": settings | {"seed": seed} | more, "recall": rows}
        (tmp_path / f"recall_{system}_{seed}.json").write_text(json.dumps(report))
    scores = {
        "num_examples": 128,
        "answer_accuracy": 0.75,
        "answer_accuracy_interval": [0.6, 0.8],
        "step_accuracy": 0.5,
        "attended_tokens": 64.0,
    }
    (tmp_path / "expressions_window.json").write_text(json.dumps({"sets": {"10": scores, "5": scores}}))
    row = {"batch_size": 1, "context_tokens": 2048, "attended_tokens": 64.5, "ms_per_step": 0.2, "tokens_per_second": 5e3}
    steps = [row | {"attention": name, "kv_memory_bytes": 2**21} for name in ("memory", "dense")]
    (tmp_path / "bench_all.json").write_text(json.dumps({"rows": steps}))
    found = recall.sections(tmp_path)
    assert "| `delta` | 1,200 | 1 | 100.0 | - | 50.0 | - | - | 50.0 | 25.0 |" in found["recall"] and (tmp_path / "recall.png").exists()
    told = ("`spans` | 1,200 |", "`spans` | 1,200, 400 of them short, headers see all |", "`delta` | 1,200 | 0 |", "`delta` | 1,200 | 1 |")
    assert (places := [found["recall"].find(row) for row in told]) == sorted(places) and places[0] > 0
    assert "| `window` | 5 | 128 | 75.0 | 60.0 | 80.0 | 50.0 | 64.0 |\n| `window` | 10 |" in found["memory expressions"]
    assert "| `memory` | 1 | 2,048 | 64 | 0.200 | 5,000 | 2.0 |" in found["memory steps"]
