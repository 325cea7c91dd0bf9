"""Documents of files and of public repositories: what is read, written, scored, counted and refused."""

# ruff: noqa: E501  (tables of text)

import collections
import dataclasses
import gzip
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

import decode
from data import dataset
from data.__main__ import main as data_main
from data.alignment import Alignment
from data.documents import DocumentTask
from data.documents import own as own_documents
from data.documents.corpus import QUESTION, group_sentences, overlapping, places, split_pieces, squeezed
from data.errors import UserError
from data.papers import reports
from data.papers.reports import parse
from data.retrieval import BM25
from data.scoring import numbers
from data.tasks import TASKS
from data.vocab import read_vocab, train_vocab
from selfspan_jax.task import read_by
from tests.data import layouts

WRITE = {"papers": layouts.write_reports, "verdicts": layouts.write_reports, "stories": layouts.write_stories}
OPTIONS = ["--vocab-tokens", "400", "--num-labels", "64", "--max-prompt-tokens", "600"]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    root = tmp_path_factory.mktemp("sources")
    reports = layouts.write_reports(root / "reports")
    return {"papers": reports, "verdicts": reports, "stories": layouts.write_stories(root / "stories")} | {
        "documents": layouts.write_own(root / "own.jsonl")
    }


@pytest.fixture(scope="module")
def corpora(sources, tmp_path_factory):
    root = tmp_path_factory.mktemp("corpora")
    for name, source in sources.items():
        data_main(
            [name, "--source", str(source), *OPTIONS, "--out", str(root / name), *(["--split", "all"] if name == "documents" else [])]
        )
    return root


def load(corpora, name, split=None):
    return dataset.load(corpora / name, TASKS, split)


def test_repositories_are_divided_as_they_say(corpora):
    sizes = {name: [len(load(corpora, name, split)) for split in dataset.splits(corpora / name)] for name in WRITE}
    assert sizes == {"papers": [3, 1, 2], "verdicts": [6, 2, 4], "stories": [2 * 4, 1, 2]}


# ------------------------------------------------------------------------------------------------ what is written

PAPER = (
    "<bos> Write the abstract: Wakor for tired waiters<seg:1> Introduction: Tired waiters are a problem everywhere.<seg:1>"
    "<seg:2> Tea is what most of them drink.<seg:2><seg:3> Methods, patients (table :1): We asked 1240 waiters in the town of Oakwick.<seg:3>"
    "<seg:4> They were given Wakor or tea for 3 weeks.<seg:4><seg:5> Results, main: With Wakor, 58 waiters woke, and with tea 31 (p=0.02)."
    "<seg:5><seg:6> No one was hurt by anything.<seg:6><solve>"
)
WRITTEN = {
    "papers": PAPER
    + "<seg:7><ref:5> To see whether Wakor wakes waiters.<seg:8><ref:5> Of 1,240 waiters, 58 woke with Wakor and 31 with tea "
    "(p = 0.02).<seg:9><ref:6> Nobody was hurt.<eos>",
    "verdicts": PAPER.replace("Write the abstract: Wakor for tired waiters", "Which way did it go? Waking, with Wakor, compared to tea?")
    + "<seg:7><ref:5> With Wakor, 58 waiters woke, and with tea 31 (p=0.02). Verdict: increased<eos>",
}


@pytest.mark.parametrize("name", WRITTEN)
def test_an_example_is_written_as_the_protocol_says(corpora, name):
    stored = load(corpora, name, "validation")
    example = stored.task.renumber(next(iter(stored)))
    assert stored.task.decode(example.token_ids) == WRITTEN[name]
    assert stored.task.decode(example.token_ids[example.predictable]) == "<seg:2><seg:3><seg:4><seg:5><seg:6>"
    closing = dataclasses.replace(stored.task, closed_steps=True)
    closed, response = closing.renumber(example), WRITTEN[name].partition("<solve>")[2]
    ends = re.sub(r"(<seg:\d+>)(.*?)(?=<seg|<eos>)", r"\1\2\1", response)  # of each step its label once more
    assert closing.decode(closed.response_ids) == ends and closing.steps(closed.response_ids) == stored.task.steps(example.response_ids)
    about = f"{stored.task.instruction} {example.document.about}"  # as experiments.mixture writes it
    again = stored.task.renumber(dataclasses.replace(example, document=dataclasses.replace(example.document, about=about)))
    assert again.token_ids.tolist() == stored.task.renumber(example).token_ids.tolist()
    naming = dataclasses.replace(stored.task, solve_names=True)
    named = naming.renumber(example)
    assert naming.decode(named.response_ids) == "<ref:5>" + response  # what `<solve>` names belongs to no step
    assert naming.steps(named.response_ids) == stored.task.steps(example.response_ids)
    plain, unnamed = (dataclasses.replace(own, labelling="plain").renumber(example) for own in (naming, stored.task))
    assert plain.token_ids.tolist() == unnamed.token_ids.tolist() and plain.prompt_tokens == unnamed.prompt_tokens


def test_a_late_instruction_is_seen_by_all_steps(corpora):
    """It ends the prompt in label 0, wherever the other labels begin; plain text has it without the span token."""
    stored = load(corpora, "papers", "validation")
    task, example = dataclasses.replace(stored.task, late_instruction=True), next(iter(stored))
    for uniform in (None, 0.5):
        before, late = (own.renumber(example, uniform) for own in (stored.task, task))
        prompt, _, response = task.decode(before.token_ids).partition("<solve>")
        told = prompt.partition("<bos>")[2].partition("<seg:")[0]
        assert told.startswith(f" {task.instruction}") and task.decode(late.token_ids) == f"{prompt}<seg:0>{told}<solve>{response}"
        assert late.token_ids[late.predictable].tolist() == before.token_ids[before.predictable].tolist()
        moved = task.rewrite(task.renumber(example), uniform, task.vocab) if uniform else late
        assert moved.token_ids.tolist() == late.token_ids.tolist()
    whole = task.renumber(example)
    assert task.encode_prompt(example.prompt).tolist() == whole.token_ids[: whole.prompt_tokens].tolist()
    plain = dataclasses.replace(task, labelling="plain").renumber(example)
    assert task.decode(plain.token_ids[: plain.prompt_tokens]) == re.sub(
        "<seg:[0-9]+>", "", task.decode(whole.token_ids[: whole.prompt_tokens])
    )


def test_each_answer_names_its_question_first_and_then_its_sections(corpora):
    """People's sections, answers and kinds come back from the file, whatever the order of the questions."""
    stored = load(corpora, "stories")
    orders = collections.defaultdict(set)
    for example in stored:
        document = example.document
        assert len(document.pieces) == 7 and document.pieces[0].endswith("found a silver key. It shone.")
        for place, step in enumerate(document.steps, 3):
            first, *sections = step.sources
            name = "the " + document.pieces[1].split()[-1].rstrip(".")
            told = {f"{QUESTION} {text.format(name=name)}": row for text, *row in layouts.ASKED}
            numbered, kind, answers = told[document.pieces[first]]
            assert first == place and [i + 1 for i in sections] == [int(n) for n in numbered.split(",")]
            assert (step.kind, (step.text, *step.answers)) == (kind, tuple(filter(None, answers)))
        orders[name].add(document.pieces[3:])
    assert all(len(found) > 1 for found in orders.values())  # four shuffles of four questions each
    naming = dataclasses.replace(stored.task, solve_names=True)
    example = naming.renumber(next(iter(stored)))
    section = example.document.steps[0].sources[1]  # `<solve>` names what the first answer is read in, not what it is asked
    assert naming.decode(example.response_ids).startswith(f"<ref:{section + 1}><seg:8><ref:4><ref:{section + 1}>")


def test_each_sentence_of_a_section_has_its_label(corpora):
    """Closed sentences: as closed pieces, and `<seg:k>` stands between the sentences too, which begin with a capital in these stories."""
    stored = load(corpora, "stories", "validation")
    (example,) = stored
    task = dataclasses.replace(stored.task, closed_sentences=True)
    texts = (stored.task.decode(own.renumber(example).token_ids) for own in (stored.task, task))
    plain, closed = (text.partition("<solve>") for text in texts)
    marked = re.sub(r"(<seg:\d+>)([^<]*)", lambda m: m[1] + re.sub(r"(?<=[a-z][.]) (?=[A-Z])", f"{m[1]} ", m[2]), plain[0])
    assert closed == (marked, *plain[1:]) and marked.count("<seg:1>") > plain[0].count("<seg:1>") == 2
    with pytest.raises(UserError, match="closed_sentences is True where closed_pieces is False; allowed: both"):
        dataclasses.replace(task, closed_pieces=False)


@pytest.mark.parametrize("name", sorted(TASKS.keys() - {"arithmetic", "news"} & {*WRITE, "documents"}))
def test_prompts_and_rows_give_the_example_again(corpora, name):
    stored = load(corpora, name)
    vocab = train_vocab(["other words"], vocab_tokens=300, num_labels=40)
    for example in stored:
        plain = stored.task.renumber(example)
        assert (stored.task.encode_prompt(plain.prompt) == plain.prompt_ids).all()
        other = dataclasses.replace(stored.task, vocab=vocab).renumber(example, 0.9)
        assert other.document == example.document and other.first_label > 1
        first = plain.token_ids + np.where(plain.token_ids >= stored.task.vocab.seg_base, example.first_label - 1, 0)
        assert (first == example.token_ids).all()


OTHER_IDS = {  # structural ids, labels -> whether ids are translated
    "after other tokens": (lambda first, n: (*range(first + 7, first + 11), first + 11, first + 11 + n), 50, True),
    "some before the labels": (lambda first, n: (first, first + 1, first + 2, first + 3, first + 90 + n, first + 4), 40, True),
    "a text's own token as an end": (lambda first, n: (first, first + 1, 70, first + 2, first + 3, first + 3 + n), 64, False),
    "too few labels": (lambda first, n: (*range(first, first + 4), first + 4, first + 4 + n), 9, None),
}


@pytest.mark.parametrize("case", OTHER_IDS)
def test_ids_of_the_same_tokenizer_are_translated_as_if_written_again(corpora, case, monkeypatch):
    place, num_labels, is_translated = OTHER_IDS[case]
    stored = load(corpora, "papers")
    vocab = stored.task.vocab
    ids = place(vocab.pad_id, num_labels)
    other = dataclasses.replace(vocab, num_labels=num_labels, structural_ids=ids, num_tokens=max(ids[4:]) + num_labels)
    task = dataclasses.replace(stored.task, vocab=other)
    for example in stored:
        expected, found = task.renumber(example, 0.6), task.rewrite(example, 0.6, vocab)
        if is_translated is None:
            assert found is expected is None
            continue
        assert (found.token_ids == expected.token_ids).all() and found.first_label == expected.first_label > 1
        assert found.document == example.document
    with monkeypatch.context() as patch:
        patch.setattr(type(task), "renumber", lambda *arguments: "renumbered")
        assert (task.rewrite(example, 0.6, vocab) == "renumbered") is not bool(is_translated)


def test_questions_of_a_story_are_divided_among_examples(sources, tmp_path, call):
    out = tmp_path / "out"
    call(data_main, "stories", "--source", sources["stories"], "--split", "train", *OPTIONS, "--questions", 3, "--orders", 1, "--out", out)
    asked = [len(example.document.steps) for example in load(tmp_path, "out")]
    assert asked == [2, 2, 2, 2]


def test_evidence_is_found_by_its_offsets_in_body_and_abstract(corpora):
    paper = next(iter(load(corpora, "papers")))
    assert [(own.pieces, own.steps) for own in paper.document.evidence] == [((4,), (1,)), ((5,), ())]
    card = load(corpora, "papers").card["statistics"]["alignment_against_evidence"]
    assert {name: card[name] for name in ("marked", "among_sources", "in_both", "aligned")} == {
        "marked": 6, "among_sources": 1.0, "in_both": 3, "aligned": 1.0,
    }  # fmt: skip
    kinds = [step.kind for example in load(corpora, "verdicts", "test") for step in example.document.steps]
    assert kinds == ["increased", "no difference"] * 2


def test_what_doctors_found_wrong_or_disagree_on_is_dropped_and_counted(tmp_path, call):
    root = layouts.write_reports(tmp_path / "reports")
    file = root / "annotations" / "v2_annotations.csv"
    head, *lines = file.read_text(encoding="utf-8").splitlines()
    answers = [
        lines[0],
        lines[0].replace(",1,UNK", ",-1,UNK"),  # disagrees with the one before
        lines[2].replace("True,True", "False,True"),  # a wrong answer
        lines[3].replace("True,True", "True,False"),  # wrong evidence
        lines[5],
        lines[7],  # evidence in the abstract alone
    ]
    file.write_text("\n".join([head, *answers]) + "\n", encoding="utf-8")
    dropped = {"on which doctors disagree": 1, "whose answers were all found wrong": 1, "whose evidence was found wrong": 1}
    for option, counts, pieces in (([], {"written": 1, "whose evidence is in no piece": 1}, [6]), (["--abstract"], {"written": 2}, [9, 9])):
        out = tmp_path / f"out{len(option)}"
        assert call(data_main, "verdicts", "--source", root, "--split", "train", *OPTIONS, *option, "--out", out)[0] == 0
        stored = load(tmp_path, out.name)
        assert stored.card["questions"] == {"read": 5, **counts, **dropped}
        assert [len(example.document.pieces) for example in stored] == pieces
    file.write_text(f"{head}\n", encoding="utf-8")
    for option, where in (([], ""), (["--split", "all"], ""), (["--split", "test"], " in the test split")):
        status, _, err = call(data_main, "verdicts", "--source", root, *OPTIONS, *option, "--out", tmp_path / "none")
        assert status == 2 and err.endswith(f"error: {root}: there are no questions{where}\n")


# ----------------------------------------------------------------------------------------------- what is read of a prompt


def test_a_prompt_may_be_the_report_as_its_repository_has_it(corpora):
    drug, people, n = layouts.PAPERS["validation"][201]
    text = layouts.REPORT.format(drug=drug, people=people, n=n)
    papers, verdicts = load(corpora, "papers", "validation"), load(corpora, "verdicts", "validation")
    assert papers.task.decode(papers.task.encode_prompt(text)) == PAPER
    asked = "QUESTION: Waking, with Wakor,\ncompared to tea?\n\n" + text
    assert verdicts.task.decode(verdicts.task.encode_prompt(asked)) == WRITTEN["verdicts"].partition("<solve>")[0] + "<solve>"
    assert (
        papers.task.decode(papers.task.encode_prompt("Tea. Milk."))
        == "<bos> Write the abstract:<seg:1> Tea.<seg:1><seg:2> Milk.<seg:2><solve>"
    )


TITLES = {"TITLE: One title": "One title", "TITLE: \nOne title": "One title", "TITLE:": "", "": ""}


@pytest.mark.parametrize("head", TITLES)
def test_a_title_is_in_its_line_or_in_the_next(head):
    report = parse(f"{head}\n\n  ABSTRACT:\nA.\n\nBODY.X.:\nB.\n")
    assert (report.title, [p.text.strip() for p in report.abstract], [p.heading for p in report.body]) == (TITLES[head], ["A."], ["X"])


IN_LINE = {  # a body whose text stands in its heading's line, or a heading in small letters -> its pieces
    "BODY: Introduction: IL-6 is high.\nIt may fall.": ["Introduction: IL-6 is high.", "It may fall."],
    "BODY.Introduction: IL-6 is": ["Introduction: IL-6 is"],
    "BODY.IL-6 is high. It\nfell": ["IL-6 is high.", "It fell"],
    "BODY. IL-6 is": ["IL-6 is"],
    "BODY:IL-6 is.": ["IL-6 is."],
    "BODY.METHODS.IL-6: We gave IL-6 to": ["Methods, il-6: We gave IL-6 to"],
    "BODY.METHODS:We gave IL-6.": ["Methods: We gave IL-6."],
    "BODY.IL:6 and IL. 7\nIt fell.": ["Il:6 and il, 7: It fell."],
    "BODY.Methods.Patients: \nIt fell.": ["Methods, patients: It fell."],
    "BODY: METHODS\nIt fell.": ["Methods: It fell."],
}


@pytest.mark.parametrize("body", IN_LINE)
def test_text_in_the_line_of_a_heading_is_text(body):
    report = parse(f"ABSTRACT: A b.\n\n{body}")
    found = reports.pieces(report, report.body, 1)
    assert list(found.texts) == IN_LINE[body] and [p.text.strip() for p in report.abstract] == ["A b."]
    assert all(squeezed(text).endswith(squeezed(report.text)[a:b]) for text, (a, b) in zip(found.texts, found.ranges, strict=True))


def test_a_story_is_asked_by_paragraphs(corpora):
    task = load(corpora, "stories").task
    text = task.decode(task.encode_prompt("A fox. It ran\nfar.\n\nQuestion: Who ran?"))
    assert text == "<bos> Answer the questions:<seg:1> A fox. It ran far.<seg:1><seg:2> Question: Who ran?<seg:2><solve>"


EMPTY = {  # a prompt of papers or verdicts that has nothing to read -> what is said
    "an abstract alone": ("TITLE: Tea\n\nABSTRACT:\nTea works.", 'an abstract, which is not read, and no body: text below a line "BODY:"'),
    "an empty body": ("QUESTION: Tea?\n\nABSTRACT:\nTea works.\n\nBODY:\n", "an abstract, which is not read, and no body"),
    "a title alone": ("TITLE: Tea", 'the text has no sentence after its first paragraph, "TITLE: ..."'),
    "a question alone": ("QUESTION: Tea?", 'the text has no sentence after its first paragraph, "QUESTION: ..."'),
    "nothing": (" \n", "the text has no sentence$"),
}


@pytest.mark.parametrize("case", EMPTY)
def test_a_prompt_without_text_to_read_says_what_is_missing(corpora, case):
    text, message = EMPTY[case]
    task = load(corpora, "verdicts" if "QUESTION" in text else "papers").task
    with pytest.raises(UserError, match=message):
        task.encode_prompt(text)


ASKED = {  # a prompt, and what asks in it
    "stories": ("A fox. It ran.\n\nQuestion: Who ran?", "Question: Who ran?"),
    "verdicts": ("QUESTION: Sleep?\n\nBODY:\nThey slept.", "QUESTION: Sleep?"),
    "tools": ("Service A_1: a.\n\nUser: Hello.", "User: Hello."),
    "tools without services": ("Service A_1: a.\n\nUser: Hello.", "Service A_1: a."),
}


@pytest.mark.parametrize("case", ASKED)
def test_a_prompt_that_asks_for_nothing_is_warned_of(corpora, case):
    text, asking = ASKED[case]
    name = case.partition(" ")[0]
    task = TASKS[name](vocab=load(corpora, "stories").task.vocab)
    assert task.warnings(text) == []
    begins = re.match(r"\w+:?", asking)[0]
    how = "(capitals as here, a blank line {} the paragraph): do not trust the answer."
    said = {"verdicts": f'The text does not begin with "{begins}" {how.format("after")}'}
    expected = [said.get(name, f'No paragraph of the text begins with "{begins}" {how.format("before")}')]
    assert task.warnings(text.replace(asking, "")) == expected
    if name == "stories":
        assert task.warnings(text.replace("\n\n", "\n")) == task.warnings(text.replace("Q", "q")) == expected
        more = "\n\nQuestion: Did it?"
        for prompt, begin in (
            (asking, "The text has a question and no story"),
            (f"{asking}\n\n{text}", "A question stands before a section"),
        ):
            (line,) = task.warnings(prompt + more)
            assert line.startswith(begin) and task.warnings(text + more) == []


def test_long_prompts_are_cut_with_a_warning_and_long_documents_dropped_or_cut(sources, tmp_path, call):
    said = []
    for too_long in ("drop", "cut"):
        options = ["--source", sources["papers"], "--split", "train", *OPTIONS[:4], "--max-prompt-tokens", 130, "--too-long", too_long]
        said.append(call(data_main, "papers", *options, "--out", tmp_path / too_long))
    assert (
        said[0][0] == 2
        and "3 dropped (3 longer than max_prompt_tokens); longer than max_prompt_tokens: PMC101, PMC102, PMC103" in said[0][2]
    )
    stored = load(tmp_path, "cut")
    counts = stored.card["papers"]
    assert counts["written, cut to max_prompt_tokens"] == 3 and counts["written, with steps left out that have no source"] == 3
    for example in stored:
        kept = len(example.document.pieces)
        assert example.prompt_tokens <= 130 and kept < 6
        assert {i for step in example.document.steps for i in step.sources} <= set(range(kept))
        assert all(set(own.pieces) <= set(range(kept)) and set(own.steps) <= set(range(kept)) for own in example.document.evidence)
    text = layouts.REPORT.format(drug="Tee", people="men", n=2)
    (line,) = stored.task.warnings(text)
    assert "of 6 sentences" in line and len(stored.task.encode_prompt(text)) <= 130


@pytest.mark.parametrize(
    ("name", "piece_sentences", "between", "divided_into"),
    [
        ("papers", 1, " ", "sentences"),
        ("verdicts", 1, " ", "sentences"),
        ("documents", 2, " ", "pieces of 2 sentences"),
        ("stories", 0, "\n\n", "paragraphs"),
    ],
)
def test_a_text_without_room_is_told_in_its_own_parts(corpora, name, piece_sentences, between, divided_into):
    """All that the text has, also where the prompt would be cut before: a label is left for a step."""
    task = dataclasses.replace(load(corpora, name).task, piece_sentences=piece_sentences, max_prompt_tokens=1000)
    room, each = task.vocab.num_labels - 2, max(piece_sentences, 1)
    tags = [i for i in task.encode_prompt(between.join(["Go."] * each * room)).tolist() if i in task.step_ids]
    assert max(tags) == task.vocab.seg_base + room
    for read in (task.encode_prompt, task.warnings):
        with pytest.raises(UserError, match=rf"^the text has 1,000 {divided_into}, but the model has room for {room}: each takes a label"):
            read(between.join(["Go."] * each * 1000))
        with pytest.raises(UserError, match=rf"^the first of the text's {divided_into} does not fit into 1,000 tokens of prompt; blank"):
            read("go and " * 1000)
        read("go and\n\n" * 60)


def test_pieces_are_sentences_within_paragraphs_or_paragraphs():
    text = "One. Two. Three.\n\nFour.\nFive."
    assert split_pieces(text, 2) == ["One. Two.", "Three.", "Four. Five."]
    assert split_pieces(text, 0) == ["One. Two. Three.", "Four. Five."]


def test_a_piece_of_two_sentences_is_found_where_no_sentence_stands_between_them():
    text = "It was seen by Stanski.[11]. The pain was less. It rained."  # the point after the bracket is left out
    pieces = group_sentences(text, 2)
    assert pieces == [["It was seen by Stanski.[11]", "The pain was less."], ["It rained."]]
    assert [squeezed(text)[a:b] for a, b in places(text, pieces)] == ["ItwasseenbyStanski.[11].Thepainwasless.", "Itrained."]


def test_places_are_found_whatever_the_white_space():
    text = "  One\n two. \u00a0Two  three.\n\n***\n\nOne two."
    found = places(text, [["One two."], ["Two three."], ["One two."]])
    assert [squeezed(text)[a:b] for a, b in found] == ["Onetwo.", "Twothree.", "Onetwo."]
    assert overlapping(found, 3, found[1][1]) == (1,)  # four characters of the first are a slip
    assert overlapping(found, 0, found[1][1]) == (0, 1) and overlapping(found, 8, 8) == ()


# ------------------------------------------------------------------------------------------------------------ scores


def respond(task, steps):
    """Write a response of (labels named, text)."""
    vocab = task.vocab
    ids = []
    for number, (refs, text) in enumerate(steps, 40):
        ids += [vocab.seg_base + number, *(vocab.ref_base + ref for ref in refs), *vocab.plain_text_ids(" " + text)]
    return np.array([*ids, vocab.eos_id], np.int32)


@pytest.mark.parametrize("name", [*WRITE, "documents"])
def test_gold_responses_are_right_and_empty_ones_are_not(corpora, name):
    stored = load(corpora, name)
    examples = [stored.task.renumber(example) for example in stored]
    gold = stored.task.scores(examples, [example.response_ids for example in examples])
    # A first sentence without a number, "To see whether ...", and 1,240, which stands elsewhere than the sentence that is named.
    expected = dict.fromkeys(gold, 1.0) | ({"numbers_in_sources": 0.75} if name == "papers" else {})
    assert gold == pytest.approx(expected)
    assert stored.task.scores(examples, [[]] * len(examples)) == dict.fromkeys(gold, 0)
    assert {key for keys in stored.task.score_kinds.values() for key in keys} == set(gold)


@pytest.mark.parametrize("name", WRITE)
def test_plain_text_is_the_same_without_span_tokens(name, corpora, sources, tmp_path, call):
    """The same documents and texts, steps told apart by `<solve>`; whatever labels the vocabulary has, it is written alike."""
    options = [*OPTIONS, "--labelling", "plain", "--split", "validation", "--out", tmp_path / name]
    assert call(data_main, name, "--source", sources[name], *options)[0] == 0
    plain, labelled = dataset.load(tmp_path / name, TASKS), load(corpora, name, "validation")
    assert len(plain) == len(labelled) and plain.corpus.labelling == "plain"
    for own, other in zip(plain, labelled, strict=True):
        vocab, expected = labelled.task.vocab, []
        for position, token in enumerate(other.token_ids.tolist()):
            if vocab.seg_base <= token < vocab.seg_base + vocab.num_labels and position > other.prompt_tokens:
                expected.append("<solve>")
            elif token < vocab.seg_base or token >= max(vocab.seg_base, vocab.ref_base) + vocab.num_labels:
                expected.append(vocab.decode([token]))
        assert [plain.task.vocab.decode([token]) for token in own.token_ids.tolist()] == expected
        assert plain.task.encode_prompt(own.prompt).tolist() == own.token_ids[: own.prompt_tokens].tolist()
        steps = plain.task.steps(own.response_ids)
        assert [step.text for step in steps] == [step.text for step in other.document.steps] and not any(step.named for step in steps)
        assert plain.task.rewrite(own, 0.7, plain.task.vocab).token_ids.tolist() == own.token_ids.tolist()
    scores = plain.task.scores([*plain], [example.response_ids for example in plain])
    assert {"papers": "rougeL", "verdicts": "verdict_accuracy", "stories": "questions_answered"}[name] in scores
    assert scores.get("rougeL", scores.get("quote_rougeL")) == pytest.approx(1)


def test_scores_of_an_abstract_by_hand(corpora):
    stored = load(corpora, "papers", "validation")
    example = stored.task.renumber(next(iter(stored)))
    response = respond(stored.task, [((3, 5), "With Wakor, 58 waiters woke, 99 slept."), ((2,), "Of 1,240 waiters most drink tea.")])
    scores = stored.task.scores([example], [response])
    assert scores["numbers_in_body"] == 2 / 3 and scores["numbers_in_sources"] == 1 / 3 and scores["numbers_in_abstract"] == 2 / 3
    assert scores["abstract_numbers_stated"] == 2 / 4  # of 1240, 58, 31, 0.02
    assert scores["gold_precision"] == 1 / 3 and scores["gold_recall"] == 1 / 2  # 3, 5 and 2 are named, 5 and 6 are gold
    assert scores["evidence_named"] == 1 / 2
    aligned = Alignment().align(example.document.pieces, ["With Wakor, 58 waiters woke, 99 slept.", "Of 1,240 waiters most drink tea."])
    said = [((1,), step.text) for step in example.document.steps]
    repeated = stored.task.scores([example], [respond(stored.task, [*said, *said[1:]])])
    assert repeated["rougeL_once"] == pytest.approx(1) and repeated["rougeL"] < 0.9
    hits = len({2, 4} & {*aligned[0]}) + len({1} & {*aligned[1]})
    assert scores["aligned_precision"] == hits / 3 and scores["aligned_recall"] == hits / sum(map(len, aligned))


def test_numbers_are_read_in_one_way():
    assert numbers(["1,200 of 3.5% (p=0·05), 12,34", "1200 and 7"]) == {"1200", "3.5", "0.05", "12,34", "7"}


VERDICTS = {
    "right, other evidence": ([((6,), "No one was hurt. Verdict: increased")], (1, 1, 0, 0, 0)),
    "wrong, right evidence": ([((5, 6), "So it was. Verdict: decreased")], (0, 1, 1, 0.5, 1)),
    "the last one counts": ([((5,), "Verdict: decreased"), ((), "Verdict: increased")], (1, 1, 1, 1, 1)),
    "another word": ([((5,), "Verdict: better")], (0, 0, 1, 1, 1)),
}


@pytest.mark.parametrize("case", VERDICTS)
def test_verdicts_by_hand(corpora, case):
    stored = load(corpora, "verdicts", "validation")
    example = stored.task.renumber(next(iter(stored)))
    steps, expected = VERDICTS[case]
    scores = stored.task.scores([example], [respond(stored.task, steps)])
    names = ("verdict_accuracy", "verdicts_given", "evidence_named", "evidence_precision", "evidence_recall")
    assert tuple(scores[name] for name in names) == expected


def test_answers_are_scored_by_the_question_that_they_name(corpora):
    """In another order, the second annotator's words, one wrong section, a question that is left out."""
    stored = load(corpora, "stories", "validation")
    example = stored.task.renumber(next(iter(stored)))
    label = {step.text: step.sources[0] + 1 for step in example.document.steps}
    steps = [
        ((label["under the oak"], 2), "below an oak"),
        ((label["a hungry wolf"], 2, 1), "a bear"),
        ((label["a silver key"], 1), "a key of gold"),
        ((label["a silver key"], 1), "a silver key"),  # too late
    ]
    scores = stored.task.scores([example], [respond(stored.task, steps)])
    from rouge_score import rouge_scorer  # imports nltk and SciPy's statistics, which only the process that runs this needs

    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)

    def rouge(own, *golds):
        return max(scorer.score(gold, own)["rougeL"].fmeasure for gold in golds)

    explicit = [rouge("below an oak", "under the oak", "below an oak"), rouge("a bear", "a hungry wolf", "a wolf")]
    explicit.append(rouge("a key of gold", "a silver key", "the key"))
    assert explicit[0] == 1 and scores["rougeL_explicit"] == pytest.approx(sum(explicit) / 3) and scores["rougeL_implicit"] == 0
    assert scores["rougeL"] == pytest.approx(sum(explicit) / 4) and scores["rougeL_first_answer"] < scores["rougeL"]
    assert scores["questions_answered"] == 3 / 4 and scores["section_named"] == 2 / 4
    assert scores["section_precision"] == 2 / 4 and scores["section_recall"] == 2 / 5


def test_sources_that_are_given_in_place_of_chosen_ones(corpora):
    """Labels are pieces from 1 on; as many as the gold step has; an answer names its question first, whatever section it is read in."""
    for name in WRITE:
        task, examples = load(corpora, name).task, [*load(corpora, name)]
        for example in map(task.renumber, examples):
            steps, pieces = example.document.steps, example.document.pieces
            assert task.headers(example, "gold") == [[1 + piece for piece in step.sources] for step in steps]
            asked = [i for i, piece in enumerate(pieces) if name == "stories" and piece.startswith(QUESTION)]
            sections = [i for i in range(len(pieces)) if i not in asked]
            for number, (step, *found) in enumerate(zip(steps, *(task.headers(example, kind) for kind in ("bm25", "random", "recent")))):
                count = len({*step.sources} - {*asked})
                query = {"papers": steps[number - 1].text if number else "", "verdicts": "", "stories": pieces[step.sources[0]]}[name]
                best = BM25([pieces[i] for i in sections]).rank(f"{example.document.about} {query}")[:count]
                first = [own.pop(0) - 1 for own in found if name == "stories"]
                assert first == [step.sources[0]] * len(first)
                assert found[0] == sorted(1 + sections[i] for i in best)
                assert len({*found[1]}) == count and {label - 1 for label in found[1]} <= {*sections}
                assert found[2] == [1 + i for i in sections[-count:]]
            assert task.headers(example, "random") == task.headers(example, "random")
            ordered = task.headers(example, "order")
            assert ordered == ([[1 + step.sources[0]] for step in steps] if name == "stories" else [])
            labels, closed, count = task.opens(example, "order")
            assert [*labels[:2]] == [1 + len(pieces), 2 + len(pieces)] and (closed, count) == (False, len(ordered))
    plain = dataclasses.replace(task, labelling="plain")
    with pytest.raises(UserError, match="sources are 'gold', but plain text names none; allowed: model"):
        plain.headers(plain.renumber(examples[0]), "gold")


def test_bm25_by_its_formula():
    """Robertson and Zaragoza (2009), equation 3.15, with k1 = 1.2 and b = 0.75; function words apart."""
    pieces = ["snow fell", "snow snow towns hills", "rain"]
    mean = 7 / 3

    def score(tf, length):
        idf = np.log(1 + (3 - 2 + 0.5) / (2 + 0.5))
        return idf * tf * 2.2 / (tf + 1.2 * (0.25 + 0.75 * length / mean))

    assert (score(2, 4) > score(1, 2)) == (BM25(pieces).rank("the snow")[0] == 1)
    assert BM25(pieces).rank("rain")[0] == 2 and BM25(pieces).rank("the") == [0, 1, 2]


# ------------------------------------------------------------------------------------------------- documents of one's own


def test_own_documents_are_aligned_where_they_have_no_sources(corpora):
    stored = load(corpora, "documents")
    texts, pieces = (example.document for example in stored)
    assert [step.sources for step in texts.steps] == [(0, 2), (3,)] and [step.sources for step in pieces.steps] == [(1,), (1, 0)]
    assert pieces.pieces == tuple(layouts.OWN[1]["document"]) and pieces.about == "Say what it was like."
    example = stored.task.renumber(list(stored)[1])
    assert stored.task.decode(example.prompt_ids).startswith(
        "<bos> Say what it was like.<seg:1> Snow fell on three towns. It was deep.<seg:1>"
    )


DROPPED = {  # rows of a document's text and its steps' sources -> what is said of those that are not written as they are
    "Snow fell on town 1.": [["Snow fell"]],
    "Snow fell on town 2.": [["Snow fell"], []],
    "Rain.": [[]],
    "Hail.": [["Hail."]] * 70,
}


def test_what_is_dropped_or_repeated_is_said_with_its_lines(tmp_path, call):
    (tmp_path / "rows").mkdir()
    rows = [{"document": text, "steps": [{"text": "x", "sources": own} for own in steps]} for text, steps in DROPPED.items()]
    rows = [json.dumps(row) for row in [rows[0], *rows, *rows[2:3] * 4, *rows[:1]]]
    (tmp_path / "rows" / "a.jsonl").write_text("\n".join(rows))
    (tmp_path / "rows" / "b.jsonl").write_text("\n\n".join(rows[:2]))
    options = ["--vocab-tokens", "300", "--num-labels", "64"]
    for workers in (0, 1):
        out = tmp_path / f"out{workers}"
        status, said, err = call(
            data_main, "documents", "--source", tmp_path / "rows", "--split", "all", "--workers", workers, *options, "--out", out
        )
        a, b, twice = tmp_path / "rows" / "a.jsonl", tmp_path / "rows" / "b.jsonl", "of a prompt that stands earlier in the same split"
        assert status == 0 and said.splitlines()[1:] == [
            f"documents: 12 read, 6 written (4 {twice}, 1 with steps left out that have no source), "
            "6 dropped (1 with more pieces and steps than num_labels, 5 without a step that rests on a piece)",
            f"{twice}: {a}: line 2, 10; {b}: line 1 and 1 more",
            f"with steps left out that have no source: {a}: line 3",
            f"without a step that rests on a piece: {a}: line 4, 6, 7 and 2 more",
            f"with more pieces and steps than num_labels: {a}: line 5",
        ]
        assert err == f"warning: examples {twice}: 4; each counts as an example of its own\n"
    (tmp_path / "own.jsonl").write_text(f"{rows[3]}\n{rows[4]}")
    status, _, err = call(
        data_main, "documents", "--source", tmp_path / "own.jsonl", "--split", "all", *options, "--out", tmp_path / "none"
    )
    lines = (f"without a step that rests on a piece: {tmp_path}/own.jsonl: line 1", f"than num_labels: {tmp_path}/own.jsonl: line 2")
    assert status == 2 and all(line in err for line in lines)


@pytest.mark.parametrize("name", WRITE)
def test_every_task_reads_own_documents(name, sources, tmp_path, call):
    status, *_ = call(data_main, name, "--source", sources["documents"], "--split", "all", *OPTIONS, "--out", tmp_path / "out")
    assert status == 0 and len(load(tmp_path, "out")) == 2


def test_a_test_file_of_ones_own_is_never_trained_on(tmp_path, call):
    """Of 8 rows a hash would give train some; what is absent, and that a hash divides, is said."""
    source = tmp_path / "rows"
    source.mkdir()
    for name in ("train", "val", "test"):
        rows = ({"document": f"Snow fell in {name} on town {i}.", "steps": [{"text": "Snow fell."}]} for i in range(8))
        (source / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    status, out, err = call(data_main, "documents", "--source", source, *OPTIONS, "--out", tmp_path / "out")
    assert status == 0 and out.startswith(f"{tmp_path / 'out'}: 8 train, 8 validation, 8 test\n") and "hash" not in out and not err
    for split, name in (("train", "train"), ("validation", "val"), ("test", "test")):
        assert all(f" in {name} on" in example.document.pieces[0] for example in load(tmp_path, "out", split))
    again = {"document": ["Snow fell in train", "on town 3."], "instruction": "Say it.", "steps": [{"text": "Snow.", "sources": [0]}]}
    with (source / "val.jsonl").open("a") as file:  # the same text for another instruction, and one of its own, each twice
        file.write("".join(f"{json.dumps(again | {'document': text})}\n" for text in (again["document"], ["It rained."]) * 2))
    status, out, err = call(data_main, "documents", "--source", source, *OPTIONS, "--out", tmp_path / "twice")
    told = "of a text that stands in an earlier split too"
    twice = "of a prompt that stands earlier in the same split"
    places = f"{told}: {source}/val.jsonl: line 9, 11\n{twice}: {source}/val.jsonl: line 12\n"
    assert status == 0 and f"documents: 28 read, 28 written (1 {twice}, 2 {told})\n{places}" in out
    warned = [f"{told}: 2; scores on them say little", f"{twice}: 1; each counts as an example of its own"]
    assert err == "".join(f"warning: examples {line}\n" for line in warned)
    assert f"| written, {told} | 2 |" in (tmp_path / "twice" / "test" / "README.md").read_text()
    warned = [f"{tmp_path / 'twice'}: 2 examples, of all splits, {told}: scores on them say little."]
    assert load(tmp_path, "twice", "test").warnings == warned and load(tmp_path, "out", "test").warnings == []
    file = source / "test.jsonl"
    status, _, err = call(data_main, "documents", "--source", file, *OPTIONS, "--out", tmp_path / "new")
    assert status == 2 and not (tmp_path / "new").exists()
    how = "--split test writes that alone, --split all everything undivided; under another name it is divided"
    assert err == f"error: {file} has no train part, only test, as its name says: {how}\n"
    status, out, _ = call(data_main, "documents", "--source", file, "--split", "test", *OPTIONS, "--out", tmp_path / "test")
    assert status == 0 and out.endswith(": 8 test\ndocuments: 8 read, 8 written\n")
    file.rename(source / "rows.jsonl")
    status, out, _ = call(data_main, "documents", "--source", source / "rows.jsonl", *OPTIONS, "--out", tmp_path / "divided")
    said = "by a hash of each document (80%, 10%, 10%), as nothing in the source is named after validation or test"
    card = load(tmp_path, "divided").card
    empty = [split for split in dataset.SPLITS if split not in dataset.splits(tmp_path / "divided")]
    told = f"no {' and no '.join(empty)} part: none of the 8 examples fell into it; train.py takes --eval-examples 0 then\n"
    assert status == 0 and out.endswith(f"splits: {said}\n{told}") and "validation" in empty and card["splits"] == said
    assert f"The splits are {said}." in (tmp_path / "divided" / "train" / "README.md").read_text()


def test_a_short_quote_across_pieces_means_those_that_have_most_of_it(tmp_path):
    quotes = {"lake. It": [0], "a lake. It rains": [1], "s. We slept": [2], "lake. It rai": [0, 1], "saw a lake. It": [0]}
    told = [{"text": "x", "sources": [quote]} for quote in quotes]
    (tmp_path / "own.jsonl").write_text(json.dumps({"document": "Elk saw a lake. It rains. We slept on.", "steps": told}))
    (draft,) = own_documents.read(str(tmp_path / "own.jsonl"), "all", 1)
    assert [[*step.sources] for step in draft.document.steps] == [*quotes.values()]


MISSING = {  # words -> what is written, what is said of parts, and what on stderr: validation is written, test is an empty file
    ("--split", "validation"): ("2 validation", "", ""),
    ("--num-examples", "3"): ("3 train", "no validation and no test part: the first 3 examples are of train{hint}", ""),
    (): (
        "4 train, 2 validation",
        "no test part: {source} has nothing for it that can be used\n",
        "warning: {source}/test.jsonl: no rows\n",
    ),
}


def test_parts_that_came_out_empty_say_why(tmp_path, call):
    source, hint = tmp_path / "rows", "; train.py takes --eval-examples 0 then\n"
    source.mkdir()
    for name, number in {"train": 4, "validation": 2, "test": 0}.items():
        rows = (json.dumps({"document": f"Snow fell in {name} on town {i}.", "steps": [{"text": "Snow fell."}]}) for i in range(number))
        (source / f"{name}.jsonl").write_text("".join(f"{row}\n" for row in rows))
    for words, (written, said, warned) in MISSING.items():
        out = tmp_path / "-".join(["out", *words])
        expected = f"{out}: {written}\ndocuments: {written[0] if words else 6} read, {written[0] if words else 6} written\n"
        told = expected + said.format(source=source, hint=hint), warned.format(source=source)
        assert call(data_main, "documents", "--source", source, *words, *OPTIONS, "--out", out) == (0, *told)


def row(**changes):
    return layouts.OWN[0] | changes


BAD_OWN = {  # the second of two rows -> what is said
    "no document": ({"steps": []}, "line 2: no document, only steps; a row has document, steps"),
    "half of a surrogate pair": (row(instruction="Say \ud800it."), "own.jsonl: line 2: \\ud800 is no character: expected text without NUL and"),
    "NUL in a step": (row(steps=[{"text": "It \0rained."}]), "own.jsonl: line 2: \\u0000 is no character"),
    "a number in a list": (row(document=["a", 1]), "line 2: document is neither a text nor a list of texts"),
    "an empty document": (row(document=" \n"), "line 2: the document is empty"),
    "no pieces": (row(document=[]), "line 2: the document is empty"),
    "an empty piece": (row(document=["a b", " "]), "line 2: piece 1 of the document is empty"),
    "another unknown key": (row(instructions="Say it."), "own.jsonl: line 2: unknown instructions; a row has document, steps, and may have instruction"),
    "a key twice": ('{"document": "Snow fell.", "steps": [], "steps": []}', "own.jsonl: line 2: the key steps stands twice in an object"),
    "a key twice in a step": ('{"document": "a", "steps": [{"text": "x", "text": "y"}]}', "line 2: the key text stands twice in an object"),
    "steps that are a text": (row(steps="x"), "line 2: steps is no list"),
    "a step without text": (row(steps=[{"sources": []}]), 'line 2, step 1: expected {"text": "...", "sources": [...]}'),
    "a step of an empty text": (row(steps=[{"text": "x"}, {"text": " \n"}]), "line 2, step 2: the text is empty"),
    "an unknown key": (row(steps=[{"text": "x", "source": []}]), "line 2, step 1: unknown source; a step has text and sources"),
    "an index of a text": (row(steps=[{"text": "x", "sources": [0]}]), "the source 0; allowed: a quote: indices are of a document that is a list"),
    "an index beyond": (row(document=["a b"], steps=[{"text": "x", "sources": [1]}]), "the source 1; allowed: a quote, or an index from 0 to 0"),
    "a quote of nothing": (row(steps=[{"text": "x", "sources": ["It snowed."]}]), "the source 'It snowed.' does not stand in the document\n"),
    "a short quote": (row(steps=[{"text": "x", "sources": [" I \nt"]}]), "step 1: the source ' I \\nt' is too short; allowed: 3 characters and more, without spaces"),
    "a composed letter": (row(document="Zoe\u0308 left.", steps=[{"text": "x", "sources": ["Zo\xeb"]}]),
        "the source 'Zo\xeb' does not stand in the document, but does after Unicode normalisation (NFC): write both in one form\n"),
    "a decomposed letter": (row(document="Zo\xeb left.", steps=[{"text": "x", "sources": ["Zoe\u0308"]}]), "does not stand in the document, but does"),
    "an instruction of numbers": (row(instruction=3), "line 2: instruction is no text"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_OWN)
def test_bad_own_documents_are_one_line(tmp_path, call, case):
    changed, message = BAD_OWN[case]
    rows = (text if isinstance(text, str) else json.dumps(text) for text in (layouts.OWN[0], changed))
    (tmp_path / "own.jsonl").write_text("".join(f"{text}\n" for text in rows), encoding="utf-8")
    status, _, err = call(data_main, "documents", "--source", tmp_path / "own.jsonl", *OPTIONS, "--out", tmp_path / "out")
    assert status == 2 and message in err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(("made", "said"), [(False, "there is no such file or directory; expected a file"), (True, "expected a file")])
def test_a_directory_that_there_is_not_is_told_from_one_without_files(made, said, tmp_path, call):
    if made:
        (tmp_path / "reports").mkdir()
    status, _, err = call(data_main, "documents", "--source", tmp_path / "reports", *OPTIONS, "--out", tmp_path / "out")
    assert (status, err) == (2, f"error: {tmp_path / 'reports'}: {said} that ends in .jsonl, or a directory of some\n")


@pytest.mark.parametrize("name", ["documents", "papers", "news"])
def test_a_pipe_is_no_source(name, tmp_path, call):
    """It would wait for who writes to it, and has nothing left for the second reading."""
    os.mkfifo(tmp_path / "rows.jsonl")
    for source in (tmp_path / "rows.jsonl", tmp_path):
        status, _, err = call(data_main, name, "--source", source, "--out", tmp_path / "out")
        assert (status, err) == (2, f"error: {tmp_path / 'rows.jsonl'} is no regular file: expected one, as a source is read twice\n")


def test_prompts_are_no_longer_than_examples(tmp_path, call):
    status, _, err = call(data_main, "documents", "--source", "x.jsonl", "--max-prompt-tokens", 9000, "--out", tmp_path / "out")
    assert status == 2 and err.startswith("error: --max-prompt-tokens is 9000; allowed: up to --max-example-tokens, 8192, which")


@pytest.mark.parametrize("name", ["documents", "stories"])
def test_hidden_files_are_no_data(name, tmp_path, call):
    """As those that macOS leaves beside others."""
    (source := tmp_path / "source").mkdir()
    write = WRITE.get(name, lambda directory: layouts.write_own(directory / "own.jsonl"))
    write(source)
    for file in [*source.rglob("*.jsonl"), *source.rglob("*.csv")]:
        file.with_name(f"._{file.name}").write_bytes(b"\0\5\x16\7")
    status, _, err = call(data_main, name, "--source", source, "--split", "train", *OPTIONS, "--out", tmp_path / "out")
    assert status == 0, err


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize("name", WRITE)
def test_parts_that_are_missing_are_said(name, tmp_path, call):
    parts = ("train", "val" if name == "stories" else "validation")
    source = WRITE[name](tmp_path / "source", parts)
    status, out, _ = call(data_main, name, "--source", source, *OPTIONS, "--out", tmp_path / "out")
    assert status == 0 and out.endswith(f"no test part in {source}\n") and dataset.splits(tmp_path / "out") == ("train", "validation")
    status, out, _ = call(data_main, name, "--source", source, "--split", "validation", *OPTIONS, "--out", tmp_path / "alone")
    assert status == 0 and "part" not in out.replace(str(tmp_path), "")
    status, _, err = call(data_main, name, "--source", source, "--split", "test", *OPTIONS, "--out", tmp_path / "new")
    assert status == 2 and "there is no such file, so no test part; there is train, validation" in err
    status, _, err = call(data_main, name, "--source", tmp_path, *OPTIONS, "--out", tmp_path / "new")
    expected = f"expected a clone of {TASKS[name].WriteCommand.repository}, or a .jsonl file\n"
    assert status == 2 and err.endswith(f": there is no such file: {expected}") and not (tmp_path / "new").exists()
    status, _, err = call(data_main, name, "--source", tmp_path / "nowhere", *OPTIONS, "--out", tmp_path / "new")
    assert (status, err) == (2, f"error: {tmp_path / 'nowhere'}: no such directory: {expected}")


IDLE = {
    "sections are pieces": ("stories", "clone", ("--piece-sentences", "2"), "documents of your own"),
    "sections that people marked": ("stories", "clone", ("--min-gain", "0.3"), "documents of your own"),
    "evidence that doctors marked": ("verdicts", "clone", ("--max-sources", "2"), "documents of your own"),
    "services are pieces": ("tools", "clone", ("--piece-sentences", "1"), "documents of your own"),
    "orders of no questions": ("stories", "own.jsonl", ("--orders", "2"), "a clone of uci-soe/FairytaleQAData"),
    "no abstract": ("verdicts", "own.jsonl", ("--abstract",), "a clone of jayded/evidence-inference"),
    "no catalogue": ("tools", "own.jsonl", ("--services", "5"), "a clone of google-research-datasets/"),
    "sizes of bare catalogues": ("tools", "clone", ("--bare-services", "5"), "--bare is 0: leave it out"),
    "bare among bare ones": ("tools", "clone", ("--bare", "0.5", "--no-described"), "all services are bare"),
    "a vocabulary of its own": ("papers", "clone", ("--vocab-tokens", "300", "--tokenizer", "words"), "--tokenizer has a vocabulary"),
    "columns of none": ("news", "synthetic", ("--article-column", "text"), "files and data sets"),
    "alignment of what is aligned": ("news", "synthetic", ("--min-gain", "0.3"), "files and data sets"),
    "events of articles": ("news", "rows.csv", ("--max-events", "3"), "synthetic news"),
}


@pytest.mark.parametrize("case", IDLE)
def test_an_option_that_changes_nothing_is_refused(case, tmp_path, call):
    name, source, option, message = IDLE[case]
    status, _, err = call(data_main, name, "--source", source, *option, "--out", tmp_path / "out")
    assert status == 2 and err.startswith(f"error: {option[0]} is ") and message in err and err.endswith(": leave it out\n")


@pytest.mark.parametrize("name", ["stories", "tools"])
def test_an_option_of_documents_of_ones_own_changes_these(name, tmp_path, call):
    call_text = '{"service": "A", "method": "f", "parameters": {}}'
    row = {"document": "Service A: f(). User: Do it. It is late.", "steps": [{"text": call_text, "sources": ["Do it."]}]}
    (tmp_path / "own.jsonl").write_text(json.dumps(row))
    for sentences, pieces in ((0, 1), (2, 2)):
        options = ["--source", tmp_path / "own.jsonl", "--split", "all", "--vocab-tokens", "300", "--piece-sentences", sentences]
        status, *_ = call(data_main, name, *options, "--out", tmp_path / f"out{sentences}")
        (example,) = dataset.load(tmp_path / f"out{sentences}", TASKS)
        assert status == 0 and len(example.document.pieces) == pieces


INCOMPLETE = "there is no such file: this clone of"
DAMAGED = {
    "a paper without its text": ("papers", "annotations/txt_files/PMC102.txt", None, f"PMC102.txt: {INCOMPLETE} jayded/evidence-inference is"),
    "no annotations": ("verdicts", "annotations/v2_annotations.csv", None, f"v2_annotations.csv: {INCOMPLETE} jayded/evidence-inference is"),
    "another column": ("papers", "annotations/prompts_merged.csv", "PromptID,PMCID\n1,2\n", "no column Outcome; there are PromptID, PMCID"),
    "offsets of words": ("papers", "annotations/v2_annotations.csv", ",".join(["PromptID", "Valid Label", "Valid Reasoning", "Label Code",
        "Evidence Start", "Evidence End"]) + "\n1,True,True,0,a,b\n", "row 1: expected whole numbers, not 1, 0, a, b"),
    "a list of names": ("papers", "annotations/splits/train_article_ids.txt", "PMC1\n", "'PMC1' is no number of a paper"),
    "a story without questions": ("stories", "data-by-train-split/questions/train/the-owl-questions.csv", None, f"{INCOMPLETE} uci-soe/FairytaleQAData is"),
    "a story without sections": ("stories", "data-by-train-split/section-stories/train/the-owl-story.csv", "section,text\n",
        "section-stories/train/the-owl-story.csv: the story has no sections\n"),
    "an empty story": ("stories", "data-by-train-split/section-stories/val/the-mole-story.csv", "", "the-mole-story.csv: the story has no sections\n"),
    "a section that there is not": ("stories", "data-by-train-split/questions/train/the-owl-questions.csv",
        "question,cor_section,ex-or-im1,answer1,answer4\nWho?,9,explicit,me,\n", "row 1: the story has no section '9', only 1, 2, 3"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_repositories_are_one_line(case, sources, tmp_path, call):
    name, file, content, message = DAMAGED[case]
    shutil.copytree(sources[name], tmp_path / "source")
    if content is None:
        (tmp_path / "source" / file).unlink()
    else:
        (tmp_path / "source" / file).write_text(content, encoding="utf-8")
    status, _, err = call(data_main, name, "--source", tmp_path / "source", *OPTIONS, "--out", tmp_path / "out")
    assert status == 2 and err.startswith("error: ") and message in err and not (tmp_path / "out").exists()


def test_a_tokenizer_may_be_given(corpora, sources, tmp_path, call):
    stored = load(corpora, "stories")
    (tmp_path / "tokenizer.json").write_text(stored.task.vocab.tokenizer_json, encoding="utf-8")
    (tmp_path / "vocab.json.gz").write_bytes(gzip.compress(json.dumps(stored.task.to_json()).encode()))  # as a model keeps it
    assert read_vocab(tmp_path / "vocab.json.gz", 32) == read_vocab(tmp_path, 32)
    options = ["--tokenizer", tmp_path, "--num-labels", 32, "--split", "test"]
    assert call(data_main, "stories", "--source", sources["stories"], *options, "--out", tmp_path / "out")[0] == 0
    again = load(tmp_path, "out")
    assert again.task.vocab.num_labels == 32
    for one, other in zip(again, load(corpora, "stories", "test"), strict=True):
        assert stored.task.vocab.decode(stored.task.renumber(other).token_ids) == again.task.decode(again.task.renumber(one).token_ids)
    status, _, err = call(
        data_main, "stories", "--source", sources["stories"], "--tokenizer", sources["stories"], "--out", tmp_path / "new"
    )
    assert status == 2 and "expected a tokenizer.json" in err
    with pytest.raises(UserError, match=r"arithmetic-tiny/vocab\.json is not .*: it has no text tokenizer; models of language"):
        read_vocab(Path("checkpoints/arithmetic-tiny"), 32)
    (tmp_path / "base.gguf").write_bytes(b"GGUF\xc3")
    with pytest.raises(UserError, match=r"base\.gguf is not .*: a GGUF is none; a checkpoint's directory has one"):
        read_vocab(tmp_path / "base.gguf", 32)


def test_documents_are_not_drawn(corpora):
    stored = load(corpora, "documents")
    with pytest.raises(UserError, match="documents are not drawn: give a corpus directory with --data"):
        next(stored.corpus.stream(seed=0))
    with pytest.raises(UserError, match=r"trained on own\.jsonl, like which nothing can be drawn"):
        stored.task.held_out(1, seed=0)
    assert DocumentTask.from_json(stored.task.to_json()) == stored.task


# ------------------------------------------------------------------------------------------------------------ evaluation


@pytest.mark.parametrize("name", WRITE)
def test_an_evaluation_takes_the_test_part(corpora, name):
    """Also for a model of any documents, or of others of them, which has the other tasks' examples scored by them."""
    stored = load(corpora, name)
    evaluation = decode.Eval(checkpoint=Path("model"), data=corpora / name, split="test")
    task, sets, _ = evaluation.examples(stored.task)
    (examples,) = sets.values()
    assert task == stored.task
    general = DocumentTask.of(load(corpora, "documents").corpus, stored.task.vocab)
    task, again, drawn = evaluation.examples(general)
    assert (task, drawn["warnings"]) == (stored.task, []) and [own.token_ids.tolist() for own in again[name]] == [
        own.token_ids.tolist() for own in examples
    ]
    other = next(own for own in WRITE if own != name)
    model = dataclasses.replace(load(corpora, other).task, closed_steps=True)
    task, again, drawn = evaluation.examples(model)
    assert (task.name, task.vocab, task.closed_steps) == (name, model.vocab, True) and len(again[name]) == len(examples)
    prompt = examples[0].prompt
    assert np.array_equal(read_by(model, name, TASKS).encode_prompt(prompt), task.encode_prompt(prompt))
    strange = f"The model was trained on {other}, not on {name}: do not trust its answers."
    assert drawn["warnings"] == [f"{corpora / name}: {strange}"] and read_by(model, name, TASKS).warnings(prompt) == [strange]
    assert stored.task.warnings(prompt) == []
    both = dataclasses.replace(model, trained_tasks=(other, name))
    assert type(both).from_json(json.loads(json.dumps(both.to_json()))) == both
    with pytest.raises(UserError, match=r"trained_tasks is 'a, b'; allowed: a list"):
        dataclasses.replace(model, trained_tasks="a, b")
    assert evaluation.examples(both)[2] == {"data": name, "split": "test", "warnings": []} and both.warnings(prompt) == []
    assert [example.document for example in examples] == [example.document for example in load(corpora, name, "test")]
    assert {example.first_label for example in examples} == {1}
