"""What a run trains on: the settings of a directory are said, its held-out part is scored, another vocabulary is written anew."""

import dataclasses
import itertools
import json

import numpy as np
import pytest

from data import dataset
from data.__main__ import main as data_main
from data.arithmetic import verify
from data.errors import UserError
from data.examples import TrainingExamples, open_stored, stored
from data.tasks import TASKS
from data.vocab import train_vocab

ROWS = {"sequence_tokens": 512, "num_shards": 1, "shards": range(1), "batch_size": 2, "gap_scales": (0,)}

VOCAB = train_vocab(["Town 1 built a bridge. 0123456789+-*()= Summarize:"], vocab_tokens=320, num_labels=40)  # of a model, say


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """Expressions that were generated, and articles of a file, divided and not."""
    root = tmp_path_factory.mktemp("corpora")
    sentences = "Town {0} built a bridge. It cost {0} million. The mayor of town {0} was glad."
    articles = (sentences.format(i) + " Many came." * (i % 3 == 0) for i in range(60))
    rows = ({"article": article, "summary": f"Town {i} built a bridge. The mayor was glad."} for i, article in enumerate(articles))
    (root / "towns.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data_main(["arithmetic", "--num-examples", "40", "--max-ops", "4", "--seed", "1", "--out", str(root / "expressions")])
    news = ["news", "--source", str(root / "towns.jsonl"), "--vocab-tokens", "400", "--num-labels", "48"]
    data_main([*news, "--out", str(root / "towns")])
    data_main([*news, "--split", "all", "--out", str(root / "whole")])
    return root


def examples_of(path, vocab=None, **settings):
    stored = open_stored(path, TASKS)
    corpus = type(stored.corpus)(**{**vars(stored.corpus), **settings})
    return TrainingExamples.of(type(stored.task), corpus, stored, vocab)


def test_a_directory_has_its_own_settings(directories):
    examples = examples_of(directories / "expressions")
    card = json.loads((directories / "expressions" / "card.json").read_text())
    identity = examples.identity()
    assert identity["corpus"] == card["distributions"] and identity["corpus"]["max_ops"] == 4 and examples.task.names_first_step
    assert identity["data_fingerprint"] == dataset.fingerprint(directories / "expressions")
    with pytest.raises(UserError, match=r"--label-jumps is 0, but 3 in .*expressions, whose examples stay as they are"):
        examples_of(directories / "expressions", label_jumps=0)


def test_examples_that_are_seen_more_than_ten_times_are_warned_of(directories):
    """The counts are those of the rows themselves."""
    examples = examples_of(directories / "expressions")
    total = sum(len(row["token_ids"]) for row in examples.stored.dataset)
    assert examples.warning(10 * total) is None
    assert "each of the 40 examples of " in examples.warning(640 * total) and "will be seen about 640 times" in examples.warning(
        640 * total
    )
    assert "leave --data out" in examples.warning(640 * total)
    assert "leave --data out" not in examples_of(directories / "towns").warning(10**9)
    assert TrainingExamples.of(TASKS["arithmetic"], TASKS["arithmetic"].Corpus(), None).warning(10**12) is None


def test_a_file_is_scored_on_what_was_held_out_of_it(directories):
    examples = examples_of(directories / "towns")
    held_out, left_out = examples.held_out(100, seed=0)
    assert left_out is None
    prompts = {example.prompt for example in held_out}
    assert prompts == {example.prompt for example in dataset.load(directories / "towns", TASKS, "validation")}
    assert not prompts & {example.prompt for example in examples.stored}
    texts = examples.texts()
    assert texts["trained_on"] == f"the {len(examples.stored)} examples of towns (split train)"
    assert texts["scored_on"] == "examples that were held out (split validation of towns)"
    assert "template" not in texts["limits"]
    with pytest.raises(UserError, match=r"has no validation split.*; --eval-examples 0 trains without an evaluation"):
        examples_of(directories / "whole").held_out(2, seed=0)


def test_a_validation_split_alone_is_trained_on_and_holds_nothing_out(directories, tmp_path):
    """Scores on it would be those of examples that were learnt."""
    (tmp_path / "towns").symlink_to(directories / "towns" / "validation")
    examples = examples_of(tmp_path / "towns")
    assert examples.stored.split == "validation"
    with pytest.raises(UserError, match="towns has a validation split alone, which is trained on: nothing is held out; --eval-examples 0"):
        examples.held_out(2, seed=0)


@pytest.mark.parametrize(
    ("name", "split", "expected"),
    [
        ("towns", "test", None),
        ("towns", "validation", None),
        ("towns", "train", "is the train split"),
        ("whole", None, "is not divided"),
        ("expressions", None, "is the train split"),
    ],
)
def test_scores_on_what_may_have_been_trained_on_are_warned_of(directories, name, split, expected):
    found = dataset.load(directories / name, TASKS, split).warnings
    assert [f"{directories / name} {expected}: the model may" in line for line in found] == [True] * (expected is not None)


@pytest.mark.parametrize(
    ("there", "taken"), [(("train", "validation", "test"), "test"), (("train", "validation"), "validation"), (("train",), "train")]
)
def test_an_evaluation_takes_a_split_that_was_not_trained_on_where_there_is_one(directories, tmp_path, there, taken):
    for split in there:
        (tmp_path / split).symlink_to(directories / "towns" / split)
    _, sets, drawn = stored(tmp_path, open_stored(tmp_path, TASKS).task, TASKS, 2)
    assert drawn["split"] == taken and bool(drawn["warnings"]) == (taken == "train")
    (found,) = sets.values()
    gold = [example.prompt for example in dataset.load(directories / "towns", TASKS, taken)]
    assert {example.prompt for example in found} <= {*gold}


def test_cards_say_what_generated_examples_do_not_have():
    for name, words in {
        "arithmetic": "Operands had one or two digits, and no value on the way was above 999",
        "news": "news from templates",
    }.items():
        texts = TrainingExamples.of(TASKS[name], TASKS[name].Corpus(), None, VOCAB).texts()
        assert words in texts["limits"] and texts["trained_on"] == TASKS[name].Corpus().description


@pytest.mark.parametrize("name", ["expressions", "towns"])
def test_examples_are_written_again_in_the_vocabulary_of_a_model(directories, name):
    """The text is the same, ids are those of the other vocabulary, and labels are drawn anew in each epoch."""
    examples, own = examples_of(directories / name, VOCAB), examples_of(directories / name)
    stream = examples.batches_from(seed=3, **ROWS)(0)
    assert next(stream).token_ids.max() < VOCAB.size != own.task.vocab.size
    count = len(examples.stored)
    drawn = list(itertools.islice(examples.stored.stream(seed=3, task=examples.task), 2 * count))
    prompts = [example.prompt for example in own.stored]
    assert sorted(example.prompt for example in drawn[:count]) == sorted(prompts)
    assert all(example.token_ids[example.prompt_tokens - 1] == VOCAB.solve_id for example in drawn)
    firsts = {tuple(example.token_ids) for example in drawn if example.prompt == prompts[0]}
    assert len(firsts) == 2
    held_out, _ = examples.held_out(2, seed=0)
    assert all(example.token_ids.max() < VOCAB.size for example in held_out)
    assert all((examples.task.encode_prompt(example.prompt) == example.prompt_ids).all() for example in held_out)


def test_examples_that_a_model_has_no_room_for_are_counted(directories):
    """Of six labels prompt and response take one each a sentence, and one what stands before the first."""
    for num_labels in (6, 7):
        examples = examples_of(directories / "towns", dataclasses.replace(VOCAB, num_labels=num_labels))
        for split in ("validation", "train"):
            whole = [example.prompt for example in dataset.load(directories / "towns", TASKS, split)]
            expected = [prompt for prompt in whole if num_labels == 7 or "Many came." not in prompt]
            if split == "validation":
                held_out, left_out = examples.held_out(100, seed=0)
                assert [example.prompt for example in held_out] == expected
            else:
                left_out, drawn = examples.left_out, itertools.islice(examples.stored.stream(seed=0, task=examples.task), len(whole))
                assert {example.prompt for example in drawn} == {*expected} and len(examples.lengths) == len(expected)
                number = "" if expected == whole else f"{len(expected)} of "
                assert examples.trained_on == f"{number}the {len(whole)} examples of towns (split train)"
            counted = f"left out, without room for them: {len(whole) - len(expected)} of {len(whole)} examples of "
            assert left_out is None if expected == whole else counted in left_out and "--tokenizer" in left_out
    examples = examples_of(directories / "towns", dataclasses.replace(VOCAB, num_labels=5))
    with pytest.raises(UserError, match=r"no room for (\d+) of \1 examples of .*towns: .*; --eval-examples 0 trains"):
        examples.held_out(100, seed=0)
    with pytest.raises(UserError, match=f"no room for {len(whole)} of {len(whole)} examples of .*towns: .*--tokenizer"):
        examples.batches_from(seed=0, **ROWS)


@pytest.mark.parametrize("vocab", [None, VOCAB], ids=["as they are", "written again"])
def test_rows_that_are_too_short_are_refused_before_training(directories, vocab):
    examples = examples_of(directories / "towns", vocab)
    longest = max(len(examples.task.renumber(example).token_ids) for example in examples.stored)
    assert isinstance(next(examples.batches_from(seed=0, **ROWS | {"sequence_tokens": longest})(0)).token_ids, np.ndarray)
    with pytest.raises(UserError, match=f"take up to {longest} tokens, a row only {longest - 1}: raise --sequence-tokens"):
        examples.batches_from(seed=0, **ROWS | {"sequence_tokens": longest - 1})


def test_examples_are_not_written_again_for_their_lengths_where_text_is_written_alike(directories, monkeypatch):
    """Other ids of the structural tokens do not matter; fewer labels may have no room."""
    own = examples_of(directories / "towns")
    pad, bos, *others = own.task.vocab.structural_ids
    monkeypatch.setattr(dataset.StoredCorpus, "_rewritten_lengths", lambda *_: [7])
    for vocab, is_alike in (({"structural_ids": (bos, pad, *others)}, True), ({"num_labels": 47}, False)):
        other = examples_of(directories / "towns", dataclasses.replace(own.task.vocab, **vocab))
        assert (other.lengths.tolist() == own.lengths.tolist()) == is_alike and (is_alike or other.lengths.tolist() == [7])


def test_a_verdict_quotes_text_as_the_tokenizer_writes_it():
    """Not its tokens, in which bytes have letters of their own."""
    stray = VOCAB.plain_text_ids(" Town 1") + [VOCAB.eos_id]
    assert verify("1+2", stray, vocab=VOCAB).message == 'step 1: " Town 1" stands before the first step'
