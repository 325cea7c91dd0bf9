"""What is read back of a decoded sequence, by hand and against the reference automaton, and how it is laid out as text."""

import dataclasses

import numpy as np
import pytest

from data import news
from data.vocab import train_vocab
from selfspan_jax import Output
from selfspan_jax.attention.policies import Span
from selfspan_jax.config import ModelConfig
from selfspan_jax.spans import SpanVocab
from selfspan_jax.viewing import text
from selfspan_jax.viewing.reading import attended, attended_by_kind
from tests.selfspan_jax.models import TINY
from tests.selfspan_jax.reference import Reference
from tests.selfspan_jax.streams import NAMED, VOCAB
from tests.selfspan_jax.viewing.test_html import output

_S, _R = VOCAB.seg_base, VOCAB.ref_base


@pytest.fixture(scope="module")
def gold():
    """What a model that writes the gold response would have returned, and the example."""
    story = news.Story(("Ada won.", "Rain fell.", "It was Monday."), ("Ada won on Monday.", "It rained."), ((0, 2), (1,)), ())
    task = news.NewsTask(train_vocab(story.article, vocab_tokens=300, num_labels=64), closed_pieces=True)
    example, vocab = task.encode(story), SpanVocab(**task.vocab.span_ids())
    mask = np.array(Reference(example.token_ids, vocab, header_view="labels").mask())
    num_attended = mask.sum(axis=1)[example.prompt_tokens :]
    config = ModelConfig(**TINY, header_view="labels", prompt_view="causal")
    out = Output(task, example.token_ids, example.prompt_tokens, num_attended, Span(), config, vocab, example.prompt)
    np.testing.assert_array_equal(out.mask, mask)
    return out, example


def test_what_closes_a_step_belongs_to_it(gold):
    out, _ = gold
    last, end = out.task.vocab.seg_base + out.steps[-1].label, out.task.vocab.eos_id
    closed = dataclasses.replace(
        out, token_ids=np.array([*out.token_ids[:-1], last, end], np.int32), num_attended=np.append(out.num_attended, 9)
    )
    assert [(step.label, step.refs, step.text) for step in closed.steps] == [(step.label, step.refs, step.text) for step in out.steps]
    assert closed.steps[-1].indices.tolist() == [*out.steps[-1].indices, len(out.token_ids)]
    opened = dataclasses.replace(closed, token_ids=np.array([*out.token_ids[:-1], last, out.token_ids[-2]], np.int32))
    assert len(opened.steps) == 3 and opened.steps[-1].label == opened.steps[-2].label  # it goes on to write: a step of its own


def test_header_tokens_read_every_tag_and_all_tokens_what_is_named(gold):
    out, example = gold
    vocab = out.task.vocab
    length = {i: len(vocab.plain_text_ids(" " + sentence)) + 2 for i, sentence in enumerate(example.story.article)}
    sink = 2 + len(vocab.plain_text_ids(f" {news.INSTRUCTION}"))  # <bos>, instruction, <solve>
    fractions, position = {"body": [], "header": []}, example.prompt_tokens
    for number, (sentence, sources) in enumerate(zip(example.story.summary, example.story.sources, strict=True)):
        own = 0
        for named in range(1 + len(sources)):
            own, position = own + 1, position + 1
            tags = 2 * (len(length) - named) + number  # those of pieces that are not named yet, and of the steps before
            fractions["header"].append((sink + sum(length[i] for i in sources[:named]) + own + tags) / position)
        for _ in vocab.plain_text_ids(" " + sentence):
            own, position = own + 1, position + 1
            fractions["body"].append((sink + sum(length[i] for i in sources) + own) / position)
    fractions["body"].append((fractions["body"][-1] * position + 1) / (position + 1))  # <eos>
    by_kind = attended_by_kind([out])
    assert all(np.isclose(by_kind[f"attended_fraction_{kind}"], np.mean(values)) for kind, values in fractions.items())
    assert np.isclose(by_kind["header_share"], len(fractions["header"]) / len(out.response_ids))
    mean = np.mean(fractions["body"] + fractions["header"])
    assert np.isclose(out.attended_fraction, mean) and np.isclose(attended([out])["attended_fraction"], mean)
    # Over several responses each token counts once.
    short, _, _ = output(NAMED["specification"][0])
    both = [*out.num_attended, *short.num_attended]
    assert np.isclose(attended([out, short])["attended_tokens"], np.mean(both))


@pytest.mark.parametrize("name", NAMED)
def test_steps_are_those_of_the_reference(name):
    out, reference, _ = output(NAMED[name][0])
    tokens = NAMED[name][0]
    expected, frozen = [], False  # (label, labels named, written tokens) of every <seg> of the response
    for index in range(out.prompt_tokens, len(tokens)):
        frozen = frozen or 2 in tokens[:index]
        if reference.solve_position is not None and not frozen:
            if _S <= tokens[index] < _S + VOCAB.num_labels:
                expected.append((tokens[index] - _S, [], []))
            elif _R <= tokens[index] < _R + VOCAB.num_labels and expected:
                expected[-1][1].append(tokens[index] - _R)
        if expected and not _S <= tokens[index] < _R + VOCAB.num_labels and tokens[index] != VOCAB.eos_id:
            expected[-1][2].append(tokens[index])
    found = [(step.label, list(step.refs), step.text) for step in out.steps]
    assert found == [(label, refs, out.task.decode(body)) for label, refs, body in expected]
    for step, arrays in zip(out.steps, [step for step in out.parts if step.opened], strict=True):
        assert step.attended_tokens == np.mean(out.num_attended[arrays.indices - out.prompt_tokens])
    every = np.concatenate([step.indices for step in out.parts]) if out.parts else []
    assert sorted(every) == list(range(out.prompt_tokens, len(tokens)))


def test_an_output_as_json():
    out, _, mask = output(NAMED["unresolved"][0])
    values = out.to_json()
    assert values["token_ids"] == NAMED["unresolved"][0] and values["num_attended"] == mask.sum(axis=1)[out.prompt_tokens :].tolist()
    assert values["unresolved_refs"] == 1 and values["finished"] is False and values["attention"] == "span"
    share = np.mean(mask.sum(axis=1)[[4, 5, 6]] / [5, 6, 7])  # <seg:2>, <ref:4> and "5" are tokens 4 to 6
    first = {"label": 2, "refs": (4,), "text": "5", "attended_tokens": out.steps[0].attended_tokens, "attended_fraction": share}
    assert values["steps"][0] == first
    assert values["attended_fraction"] == out.attended_fraction and values["warnings"] == out.warnings != []
    assert values["verdict"] is None and values["stopped_by"] is None


def test_a_response_with_sources_has_them_below_each_sentence(gold):
    lines = text.response_table(gold[0]).splitlines()
    assert lines[0] == "Ada won on Monday. It rained."
    steps = ["<4> Ada won on Monday.", "    from <1> Ada won.", "    from <3> It was Monday.", "<5> It rained.", "    from <2> Rain fell."]
    assert lines[2:7] == steps
    out, _ = gold
    response = out.token_ids[out.prompt_tokens :]
    body = (response < out.vocab.seg_base) | (response >= out.vocab.ref_base + out.vocab.num_labels)
    share = out.num_attended / (1 + out.prompt_tokens + np.arange(len(response)))
    shares = f"{share.mean():.1%} of the context (text {share[body].mean():.1%}, span tokens {share[~body].mean():.1%})"
    assert lines[-1] == f"attended: {out.num_attended.mean():.1f} tokens, {shares}"
    assert f" · {lines[-1]}</p>" in out.to_html()


SUM, RAIN, AND, LINE = "Ada won on Monday.", "It rained.", " and so on", "A tram was built in Lisbon "
REPEATS = {  # sentences of a summary, and what follows them without an end -> the text that is said to be repeated, and how often
    "sentences": ((SUM, "It rained."), "", None),
    "a sentence twice": ((SUM, "It rained.", SUM), "", (SUM, 2)),
    "sentences that end differently": ((LINE + "Ada.", LINE + "Ben.", SUM), "", (LINE.strip(), 2)),
    "sentences that begin alike for five words": (("The mayor of Oakton won.", "The mayor of Oakton lost."), "", None),
    "a sentence until the limit": ((SUM, *[RAIN] * 4), None, ("It rained.", 4)),
    "two sentences until the limit, the last one begun": (("Snow.", *[RAIN, SUM] * 3), " It ", ("It rained. Ada won on Monday.", 3)),
    "words until the limit": ((SUM,), AND * 9, ("and so on", 9)),
    "words twice": ((SUM,), AND * 2, None),
    "a rule of few characters": ((SUM,), "-----", None),
}


@pytest.mark.parametrize("name", REPEATS)
def test_a_response_that_repeats_itself_is_warned_of(gold, name):
    """A loop is no matter of --max-new-tokens; what ended by itself is in none. An empty rest is the end, None none."""
    out, example = gold
    sentences, rest, expected = REPEATS[name]
    vocab, ids = out.vocab, [*example.token_ids[: example.prompt_tokens]]
    words = out.task.vocab.plain_text_ids
    for number, sentence in enumerate(sentences):
        ids += [vocab.seg_id(4 + number), vocab.ref_id(1), vocab.ref_id(2), *words(" " + sentence)]
    if rest and sentences[0] == "Snow.":
        ids += [vocab.seg_id(40), vocab.ref_id(1), vocab.ref_id(2)]
    ids += [vocab.eos_id] if rest == "" else [*words(rest or "")]
    response = np.array(ids[example.prompt_tokens :], np.int32)
    found = dataclasses.replace(out, token_ids=np.array(ids, np.int32), num_attended=np.ones(len(response), np.int32)).warnings
    repeats = [line for line in found if "response is a loop" in line or "repeats itself" in line]
    if expected is None:
        assert repeats == []
    elif rest == "":
        assert repeats == [f'The response repeats itself: {expected[1]} of its sentences begin with "{expected[0]}".']
    else:
        assert len(repeats) == 1 and f'is a loop: "{expected[0]}" is written {expected[1]} times' in repeats[0]
        assert not any("--max-new-tokens" in line for line in found)


def test_a_loop_of_names_alone_quotes_no_text(gold):
    out, example = gold
    response = np.full(20, out.vocab.ref_id(1), np.int32)
    ids = np.array([*example.token_ids[: example.prompt_tokens], *response], np.int32)
    found = dataclasses.replace(out, token_ids=ids, num_attended=np.ones(len(response), np.int32)).warnings
    assert any("is a loop: control tokens alone stand at its end." in line for line in found)


def test_a_source_may_be_a_sentence_of_the_response_or_nothing(gold):
    """The second sentence names the first, and a label that nobody carries."""
    out, example = gold
    vocab, ids = out.vocab, example.token_ids.copy()
    ids[np.flatnonzero(ids == vocab.ref_id(2))] = vocab.ref_id(4)
    end = len(ids) - 1
    ids = np.concatenate([ids[:end], [vocab.seg_id(6), vocab.ref_id(60)], ids[end:]])
    read = np.append(out.num_attended, [1, 1])
    changed = dataclasses.replace(out, token_ids=ids, num_attended=read)
    lines = text.response_table(changed).splitlines()
    at = lines.index("<5> It rained.")
    assert lines[at + 1] == "    from <4> its own sentence: Ada won on Monday."
    assert lines[at + 3] == "    from <60> (nothing so far carries that label)"
    opened = [line for line in lines if "open a label of the prompt" in line]
    ids[np.flatnonzero(ids == vocab.seg_id(6))] = vocab.seg_id(2)
    assert not opened and "Steps that open a label of the prompt in place of one of their own: 1." in dataclasses.replace(changed).warnings


def test_a_response_of_sources_without_a_step_is_shown(gold):
    out, _ = gold
    ids = np.append(out.token_ids[: out.prompt_tokens], out.vocab.ref_id(2))
    bare = dataclasses.replace(out, token_ids=ids, num_attended=out.num_attended[:1])
    assert text.response_table(bare).splitlines()[2:4] == ["(no step was opened)", "response: <ref:2>"]
    ids = np.append(out.token_ids[: out.prompt_tokens], [out.vocab.seg_id(60), out.vocab.ref_id(2)])
    opened = dataclasses.replace(out, token_ids=ids, num_attended=out.num_attended[:2])  # and stopped before its text
    lines = text.response_table(opened).splitlines()
    assert lines[lines.index("(no step was written)") + 1 :][:2] == ["response: <seg:60><ref:2>", "<60> "]


def test_a_response_with_steps_has_a_row_for_each():
    out, _, mask = output(NAMED["unresolved"][0])
    stopped, lost, *lines = text.response_table(out).splitlines()
    size = len(mask)
    assert stopped.startswith(f"warning: The response was stopped before it had ended; tokens written: {size - out.prompt_tokens}. ")
    assert stopped.endswith("A higher limit gives more.") and lost.endswith("for which nothing was read: 1.")
    assert lines[0].split() == ["step", "reads", "writes", "attended", "tokens"]
    assert [line.split()[:3] for line in lines[1:4]] == [["<2>", "<4>", "5"], ["<4>", "-", "6"], ["<2>", "<4>", "7"]]
    attended = mask.sum(axis=1)[out.prompt_tokens :]
    assert lines[5].startswith(f"attended: {attended.mean():.1f} tokens, {out.attended_fraction:.1%} of the context   dense decoding: ")
    assert lines[5].endswith(f"{np.mean(np.arange(out.prompt_tokens, size) + 1):.1f} tokens, 100%") and len(lines) == 6
    assert f" · {lines[5].partition('   ')[0]}</p>" in out.to_html()
