"""Evaluations: scores, order, seconds and reports, by a model that writes noise and a task that is told what to say of it."""

import dataclasses
import hashlib
import json
import re
from types import SimpleNamespace
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data import arithmetic
from selfspan_jax import SpanLM, evaluation
from selfspan_jax.config import DecodeConfig
from selfspan_jax.decoding.state import prefill_chunk_tokens
from selfspan_jax.errors import UserError
from selfspan_jax.parallel import memory
from selfspan_jax.serving.requests import Tokens
from selfspan_jax.spans import SpanVocab
from selfspan_jax.viewing import text
from tests.selfspan_jax.models import Digits, random_model

RIGHT = {"4": (True, True, True), "45": (True, False, True), "456": (False, False, False)}


class Example(NamedTuple):
    prompt: str
    response_ids: np.ndarray = np.array([5, 2])


class Summaries(Digits):
    """A task with scores of its own."""

    unit = "summaries"
    score_kinds: ClassVar = {"ROUGE": ("rougeL",), "facts": ("fact_accuracy",)}

    def to_json(self):
        return {"task": "digits", "max_digits": 2, "vocab": "large"}

    def scores(self, examples, responses):
        assert all(len(response) for response in responses)
        return {"rougeL": np.mean([len(example.prompt) for example in examples]) / 4, "fact_accuracy": 0.5}


class Problems(Summaries):
    """The same, verified: a prompt decides what is right."""

    unit, group_by, group_title = "problems", "ops", "operators"

    def warnings(self, prompt):
        return ["a long one"] if prompt == "456" else []

    def verify(self, prompt, response_ids):
        answer, steps, spans = RIGHT[prompt]
        return SimpleNamespace(answer_right=answer, steps_right=steps, spans_right=spans, message=f"of {prompt}")

    def scores(self, examples, responses):
        judged = np.mean([RIGHT[example.prompt] for example in examples], axis=0)
        return dict(zip(("answer_accuracy", "step_accuracy", "span_accuracy"), judged.tolist(), strict=True))

    def group(self, prompt):
        return str(10 - len(prompt) if len(prompt) > 1 else 10)


@pytest.fixture(scope="module")
def model():
    return random_model(max_context_tokens=80)


@pytest.fixture(scope="module")
def lm(model):
    return SpanLM(model, Problems())


def evaluate_all(lm, sets, **options):
    return evaluation.evaluate_all(lm, sets, batch_sizes=(2,), **options)


@pytest.fixture(scope="module")
def evaluations(lm):
    sets = {"short": [Example("4")], "long": [Example("45"), Example("456")]}
    return evaluation.evaluate_all(lm, sets, batch_sizes=(1, 2), attention="span", passes=2)


def test_scores_order_and_seconds(lm, monkeypatch):
    """Shares, the order of the prompts, the median of passes, the last, smaller batch; decoding and reading are timed apart."""
    prompts = ["45", "456", "4"]  # not in the order of their lengths, in which they are decoded
    passes, later = [(0, 1, 5), (0, 0.25, 1), (0, 0.5, 2)], [(0, 2, 7), (0, 1, 3), (0, 1, 3)]  # prefill, and decoding after it
    lasted = [(0, 100), *passes, (0, 0.5), *later, (0, 0.25)]  # compilation; three passes of each batch, then what they wrote is read
    readings = iter(reading for own in lasted for reading in own)
    monkeypatch.setattr(evaluation.running, "time", SimpleNamespace(perf_counter=lambda: next(readings)))
    found = evaluation.evaluate(lm, [Example(prompt) for prompt in prompts], max_new_tokens=6, batch_size=2, passes=3)
    assert (found.decode_seconds, found.read_seconds, found.compile_seconds, next(readings, "read")) == (2 + 3, 0.75, 100, "read")
    speed = found.speed()
    assert speed["prefill_seconds"] == 0.5 + 1
    assert (speed["problems_per_second"], speed["problems_per_second_with_reading"]) == (2 / 5, pytest.approx(2 / 5.75))
    assert [out.prompt for out in found.outputs] == prompts and found.outputs[0].verdict.message == "of 45"
    assert (found.scores["answer_accuracy"], found.scores["step_accuracy"], found.scores["span_accuracy"]) == (2 / 3, 1 / 3, 2 / 3)
    attended = np.concatenate([out.num_attended for out in found.outputs])
    contexts = np.concatenate([np.arange(out.prompt_tokens + 1, len(out.token_ids) + 1) for out in found.outputs])
    assert found.scores["attended_tokens"] == pytest.approx(attended.mean())
    assert found.scores["attended_fraction"] == pytest.approx((attended / contexts).mean())
    assert found.scores["finished_fraction"] == np.mean([2 in out.response_ids for out in found.outputs])
    assert found.right_per_second == 2 / 5
    alone = lm.generate(prompts, max_new_tokens=6)
    assert [out.text for out in found.outputs] == [out.text for out in alone] and found.outputs[0].attention == "span"
    for sets in ({"none": []}, {"some": [Example("4")], "none": []}):
        with pytest.raises(ValueError, match="no examples"):
            evaluation.evaluate_all(lm, sets, batch_sizes=[1])
    with pytest.raises(ValueError, match="no examples"):
        evaluation.evaluate(lm, [])


def test_what_a_scheduler_decodes_is_read_in_the_order_of_the_examples(lm, monkeypatch, capsys):
    """Each response up to its end, which is counted; that the tokens are those of static batches is tested in test_lm.py."""
    examples = [Example(prompt, np.full(count, 2)) for count, prompt in enumerate(("45", "456", "4", "45", "4"), 1)]
    config = SimpleNamespace(num_sequences=4)

    def run_together(scheduler, requests, on_end):
        for _ in requests:
            on_end()
        assert [request.max_new_tokens for request in requests] == [6] * 5
        assert [len(request.prompt_ids) for request in requests] == [4, 5, 3, 4, 3]
        assert [request.expected_tokens for request in requests] == [1, 2, 3, 4, 5]
        return [Tokens(np.array([len(own.prompt_ids), 2, 7, 7]), np.array([3, 4, 5, 6]), "length") for own in requests]

    monkeypatch.setattr(evaluation.running, "is_faster", lambda *_: True)
    monkeypatch.setattr(evaluation.running, "throughput_scheduler", lambda *_: SimpleNamespace(config=config, warm_up=lambda draws: None))
    monkeypatch.setattr(evaluation.running, "run_together", run_together)
    monkeypatch.setattr(evaluation.running, "_LINE_SECONDS", -1)
    found = evaluation.evaluate(lm, examples, max_new_tokens=6, batch_size=2, progress=True)
    assert capsys.readouterr().err.splitlines() == [f"decoded {done} of 5 prompts" for done in range(1, 5)]
    assert [out.response_ids.tolist() for out in found.outputs] == [[4, 2], [5, 2], [3, 2], [4, 2], [3, 2]]
    assert found.scores["answer_accuracy"] == 4 / 5 and found.scores["attended_tokens"] == 3.5
    assert found.speed()["num_places"] == 4 and found.decode_seconds > 0


class Named(Summaries):
    """The same, which says what each step names, what its text begins with, and what each example adds to a score."""

    def headers(self, example, sources):
        return [[{"gold": 1, "random": 0}[sources]] * 2]

    def beginnings(self, prompt):
        return [[9, 8]]

    def counts(self, example, response_ids):
        return {"length": (len(response_ids), 1)} | ({"fours": (1, 2)} if "4" in example.prompt else {})


def test_steps_name_what_the_task_gives_and_examples_are_kept_apart(model):
    lm, examples = SpanLM(model, Named()), [Example("45"), Example("567"), Example("4")]
    found = {sources: evaluation.evaluate(lm, examples, max_new_tokens=6, batch_size=2, sources=sources) for sources in ("gold", "model")}
    first = [[out.steps[0].refs for out in own.outputs if out.steps] for own in found.values()]
    assert first[0] and set(first[0]) == {(1, 1)} and set(first[1]) != {(1, 1)}
    values = evaluation.report(lm, {"some": [found["model"]]}, {})["by_example"]
    outputs = found["model"].outputs
    assert values["digests"] == [hashlib.sha256(example.prompt.encode()).hexdigest()[:16] for example in examples]
    assert values["prompt_tokens"] == [4, 5, 3] and values["response_tokens"] == [len(out.response_ids) for out in outputs]
    assert values["counts"] == {"length": [[len(out.response_ids), 1] for out in outputs], "fours": [[1, 2], [0, 0], [1, 2]]}
    with pytest.raises(ValueError, match="sources are 'gold', but this model's task gives none; allowed: model"):
        evaluation.evaluate(SpanLM(model, Problems()), examples, sources="gold")
    constrained = evaluation.evaluate(lm, examples, max_new_tokens=6, batch_size=2, sources="gold", constrained=True)
    texts = [[token for token in out.response_ids.tolist() if token in range(4, 10)][:2] for out in constrained.outputs]
    assert any(texts) and all(text == [9, 8][: len(text)] for text in texts)
    with pytest.raises(ValueError, match="constrained is True, but this model's task says nothing that steps are to begin with"):
        evaluation.evaluate(SpanLM(model, Problems()), examples, constrained=True)


def test_an_evaluation_says_what_it_decodes_and_how_far_it_is(lm, monkeypatch, capsys):
    """At once, and now and then where there is no bar; what exceeds the context is not counted."""
    sets = {"short": [Example("4")] * 3, "long": [Example("456"), Example("4" * 80)]}
    evaluate_all(lm, sets)
    assert capsys.readouterr().err == ""
    longest = len(Example("4").response_ids) + evaluation.running.MARGIN_TOKENS
    head = f"decoding 4 examples: prompts of {3 * 3 + 5} tokens in all, the longest of 5; responses of at most {longest}\n"
    for seconds, expected in ((-1, "decoded 2 of 3 prompts\n"), (10**9, "")):
        monkeypatch.setattr(evaluation.running, "_LINE_SECONDS", seconds)
        evaluate_all(lm, sets, progress=True)
        assert capsys.readouterr().err == head + expected

    def compile_all(programs):
        raise RuntimeError(capsys.readouterr().err)

    monkeypatch.setattr(evaluation.running, "compile_all", compile_all)
    with pytest.raises(RuntimeError, match=r"^decoding 4 examples: "):
        evaluate_all(lm, sets, progress=True)


def live_bytes():
    return sum(array.nbytes for array in jax.live_arrays())


def test_prompts_are_read_as_asked_and_what_is_kept_is_told(lm):
    """A local model has nothing to choose from, and says so; short causal prompts are read densely, and are said to."""
    sets = {"both": [Example("4"), Example("45")]}
    for read in (lambda **options: evaluation.evaluate(lm, sets["both"], **options), lambda **options: evaluate_all(lm, sets, **options)):
        with pytest.raises(UserError, match="prefill='sample' is for prompts that read everything before"):
            read(prefill="sample")
    causal = SpanLM(random_model(max_context_tokens=80, prompt_view="causal"), Problems())
    report = evaluation.report(causal, evaluate_all(causal, sets, prefill="sample"), {"prefill": "sample"})
    assert (report["prefill"]["selector"], report["prefill"]["tiles_kept"]) == ("sample", 1)
    assert "prefill: sample reads 100.0% of the tiles" in text.evaluation_table(report, causal.task).splitlines()[-1]


def test_each_pass_has_the_memory_of_the_one_before(lm, monkeypatch):
    """What is alive when a batch begins is what was alive before the first: no KV pool of an earlier pass or batch."""
    prefill, alive, ends = lm.engine.prefill, [], []

    def measured(*arguments):
        alive.append(live_bytes())
        state = prefill(*arguments)
        ends.append(live_bytes())
        return state

    prompts = [Example(prompt) for prompt in ("45", "456", "4", "45")]
    evaluation.evaluate_all(lm, {"warm up": prompts}, batch_sizes=[2], max_new_tokens=6)
    monkeypatch.setattr(lm.engine, "prefill", measured)
    evaluation.evaluate_all(lm, {"first": prompts, "second": prompts}, batch_sizes=[2], passes=2, max_new_tokens=6)
    pools = jax.tree.leaves(prefill(np.ones((2, 8), np.int32), np.full(2, 8), DecodeConfig("span", 6)).cache.pools)
    assert len(alive) == 8 and min(ends) - max(alive) > sum(pool.nbytes for pool in pools)
    assert max(alive) - min(alive) < 1000, alive  # tokens that outputs keep, on a CPU without a copy


def test_a_batch_that_does_not_fit_into_memory_is_told_and_the_others_are_kept(lm, monkeypatch):
    prefill, compile_ = lm.engine.prefill, lm.engine.compile

    def run_out(token_ids, *arguments):
        if len(token_ids) == 2 and token_ids.shape[1] == 5:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 68719476736 bytes.")
        return prefill(token_ids, *arguments)

    def compile_or_not(batch_size, *arguments):
        if batch_size == 3:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm.")
        return compile_(batch_size, *arguments)

    monkeypatch.setattr(lm.engine, "prefill", run_out)
    monkeypatch.setattr(lm.engine, "compile", compile_or_not)
    sets = {"short": [Example("4")] * 2, "long": [Example("456")] * 3}
    before = live_bytes()
    report = json.loads(json.dumps(evaluation.report(lm, evaluation.evaluate_all(lm, sets, batch_sizes=(1, 2, 3)), {})))
    assert live_bytes() - before < 1000
    assert {name: [row["batch_size"] for row in own["by_batch_size"]] for name, own in report["sets"].items()} == {
        "short": [1, 2, 2],
        "long": [1],
    }
    reason = "does not fit: the device ran out of memory"
    assert report["not_run"] == [{"set": "long", "batch_size": size, "reason": reason} for size in (2, 3)]
    assert text.evaluation_table(report, lm.task).splitlines()[-2:] == [
        f"long operators: not run at batch {size}: {reason}" for size in (2, 3)
    ]
    with pytest.raises(UserError, match=f"long at batch 2: {reason}; long at batch 3: {reason}"):
        evaluation.report(lm, evaluation.evaluate_all(lm, {"long": sets["long"]}, batch_sizes=(2, 3)), {})
    with monkeypatch.context() as patch:  # what is known before anything is compiled
        patch.setattr(memory, "device_memory_bytes", lambda: 1000)
        with pytest.raises(UserError, match=r"short at batch 1: does not fit: needs 0\.0 GiB of memory, the device has 0\.0"):
            evaluation.report(lm, evaluation.evaluate_all(lm, {"short": sets["short"]}, batch_sizes=(1,)), {})
    monkeypatch.setattr(lm.engine, "prefill", lambda *arguments: jnp.zeros(3) + jnp.zeros(4))
    with pytest.raises(TypeError):  # any other error is a bug
        evaluation.evaluate_all(lm, sets, batch_sizes=(1,))


def test_examples_that_exceed_the_context_are_left_out_and_counted(model):
    """The context has 80 tokens. The responses of a batch share their room, so that the longest counts for all."""
    lm = SpanLM(model, Summaries())
    fits, full = Example("4" * 10, np.full(40, 5)), Example("4" * 38, np.full(40, 5))  # 12 and 40 tokens of prompt
    too_long = Example("4" * 39, np.full(20, 5)), Example("4" * 100), Example("4", np.full(78, 5))
    found = evaluation.evaluate_all(lm, {"some": [fits, too_long[0], full, *too_long[1:]], "none": list(too_long[1:])}, batch_sizes=(2,))
    (some,), (none,) = found.values()
    assert [len(out.prompt) for out in some.outputs] == [10, 38] and some.num_too_long == 3
    assert none.reason == "does not fit: prompt and response of each example exceed the model's context of 80 tokens"
    lines = text.evaluation_table(evaluation.report(lm, found, {}), lm.task).splitlines()
    assert lines[-2] == "some: left out, because they exceed the model's context: 3 examples" and lines[-1].startswith(
        "none: not run at batch 2: "
    )


@pytest.mark.parametrize("size", [1, 2, 16])
def test_scores_of_a_long_prompt_on_a_cpu_take_little_memory(monkeypatch, size):
    """A CPU's attention keeps those of all queries that are read at once: of 8,192 tokens 2.4 GB for nine heads, read whole."""
    seen, lm = [], SpanLM(random_model(max_context_tokens=8192), Summaries())
    monkeypatch.setattr(lm.engine, "compile", lambda *arguments: seen.append(arguments) or 1 / 0)
    monkeypatch.setattr(lm.engine, "prefill", lambda ids, lengths, config, *_, **__: seen.append((len(ids), 0, config)) or 1 / 0)
    for call in (lambda: evaluation.evaluate(lm, [Example("4" * 8000)] * size), lambda: lm.generate(["4" * 8000] * size, batch_size=size)):
        with pytest.raises(ZeroDivisionError):
            call()
    assert len(seen) == 2 and all(batch == size for batch, *_ in seen)
    queries = [size * prefill_chunk_tokens(size, 8192, config) for *_, config in seen]
    assert max(queries) * 8192 * 9 * 4 <= 2**30 and jax.default_backend() == "cpu"


def test_a_report_of_verified_answers(lm, evaluations):
    report = json.loads(json.dumps(evaluation.report(lm, evaluations, {"seed": 7})))
    assert report["seed"] == 7 and report["attention"] == "span" and report["num_parameters"] == lm.model.num_parameters
    assert (report["num_examples"], report["answer_accuracy"]) == (3, 2 / 3)
    assert report["answer_accuracy_interval"] == list(evaluation.wilson(2 / 3, 3)) and report["first_wrong"] == "45: of 45"
    assert list(report["by_ops"]) == ["7", "8", "10"] and report["by_ops"]["8"]["answer_accuracy"] == 1
    assert sum(sum(row["first_errors"].values()) for row in report["by_ops"].values()) == sum(report["first_errors"].values())
    long = report["sets"]["long"]
    assert [speed["batch_size"] for speed in long["by_batch_size"]] == [1, 2] and long["num_examples"] == 2
    best = max(long["by_batch_size"], key=lambda speed: speed["problems_per_second"])
    assert {key: long[key] for key in best} == best and best["problems_per_second"] == 1 / best["decode_seconds"]
    tokens = [len(out.token_ids) for out in evaluations["long"][0].outputs]
    assert long["context_tokens"] == np.mean(tokens) and long["decode_seconds"] + report["sets"]["short"]["decode_seconds"] == (
        pytest.approx(report["decode_seconds"])
    )
    assert {"attended_fraction_body", "attended_tokens_header", "header_share", "unresolved_refs", "device", "jax"} <= report.keys()
    assert report["first"]["gold"] == "5 2" and report["task"] == {"task": "digits", "max_digits": 2} and report["not_run"] == []
    assert long["verdicts"] == {"answer_right": 1, "steps_right": 0, "spans_right": 1, "all_right": 0}
    assert report["verdicts"] == {"answer_right": 2, "steps_right": 1, "spans_right": 2, "all_right": 1}

    table = text.evaluation_table(report, lm.task).splitlines()
    assert table[0] == "operators  examples  answers  steps   spans   attended  tokens"
    assert table[2].split()[:5] == ["8", "1", "100.0%", "0.0%", "100.0%"] and table[4].split()[:3] == ["all", "3", "66.7%"]
    assert table[5].startswith("short operators: ") and table[5].endswith(" with the reading of responses, batch 1")
    assert [line[:13] for line in table[-3:-1]] == ["first errors:", "first wrong: "] and len(table) == 5 + 4 + 3
    assert table[-1] == "long operators: beyond what the model was trained on, or cut: 1 examples" and long["num_with_warnings"] == 1


def test_verified_answers_without_groups_are_told_apart_by_set(model, evaluations):
    class Ungrouped(Summaries):
        verify, scores, unit = Problems.verify, Problems.scores, "problems"

    task = Ungrouped()
    own = {name: [dataclasses.replace(e, task=task) for e in found] for name, found in evaluations.items()}
    table = text.evaluation_table(evaluation.report(SpanLM(model, task), own, {}), task).splitlines()
    assert [line.split()[:3] for line in table[1:4]] == [["short", "1", "100.0%"], ["long", "2", "50.0%"], ["all", "3", "66.7%"]]
    assert table[4].startswith("short: ") and len(table[0].split()) == len(table[1].split())


def test_a_report_of_a_task_that_verifies_nothing(model, evaluations):
    lm = SpanLM(model, Summaries())
    examples = [Example("45"), Example("456")]
    found = evaluation.evaluate_all(lm, {"synthetic": examples}, batch_sizes=(1, 2), attention="span")
    report = json.loads(json.dumps(evaluation.report(lm, found, {})))
    assert report["rougeL"] == 5 / 8 and not {"by_ops", "first_errors", "first_wrong", "fact_accuracy_interval"} & report.keys()
    assert [speed["batch_size"] for speed in report["by_batch_size"]] == [1, 2]
    for speed in report["by_batch_size"]:
        assert speed["summaries_per_second"] == pytest.approx(2 / speed["decode_seconds"])
    assert report["summaries_per_second"] == max(speed["summaries_per_second"] for speed in report["by_batch_size"])
    report["sets"]["synthetic"]["by_batch_size"][-1]["summaries_per_second"] = 0.0412
    lines = text.evaluation_table(report, lm.task).splitlines()
    assert lines[0].startswith("2 summaries (span attention), ") and lines[1] == "ROUGE     rougeL 62.5%"
    assert lines[2] == "facts     fact accuracy 50.0%" and lines[3].startswith("attended  attended fraction ")
    assert re.fullmatch(r"0\.041 summaries and \d+ tokens per second of prefill and decoding, batch 2", lines[-1]) and len(lines) == 6


@pytest.mark.parametrize(
    ("response", "kind"),
    [
        ("<seg:1>51+75=126<seg:2>95*3=285<seg:3><ref:1><ref:2>126-285=-159<eos>", None),
        ("<seg:2>51+75=126", "first label"),
        ("51+75=126", "first label"),
        ("", "first label"),
        ("<seg:1>51+75=127<seg:2>", "body"),
        ("<seg:1>51+75=12<seg:2>", "body"),
        ("<seg:1>51+75=1260", "body"),
        ("<seg:1>51+75=126<seg:3>", "next label"),
        ("<seg:1>51+75=126<eos>", "eos"),
        ("<seg:1>51+75=126<seg:2><ref:1>", "refs"),
        ("<seg:1>51+75=126<seg:2>95*3=285<seg:3><ref:2>", "refs"),
        ("<seg:1>51+75=126<seg:2>95*3=285<seg:3><ref:1>126", "refs"),
        ("<seg:1>51+75=126<seg:2>95*3=285<seg:3><ref:1><ref:2>126-285=-159<seg:4>", "eos"),
        ("<seg:1>51+75=126<seg:2>95*3=285<seg:3><ref:1><ref:2>126-285=-159", "eos"),
    ],
)
def test_the_first_error_has_a_kind(response, kind):
    task = arithmetic.ArithmeticTask()
    gold, vocab = task.encode("((51+75)-(95*3))").response_ids, SpanVocab(**task.vocab.span_ids())
    assert evaluation.first_error(task.vocab.encode(response), gold, vocab) == kind


@pytest.mark.parametrize(
    ("right", "num_examples", "expected"),
    [(0, 10, (0.0, 0.2775)), (10, 10, (0.7225, 1.0)), (81, 263, (0.2553, 0.3662)), (995, 1000, (0.9884, 0.9979))],
)
def test_intervals_are_wilson_s(right, num_examples, expected):
    """Against published values (Newcombe, 1998, has 81 of 263) and the roots of the score equation."""
    share = right / num_examples
    low, high = evaluation.wilson(share, num_examples)
    assert (low, high) == pytest.approx(expected, abs=1e-4)
    for bound in (low, high):
        assert (share - bound) ** 2 == pytest.approx(1.959964**2 * bound * (1 - bound) / num_examples, abs=1e-9)
