"""Scores of models that write from sources: what was read, by hand; the commands end to end on the smallest model."""

import itertools
import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

import decode
import train
from data import news
from data.__main__ import main as data_main
from selfspan_jax import summaries
from selfspan_jax.attention.policies import get_policy
from selfspan_jax.config import ModelConfig
from selfspan_jax.lm import Output, SpanLM
from selfspan_jax.model import Decoder
from selfspan_jax.spans import SpanVocab
from selfspan_jax.viewing.reading import Reading, attended

ROOT = Path(__file__).parents[2]
SIZES = {"hidden_size": 32, "intermediate_size": 32, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "head_size": 16}
TOY = [str(word) for name, value in SIZES.items() for word in (f"--{name.replace('_', '-')}", value)]
TOY += ["--steps", "4", "--warmup-steps", "1", "--batch-size", "2", "--log-every-steps", "2", "--workers", "0"]
TOY += ["--max-events", "2", "--max-distractors", "0"]
TOY += ["--num-labels", "48", "--vocab-tokens", "400"]


@pytest.fixture(scope="module")
def lm():
    corpus = news.Corpus(vocab_tokens=400, num_labels=64)
    config = ModelConfig(**SIZES, header_view="all", prompt_view="causal", compute_dtype="float32")
    task = news.NewsTask.of(corpus)
    model = Decoder(config, vocab=SpanVocab(**task.vocab.span_ids()), vocab_size=task.vocab.size, rngs=nnx.Rngs(0))
    return SpanLM(model, task)


@pytest.fixture(scope="module")
def gold(lm):
    """What a model that writes the gold response would have returned, and the example."""
    story = news.Story(("Ada won.", "Rain fell.", "It was Monday."), ("Ada won on Monday.", "It rained."), ((0, 2), (1,)), ())
    example = lm.task.encode(story)
    mask = lm.mask(example.token_ids, "span")
    attended = mask.sum(axis=1)[example.prompt_tokens :]
    task, model = lm.task, lm.model
    reading = Reading(example.token_ids, example.prompt_tokens, attended, get_policy("span"), model.config, model.vocab, task.decode)
    return Output(example.prompt, task.decode(example.response_ids), task.answer(example.response_ids), reading, task), example


def test_header_tokens_read_everything_and_body_tokens_what_is_named(gold):
    out, example = gold
    task = out.task
    length = {i: len(task.vocab.plain_text_ids(" " + text)) + 1 for i, text in enumerate(example.story.article)}
    sink = 2 + len(task.vocab.plain_text_ids(news.INSTRUCTION))  # <bos>, instruction, <solve>
    fractions, position = {"body": [], "header": []}, example.prompt_tokens
    for text, sources in zip(example.story.summary, example.story.sources, strict=True):
        own = 0
        for _ in range(1 + len(sources)):
            fractions["header"].append(1.0)
            own, position = own + 1, position + 1
        for _ in task.vocab.plain_text_ids(" " + text):
            own, position = own + 1, position + 1
            fractions["body"].append((sink + sum(length[i] for i in sources) + own) / position)
    fractions["body"].append((fractions["body"][-1] * position + 1) / (position + 1))  # <eos>
    read = attended([out.reading])
    assert read["attended_fraction_header"] == 1 and np.isclose(read["attended_fraction_body"], np.mean(fractions["body"]))
    assert np.isclose(read["header_share"], len(fractions["header"]) / len(out.response_ids))
    assert np.isclose(read["attended_fraction"], np.mean(fractions["body"] + fractions["header"]))


def test_the_table_has_the_sources_of_each_sentence(gold):
    lines = summaries.sources_table(gold[0]).splitlines()
    assert lines[0] == "Ada won on Monday. It rained."
    steps = ["<4> Ada won on Monday.", "    from <1> Ada won.", "    from <3> It was Monday.", "<5> It rained.", "    from <2> Rain fell."]
    assert lines[2:7] == steps
    assert lines[-1].startswith("attended, of the context: text ") and lines[-1].endswith("span tokens 100.0%")


def test_a_report_scores_what_was_decoded(lm):
    examples = [x for x in lm.task.held_out(3, seed=0)["synthetic"] if len(x.token_ids) < 1500]
    given = []

    def scores(golds, responses):
        given.append((golds, responses))
        return {"rougeL": 0.5}

    report = summaries.report(lm, examples, scores=scores, attention="span", batch_sizes=(1, 3), settings={"seed": 7})
    json.dumps(report)
    assert given[0][0] == examples and len(given[0][1]) == len(examples) and report["rougeL"] == 0.5 and report["seed"] == 7
    assert [speed["batch_size"] for speed in report["by_batch_size"]] == [1, 3]
    assert "rougeL 50.0%" in summaries.table(report) and "batch 3" in summaries.table(report)


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs a command's main in this process: (exit status, stdout, stderr)."""

    def run(main, *arguments):
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
        capsys.readouterr()
        try:
            with jax.numpy_dtype_promotion("standard"):
                main()
            status = 0
        except SystemExit as end:
            status = end.code or 0
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def test_a_model_of_news_is_trained_scored_and_asked(call, tmp_path):
    run = tmp_path / "run"
    status, out, err = call(train.main, "news-small", "--run-dir", run, *TOY, "--eval-examples", 2)
    assert status == 0 and "finished" in out, err
    assert "synthetic articles of 2 to 2 events" in (run / "model" / "README.md").read_text()
    status, out, err = call(decode.main, "eval", run / "model", "--num-examples", 2, "--batch-size", 2, "--json", tmp_path / "eval.json")
    assert status == 0 and out.startswith("2 summaries (span attention)"), err
    written = json.loads((tmp_path / "eval.json").read_text())
    assert {"rouge1", "rougeL", "fact_accuracy", "span_precision", "attended_fraction_body", "summaries_per_second"} <= written.keys()
    data = tmp_path / "corpus"
    data_main(["news", "--num-examples", "4", "--max-events", "2", "--vocab-tokens", "400", "--out", str(data)])
    status, out, err = call(decode.main, "eval", run / "model", "--num-examples", 2, "--batch-size", 2, "--data", data)
    assert status == 0 and out.startswith("2 summaries"), err
    page = tmp_path / "page.html"
    article = "docs/article.txt"
    status, out, err = call(decode.main, "generate", run / "model", "--article", article, "--max-new-tokens", 8, "--html", page)
    assert status == 0 and "attended, of the context:" in out and "Norwick" in page.read_text().replace("</span>", ""), err

    loaded = SpanLM.load(run / "model", {"news": news.NewsTask})  # nothing but the directory
    assert isinstance(loaded.task, news.NewsTask) and loaded.task.decode(loaded.task.encode_prompt("Ada won.")[-6:]).endswith("<solve>")

    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"\xff\xfe")
    long = tmp_path / "long.txt"
    long.write_text(" ".join("It rained." for _ in range(60)))
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    for file, message in {
        bad: "is not text in UTF-8",
        long: "need labels up to 61, but the last one is 47",
        empty: "the article has no sentence",
        tmp_path / "none.txt": "No such file",
    }.items():
        status, _, err = call(decode.main, "generate", run / "model", "--article", file)
        assert status == 2 and err.startswith("error: ") and message in err and len(err.splitlines()) == 1
    status, _, err = call(decode.main, "generate", run / "model")
    assert status == 2 and "give either a prompt or --article" in err


def test_examples_held_out_are_of_no_training_stream(lm):
    task = lm.task
    held = {example.prompt for example in task.held_out(16, seed=0)["synthetic"]}
    corpus = news.Corpus(vocab_tokens=400, num_labels=64)
    assert not held & {example.prompt for example in itertools.islice(corpus.stream(seed=0), 64)}
