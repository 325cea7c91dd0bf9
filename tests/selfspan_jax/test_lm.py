"""SpanLM with the shipped checkpoint: the public contract, and that the model does what it is shipped for."""

from pathlib import Path

import numpy as np
import pytest

from data import arithmetic
from selfspan_jax import SpanLM
from selfspan_jax.attention.policies import Window
from selfspan_jax.evaluation import evaluate
from selfspan_jax.lm import Step, installed_tasks
from tests.selfspan_jax.models import random_model
from tests.selfspan_jax.reference import Reference
from tests.selfspan_jax.streams import NAMED

CHECKPOINT = Path(__file__).parents[2] / "checkpoints" / "arithmetic-tiny"
TASKS = {"arithmetic": arithmetic.ArithmeticTask}
EXPRESSION = "((51+75)-(95*3))"


@pytest.fixture(scope="module")
def lm():
    return SpanLM.load(CHECKPOINT, TASKS)


@pytest.fixture(scope="module")
def out(lm):
    return lm.generate(EXPRESSION, max_new_tokens=64)


class Digits:
    """A task over the small vocabulary of the tests: digits are themselves."""

    def encode_prompt(self, text):
        return np.array([1, *(int(character) for character in text), 3], np.int32)

    def decode(self, token_ids):
        return " ".join(str(int(token)) for token in token_ids)

    def answer(self, response_ids):
        return None


@pytest.fixture(scope="module")
def small():
    """A model that writes noise, for what does not depend on what is written: it compiles in a moment."""
    return SpanLM(random_model(max_context_tokens=256), Digits())


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


def test_dense_decoding_attends_to_everything(small):
    assert small.generate("45", attention="dense", max_new_tokens=12).attended_fraction == 1.0


def test_by_default_a_model_attends_as_it_was_trained_to(out):
    assert out.attention == "span"
    dense = SpanLM(random_model(mask="dense", max_context_tokens=80), Digits())
    assert dense.generate("45", max_new_tokens=12).attention == "dense"
    assert np.all(dense.mask(np.array([1, 11, 4, 3, 12, 5])) == np.tri(6, dtype=bool))


def test_window_decoding_attends_to_a_bounded_number(small):
    out = small.generate("4" * 140, attention="window", max_new_tokens=12)
    assert out.prompt_tokens > Window().sink_tokens + Window().window_tokens
    assert set(out.num_attended) == {Window().sink_tokens + Window().window_tokens}


def test_a_list_is_decoded_as_a_batch_and_samples_come_as_a_list(small):
    alone = [small.generate(prompt, max_new_tokens=12).text for prompt in ("45", "678")]
    outs = small.generate(["45", "678"], max_new_tokens=12)
    assert [out.text for out in outs] == alone and [out.prompt for out in outs] == ["45", "678"] and alone[0] != alone[1]
    both = small.generate(["45", "678"], num_samples=2, max_new_tokens=12)
    assert [[sample.text for sample in samples] for samples in both] == [[text] * 2 for text in alone]
    drawn = small.generate("45", num_samples=3, max_new_tokens=12, temperature=3.0)
    assert len(drawn) == 3 and len({sample.text for sample in drawn}) > 1
    assert small.generate([]) == []


def test_int8_weights_are_a_little_less_exact_and_as_right(lm, out):
    """The same most likely tokens, so decoding writes the same; `decode.py generate --weights int8` runs in test_commands.py."""
    int8 = SpanLM.load(CHECKPOINT, TASKS, weights="int8")
    exact, rounded = lm.logits(out.token_ids), int8.logits(out.token_ids)
    np.testing.assert_array_equal(np.argmax(rounded[out.prompt_tokens - 1 : -1], axis=-1), out.response_ids)
    error = np.sqrt(np.mean((rounded - exact) ** 2) / np.mean(exact**2))
    assert 1e-4 < error < 0.015  # measured 0.0074
    weights = int8.model.layers[0].mlp.down_proj
    assert weights.weight[...].dtype == np.int8 and weights.scales[...].shape == (256,)
    with pytest.raises(ValueError, match="weights is 'int4'; allowed: bf16, int8"):
        SpanLM.load(CHECKPOINT, TASKS, weights="int4")


def test_streamed_text_is_the_generated_text(small):
    pieces = list(small.stream("45", max_new_tokens=12, chunk_tokens=5))
    assert " ".join(pieces) == small.generate("45", max_new_tokens=12).text and len(pieces) == 3


def test_logits_are_those_that_decoding_chose_from(lm, out, small):
    logits = lm.logits(out.token_ids, attention="span")
    assert logits.shape == (len(out.token_ids), lm.model.vocab_size) and logits.dtype == np.float32
    np.testing.assert_array_equal(np.argmax(logits[out.prompt_tokens - 1 : -1], axis=-1), out.response_ids)
    ids = np.array(NAMED["specification"][0])
    assert not np.allclose(small.logits(ids, attention="dense")[-2], small.logits(ids, attention="span")[-2], atol=0.1)


def test_decoding_that_stops_early_says_so(small):
    out = small.generate("45", max_new_tokens=3)
    assert not out.finished and len(out.response_ids) == 3 and "stopped before it had ended; tokens written: 3" in out.warnings[0]


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
    ((name, examples),) = lm.task.held_out(8, seed=11).items()
    assert name == "2-12"
    found = evaluate(lm, examples)
    assert all(found.scores[f"{what}_accuracy"] >= 7 / 8 for what in ("step", "answer", "span"))
    assert sum(np.array_equal(own.response_ids, out.response_ids) for own, out in zip(examples, found.outputs, strict=True)) >= 7
    assert found.right_per_second == pytest.approx(found.scores["answer_accuracy"] * 8 / found.decode_seconds)
