"""SpanLM with the shipped checkpoint: the public contract, and that the model does what it is shipped for."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from data import arithmetic, tasks
from selfspan_jax import SpanLM
from selfspan_jax import lm as lm_module
from selfspan_jax.attention.policies import Window
from selfspan_jax.errors import UserError
from selfspan_jax.evaluation import evaluate
from selfspan_jax.lm import Step, installed_tasks
from selfspan_jax.serving import scheduler, throughput
from selfspan_jax.viewing import text
from tests.selfspan_jax.models import Digits, random_model
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


@pytest.fixture(scope="module")
def small():
    """A model that writes noise, for what does not depend on what is written: it compiles in a moment."""
    return SpanLM(random_model(seed=86, num_layers=1, max_context_tokens=256, header_view="labels"), Digits())


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
    alone = [small.generate(prompt, max_new_tokens=40).text for prompt in ("45", "678")]
    outs = small.generate(["45", "678"], max_new_tokens=40)
    assert [out.text for out in outs] == alone and [out.prompt for out in outs] == ["45", "678"] and alone[0] != alone[1]
    drawn = small.generate("45", num_samples=3, max_new_tokens=40, temperature=3.0)
    assert len(drawn) == 3 and len({sample.text for sample in drawn}) > 1
    assert small.generate([]) == []


def test_many_prompts_give_the_same_tokens_whether_batches_are_static_or_share_a_running_state(small, monkeypatch):
    """Drawn ones: what a sequence draws is its own, whatever else is decoded. On the rows of one batch, so that some wait."""
    prompts = ["".join(str((i + at) % 10) for at in range(length)) for i, length in enumerate((3, 40, 5, 1, 60, 9, 2, 30))]
    options = dict(batch_size=2, num_samples=2, max_new_tokens=40, temperature=1.5, seed=2**40 + 3)
    apart, ran = small.generate(prompts, **options), []
    monkeypatch.setattr(throughput, "THROUGHPUT_PREFILL_TOKENS", 128)
    monkeypatch.setattr(scheduler, "ADMITTED_SHARE", 3)  # two of eight places at once
    monkeypatch.setattr(lm_module, "is_faster", lambda *_: True)
    monkeypatch.setattr(lm_module, "run_together", lambda *given: ran.append(given[0]) or throughput.run_together(*given))
    together = small.generate(prompts, **options)
    assert ran[0].config.num_sequences == 8 and ran[0].num_pages * ran[0].config.page_tokens <= 4 * (64 + 40)
    for ours, theirs in zip(sum(together, []), sum(apart, []), strict=True):
        assert ours.prompt == theirs.prompt
        np.testing.assert_array_equal(ours.token_ids, theirs.token_ids)
        np.testing.assert_array_equal(ours.num_attended, theirs.num_attended)


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
    pieces = list(small.stream("45", max_new_tokens=40, chunk_tokens=15))
    assert "".join(pieces) == small.generate("45", max_new_tokens=40).text and len(pieces) == 3


@pytest.mark.parametrize("attention", ["span", "dense"])
def test_memory_that_grows_changes_nothing(monkeypatch, attention):
    """The default decodes up to the context, in room that doubles; the same tokens as where there is room for all at first."""
    small = SpanLM(random_model(max_context_tokens=256, header_view="labels"), Digits())  # of two layers
    whole = small.generate(["45", "678"], attention=attention, max_new_tokens=250)
    monkeypatch.setattr(lm_module, "_FIRST_ROOM", 128)
    grown, streamed = small.generate(["45", "678"], attention=attention), small.stream("45", attention=attention)
    assert len(grown[0].response_ids) > 128 and "".join(streamed) == grown[0].text
    for ours, theirs in zip([*grown, streamed.output], [*whole, whole[0]], strict=True):
        np.testing.assert_array_equal(ours.token_ids, theirs.token_ids)
        np.testing.assert_array_equal(ours.num_attended, theirs.num_attended)


def test_the_context_ends_a_response_and_no_option_is_named(small, monkeypatch):
    monkeypatch.setattr(lm_module, "_FIRST_ROOM", 128)
    out = small.generate("45", repetition_penalty=0.5)  # says the same again and again
    assert not out.finished and len(out.token_ids) == 256
    assert "stopped before it had ended: with its 252 tokens the context of the model is full" in out.warnings[0]


STOPS = {  # why it is here -> (stop strings, of the text after "45": "8 8 8 8 8 8 16 16 ...")
    "over two tokens": ("8 16", "8 8 8 8 8 ", "8 16", 6),
    "at once": (["8"], "", "8", 0),
    "in the middle of a token": ("6", "8 8 8 8 8 8 1", "6", 7),
    "the first of several": (["16", "8 8 8"], "", "8 8 8", 0),
    "none that comes": ("7", None, None, 40),
}


@pytest.mark.parametrize("name", STOPS)
def test_stop_strings_end_a_response(small, name):
    stop, text, stopped_by, num_tokens = STOPS[name]
    free = small.generate("45", max_new_tokens=40)
    assert free.text.startswith("8 8 8 8 8 8 16 16 ")
    (out,), streamed = (
        small.generate(["45"], stop=stop, max_new_tokens=40),
        small.stream("45", stop=stop, max_new_tokens=40, chunk_tokens=3),
    )
    assert out.text == "".join(streamed) == (free.text if text is None else text)
    for found in (out, streamed.output):
        assert found.stopped_by == stopped_by and len(found.response_ids) == len(found.num_attended) == num_tokens
        np.testing.assert_array_equal(found.token_ids, free.token_ids[: found.prompt_tokens + num_tokens])
        assert found.finished == (stopped_by is not None) and found.to_json()["stopped_by"] == stopped_by
        assert any("stopped before" in line for line in found.warnings) == (stopped_by is None)


def test_each_of_a_batch_stops_for_itself(small):
    both = small.generate(["45", "678"], stop="16", num_samples=2, max_new_tokens=40)
    alone = [small.generate(prompt, stop="16", max_new_tokens=40).text for prompt in ("45", "678")]
    assert [[out.text for out in own] for own in both] == [[text] * 2 for text in alone]


def test_a_stream_has_an_output_once_it_has_ended(small):
    stream = small.stream("45", max_new_tokens=40, chunk_tokens=15)
    next(stream)
    with pytest.raises(ValueError, match="the stream has not ended"):
        _ = stream.output
    assert list(stream) and list(stream) == []
    expected = small.generate("45", max_new_tokens=40)
    assert stream.output.to_json() == expected.to_json()


def test_large_seeds_are_seeds_of_their_own(small):
    drawn = {small.generate("45", max_new_tokens=40, temperature=3.0, seed=seed).text for seed in (1, 2**32 + 1, 2**62 + 1, 2**63 - 1)}
    assert len(drawn) == 4


WRONG_CALLS = {  # what is wrong -> (prompts, options, what is said)
    "no text": (3, {}, "prompts are 3: expected text, or a list of texts"),
    "nothing": (None, {}, "prompts are None"),
    "bytes": (b"45", {}, "prompts are b'45'"),
    "a mapping": ({"prompt": "45"}, {}, "prompts are"),
    "no text in a list": (["45", 3], {}, "prompt 2, 3: expected text, found int"),
    "no prompt in a list": (["45", "4x5"], {}, "prompt 2, '4x5': invalid literal"),
    "no prompt in a file": (["45", "4x5"], dict(prompt_names=["a.txt: line 1", "a.txt: line 3"]), "^a.txt: line 3, '4x5': invalid literal"),
    "too few names": (["45", "4x5"], dict(prompt_names=["a.txt: line 1"]), "prompt_names has 1 names; expected one for each of 2 prompts"),
    "a long one that is none": (["45", "x" * 100], {}, f"prompt 2, '{'x' * 40}...': invalid"),
    "too long in a list": (["45", "4" * 300], {}, "prompt 2, '4+...': the prompt is 302 tokens long, but the model's context is 256"),
    "no such option": ("45", dict(nonsense=1), "no option 'nonsense'; there are attention, .*top_k.*num_samples and batch_size"),
    "a negative seed": ("45", dict(seed=-1), "seed is -1; allowed: whole numbers from 0 to"),
    "a seed of 64 bits": ("45", dict(seed=2**63), r"seed is 9223372036854775808; allowed: whole numbers from 0 to 2\*\*63 - 1"),
    "a seed that is no number": ("45", dict(seed=0.5), "seed is 0.5"),
    "no tokens": ("45", dict(max_new_tokens=0), "max_new_tokens is 0; allowed: whole numbers from 1"),
    "half a token": ("45", dict(max_new_tokens=2.5), "max_new_tokens is 2.5"),
    "more tokens than the context": ("45", dict(max_new_tokens=10**9), "exceed the model's context of 256"),
    "no samples": ("45", dict(num_samples=0), "num_samples is 0"),
    "no policy": ("45", dict(attention=3), "attention is 3; allowed: span, dense, window"),
    "no kernel": ("45", dict(implementation="cuda"), "implementation is 'cuda'; allowed: reference"),
    "an empty stop string": ("45", dict(stop=["7", ""]), r"stop is \['7', ''\]; allowed"),
    "no temperature": ("45", dict(temperature="hot"), "temperature is 'hot'; allowed: numbers from 0"),
}


@pytest.mark.parametrize("name", WRONG_CALLS)
def test_what_generate_cannot_take_is_said_in_one_line(small, name):
    prompts, options, message = WRONG_CALLS[name]
    with pytest.raises(ValueError, match=message) as error:
        small.generate(prompts, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        (["45"], {}, r"a prompt is \['45'\]: expected text"),
        ("45", dict(chunk_tokens=0), "chunk_tokens is 0"),
        ("45", dict(num_samples=2), "no option 'num_samples'"),
        ("45", dict(nonsense=2), "no option 'nonsense'"),
    ],
)
def test_a_stream_says_what_is_wrong_before_it_begins(small, prompt, options, message):
    with pytest.raises(ValueError, match=message):
        small.stream(prompt, **options)


def test_answers_that_cannot_be_trusted_say_so(lm, out):
    """An operand that the model was not trained on, another attention than it was trained with, and what is as it should be."""
    far, dense = lm.generate("123456*7", max_new_tokens=64), lm.generate(EXPRESSION, attention="dense", max_new_tokens=64)
    assert out.warnings == [] and out.verdict.answer_right and "warnings" not in repr(out) and "verdict" not in repr(out)
    read = int(out.num_attended.sum())
    slow = [dataclasses.replace(out, misses=rows).warnings for rows in (read // 10, read // 10 + 1)]
    assert slow[0] == [] and f"{read // 10 + 1} of {read} rows" in slow[1][0] and "working_set_tokens" in slow[1][0]
    assert [line.split(",")[0] for line in far.warnings[:2]] == [
        "123456 is beyond what the model was trained on", "The value of a step is 864192"
    ]  # fmt: skip
    assert far.to_json()["warnings"] == far.warnings and far.to_json()["verdict"]["answer_right"] is False
    assert set(far.to_json()["verdict"]) == {"answer_right", "steps_right", "spans_right", "message"}
    assert "verdict='step 1" in repr(far) and "warnings=" in repr(far)
    assert "Decoded with dense attention, trained with span: another computation" in dense.warnings[0]
    table = text.response_table(far).splitlines()
    assert table[0].startswith("warning: 123456 is beyond") and any(line.startswith("WRONG: 123456*7 = ") for line in table)
    assert "\x1b[31mWRONG: " in text.in_color("\n".join(table)) and "\x1b[33mwarning: " in text.in_color("\n".join(table))


def test_attention_that_reads_the_same_is_no_other_computation(small):
    """A pretrained model writes no span tokens, so that "span" and "dense" are the same."""
    plain = small.generate("4" * 20, attention="dense", max_new_tokens=1)
    assert not any("Decoded with" in line for line in plain.warnings)


def test_logits_are_those_that_decoding_chose_from(lm, out, small):
    logits = lm.logits(out.token_ids, attention="span")
    assert logits.shape == (len(out.token_ids), lm.model.vocab_size) and logits.dtype == np.float32
    np.testing.assert_array_equal(np.argmax(logits[out.prompt_tokens - 1 : -1], axis=-1), out.response_ids)
    ids = np.array(NAMED["specification"][0])
    assert not np.allclose(small.logits(ids, attention="dense")[15], small.logits(ids, attention="span")[15], atol=0.1)


def test_decoding_that_stops_early_says_so(small):
    out = small.generate("45", max_new_tokens=40)
    assert not out.finished and len(out.response_ids) == 40 and "stopped before it had ended; tokens written: 40" in out.warnings[0]


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


@pytest.mark.parametrize(
    ("name", "words"), [("papers", "but the model is of arithmetic; allowed: arithmetic$"), ("chess", "allowed: arithmetic, d")]
)
def test_prompts_of_a_task_that_is_not_for_the_model_are_refused(name, words):
    with pytest.raises(ValueError, match=f"task is {name!r}[,;] {words}"):
        SpanLM.load(CHECKPOINT, tasks.TASKS, task=name)


def test_the_installed_package_offers_its_task():
    assert installed_tasks()["arithmetic"] is arithmetic.ArithmeticTask
    assert SpanLM.load(CHECKPOINT).task == arithmetic.ArithmeticTask(names_first_step=True)


def test_the_shipped_model_is_small_and_right(lm):
    """Some of what its card claims for 1,000: every step, span and answer of fresh expressions of 2 to 12 operators."""
    assert (CHECKPOINT / "model.safetensors").stat().st_size < 16 * 2**20
    ((name, examples),) = lm.task.held_out(4, seed=11).items()
    assert name == "2-12"
    found = evaluate(lm, examples)
    assert all(found.scores[f"{what}_accuracy"] >= 3 / 4 for what in ("step", "answer", "span"))
    assert sum(np.array_equal(own.response_ids, out.response_ids) for own, out in zip(examples, found.outputs, strict=True)) >= 3
    assert found.right_per_second == pytest.approx(found.scores["answer_accuracy"] * 4 / found.decode_seconds)


def test_sparse_prefill_is_for_prompts_that_read_everything(lm):
    """Short prompts are read densely, and measured so; a local model is refused, and so is an unknown name."""
    causal = SpanLM(random_model(max_context_tokens=256, prompt_view="causal"), Digits())
    outs = [causal.generate("456", max_new_tokens=4, prefill=prefill) for prefill in ("dense", "sample")]
    assert outs[0].token_ids.tolist() == outs[1].token_ids.tolist()
    kept = causal.measure_prefill(["456", "4567"], "blocks")
    assert (kept["tiles_kept"], kept["measured_every"], round(kept["retained_mass_min"], 4)) == (1, 1, 1)
    line = text.prefill_line({"selector": "blocks", **kept, "retained_mass_min": 0.5})
    assert line.split("; ") == [
        "prefill: blocks reads 100.0% of the tiles (short prompts are read densely)",
        "retained mass: 100.00% in the mean of queries and heads, 50.00% at least",
    ]
    with pytest.raises(UserError, match="exact tiles by labels are already sparse"):
        lm.generate(EXPRESSION, prefill="sample")
    with pytest.raises(UserError, match="prefill is 'all'; allowed: dense, sample, blocks, or a selector"):
        causal.generate("456", prefill="all")
