"""The mixture of corpora: what their rows say, and questions of its own making against the text that they are about."""

import json
import random
import re

import pytest

from data import dataset
from data.__main__ import main as data_main
from data.documents import Document, Step
from data.tasks import TASKS
from experiments import mixture

SENTENCES = [
    f"The {name} of the river {place} was seen by all the people there." for name in ("king", "wolf", "cook") for place in ("Ouse", "Exe")
]
OWN = {"instruction": "Answer:", "document": [*SENTENCES, "Question: Who?"], "steps": [{"text": "the wolf", "sources": [6, 2]}]}
LONG = {"document": [" ".join(SENTENCES[:3]), " ".join(SENTENCES[3:])], "steps": [{"text": "All was seen.", "sources": [1]}]}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Two documents: sentences as pieces, beside a question, and sections of several sentences."""
    path = tmp_path_factory.mktemp("mixture")
    for split in ("train", "validation"):
        (path / f"{split}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in (OWN, LONG)))
    data_main(["documents", "--source", str(path), "--vocab-tokens", "300", "--out", str(path / "corpus")])
    return path / "corpus"


def written(corpus, out, *options):
    mixture.main([str(corpus), "--out", str(out), *options])
    return {file.stem: [json.loads(line) for line in file.read_text().splitlines()] for file in out.iterdir()}


def test_rows_are_those_of_the_corpora_and_can_be_written_as_one(corpus, tmp_path):
    found = written(corpus, tmp_path / "rows", "--texts", "0")
    assert found == {split: [OWN, {"instruction": "", **LONG}] for split in ("train", "validation")}
    data_main(["documents", "--source", str(tmp_path / "rows"), "--vocab-tokens", "300", "--out", str(tmp_path / "both")])
    one, other = (dataset.load(path, TASKS, "train") for path in (corpus, tmp_path / "both"))
    assert [example.document for example in one] == [example.document for example in other]


@pytest.mark.parametrize("kept", ["0", "1"])
def test_questions_are_sentences_of_the_sections_that_their_answers_name(corpus, tmp_path, kept):
    """By the text itself: question and answer make a sentence, which its section has lost, or keeps, and no other section has."""
    made = [
        row
        for row in written(corpus, tmp_path / kept, "--texts", "1", "--kept", kept)["train"]
        if row["instruction"] == mixture.INSTRUCTION
    ]
    assert len(made) == 2
    for row in made:
        questions = [i for i, piece in enumerate(row["document"]) if piece.startswith("Question:")]
        sections = row["document"][: questions[0]]
        assert [step["sources"][0] for step in row["steps"]] == questions and "Who?" not in " ".join(row["document"])
        asked = []
        for step in row["steps"]:
            question, section = step["sources"]
            asked.append(f"{row['document'][question].removeprefix('Question: ')} {step['text']}")
            before = SENTENCES.index(asked[-1])  # sections are of neighbours
            neighbours = [place for place, text in enumerate(SENTENCES) if text in sections[section] and text != asked[-1]]
            assert before - 1 in neighbours or before + 1 in neighbours
            assert [asked[-1] in text for text in sections] == [kept == "1" and i == section for i in range(len(sections))]
        assert all(text in " ".join(sections) for text in SENTENCES if text not in asked)


def test_questions_of_a_few_words_are_words_of_one_sentence_in_its_order(corpus, tmp_path):
    rows = written(corpus, tmp_path, "--texts", "1", "--kept", "1", "--words", "4")["train"]
    for row in (row for row in rows if row["instruction"] == mixture.INSTRUCTION):
        for step in row["steps"]:
            question, section = step["sources"]
            few = row["document"][question].removeprefix("Question: ").split()
            whole = [text for text in SENTENCES if text in row["document"][section] and text.endswith(f" {step['text']}")]
            assert 3 <= len(few) <= 4 and any(re.search(".*".join(map(re.escape, few)), text) for text in whole)


def test_a_window_has_sections_in_a_row_and_the_questions_that_these_alone_answer():
    texts = tuple(f"Part {number}." for number in range(8))
    steps = tuple(Step(f"of {'and'.join(map(str, own))}", (8 + i, *own)) for i, own in enumerate([(0,), (5,), (2, 3), (7,)]))
    document = Document("", (*texts, *(f"Question: {step.text}?" for step in steps)), steps)
    found = [mixture.window(document, random.Random(seed)) for seed in range(40)]
    assert len({own.pieces for own in found}) > 8
    for own in found:
        sections = [piece for piece in own.pieces if not piece.startswith("Question:")]
        assert " ".join(sections) in " ".join(texts)
        for step in own.steps:
            question, *sources = (own.pieces[i] for i in step.sources)
            assert question == f"Question: {step.text}?" and step.text == f"of {'and'.join(text[5] for text in sources)}"
        inside = [step.text for step in steps if all(texts[i] in sections for i in step.sources[1:])]
        assert [step.text for step in own.steps] == inside != []
    few = [mixture.asking(document, random.Random(seed), 1) for seed in range(20)]
    assert {own.steps[0].text for own in few} == {step.text for step in steps}  # each of them is drawn at some time
    for own in few:
        assert own.pieces == (*texts, f"Question: {own.steps[0].text}?") and own.steps[0].sources[0] == 8 and len(own.steps) == 1
    assert mixture.asking(document, random.Random(0), 0) is mixture.asking(document, random.Random(0), 4) is document


def test_a_step_names_first_what_is_new_and_rests_on_something_new(corpus):
    """What a step before has named comes after what none has; a step that rests on such sources alone is left out."""
    steps = tuple(Step(str(i), own) for i, own in enumerate([(0, 1), (1, 2), (1,), (2, 0), (0, 3, 2)]))
    found = mixture.row(dataset.load(corpus, TASKS).task, Document("A title", ("a", "b", "c", "d"), steps))["steps"]
    assert [(step["text"], step["sources"]) for step in found] == [("0", [0, 1]), ("1", [2, 1]), ("4", [3, 0, 2])]


def test_what_is_no_corpus_of_documents_is_refused_and_nothing_is_overwritten(corpus, tmp_path, call):
    call(data_main, "arithmetic", "--num-examples", "2", "--out", tmp_path / "sums")
    call(data_main, "documents", "--source", corpus.parent / "train.jsonl", "--split", "all", "--out", tmp_path / "all")
    for path, message in {"sums": "is a corpus of arithmetic; allowed: corpora of", "all": "has no train and no validation split"}.items():
        status, _, err = call(mixture.main, corpus, tmp_path / path, "--out", tmp_path / "rows")
        assert status == 2 and message in err and not (tmp_path / "rows").exists()
    status, _, err = call(mixture.main, "--out", tmp_path / "rows")
    assert status == 2 and "no corpora are given" in err and not (tmp_path / "rows").exists()
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "own.txt").write_text("mine")
    status, _, err = call(mixture.main, corpus, "--out", tmp_path / "rows")
    assert status == 2 and f"{tmp_path / 'rows'} exists and is not an empty directory: choose another" in err
    assert [path.name for path in (tmp_path / "rows").iterdir()] == ["own.txt"]
