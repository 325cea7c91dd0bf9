"""GGUF files: tokens, ends and settings as `transformers` reads them from the same file, and what the decoder does not have is refused."""

import numpy as np
import pytest
import transformers

from selfspan_jax import SpanLM
from selfspan_jax.config import LoraConfig
from selfspan_jax.errors import UserError
from selfspan_jax.weights import importing, lora
from tests.selfspan_jax.weights import pretrained
from tests.selfspan_jax.weights.pretrained import WORDS, gguf_file

pytestmark = pytest.mark.filterwarnings("ignore")  # `transformers` warns about itself
ARRAYS = pretrained.tensors(320)
SPECIAL = [*WORDS, "<think>", "ä<odd>", "<begin>"]
TYPES = [3, *[1] * (len(WORDS) - 1), 4, 3, 3]
TOKENIZERS = {  # what a file says beside its tokens and merges
    "nothing": {},
    "user-defined tokens, mislabelled control tokens": dict(words=SPECIAL, types=TYPES),
    "a beginning of text": dict(words=SPECIAL, types=TYPES, tokenizer__ggml__bos_token_id=262, tokenizer__ggml__add_bos_token=True),
    "no beginning of text": dict(words=SPECIAL, types=TYPES, tokenizer__ggml__bos_token_id=262, tokenizer__ggml__add_bos_token=False),
    "an end of text after each prompt": dict(tokenizer__ggml__add_eos_token=True),
    "both": dict(
        words=SPECIAL,
        types=TYPES,
        tokenizer__ggml__bos_token_id=262,
        tokenizer__ggml__add_bos_token=True,
        tokenizer__ggml__add_eos_token=True,
    ),
    "a chat template": dict(tokenizer__chat_template="{{ messages[0].content }}!"),
    "a padding token": dict(words=SPECIAL, types=TYPES, tokenizer__ggml__padding_token_id=260),
}
TEXTS = ["the cat and the dog", "x<think>the </think> y", "a<|end|>b ä<odd> 12", "", " <begin> the"]


@pytest.mark.parametrize("more", TOKENIZERS.values(), ids=TOKENIZERS)
def test_a_tokenizer_is_what_transformers_makes_of_the_same_file(tmp_path, more):
    path = gguf_file(tmp_path / "model.gguf", {"model.embed_tokens.weight": ARRAYS["model.embed_tokens.weight"]}, **more)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name, local_files_only=True)
    ours = importing.open_source(path).load_tokenizer()
    for text in TEXTS:
        ids = theirs(text)["input_ids"]
        assert ours(text)["input_ids"] == ids
        assert ours.decode(ids, skip_special_tokens=True) == theirs.decode(ids, skip_special_tokens=True)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "chat_template"):
        assert getattr(ours, name) == getattr(theirs, name), name


def test_ends_of_text_and_turn_both_end(tmp_path):
    path = gguf_file(tmp_path / "MODEL.GGUF", ARRAYS, tokenizer__ggml__eot_token_id=66, tokenizer__ggml__eom_token_id=67)
    model, task = importing.load(path)
    assert (model.vocab.eos_id, task.stop_ids) == (0, (66, 67)) and model.config.compute_dtype == "float32"


REQUIRED = ["context_length", "embedding_length", "feed_forward_length", "block_count"]
REQUIRED += ["attention.head_count", "attention.layer_norm_rms_epsilon"]
REFUSED = {
    "a type of scaling": (dict(llama__rope__scaling__type="yarn"), "llama.rope.scaling.type is 'yarn'; known from GGUF are unscaled"),
    "a factor alone": (dict(llama__rope__scaling__factor=4.0), "llama.rope.scaling.factor is 4.0"),
    "a factor by its old key": (dict(llama__rope__scale_linear=2.0), "llama.rope.scale_linear is 2.0"),
    "a factor of attention": (dict(llama__rope__scaling__attn_factor=1.2), "llama.rope.scaling.attn_factor is 1.2"),
    "a setting of scaling nobody knows": (dict(llama__rope__scaling__beta_fast=32.0), "beta_fast is 32.0"),
    "a part of the head turned": (
        dict(llama__rope__dimension_count=4, llama__attention__key_length=8),
        "llama.rope.dimension_count is 4; known is the head size, 8",
    ),
    "values of another size": (dict(llama__attention__value_length=16, llama__attention__key_length=8), "value_length is 16"),
    "a list for a number": (dict(llama__attention__head_count_kv=[2, 2]), "llama.attention.head_count_kv is list; expected a number"),
    "an end beyond the tokens": (dict(tokenizer__ggml__eos_token_id=900), "eos_token_id is 900, but there are 260 tokens"),
    "another tokenizer": (dict(tokenizer__ggml__model="llama"), "of type 'llama'; known is gpt2"),
    **{f"without {key}": (dict(without=(f"llama.{key}",)), f"llama.{key} is missing") for key in REQUIRED},
}


@pytest.mark.parametrize(("more", "message"), REFUSED.values(), ids=REFUSED)
def test_settings_that_are_unknown_or_missing_are_named(tmp_path, more, message):
    path = gguf_file(tmp_path / "model.gguf", {"model.embed_tokens.weight": np.zeros((320, 32), np.float32)}, **more)
    with pytest.raises(ValueError, match=message) as error:
        importing.open_source(path).load_tokenizer()
    assert "\n" not in str(error.value)


def test_settings_that_scale_nothing_are_taken(tmp_path):
    neutral = dict(llama__rope__scaling__type="none", llama__rope__scaling__factor=1.0, llama__rope__scaling__original_context_length=64)
    path = gguf_file(tmp_path / "model.gguf", ARRAYS, **neutral, llama__rope__dimension_count=8, llama__rope__freq_base=5e5)
    config = importing.open_source(path).config
    assert (config.rope_theta, config.rope_scaling, config.rms_norm_eps, config.head_size) == (5e5, None, 1e-5, 8)


@pytest.mark.parametrize("size", [0, 3, 30, 700, -20_000, -1])
def test_a_file_cut_short_is_refused_in_one_line(tmp_path, size):
    data = gguf_file(tmp_path / "whole.gguf", ARRAYS).read_bytes()
    (tmp_path / "cut.gguf").write_bytes(data[:size])
    with pytest.raises(ValueError, match=r"cut.gguf: not a GGUF file, or a damaged one \(") as error:
        SpanLM.load(tmp_path / "cut.gguf")
    assert "\n" not in str(error.value)


NOT_UTF8 = {  # where a byte of a string is no UTF-8: what is replaced, and the key that is named
    "the architecture": (b"\x05\0\0\0\0\0\0\0llama", "general.architecture"),
    "a token": (b"\x03\0\0\0\0\0\0\0the", "tokenizer.ggml.tokens"),
    "a merge": (b"\x04\0\0\0\0\0\0\0th e", "tokenizer.ggml.merges"),
    "the chat template": (b"{{ messages", "tokenizer.chat_template"),
}


@pytest.mark.parametrize(("found", "key"), NOT_UTF8.values(), ids=NOT_UTF8)
def test_text_that_is_not_utf8_is_named_in_one_line(tmp_path, found, key):
    path = gguf_file(tmp_path / "model.gguf", ARRAYS, tokenizer__chat_template="{{ messages[0].content }}")
    data = path.read_bytes()
    assert data.count(found) == 1
    path.write_bytes(data.replace(found, found[:-1] + b"\xff"))
    with pytest.raises(UserError, match=f"model.gguf: {key} cannot be read") as error:
        SpanLM.load(path)
    assert "\n" not in str(error.value)


def test_an_adapter_fits_the_same_weights_in_another_format(tmp_path):
    """A GGUF file keeps settings in float32: 1e-05 comes back as 9.999999747e-06, which an older adapter has in its config."""
    path = gguf_file(tmp_path / "model.gguf", ARRAYS)
    other = pretrained.directory(tmp_path / "hf", arrays=ARRAYS)
    for eps in (1e-5, 9.999999747378752e-06):
        model, _ = importing.load(path, num_labels=4, compute_dtype="bfloat16", rms_norm_eps=eps)
        adapted = lora.adapt(model, LoraConfig(rank=2))
        stored = tmp_path / f"adapter-{eps}"
        lora.save_adapter(stored, adapted, LoraConfig(rank=2), path.name, {}, "")
        for base in (path, other):
            merged, _ = lora.load_adapter(stored, base)
            np.testing.assert_array_equal(merged.norm.scale[...], model.norm.scale[...])
    wrong = pretrained.directory(tmp_path / "wrong", arrays=ARRAYS, rms_norm_eps=2e-5)
    with pytest.raises(ValueError, match=r"another architecture than that of model.gguf"):
        lora.load_adapter(stored, wrong)
