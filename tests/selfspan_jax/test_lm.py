"""SpanLM with the shipped checkpoint: the public contract, and that the model does what it is shipped for."""

import itertools
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from data import arithmetic
from selfspan_jax import SpanLM, evaluation
from selfspan_jax.attention.policies import Window
from selfspan_jax.lm import Step, installed_tasks
from tests.selfspan_jax.models import random_model
from tests.selfspan_jax.reference import Reference

CHECKPOINT = Path(__file__).parents[2] / "checkpoints" / "arithmetic-tiny"
TASKS = {"arithmetic": arithmetic.ArithmeticTask}
EXPRESSION = "((51+75)-(95*3))"


@pytest.fixture(scope="module")
def lm():
    return SpanLM.load(CHECKPOINT, TASKS)


@pytest.fixture(scope="module")
def out(lm):
    return lm.generate(EXPRESSION, attention="span", max_new_tokens=64)


def test_the_example_of_the_specification(out):
    assert out.answer == "-159" == str(eval(EXPRESSION))
    assert out.text == "<seg:1>51+75=126<seg:2>95*3=285<seg:3><ref:1><ref:2>126-285=-159<eos>"
    assert [(step.label, step.refs, step.text) for step in out.steps] == [
        (1, (), "51+75=126"),
        (2, (), "95*3=285"),
        (3, (1, 2), "126-285=-159"),
    ]
    assert str(out.steps[2]) == "<seg:3><ref:1><ref:2>126-285=-159" and isinstance(out.steps[2], Step)
    assert out.finished and out.unresolved_refs == 0 and out.attention == "span"


def test_what_was_attended_is_what_the_mask_says(lm, out):
    views = dict(header_view=lm.model.config.header_view, prompt_view="local", prompt_window_tokens=16)
    mask = np.array(Reference(out.token_ids, lm.model.vocab, **views).mask())
    np.testing.assert_array_equal(lm.mask(out.token_ids, "span"), mask)
    expected = mask[out.prompt_tokens :].sum(axis=1)
    np.testing.assert_array_equal(out.num_attended, expected)
    contexts = np.arange(out.prompt_tokens + 1, len(out.token_ids) + 1)
    assert out.attended_fraction == pytest.approx(np.mean(expected / contexts))
    assert 0 < out.attended_fraction < 0.8
    ids = lm.task.encode_prompt(EXPRESSION)
    np.testing.assert_array_equal(out.token_ids[: out.prompt_tokens], ids)


def test_dense_decoding_attends_to_everything(lm):
    out = lm.generate("3*(4+5)", attention="dense", max_new_tokens=8)
    assert out.attended_fraction == 1.0


def test_by_default_a_model_attends_as_it_was_trained_to(lm):
    assert lm.generate("1+2", max_new_tokens=4).attention == "span"
    dense = SpanLM(random_model(mask="dense", max_context_tokens=80), _Digits())
    assert dense.generate("45", max_new_tokens=4).attention == "dense"
    assert np.all(dense.mask(np.array([1, 11, 4, 3, 12, 5])) == np.tri(6, dtype=bool))


def test_window_decoding_attends_to_a_bounded_number(lm):
    out = lm.generate("-".join(["(12*34)"] * 12), attention="window", max_new_tokens=8)
    assert out.prompt_tokens > Window().sink_tokens + Window().window_tokens
    assert set(out.num_attended) == {Window().sink_tokens + Window().window_tokens}


def test_a_list_is_decoded_as_a_batch(lm):
    expressions = ["3*(4+5)", "1 - 2", EXPRESSION]
    outs = lm.generate(expressions, max_new_tokens=64)
    assert [out.answer for out in outs] == ["27", "-1", "-159"]
    assert [out.prompt for out in outs] == expressions
    assert lm.generate([]) == []


def test_samples_of_a_prompt_come_as_a_list(lm, out):
    samples = lm.generate(EXPRESSION, num_samples=3, max_new_tokens=64)
    assert [sample.text for sample in samples] == [out.text] * 3
    both = lm.generate([EXPRESSION, "1-2"], num_samples=2, max_new_tokens=64)
    assert [[sample.answer for sample in samples] for samples in both] == [["-159"] * 2, ["-1"] * 2]
    drawn = lm.generate(EXPRESSION, num_samples=8, max_new_tokens=64, temperature=3.0)
    assert len({sample.text for sample in drawn}) > 1


def test_int8_weights_are_a_little_less_exact_and_as_right(lm, out):
    int8 = SpanLM.load(CHECKPOINT, TASKS, weights="int8")
    assert int8.generate(EXPRESSION, max_new_tokens=64).text == out.text
    exact, rounded = lm.logits(out.token_ids), int8.logits(out.token_ids)
    error = np.sqrt(np.mean((rounded - exact) ** 2) / np.mean(exact**2))
    assert 1e-4 < error < 0.015  # measured 0.0074
    weights = int8.model.layers[0].mlp.down_proj
    assert weights.weight[...].dtype == np.int8 and weights.scales[...].shape == (256,)


def test_streamed_text_is_the_generated_text(lm, out):
    assert "".join(lm.stream(EXPRESSION, max_new_tokens=64, chunk_tokens=5)) == out.text


def test_logits_are_those_that_decoding_chose_from(lm, out):
    logits = lm.logits(out.token_ids, attention="span")
    assert logits.shape == (len(out.token_ids), lm.model.vocab_size) and logits.dtype == np.float32
    np.testing.assert_array_equal(np.argmax(logits[out.prompt_tokens - 1 : -1], axis=-1), out.response_ids)
    assert not np.allclose(lm.logits(out.token_ids, attention="dense")[-2], logits[-2], atol=0.1)


def test_decoding_that_stops_early_says_so(lm):
    out = lm.generate(EXPRESSION, max_new_tokens=12)
    assert not out.finished and len(out.response_ids) == 12 and [step.label for step in out.steps] == [1, 2]


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("(1+2", 'column 1: found "\\(" that is never closed'),
        ("7", "nothing to evaluate"),
        ("+".join(["1"] * 600), "labels"),
        ("+".join(["11111"] * 300), "context is 2048"),
    ],
    ids=["no expression", "no operator", "too many operators for the labels", "too long for the context"],
)
def test_what_the_model_cannot_take_is_refused_in_one_line(lm, expression, message):
    with pytest.raises(ValueError, match=message) as error:
        lm.generate(expression)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("token_ids", [[], [[1, 2]], [1, 5000]])
def test_logits_of_ids_that_are_none_are_refused(lm, token_ids):
    with pytest.raises(ValueError, match=r"shape|ids from"):
        lm.logits(np.array(token_ids, np.int32))


def test_an_unknown_task_is_refused():
    with pytest.raises(ValueError, match="of task 'arithmetic'; known are chess"):
        SpanLM.load(CHECKPOINT, {"chess": arithmetic.ArithmeticTask})


def test_the_installed_package_offers_its_task():
    assert installed_tasks()["arithmetic"] is arithmetic.ArithmeticTask
    assert SpanLM.load(CHECKPOINT).task == arithmetic.ArithmeticTask(names_first_step=True)


def test_the_shipped_model_is_small_and_right(lm):
    """A sample of what its card claims for 1,000: every step, span and answer of fresh expressions of 2 to 12 operators."""
    assert (CHECKPOINT / "model.safetensors").stat().st_size < 16 * 2**20
    corpus = arithmetic.Corpus(min_ops=2, max_ops=12)
    examples = list(itertools.islice(arithmetic.stream(corpus, seed=11, split="test"), 16))
    longest = max(len(example.response_ids) for example in examples)
    evaluated = evaluation.evaluate(
        lm, [example.expression.text for example in examples], verify=lm.task.verify, max_new_tokens=longest + 8, batch_size=16
    )
    scores = evaluation.Scores.of(evaluated.results)
    assert scores.step_accuracy >= 15 / 16 and scores.answer_accuracy >= 15 / 16 and scores.span_accuracy >= 15 / 16
    gold = [arithmetic.encode(example.expression) for example in examples]
    written = [result.output.response_ids for result in evaluated.results]
    assert sum(np.array_equal(a.response_ids, b) for a, b in zip(gold, written)) >= 15
    assert evaluated.problems_per_second == pytest.approx(scores.answer_accuracy * 16 / evaluated.decode_seconds)


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
def test_the_first_error_has_a_kind(lm, response, kind):
    gold = lm.task.gold("((51+75)-(95*3))")
    assert evaluation.first_error(lm.task.vocab.encode(response), gold, lm.model.vocab) == kind


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


def test_scores_count_what_the_verdicts_say(monkeypatch):
    """A model that writes noise, and a verifier and a clock that are told what to say: shares, order, seconds, the last, smaller batch."""
    lm = SpanLM(random_model(max_context_tokens=80), _Digits())
    verdicts = {"4": (True, True, True), "45": (True, False, True), "456": (False, False, False)}

    class Told:
        def __init__(self, prompt):
            self.answer_right, self.steps_right, self.spans_right = verdicts[prompt]
            self.message = prompt

    lasted = [100, *(5, 1, 2), *(7, 3, 3)]  # compilation, three passes of each batch
    readings = iter(reading for seconds in lasted for reading in (0.0, seconds))
    monkeypatch.setattr(evaluation, "time", SimpleNamespace(perf_counter=lambda: next(readings)))
    evaluated = evaluation.evaluate(lm, list(verdicts), verify=lambda prompt, ids: Told(prompt), max_new_tokens=6, batch_size=2, passes=3)
    assert (evaluated.decode_seconds, evaluated.compile_seconds, next(readings, "read")) == (2 + 3, 100, "read")
    assert [result.verdict.message for result in evaluated.results] == list(verdicts)
    scores = evaluation.Scores.of(evaluated.results)
    assert (scores.answer_accuracy, scores.step_accuracy, scores.span_accuracy) == (2 / 3, 1 / 3, 2 / 3)
    attended = np.concatenate([result.output.num_attended for result in evaluated.results])
    assert scores.attended_tokens == pytest.approx(attended.mean())
    alone = [lm.generate(prompt, max_new_tokens=6).text for prompt in verdicts]
    assert [result.output.text for result in evaluated.results] == alone
    with pytest.raises(ValueError, match="no results"):
        evaluation.Scores.of([])


class _Digits:
    """A task over the small vocabulary of the tests: digits are themselves."""

    def encode_prompt(self, text):
        return np.array([1, *(int(character) for character in text), 3], np.int32)

    def decode(self, token_ids):
        return " ".join(str(int(token)) for token in token_ids)

    def answer(self, response_ids):
        return None
