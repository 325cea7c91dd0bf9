"""News of files: what is read, divided, counted and refused, the same with workers and without, whatever the locale."""

# ruff: noqa: E501  (the table of bad input)

import collections
import csv
import functools
import itertools
import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import datasets
import hypothesis
import numpy as np
import pyarrow
import pytest
from hypothesis import strategies
from pyarrow import parquet

from data import dataset as corpus
from data import news, streams
from data.__main__ import main as data_main
from data.alignment import Alignment, split_sentences
from data.errors import UserError
from data.news import sources, synthetic
from data.sources import make_all
from data.tasks import TASKS
from selfspan_jax import files

ROOT = Path(__file__).parents[3]
STORIES = [synthetic.draw(f"tests/sources/{i}") for i in range(60)]
PAIRS = [{"article": " ".join(story.article), "summary": " ".join(story.summary)} for story in STORIES]
PAIRS = [{name: text.replace("Oakton", "Oaktön") for name, text in pair.items()} for pair in PAIRS]  # not ASCII
MAYOR = {
    "article": "The mayor of Oakton resigned. It rained. She had served for 12 years.",
    "summary": "Oakton's mayor resigned after 12 years.",
}


@pytest.fixture(scope="module")
def task():
    return news.NewsTask(news.train_vocab([" ".join(pair.values()) for pair in PAIRS], vocab_tokens=600, num_labels=128))


def json_lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


ROWS = [
    {
        "id": 1,
        "article": "The mayor of Oakton resigned. It rained. She had served for 12 years.",
        "summary": "Oakton's mayor resigned after 12 years.",
    },
    {"id": 2, "article": "", "summary": "Nothing."},
    {"id": 3, "article": "Snow fell.", "summary": None},
    {"id": 4, "article": "Snow fell.", "summary": "Ada won."},
]


def write_rows(path):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ROWS[0])
            writer.writeheader()
            writer.writerows(ROWS)
    else:
        parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_files_become_corpora_and_the_card_counts_what_was_dropped(tmp_path, call, suffix):
    write_rows(tmp_path / f"rows{suffix}")
    assert call(data_main, "news", "--source", tmp_path / f"rows{suffix}", "--split", "all", "--out", tmp_path / "out")[0] == 0
    stored = corpus.load(tmp_path / "out", TASKS)
    (row,) = stored.dataset
    assert (row["sources"], len(row["article"])) == ([[0, 2]], 3)
    dropped = {"without a sentence": 1, "without a summary": 1, "without a usable alignment": 1}
    assert stored.card["articles"] == {"read": 4, "written": 1, **dropped}


# ------------------------------------------------------------------------------------------------- what is refused

CSV = "id,article,summary\n" + "".join(f"{i},The mayor of Oakton resigned.,The mayor resigned.\n" for i in range(20))


def with_line(number, line):
    """The CSV file with another line of that number, the header's being 1."""
    lines = CSV.splitlines(keepends=True)
    return "".join([*lines[: number - 1], line, *lines[number:]])


def table(**columns):
    return pyarrow.table(columns)


UNUSABLE = "none of its articles can be used: 1 read, 0 written, 1 dropped "
BAD = {
    "a quote that never closes": ("rows.csv", with_line(5, '3,"The mayor resigned,x\n'), [], "the row that begins in line 5: a quote is opened there and never closed"),
    "a quote that the next one closes": ("rows.csv", with_line(5, '3,"The mayor resigned,x\n') + '21,"A storm came.",A storm.\n', [], "the row that begins in line 5: ',' expected after '\"'"),
    "a comma that is not quoted": ("rows.csv", with_line(7, "5,The mayor, resigned.,The mayor.\n"), [], "line 7: 4 fields, but the header has 3 columns"),
    "a row that breaks off": ("rows.csv", with_line(7, "5,The mayor\n"), [], "line 7: 2 fields, but the header has 3 columns"),
    "a row after one of several lines": ("rows.csv", with_line(2, '0,"The\n\nmayor\nresigned.",The mayor.\n') + "1,x\n", [], "line 25: 2 fields"),
    "another delimiter": ("rows.csv", CSV.replace(",", ";"), [], "there are id;article;summary: its columns are to be separated by commas"),
    "tabs": ("rows.csv", CSV.replace(",", "\t"), [], "its columns are to be separated by commas"),
    "a column twice": ("rows.csv", "article,article,summary\na,b,c\n", [], "there are two columns article"),
    "NUL in CSV": ("rows.csv", with_line(4, "2,The may\0or,x\n"), [], "line 4 is not text in UTF-8"),
    "CSV in Latin-1": ("rows.csv", with_line(4, "2,café,x\n").encode("latin-1"), [], "line 4 is not text in UTF-8"),
    "CSV in UTF-16": ("rows.csv", CSV.encode("utf-16"), [], "line 1 is not text in UTF-8"),
    "a header alone": ("rows.csv", "article,summary\n", [], "no rows"),
    "JSONL that breaks off": ("rows.jsonl", json_lines([MAYOR] * 3) + '{"article": "The', [], "line 4 is not JSON"),
    "JSONL in Latin-1": ("rows.jsonl", '{"article": "café"}'.encode("latin-1"), [], "line 1 is not text in UTF-8"),
    "JSONL in UTF-16": ("rows.jsonl", json_lines([MAYOR]).encode("utf-16"), [], "line 1 is not text in UTF-8"),
    "NUL in JSONL": ("rows.jsonl", json_lines([MAYOR]) + "\0\n", [], "line 2 is not text in UTF-8"),
    "Parquet without the column": ("rows.parquet", table(article=["a"], title=["b"]), [], "no column summary or highlights or abstract or headline; there are article, title"),
    "Parquet of numbers": ("rows.parquet", table(article=[1], summary=["b"]), [], "column article holds int64: expected text"),
    "Parquet of lists": ("rows.parquet", table(article=[["a"]], summary=["b"]), [], "column article holds list<"),
    "a directory of nothing": ("rows/x.txt", "", [], "rows: expected a file that ends in .jsonl, .csv, .parquet, or a directory of some"),
    "a JSON array": ("rows.jsonl", json.dumps([MAYOR], indent=1), [], "rows.jsonl: line 1: expected a JSON object a line, not an array"),
    "a split that there is not": ("rows.jsonl", json_lines([MAYOR]), ["--split", "dev"], "split is 'dev'; allowed: train, validation, test, all"),
    "too many workers": ("rows.jsonl", json_lines([MAYOR]), ["--workers", "1000", "--split", "all"], "the number of workers is 1000; allowed: 0 to 256"),
    "a first sentence longer than the context": ("rows.jsonl", json_lines([{"article": "word " * 3000, "summary": "word."}]), ["--split", "all"], UNUSABLE + "(1 with a first piece longer than max_prompt_tokens"),
    "an empty article only": ("rows.jsonl", '{"article": "", "summary": "x"}\n', [], UNUSABLE + "(1 without a sentence"),
    "a missing column": ("rows.jsonl", '{"article": "A b.", "title": "x"}\n', [], "no column summary or highlights or abstract or headline; there are article, title"),
    "a named column that is missing": ("rows.jsonl", '{"article": "A b.", "summary": "x"}\n', ["--article-column", "x"], "no column x; there are article, summary: name one with --article-column"),
    "not JSON": ("rows.jsonl", '{"article": \n', [], "line 1 is not JSON"),
    "not an object": ("rows.jsonl", "[1]\n", [], "line 1: expected a JSON object a line, not an array"),
    "a number of many digits": ("rows.jsonl", f'{{"article": {"9" * 5000}}}\n', [], "rows.jsonl: line 1 has a number of more than 4,300 digits"),
    "nested without end": ("rows.jsonl", '{"a":' * 100_000, [], "rows.jsonl: line 1 is nested too deeply"),
    "an address": ("rows.jsonl", json_lines([MAYOR]), ["--source", "https://example.com/x.jsonl"], "https://example.com/x.jsonl is an address, which is not read: download"),
    "a number for text": ("rows.jsonl", '{"article": 1, "summary": "x"}\n', [], UNUSABLE + "(1 with something other than text"),
    "an empty file": ("rows.csv", "", [], "no rows"),
    "not Parquet": ("rows.parquet", "nothing", [], "is not Parquet"),
    "another kind of file": ("rows.txt", "text", [], "expected a file that ends in .jsonl, .csv, .parquet"),
    "too many sentences": (
        "rows.jsonl", json.dumps({"article": "A won. B won. C won. D won.", "summary": "A won."}) + "\n",
        ["--num-labels", "4"], UNUSABLE + "(1 with more pieces and steps than num_labels",
    ),
    "a gain of nothing": ("rows.csv", "", ["--min-gain", "0"], "-gain is 0.0; allowed: above 0"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, call, case):
    name, content, options, message = BAD[case]
    source = (tmp_path / name).parent if "/" in name else tmp_path / name
    (tmp_path / name).parent.mkdir(exist_ok=True)
    if isinstance(content, pyarrow.Table):
        parquet.write_table(content, source)
    else:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    status, out, err = call(data_main, "news", "--source", source, *options, "--out", tmp_path / "new" / "out")
    (line,) = [line for line in err.splitlines() if "examples" not in line]
    assert (status, out) == (2, "") and line.startswith("error: ") and message in line
    assert [path.name for path in tmp_path.iterdir()] == [source.name]


GOOD = "3,The mayor of Oakton resigned.,The mayor resigned.\n"
LETTER = '4,"Dear all,\nthe mayor, 61, resigned.\n\nYours, Ann",The mayor resigned.\n'
QUOTES = {  # rows below the header -> rows that are read, and the line that the warning names
    "opened before a summary, closed after one": ('1,Snow.,"It fell\n' + GOOD * 3 + '2,Rain.,It rained"\n' + GOOD, 2, "line 2 "),
    "closed in the next row": (GOOD + '1,Snow.,"It fell\n2,Rain.,It rained"\n', 2, "line 3 "),
    "opened before an article, closed after one": (GOOD + '1,"Snow.,It fell\n' + GOOD + '2,Rain.",It rained\n', 2, "line 3 "),
    "four times": ('1,Snow.,"It fell\n2,Rain.,It rained"\n' * 4, 4, "line 2, 4, 6 and 1 more "),
    "beside a text of several lines": (LETTER + '1,Snow.,"It fell\n2,Rain.,It rained"\n', 2, "line 6 "),
    "texts of several lines": (LETTER * 3, 3, None),
    "a text that only looks so": ('1,"Snow, ice\nand rain, too",It fell.\n', 1, "line 2 "),
    "a text of lines like rows among others": (LETTER * 2 + '1,Snow.,"It fell\n2,Rain.,It rained"\n', 3, None),
    "Windows": ('1,Snow.,"It fell\r\n2,Rain.,It rained"\r\n', 1, "line 2 "),
}


@pytest.mark.parametrize("case", QUOTES)
def test_rows_between_two_stray_quotes_are_not_lost_in_silence(tmp_path, capsys, case):
    rows, num_read, line = QUOTES[case]
    (tmp_path / "rows.csv").write_bytes(("id,article,summary\n" + rows).encode())
    for _ in range(2):  # as a corpus is written, and said once
        assert len(list(sources.read_pairs(str(tmp_path / "rows.csv")))) == num_read
    said = capsys.readouterr().err
    assert said.count("\n") == (line is not None) and (line or "") in said


def test_a_file_that_is_not_there(tmp_path, call):
    status, _, err = call(data_main, "news", "--source", tmp_path / "none.jsonl", "--out", tmp_path / "out")
    assert status == 2 and "none.jsonl: No such file or directory" in err and not list(tmp_path.iterdir())
    status, _, err = call(data_main, "news", "--source", "synthetic", "--split", "dev", "--out", tmp_path / "out")
    assert status == 2 and "split is 'dev'; allowed: train, test" in err and not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------- what is replaced, dropped, counted


def test_rows_that_cannot_be_used_are_counted_by_reason_and_never_end_the_import(tmp_path, call):
    """One row of each kind among good ones; the numbers are those of the rows below."""
    rows = [
        MAYOR,
        {**MAYOR, "article": "A half \ud83d pair: " + MAYOR["article"]},
        {**MAYOR, "summary": "Oakton's mayor \udc00resigned after \0 12 years."},
        {**MAYOR, "article": "\ufeff" + MAYOR["article"]},
        {**MAYOR, "article": MAYOR["article"] + " It rained on and on and on." * 99},
        {**MAYOR, "article": MAYOR["article"] + " Rain." * 99},
        {**MAYOR, "article": "word " * 3000 + "mayor resigned"},
        {**MAYOR, "summary": MAYOR["summary"] + " Nothing in common."},
        {**MAYOR, "article": ""},
        {**MAYOR, "article": "* * *"},
        {**MAYOR, "article": None},
        {**MAYOR, "summary": " "},
        {"article": MAYOR["article"]},
        {**MAYOR, "summary": 3},
        {**MAYOR, "article": ["The mayor resigned."]},
        {"article": "Snow fell.", "summary": "Ada won."},
        {"article": "Rain fell. " * 80 + "Ada won.", "summary": "Ada won."},
    ]
    (tmp_path / "rows.jsonl").write_text(json_lines(rows))
    options = ["--split", "all", "--max-prompt-tokens", 300, "--num-labels", 100, "--vocab-tokens", 300]
    status, out, err = call(data_main, "news", "--source", tmp_path / "rows.jsonl", *options, "--out", tmp_path / "out")
    counts = {
        "read": 17,
        "written": 7,
        "written, with unreadable characters replaced": 3,
        "written, cut to max_prompt_tokens": 2,
        "written, of a prompt that stands earlier in the same split": 3,
        "written, with summary sentences left out that have no source": 1,
        "without a sentence": 3,
        "without a summary": 2,
        "with something other than text": 2,
        "without a usable alignment": 1,
        "with a first piece longer than max_prompt_tokens": 1,
        "with all sources beyond the cut": 1,
    }
    stored = corpus.load(tmp_path / "out", TASKS)
    assert status == 0 and stored.card["articles"] == counts
    places = {
        "with unreadable characters replaced": "row 2, 3, 4",
        "of a prompt that stands earlier in the same split": "row 3, 4, 8",
        "cut to max_prompt_tokens": "row 5, 6",
        "with a first piece longer than max_prompt_tokens": "row 7",
        "with summary sentences left out that have no source": "row 8",
        "without a sentence": "row 9, 10, 11",
        "without a summary": "row 12, 13",
        "with something other than text": "row 14, 15",
        "without a usable alignment": "row 16",
        "with all sources beyond the cut": "row 17",
    }
    assert stored.card["places"] == places and out.endswith("".join(f"{kind}: {where}\n" for kind, where in places.items()))
    assert err.endswith("warning: examples of a prompt that stands earlier in the same split: 3; each counts as an example of its own\n")
    told = "articles: 17 read, 7 written (2 cut to max_prompt_tokens, 3 of a prompt that stands earlier in the same split, 1 with summary sentences left out that have no source, "
    assert out.startswith(f"{tmp_path / 'out'}: 7 all\n{told}") and "10 dropped (1 with a first piece" in out
    replaced = [x for x in stored if "\ufffd" in x.prompt + " ".join(x.story.summary)]
    assert len(replaced) == 2 and not any("\ufeff" in example.prompt for example in stored)
    readme = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    kept = [len(example.story.article) for example in stored]
    lost = sorted([3 + 99 - kept[4], 3 + 99 - kept[5]])
    cut = "2 of 7 articles were cut: longer than 300 tokens of prompt (max_prompt_tokens), they end after the last sentence that fits. "
    assert f"{cut}The median one lost {lost[0]} sentences, none more than {lost[1]}." in readme and lost[0] > 0
    assert stored.card["statistics"]["cut_articles"] == 2 and stored.card["statistics"]["cut_sentences"]["max"] == lost[1]


PARAGRAPHS = [
    "Measures.\n1. Close the bridge\n2. Build a school\n\nThe mayor thanked all.",
    "1) First\n2) Second\n\n(a) one (b) two. i. three",
    'He said: "Go. Now." Then left.\n"Yes!" she cried.',
    "Dr. Smith, Jr.\r\n \r\nMr. J. R. Brown of the U.S. came at 5 p.m. on Jan. 5.\rThey left.",
    "- one\n- two\n* three\nDone.",
    "今天天气很好。我们去公园。\n\n你呢？",
    "नमस्ते। आप कैसे हैं। مرحبا. كيف حالك؟ Привет. Как дела?",
    "A\u2028B\u0085C.\u3000D\x1cE\x0bF. G…H.",
    "No. 5. of 3. 4. 5.",
    "\ufeffBOM.\n\t\nHalf \ud83d.",
]
WHITE_SPACE = {  # what the splitter sees of a sentence depends on the white space before it, and it fails at one of several bytes after a capital
    "\t! 3.5 percent.": ["3.5 percent."],
    " ?) said Ada.": [") said Ada."],
    "Group A\xa0. It won.": ["Group A .", "It won."],
    "Vitamin C\u3000.": ["Vitamin C ."],
    "Anna J.\xa0Brown came.\u3000She left.": ["Anna J. Brown came.", "She left."],
}
FRAGMENTS = strategies.sampled_from([
    "1.", " 2) ", "(iv)", "a.", "Dr.", "U.S.", "No.", "p.m.", " J.", " 3.5", "-", "* ",
    ".", "!", "?", "...", "。", "।", "؟", '"', "”", "“", "'",
    "\n", "\n\n", "\r\n", "\r", " \n \n", "\t", "\u2028", "\u3000",
    " The mayor", " said", "came ", "Oakton", "今天", "हैं", "كيف", "é", "e\u0301",
    "\ufeff", "\ud83d", "\0", "<seg:1>",
])  # fmt: skip


def assert_stable(task, text):
    """What is stored of an article is what its text is read as again, however often."""
    sentences = split_sentences(text)
    assert split_sentences("\n\n".join(sentences)) == sentences
    pair = sources.Pair(0, "train", text, text)
    ((_, example, _, _),) = sources.example(task.vocab, {"max_prompt_tokens": 4096, "closed_pieces": False}, Alignment(), 0, pair)
    if example is not None and not example.cut_sentences:
        first = task.renumber(example)
        wide = news.NewsTask(task.vocab, max_prompt_tokens=4096)
        assert list(wide.encode_prompt(example.prompt)) == list(first.prompt_ids) == list(wide.encode_prompt(text))
        shift = np.where(np.isin(example.prompt_ids, list(task.step_ids)), example.first_label - 1, 0)
        assert list(example.prompt_ids - shift) == list(first.prompt_ids)
    return example


def test_a_stored_prompt_is_the_prompt_of_its_text(task):
    assert all(assert_stable(task, text) for text in PARAGRAPHS)
    assert split_sentences(PARAGRAPHS[0]) == ["Measures.", "1. Close the bridge", "2. Build a school", "The mayor thanked all."]
    for text, sentences in WHITE_SPACE.items():
        assert split_sentences(text) == sentences == split_sentences("\n\n".join(sentences))
    assert split_sentences(PARAGRAPHS[3])[0] == "Dr. Smith, Jr."  # a line of white space is a blank one, also after CRLF


@hypothesis.given(strategies.lists(FRAGMENTS | strategies.text(max_size=4), max_size=24).map("".join))
@hypothesis.settings(max_examples=150)
def test_a_stored_prompt_is_the_prompt_of_its_text_whatever_the_text(task, text):
    assert_stable(task, text)


# ------------------------------------------------------------------------------------------------------------ splits


@pytest.fixture(scope="module")
def divided(tmp_path_factory):
    """A file of 60 articles, the first ten once more with other white space and summaries; its corpus directory."""
    path = tmp_path_factory.mktemp("divided")
    again = [{"article": pair["article"].replace(" ", "\n", 3) + " ", "summary": "And " + pair["summary"]} for pair in PAIRS[:10]]
    (path / "rows.jsonl").write_text(json_lines([*PAIRS, *again]))
    data_main(["news", "--source", str(path / "rows.jsonl"), "--out", str(path / "corpus"), "--vocab-tokens", "600"])
    return path


def articles(directory):
    """The articles of each split of a directory."""
    return {split: [x.prompt for x in corpus.load(directory, TASKS, split=split)] for split in corpus.splits(directory)}


def test_a_file_is_divided_and_an_article_that_occurs_twice_is_in_one_split(divided):
    found = articles(divided / "corpus")
    assert list(found) == ["train", "validation", "test"] and sum(map(len, found.values())) == 70
    counted = collections.Counter(itertools.chain(*found.values()))
    assert sorted(counted.values()) == [1] * 50 + [2] * 10 and sum(map(len, map(set, found.values()))) == 60
    read = datasets.load_from_disk(str(divided / "corpus"))
    assert {split: len(rows) for split, rows in read.items()} == {split: len(texts) for split, texts in found.items()}
    for split in found:
        card = corpus.load(divided / "corpus", TASKS, split=split).card
        twice = {"written, of a prompt that stands earlier in the same split": 10}
        assert card["split"] == split and card["articles"] == {"read": 70, "written": 70} | twice and "--split" not in card["command"]
    assert corpus.load(divided / "corpus", TASKS).split == "train"


def test_shares_are_as_stated():
    found = collections.Counter(streams.divided_split_of(f"Article {i} of many.") for i in range(10_000))
    for split, share in {"train": 0.8, "validation": 0.1, "test": 0.1}.items():
        assert abs(found[split] - 10_000 * share) < 4 * math.sqrt(10_000 * share * (1 - share))


@pytest.mark.slow
def test_splits_depend_on_neither_the_order_of_rows_nor_workers_nor_the_locale(divided, tmp_path):
    """LC_ALL=C without Python's UTF-8 mode: what `open` and `print` would take by themselves is ASCII."""
    rows = [json.dumps(json.loads(line), ensure_ascii=False) + "\n" for line in (divided / "rows.jsonl").read_text().splitlines()]
    random.Random(0).shuffle(rows)
    (tmp_path / "rows é.jsonl").write_text("".join(rows), encoding="utf-8")
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    words = ["--source", "rows é.jsonl", "--vocab-tokens", "600", "--workers", "2", "--out", "corpus é"]
    command = [sys.executable, "-m", "data", "news", *words]
    done = subprocess.run(command, cwd=tmp_path, env=environment | {"PYTHONPATH": str(ROOT)}, check=True, capture_output=True)
    assert done.stderr.startswith(b"warning: examples of a prompt that") and done.stderr.count(b"\n") == 1 and b"corpus " in done.stdout
    assert "--source 'rows é.jsonl'" in (tmp_path / "corpus é" / "train" / "README.md").read_text(encoding="utf-8")
    ours, theirs = articles(divided / "corpus"), articles(tmp_path / "corpus é")
    assert {split: sorted(texts) for split, texts in ours.items()} == {split: sorted(texts) for split, texts in theirs.items()}
    assert "Oaktön" in str(theirs)


def test_one_split_alone_is_the_one_of_the_whole_and_all_is_undivided(divided, tmp_path, call):
    whole = corpus.load(divided / "corpus", TASKS, split="test")
    options = ["--source", divided / "rows.jsonl", "--vocab-tokens", 600]
    assert call(data_main, "news", *options, "--split", "test", "--out", tmp_path / "test")[0] == 0
    alone = corpus.load(tmp_path / "test", TASKS)
    assert [list(x.token_ids) for x in alone] == [list(x.token_ids) for x in whole] and alone.split == "test"  # the vocabulary too
    assert corpus.fingerprint(tmp_path / "test") != corpus.fingerprint(divided / "corpus")
    assert call(data_main, "news", *options, "--split", "all", "--num-examples", 5, "--out", tmp_path / "all")[0] == 0
    everything = corpus.load(tmp_path / "all", TASKS)
    assert [x.prompt for x in everything] == ["\n\n".join(story.article) for story in STORIES[:5]]
    with pytest.raises(UserError, match="has no validation split, only all: nothing is held out"):
        everything.held_out(3, seed=0)
    with pytest.raises(UserError, match="has no test split: there is all"):
        corpus.load(tmp_path / "all", TASKS, split="test")


def test_a_file_without_an_article_of_train_is_refused(tmp_path, call):
    text = next(t for t in (f"Article {i} of many. It rained." for i in itertools.count()) if streams.divided_split_of(t) == "test")
    (tmp_path / "rows.jsonl").write_text(json_lines([{"article": text, "summary": text}]))
    status, _, err = call(data_main, "news", "--source", tmp_path / "rows.jsonl", "--out", tmp_path / "out")
    assert status == 2 and "no example is in the train split, only 1 in test (1 read, 1 written): give more, or write" in err
    status, _, err = call(data_main, "news", "--source", tmp_path / "rows.jsonl", "--split", "train", "--out", tmp_path / "out")
    assert (
        status == 2
        and f"error: {tmp_path / 'rows.jsonl'}: there are no articles in the train split\n" == err
        and not (tmp_path / "out").exists()
    )


def test_examples_held_out_of_a_file_are_its_own(divided):
    stored = corpus.load(divided / "corpus", TASKS)
    for split in ("validation", "test"):
        held, num_without_room = stored.held_out(3, seed=0, split=split)
        own = list(corpus.load(divided / "corpus", TASKS, split=split))[:3]
        assert not num_without_room and [x.prompt for x in held] == [x.prompt for x in own] and {x.first_label for x in held} == {1}
        assert not {x.prompt for x in held} & {x.prompt for x in stored}
    assert stored.task.source == "rows.jsonl" and not stored.task.is_generated
    with pytest.raises(UserError, match=r"trained on news of rows\.jsonl, not on synthetic news: give its corpus directory"):
        stored.task.held_out(3, seed=0)


# ------------------------------------------------------------------------------------------------------ other sources


def test_parquet_is_read_where_it_is_needed_alone(tmp_path):
    """A date beyond the year 9999, which Python has none of, in a column that nobody asked for; text in its other types."""
    days = pyarrow.array([10**7] * 3, pyarrow.int32()).cast(pyarrow.date32())
    bad = pyarrow.array([b"Rain \xff fell.", None, b"\xe2\x82\xac"], pyarrow.binary()).view(pyarrow.string())
    named = pyarrow.array(["a", "b", "a"])
    for summary in (named, named.dictionary_encode(), named.cast(pyarrow.large_string()), named.cast(pyarrow.string_view())):
        parquet.write_table(table(when=days, article=bad, summary=summary), tmp_path / "rows.parquet")
        found = [pair[2:] for pair in sources.read_pairs(str(tmp_path / "rows.parquet"))]
        assert found == [("Rain \udcff fell.", "a"), ("", "b"), ("€", "a")]


def test_byte_order_marks_are_taken_off(tmp_path):
    rows = {"rows.csv": 'article,summary\n"\ufeffa",b\n', "rows.jsonl": json_lines([{"article": "\ufeffa", "summary": "b"}])}
    for name, text in rows.items():
        (tmp_path / name).write_text("\ufeff" + text, encoding="utf-8")
        ((_, _, article, summary),) = sources.read_pairs(str(tmp_path / name))
        assert (split_sentences(article), summary) == (["a"], "b")
    (tmp_path / "article.txt").write_text("\ufeffAda won.", encoding="utf-8")
    assert files.read_text(tmp_path / "article.txt") == "Ada won."


def test_a_column_that_nobody_needs_may_be_damaged(tmp_path):
    file = tmp_path / "rows.parquet"
    parquet.write_table(table(other=[f"{i}" * 99 for i in range(99)], article=["a"] * 99, summary=["b"] * 99), file, compression="snappy")
    chunk = parquet.ParquetFile(file).metadata.row_group(0).column(0)
    damaged = bytearray(file.read_bytes())
    end = chunk.dictionary_page_offset + chunk.total_compressed_size
    damaged[chunk.dictionary_page_offset : end] = b"\xff" * (end - chunk.dictionary_page_offset)
    file.write_bytes(damaged)
    with pytest.raises(OSError):
        parquet.read_table(file)
    assert [pair[2:] for pair in sources.read_pairs(str(file))] == [("a", "b")] * 99
    with pytest.raises(UserError, match=r"rows\.parquet is not Parquet, or damaged: "):
        list(sources.read_pairs(str(file), article_column="other"))


def test_files_of_a_directory_are_the_splits_that_they_are_named_after(tmp_path, call):
    for name, pairs in {"train-1": PAIRS[:5], "train-2": PAIRS[5:9], "test": PAIRS[9:12]}.items():
        (tmp_path / f"{name}.jsonl").write_text(json_lines(pairs))
    assert call(data_main, "news", "--source", tmp_path, "--out", tmp_path / "out")[0] == 0
    assert articles(tmp_path / "out") == {
        "train": ["\n\n".join(story.article) for story in STORIES[:9]],
        "test": ["\n\n".join(story.article) for story in STORIES[9:12]],
    }


BY_HASH = None
NAMED = {  # files of a directory -> the splits of their rows
    "other spellings": {"train.jsonl": "train", "val.jsonl": "validation", "test.jsonl": "test"},
    "numbers, and other kinds": {"train-00000-of-2.csv": "train", "Train-1.jsonl": "train", "dev.jsonl": "validation"},
    "one word of several": {"reports_train_v2.jsonl": "train", "reports.valid.jsonl": "validation", "testset of reports.csv": "test"},
    "test alone": {"test.jsonl": "test", "test-2.jsonl": "test"},
    "train alone": {"train-1.jsonl": BY_HASH, "train-2.jsonl": BY_HASH},
    "words that begin so": {"testimonies.jsonl": BY_HASH, "validity.jsonl": BY_HASH, "devices.jsonl": BY_HASH},
    "two words of different splits": {"train+test.jsonl": BY_HASH, "dev_test.jsonl": BY_HASH},
}


@pytest.mark.parametrize("case", NAMED)
def test_names_of_files_say_their_splits(tmp_path, case):
    expected = set()
    for name, split in NAMED[case].items():
        texts = [f"Article {i} of {name}." for i in range(9)]
        head, lines = ("article,summary\n", [f"{text},b\n" for text in texts]) if name.endswith(".csv") else ("", [])
        (tmp_path / name).write_text(head + ("".join(lines) or json_lines({"article": text, "summary": "b"} for text in texts)))
        expected |= {(split or streams.divided_split_of(text), text) for text in texts}
    pairs = list(sources.read_pairs(str(tmp_path)))
    assert {(pair.split, pair.article) for pair in pairs} == expected
    order = [pair.split for pair in pairs]
    assert BY_HASH in NAMED[case].values() or order == sorted(order, key=streams.SPLITS.index)  # so --num-examples takes train first
    (tmp_path / "more.jsonl").write_text(json_lines(PAIRS[:1]))
    assert len(list(sources.read_pairs(str(tmp_path), "all"))) == len(pairs) + 1
    if BY_HASH not in NAMED[case].values() or case == "train alone":
        with pytest.raises(UserError, match=r"more\.jsonl: its name says no split, but .* is of "):
            list(sources.read_pairs(str(tmp_path)))


HUB = {
    "splits of its own": (("train", "validation", "test"), None, ["train", "validation", "test"]),
    "one of them": (("train", "validation", "test"), "test", ["test"]),
    "one split is divided": (("train",), None, ["train", "test"]),
    "and one of its parts": (("train",), "test", ["test"]),
    "another of its own": (("train", "dev"), "dev", ["dev"]),
    "more than these": (("train", "test", "unlabelled"), None, ["train", "test"]),
    "in other spellings": (("train_sft", "dev_matched", "test_sft"), None, ["train", "validation", "test"]),
    "test alone": (("test",), None, ["test"]),
    "other names alone": (("all",), None, ["train", "test"]),
}


@pytest.mark.parametrize("case", HUB)
def test_a_data_set_keeps_its_splits_and_its_only_one_is_divided(case, monkeypatch):
    own, split, expected = HUB[case]
    name, asked = f"sets/{case}", []
    texts = [next(t for t in map(str, itertools.count()) if streams.divided_split_of(t) == part) for part in ("train", "test")]
    rows = datasets.Dataset.from_list([{"article": text, "summary": "b", "other": 1} for text in texts])
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *path: asked.append(path) or list(own))
    monkeypatch.setattr(datasets, "load_dataset", lambda *path, split, streaming: rows.to_iterable_dataset())
    for _ in range(2):
        found = list(sources.read_pairs(name, split))
        assert list(dict.fromkeys(pair.split for pair in found)) == expected
    if case == "one of them":
        with pytest.raises(UserError, match=f"{name}: there is no split dev, only train, validation, test"):
            next(sources.read_pairs(name, "dev"))
    assert asked == [(name,)]  # over the network: once


def test_a_data_set_that_fails_on_the_way_is_one_line(monkeypatch):
    def failing():
        yield {"article": "a", "summary": "b"}
        raise ConnectionError("connection lost\nmore")

    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *path: ["train"])
    monkeypatch.setattr(datasets, "load_dataset", lambda *path, split, streaming: datasets.IterableDataset.from_generator(failing))
    with pytest.raises(UserError, match=r"^some/set: neither a file nor a data set that could be loaded: connection lost$"):
        list(sources.read_pairs("some/set"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "rows", [[{"article": "word " * 3000, "summary": "word."}], [{**MAYOR, "article": "\ud83d"}]], ids=["long", "surrogate"]
)
def test_workers_say_what_is_said_without(rows, tmp_path, call):
    (tmp_path / "rows.jsonl").write_text(json_lines(rows * 3))
    said = [
        call(data_main, "news", "--source", tmp_path / "rows.jsonl", "--split", "all", "--workers", workers, "--out", tmp_path / "out")
        for workers in (0, 2)
    ]
    assert said[0][0] == 2 and said[0][2].splitlines()[-1] == said[1][2].splitlines()[-1] and said[0][:2] == said[1][:2]


def test_workers_change_nothing(task):
    pairs = [sources.Pair(number, "train", *pair.values()) for number, pair in enumerate(PAIRS)]
    make = functools.partial(sources.example, task.vocab, {"max_prompt_tokens": 896, "closed_pieces": False}, Alignment(), 0)
    made = [list(make_all(make, iter(pairs), workers)) for workers in (0, 2)]
    alone, together = ([(one.split, one.counted, one.example.token_ids.tolist()) for one in found] for found in made)
    assert alone == together and len(alone) == len(PAIRS)
