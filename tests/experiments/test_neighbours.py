"""The experiment of what becomes of cut decoding, at toy size: several counts at once, the commands, the page."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from data import arithmetic
from data.vocab import Vocab
from experiments import neighbours, neighbours_tables
from selfspan_jax.lm import SpanLM
from selfspan_jax.model import Decoder
from selfspan_jax.neighbours.query_driven import Oracle, Quest
from selfspan_jax.spans import SpanVocab
from tests.selfspan_jax.models import random_model

COUNTS = [3, 9, 40]


@pytest.mark.parametrize("kind", ["window", "quest-4", "oracle"])
def test_sequences_read_as_each_count_alone_would(kind):
    """Of a list for the largest count, each sequence reads the first ones: those that a policy of its own count chooses."""
    rng = np.random.default_rng(0)
    q, pool = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((6, 2, 2, 8), (6 * 48, 2, 8)))
    table = jnp.asarray(rng.permutation(6 * 48).reshape(6, 48), jnp.int32)
    num_tokens = jnp.asarray([31, 31, 31, 2, 40, 48], jnp.int32)
    policy = neighbours.policy_of(kind, COUNTS)

    @functools.partial(jax.jit, static_argnums=0)
    def chosen(policy, q, pool, table, num_tokens):
        slots = dataclasses.replace(policy.initial_slots(table), counts=policy.count(num_tokens), num_tokens=num_tokens)
        summaries = policy.update(policy.summarize(pool, table), pool, slots)
        return policy.choose(q, pool, summaries, slots), slots.counts

    arrays = q, pool, table, num_tokens
    found, counts = map(np.asarray, chosen(policy, *arrays))
    for number, own in enumerate(policy.policies):
        expected, own_counts = map(np.asarray, chosen(own, *arrays))
        for b in range(number, 6, 3):
            assert counts[b] == own_counts[b] <= max(own.tokens, COUNTS[number])
            for head in range(2):
                assert set(found[b, head, : counts[b]]) == set(expected[b, head, : counts[b]])
                if kind == "window":
                    n = int(num_tokens[b])
                    assert set(found[b, head, : counts[b]]) == {*range(min(n, 4)), *range(max(0, n - own.tokens + 4), n)}


def test_counts_are_at_least_a_page_or_a_window():
    at_least = {"window": [5, 9, 40], "quest": [16, 16, 40], "quest-4": [4, 9, 40], "oracle": COUNTS}
    for kind, expected in at_least.items():
        assert [own.tokens for own in neighbours.policy_of(kind, COUNTS).policies] == expected
        assert [count for count, _ in neighbours.by_count(kind, COUNTS, COUNTS)] == sorted({*expected})
    assert at_least.keys() == neighbours.KINDS.keys()


@pytest.fixture
def models(monkeypatch):
    task = arithmetic.ArithmeticTask(vocab=Vocab(64))
    vocab = SpanVocab(**task.vocab.span_ids())
    found = {}
    for mask in ("dense", "span"):
        config = dataclasses.replace(random_model().config, max_context_tokens=256, mask=mask)
        found[mask] = SpanLM(Decoder(config, vocab=vocab, vocab_size=vocab.min_vocab_size, rngs=nnx.Rngs(0)), task)
    monkeypatch.setattr(neighbours.SpanLM, "load", lambda path, *_, **__: found[path.name])
    return found


def test_right_answers_and_rows_are_counted(models, monkeypatch, tmp_path, call):
    """All rows kept are dense decoding; what is counted is what the policies say."""
    monkeypatch.setattr(neighbours, "KINDS", {"oracle": Oracle(), "quest": Quest()})
    judged = []
    monkeypatch.setattr(neighbours, "_scores", lambda outs, own=neighbours._scores: judged.append([*outs]) or own(outs))
    options = ["--ops", 2, "--num-examples", 2, "--shares", "10,300", "--neighbours", "oracle"]
    status, out, err = call(neighbours.main, "arithmetic", "dense", "span", *options, "--json", tmp_path / "arithmetic.json")
    assert (status or 0) == 0, err
    rows = json.loads((tmp_path / "arithmetic.json").read_text())["arithmetic"]
    assert [row["neighbour"] for row in rows] == ["span", "dense", "oracle", "oracle", "oracle"] and len(out.splitlines()) == len(rows)
    by_mask = {outs[0].policy.name: outs for outs in judged[:2]}
    assert rows[0]["attended_tokens"] == pytest.approx(np.mean(np.concatenate([out.num_attended for out in judged[0]])))
    assert rows[0]["attended_fraction"] < rows[1]["attended_fraction"] == 1 and {*by_mask} == {"span", "dense"}
    few, *_, every = rows[2:]
    assert few["tokens"] == few["attended_tokens"] == max(1, round(few["context_tokens"] / 10))
    assert sum(row["as_spans"] for row in rows[2:]) == 1
    assert every["attended_fraction"] == 1 and every["right"] == rows[1]["right"]
    for one, other in zip(judged[1], judged[-1]):  # the dense model's responses, and those of all rows
        np.testing.assert_array_equal(one.token_ids, other.token_ids)

    # Documents are decoded the same way, whatever scores them; a span model reads its spans.
    class Scored(arithmetic.ArithmeticTask):
        def scores(self, examples, responses):
            return {"written": sum(map(len, responses)) / len(examples)}

    task = Scored(vocab=Vocab(64))
    (some,) = task.held_out(2, seed=1, ops=((2, 2),)).values()
    monkeypatch.setattr(neighbours, "chosen", lambda *_: (task, some))
    monkeypatch.setattr(neighbours.SpanLM, "load", lambda path, *_, **__: models[path.name])
    for name in ("dense", "span"):
        more = ["--data", tmp_path, "--shares", "10,300", "--neighbours", "oracle", "--json", tmp_path / f"{name}.json"]
        status, _, err = call(neighbours.main, "documents", name, *more)
        assert (status or 0) == 0, err
    found = [json.loads((tmp_path / f"{name}.json").read_text())["documents"] for name in ("dense", "span")]
    assert [row["attended_tokens"] for row in found[0]] == [row["attended_tokens"] for row in rows[1:] if not row.get("as_spans")]
    assert [row["attended_tokens"] for row in found[1]] == [rows[0]["attended_tokens"]]
    assert found[0][0]["tokens"] is None and found[0][-1]["attended_fraction"] == 1

    status, _, err = call(neighbours.main, "arithmetic", "span", "dense", *options)
    assert status == 2 and err == "error: span was trained under the mask 'span'; expected 'dense'\n"


def test_losses_of_all_rows_are_dense_ones(models, tmp_path, call):
    """And those of dense rows are of one forward; fewer rows are other losses."""
    (tmp_path / "texts").mkdir()
    for number in range(2):
        (tmp_path / "texts" / f"{number}.txt").write_text("+".join(f"({number + 1}*{n})" for n in range(1, 12)))
    sizes = ["--tokens", 40, "--continuation", 6, "--num-texts", 2, "--shares", "20,100", "--neighbours", "quest"]
    status, _, err = call(neighbours.main, "text", "dense", tmp_path / "texts", *sizes, "--json", tmp_path / "text.json")
    assert (status or 0) == 0, err
    rows = json.loads((tmp_path / "text.json").read_text())["text"]
    lm = models["dense"]
    ids = neighbours.concatenated(lm, [tmp_path / "texts"], 40, 2)
    logits = np.stack([lm.logits(row, "dense") for row in ids])[:, -7:-1]
    expected = np.log(np.exp(logits).sum(axis=2)) - np.take_along_axis(logits, ids[:, -6:, None], axis=2)[..., 0]
    assert rows[0]["neighbour"] == "dense" and rows[0]["perplexity"] == pytest.approx(np.exp(expected.mean()), rel=1e-4)
    assert rows[0]["attended_tokens"] == np.mean(np.arange(35, 41))
    for row in rows[1:]:
        assert abs(row["loss_more"]) < 1e-5 if row["tokens"] == 40 else 0 < abs(row["loss_more"])
    assert [row["tokens"] for row in rows[1:]] == [16, 40]
    for options, told in (
        (["--tokens", 6, "--continuation", 6], "--tokens is 6; allowed: above the 6 of the continuation"),
        (["--shares", 0], "--shares is 0.0; allowed: 0.01 to 1000"),
    ):
        status, _, err = call(neighbours.main, "text", "dense", tmp_path / "texts", *options)
        assert status == 2 and err == f"error: {told}\n"


def test_a_page_is_made_of_the_files(tmp_path, call):
    """Shares of the context stand in the column that is nearest, counts as spans have their own; the picture has a panel a task."""
    device, loss = {"device": "H100", "jax": "0.11.2"}, {"perplexity": 12.345, "loss_more": 0.25, "loss_more_error": 0.01}
    scores = {"num_examples": 4, "right": 3, "answer_accuracy": 0.75, "answer_accuracy_interval": [0.3, 0.95], "attended_tokens": 33.25}
    row = scores | {"context_tokens": 300.0, "attended_fraction": 0.11}
    results = tmp_path / "neighbours"
    results.mkdir()
    for ops in (100, 20):
        rows = [row | {"ops": ops, "neighbour": kind, "tokens": None} for kind in ("span", "dense")]
        rows += [row | {"ops": ops, "neighbour": "oracle", "tokens": 33, "as_spans": True}]
        rows += [row | {"ops": ops, "neighbour": "oracle", "tokens": 58, "as_spans": False, "answer_accuracy": 0.5}]
        (results / f"arithmetic_{ops}.json").write_text(json.dumps(device | {"dense": "long", "span": "small", "arithmetic": rows}))
    read = {
        "attended_tokens": 80.6,
        "attended_fraction": 0.01,
        "rougeL": 0.421,
        "batch_size": 24,
        "ms_per_step": 2.5,
        "tokens_per_second": 9600.0,
    }
    reports = {
        "text": {
            "model": "SmolLM2",
            "num_texts": 8,
            "tokens": 8192,
            "continuation_tokens": 257,
            "text": [loss | read | {"neighbour": "quest", "tokens": 82}],
        },
        "documents_papers": {"documents": [read | {"neighbour": "dense", "tokens": None}]},
        "presses_papers": {"transformers": "5", "num_examples": 16, "presses": [read | {"neighbour": "snapkv", "share": 5}]},
        "speed_presses": {"presses": [read | {"neighbour": "snapkv", "share": 5, "cache_bytes": 2**20, "peak_bytes": 2**31}]},
        "rebalancing_stories": {
            "model": "SmolLM2",
            "dtype": "float32",
            "rebalancing": [{"kind": "stories", "alpha": 0.2, "number": 9, "score": 5.0, "more": -1.5, "error": 0.5}],
        },
    }
    for name, report in reports.items():
        (results / f"{name}.json").write_text(json.dumps(device | report))
    (tmp_path / "prefill").mkdir()
    sparse = [
        {"selector": kind, "tiles_kept": kept, "loss_more": 0.01} for kind, kept in (("dense", 1.0), ("sample 2", 0.5), ("sample 2", 0.2))
    ]
    (tmp_path / "prefill/sparse_quality_2.json").write_text(json.dumps({"quality": sparse}))
    sections = ("picture", "arithmetic", "documents", "text", "speed", "rebalancing")
    (tmp_path / "neighbours.md").write_text("".join(f"<!-- {name} -->\n<!-- end -->\n" for name in sections))
    assert call(neighbours.main, "page", results)[0] in (None, 0)
    page = (tmp_path / "neighbours.md").read_text()
    assert "| operators | read by | expressions | uncut: right, % | as spans | 20% |" in page
    assert page.index("| 20 | `oracle` | 4 | - | 75.0 | 50.0 |") < page.index("| 100 | `span` | 4 | 75.0 | - | - |")
    assert "| `quest` | 82 | 80.6 | 1.0 | 12.35 | +0.2500 | 0.0100 |" in page
    assert "| papers | `kvpress snapkv` | 16 | 81 | 1.0 | ROUGE-L | 42.1 |" in page
    assert "| `kvpress snapkv` | 24 | 81 | 2.50 | 9,600 | 1 | 2,048 |" in page
    assert "| stories | 0.2 | 9 | 5.00 | -1.50 | 0.50 |" in page
    panels = list(neighbours_tables.panels_of(results))
    assert [panel.title for panel in panels] == [
        "20 operators",
        "100 operators",
        "papers",
        "text, 8,192 tokens",
        "text, prompts read sparsely",
    ]
    assert panels[4].curves == {"dense": [(100.0, 0.01)], "prompt: sample 2": [(20.0, 0.01), (50.0, 0.01)]}
    assert panels[2].curves == {"dense": [(1.0, 42.1)], "kvpress snapkv": [(1.0, 42.1)]}
    assert {file.name for file in results.glob("*.png")} == {"quality.png"}


def test_files_may_have_different_shares():
    """Counts stand in the columns of their shares, also where a later file has a smaller one."""
    shared = {"neighbour": "oracle", "num_examples": 4, "context_tokens": 100.0, "as_spans": False, "answer_accuracy": 0.5}
    reports = [
        (
            Path(f"arithmetic_{ops}.json"),
            {"device": "H200", "jax": "0", "dense": "long", "arithmetic": [shared | {"ops": ops, "tokens": share}]},
        )
        for ops, share in ((20, 20), (100, 5))
    ]
    written = neighbours_tables.arithmetic(reports)
    assert "| 5% | 20% |" in written
    assert "| 20 | `oracle` | 4 | - | - | 50.0 |" in written and "| 100 | `oracle` | 4 | - | 50.0 | - |" in written
