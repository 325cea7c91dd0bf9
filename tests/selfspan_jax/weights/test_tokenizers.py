"""Tokenizers: new tokens get ids that are free, stored state does nothing, chat templates run in a sandbox, damaged files get one line."""

import json

import numpy as np
import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from data.vocab import TokenizerVocab
from selfspan_jax import SpanLM
from selfspan_jax.weights import importing
from selfspan_jax.weights.tokenizers import TextTask, add_span_tokens, find_span_tokens, load_tokenizer
from tests.selfspan_jax.weights import pretrained

pytestmark = pytest.mark.filterwarnings("ignore")  # `transformers` warns about itself

IDS = {word: i for i, word in enumerate(pretrained.WORDS)}
GAPS = {  # ids of a tokenizer's tokens
    "none": IDS,
    "one below the highest": {**IDS, "Ġthe": 261},
    "wider than what is added": {**IDS, "Ġthe": 900},
    "below the lowest": {word: i + 7 for word, i in IDS.items()},
}


@pytest.mark.parametrize("ids", GAPS.values(), ids=GAPS)
def test_new_tokens_get_ids_above_all_that_are_in_use(ids):
    theirs = pretrained.tokenizer(vocab=ids)
    before = theirs("the cat, the dog")["input_ids"]
    vocab = add_span_tokens(theirs, 20)
    assert theirs("the cat, the dog")["input_ids"] == before
    taken, last = {*ids.values()}, 1 + max(ids.values())
    new = [vocab.bos_id, vocab.pad_id, vocab.solve_id, *map(vocab.seg_id, range(20)), *map(vocab.ref_id, range(20))]
    assert new == [*range(last, last + 43)] and not taken & {*new}
    written = "<solve><seg:1>the<ref:19>"
    assert theirs(written)["input_ids"] == [vocab.solve_id, vocab.seg_id(1), ids["the"], vocab.ref_id(19)]
    assert theirs.decode(theirs(written)["input_ids"]) == written
    assert len({*theirs.get_vocab().values()}) == len(theirs.get_vocab())
    assert find_span_tokens(theirs) == vocab
    stored = TokenizerVocab.of(TextTask(theirs).tokenizer_json, vars(vocab), vocab.min_vocab_size)
    assert stored.tokens[vocab.seg_id(1)] == "<seg:1>" and stored.text_ids("the cat, the dog").tolist() == before


def test_ids_that_cannot_be_chosen_are_refused():
    """A unigram model is a list: nothing can be put beyond its end."""
    core = Tokenizer(models.Unigram([("<eos>", 0.0), ("a", -1.0)], unk_id=0))
    theirs = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")
    theirs.get_vocab = lambda: {"<eos>": 0, "a": 1, "z": 7}
    with pytest.raises(ValueError, match=r"leaves ids free below its highest, and its model .Unigram. cannot skip them"):
        add_span_tokens(theirs, 2)


def test_a_gap_is_no_hurdle_for_a_model(tmp_path):
    words = pretrained.tokenizer(vocab=GAPS["one below the highest"])
    model, task = importing.load(pretrained.directory(tmp_path / "model", words=words))
    assert model.vocab.bos_id == 262 and task.decode([261]) == " the"
    with pytest.raises(ValueError, match="the tokenizer has 321 tokens, the model's embedding 320 rows"):
        importing.load(pretrained.directory(tmp_path / "small", words=pretrained.tokenizer(vocab={**IDS, "Ġthe": 320})))


STATES = {
    "truncation": lambda core: core.enable_truncation(3),
    "padding": lambda core: core.enable_padding(length=40, pad_token="<|end|>"),
    "dropout": lambda core: setattr(core.model, "dropout", 0.9),
}


@pytest.mark.parametrize("switch_on", STATES.values(), ids=STATES)
def test_what_a_tokenizer_was_last_used_with_is_forgotten(tmp_path, switch_on):
    theirs = pretrained.tokenizer()
    text = "the cat and the other thing"
    wanted = theirs(text)["input_ids"]
    path = pretrained.directory(tmp_path / "model", words=theirs)
    core = Tokenizer.from_file(str(path / "tokenizer.json"))
    switch_on(core)
    core.save(str(path / "tokenizer.json"))
    assert [core.encode(text).ids for _ in range(5)] != [wanted] * 5  # the library itself obeys
    loaded = load_tokenizer(path)
    task = TextTask(loaded)
    assert [task.encode_prompt(text).tolist() for _ in range(5)] == [wanted] * 5
    vocab = add_span_tokens(loaded, 4)
    for stored in (task.tokenizer_json, core.to_str()):  # the second as an older version wrote it
        words = TokenizerVocab.of(stored, vars(vocab), vocab.min_vocab_size)
        assert [words.text_ids(text).tolist() for _ in range(5)] == [wanted] * 5


def test_the_models_config_names_the_end_where_the_tokenizer_does_not(tmp_path):
    path = pretrained.directory(tmp_path / "model", eos_token_id=[66, 0], words=pretrained.tokenizer(eos_token=None))
    model, task = importing.load(path)
    assert (model.vocab.eos_id, task.stop_ids) == (66, (0,))
    with pytest.raises(ValueError, match="names no end of text"):
        importing.load(pretrained.directory(tmp_path / "none", eos_token_id=None, words=pretrained.tokenizer(eos_token=None)))


HALF = {
    "a label alone": ["<seg:1>"],
    "without <solve>": [f"<{kind}:{k}>" for kind in ("seg", "ref") for k in range(4)],
    "in another order": ["<solve>", *(f"<{kind}:{k}>" for k in range(4) for kind in ("seg", "ref"))],
    "fewer of one family": ["<solve>", *(f"<seg:{k}>" for k in range(4)), "<ref:0>", "<ref:1>"],
}


@pytest.mark.parametrize("tokens", HALF.values(), ids=HALF)
def test_span_tokens_that_are_no_export_of_ours_are_refused(tmp_path, tokens):
    theirs = pretrained.tokenizer(additional_special_tokens=tokens)
    with pytest.raises(ValueError, match=r"has <.*> already, but not the span tokens as an export"):
        importing.load(pretrained.directory(tmp_path / "model", words=theirs))


def text(name, change):
    return lambda path: (path / name).write_text(change((path / name).read_text()))


def field(name, change):
    return text(name, lambda content: json.dumps(change(json.loads(content))))


DAMAGES = {
    "cut": (text("tokenizer.json", lambda t: t[:300]), "tokenizer.json: not a tokenizer"),
    "empty": (text("tokenizer.json", lambda t: ""), "tokenizer.json: not a tokenizer"),
    "a list": (text("tokenizer.json", lambda t: "[]"), "tokenizer.json: not a tokenizer"),
    "no model": (field("tokenizer.json", lambda j: {k: v for k, v in j.items() if k != "model"}), "tokenizer.json: not a tokenizer"),
    "an unknown model": (text("tokenizer.json", lambda t: t.replace('"BPE"', '"XYZ"')), "tokenizer.json: not a tokenizer"),
    "merges of no tokens": (text("tokenizer.json", lambda t: t.replace('"Ġthe": 259', '"the2": 259')), "tokenizer.json: not a tokenizer"),
    "not UTF-8": (lambda p: (p / "tokenizer.json").write_bytes(b'{"a": "\xff"}'), "tokenizer.json is not text in UTF-8"),
    "its config cut": (text("tokenizer_config.json", lambda t: t[:20]), r"the tokenizer cannot be read \(JSONDecodeError"),
    "its config a list": (text("tokenizer_config.json", lambda t: "[]"), r"the tokenizer cannot be read \(AttributeError"),
    "a number for a token": (field("tokenizer_config.json", lambda j: j | {"eos_token": 5}), r"the tokenizer cannot be read \(TypeError"),
    "code of its own": (
        field("tokenizer_config.json", lambda j: j | {"tokenizer_class": "Y", "auto_map": {"AutoTokenizer": ["x.Y", None]}}),
        r"the tokenizer cannot be read \(ValueError: .*custom code",
    ),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return pretrained.directory(tmp_path_factory.mktemp("whole") / "model")


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_tokenizer_is_refused_in_one_line(whole, tmp_path, damage, message):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((whole / name).read_bytes())
    damage(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


# Chat templates.

TEMPLATE = """{% for message in messages %}
<{{ message.role }}> {{ message.content | trim }}<|end|>
{% endfor %}
{% if add_generation_prompt %}<assistant> {% endif %}"""


def test_a_chat_is_written_as_its_template_says(tmp_path):
    path = pretrained.directory(tmp_path / "model", words=pretrained.tokenizer(chat_template=TEMPLATE))
    lm = SpanLM.load(path)
    ids = lm.task.encode_chat("  the cat ")
    assert lm.task.decode(ids) == "<user> the cat<|end|>\n<assistant> " and list(ids).count(0) == 1
    several = [{"role": "system", "content": "the"}, {"role": "user", "content": "cat "}]
    assert lm.task.decode(lm.task.encode_chat(several)) == "<system> the<|end|>\n<user> cat<|end|>\n<assistant> "
    out = lm.generate("  the cat ", chat=True, max_new_tokens=6)
    np.testing.assert_array_equal(out.token_ids[: out.prompt_tokens], ids)
    assert "".join(lm.stream("  the cat ", chat=True, max_new_tokens=6)) == out.text
    plain = lm.generate("the cat", max_new_tokens=6)
    np.testing.assert_array_equal(plain.token_ids[: plain.prompt_tokens], lm.task.encode_prompt("the cat"))
    scores = lm.logits(out.token_ids)  # an end of text within the prompt ends nothing
    np.testing.assert_array_equal(np.argmax(scores[out.prompt_tokens - 1 : -1], axis=-1), out.response_ids)


FAILING = {
    "none": (None, "the tokenizer has no chat template"),
    "no template": ("{% for %}", "the chat template fails: "),
    "one that refuses": ("{{ raise_exception('only tools') }}", "the chat template fails: only tools"),
    "a way out": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "the chat template fails: .*unsafe"),
    "unknown names": ("{{ nothing.more }}", "the chat template fails: .*undefined"),
}


@pytest.mark.parametrize(("template", "message"), FAILING.values(), ids=FAILING)
def test_a_chat_template_that_fails_is_one_line(template, message):
    with pytest.raises(ValueError, match=message) as error:
        TextTask(pretrained.tokenizer(chat_template=template)).encode_chat("the")
    assert "\n" not in str(error.value)


def test_chat_is_refused_where_a_task_writes_its_own_prompts():
    with pytest.raises(ValueError, match="chat is for pretrained models"):
        SpanLM.load("checkpoints/arithmetic-tiny").generate("1+2*3", chat=True)
