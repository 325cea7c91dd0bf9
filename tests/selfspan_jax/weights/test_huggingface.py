"""Hugging Face directories: what the files say is taken as `transformers` takes it, or refused; what is exported loads again."""

import json
import locale
import logging

import jax
import numpy as np
import pytest
import transformers
from flax import nnx
from safetensors.numpy import load_file, save_file

from selfspan_jax import SpanLM, training
from selfspan_jax.config import DecodeConfig, LoraConfig, TrainConfig
from selfspan_jax.errors import UserError
from selfspan_jax.weights import huggingface, importing, lora, models
from selfspan_jax.weights.tokenizers import TextTask
from tests.selfspan_jax.models import random_model
from tests.selfspan_jax.weights import pretrained

pytestmark = pytest.mark.filterwarnings("ignore")  # `transformers` warns about itself
TEXT = "the cat and the dog"
RANK_2 = LoraConfig(rank=2)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return pretrained.directory(tmp_path_factory.mktemp("hf") / "base")


@pytest.fixture(scope="module")
def lm(base):
    return SpanLM.load(base)


def changed(base, path, **fields):
    """A copy of a directory with other fields in its config; None takes one away."""
    path.mkdir()
    for file in base.iterdir():
        (path / file.name).symlink_to(file)
    config = {k: v for k, v in (json.loads((base / "config.json").read_text()) | fields).items() if v is not None}
    (path / "config.json").unlink()
    (path / "config.json").write_text(json.dumps(config))
    return path


# The config: `transformers` says what its fields mean.

LLAMA3 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
PART = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
ROPES = {  # fields of a config, None where they are refused
    "nothing": {},
    "theta beside (transformers 4)": dict(rope_theta=1e6),
    "theta inside (transformers 5)": dict(rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
    "a dict without theta, theta beside": dict(rope_parameters={"rope_type": "default"}, rope_theta=1e6),
    "theta inside and beside": dict(rope_parameters={"rope_type": "default", "rope_theta": 5e5}, rope_theta=1e6),
    "a dict with theta alone": dict(rope_parameters={"rope_theta": 9e4}),
    "an empty scaling before it": dict(rope_scaling={}, rope_parameters={"rope_theta": 9e4}),
    "no scaling": dict(rope_scaling=None, rope_theta=7e5),
    "scaling by its old key": dict(rope_scaling={"type": "llama3", **LLAMA3}, rope_theta=1e6),
    "scaling by both keys": dict(rope_scaling={"type": "llama3", "rope_type": "llama3", **LLAMA3}, rope_theta=1e6),
    "scaling with theta": dict(rope_scaling={"rope_type": "llama3", "rope_theta": 3e5, **LLAMA3}),
    "scaling without theta anywhere": dict(rope_scaling={"rope_type": "llama3", **LLAMA3}),
    "scaling without the first context": dict(rope_scaling={"rope_type": "llama3", **PART}, rope_theta=1e6),
    "the same twice": dict(
        rope_parameters={"rope_type": "llama3", "rope_theta": 2e4, **LLAMA3}, rope_scaling={"type": "llama3", **LLAMA3}, rope_theta=2e4
    ),
}


@pytest.mark.parametrize("fields", ROPES.values(), ids=ROPES)
def test_rotary_settings_are_those_of_transformers(fields):
    sizes = dict(pretrained.SIZES, vocab_size=61)
    ours = huggingface.model_config({"model_type": "llama", **sizes, **fields})
    theirs = transformers.LlamaConfig(**sizes, **json.loads(json.dumps(fields))).rope_parameters
    assert ours.rope_theta == theirs["rope_theta"]
    if theirs["rope_type"] == "default":
        assert ours.rope_scaling is None
    else:
        scaling = [theirs[name] for name in LLAMA3]
        assert [*vars(ours.rope_scaling).values()] == scaling


LAYERS = dict(layer_types=["full_attention", "sliding_attention"], use_sliding_window=True, sliding_window=32)
REFUSED_ROPES = {
    "two thetas": (
        dict(rope_parameters={"rope_theta": 2e4}, rope_scaling={"rope_theta": 3e4}),
        "rope_theta is 20000.0 in rope_parameters, and 30000.0 in rope_scaling; known is one value",
    ),
    "another type": (dict(rope_scaling={"type": "linear", "factor": 2.0}), "type 'linear'; known are default and llama3"),
    "a factor of no type": (dict(rope_scaling={"factor": 2.0}), "a factor of 2.0, but no type"),
    "a part of the head": (dict(partial_rotary_factor=0.5), "partial_rotary_factor is 0.5"),
    "a part of the head, inside": (dict(rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.5}), "partial_rotary_factor is 0.5"),
    "the first context outside": (dict(rope_scaling={"type": "llama3", **PART}, original_max_position_embeddings=32), "stands beside"),
    "the first context, two": (
        dict(rope_scaling={"rope_type": "llama3", **LLAMA3}, original_max_position_embeddings=32),
        "original_max_position_embeddings, 32, stands beside .* is 16 among them",
    ),
    "a theta that a second dict does not name": (
        dict(rope_parameters={"rope_theta": 5e5}, rope_scaling={"type": "default"}),
        "rope_theta is 500000.0 in rope_parameters, and 10000.0 for rope_scaling, which does not name it",
    ),
    "a list": (dict(rope_parameters=[]), "rope_parameters is ..; expected an object"),
    "a type of layer, no types": (
        dict(rope_parameters={"full_attention": {"rope_theta": 1e6}}),
        "for layers of type full_attention; known",
    ),
    "a type of layer, of a Llama": (
        dict(LAYERS, model_type="llama", rope_parameters={"full_attention": {"rope_theta": 1e6}}),
        "for layers of type full_attention; known are those of a qwen2 or qwen3",
    ),
    "half of llama3": (dict(rope_scaling={"type": "llama3", "factor": 8.0}), "low_freq_factor, high_freq_factor missing"),
    "text for theta": (dict(rope_theta="1e6"), "rope_theta is '1e6'; expected a number"),
    "no dict": (dict(rope_scaling="llama3"), "rope_scaling is 'llama3'; expected an object"),
    "types of layers that differ": (
        dict(LAYERS, rope_parameters={"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}),
        "rope_theta is 1000000.0 in rope_parameters.full_attention, and 10000.0 in rope_parameters.sliding_attention",
    ),
    "a type of layer without": (
        dict(LAYERS, rope_parameters={"full_attention": {"rope_theta": 1e6}}),
        "no settings for layers of type sliding",
    ),
}


@pytest.mark.parametrize(("fields", "message"), REFUSED_ROPES.values(), ids=REFUSED_ROPES)
def test_rotary_settings_that_are_unknown_or_say_two_things_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        huggingface.model_config({"model_type": "qwen3", **pretrained.SIZES, "vocab_size": 61, **fields})


def test_settings_by_type_of_layer_are_read_where_they_agree():
    rope = {"full_attention": {"rope_type": "default", "rope_theta": 1e6}, "sliding_attention": {"rope_type": "default", "rope_theta": 1e6}}
    for parameters, beside in ((rope, {}), ({name: {} for name in rope}, {"rope_theta": 1e6})):
        fields = dict(LAYERS, rope_parameters=parameters or rope, **beside)
        assert huggingface.model_config({"model_type": "qwen3", **pretrained.SIZES, "vocab_size": 61, **fields}).rope_theta == 1e6


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_fields_that_the_file_leaves_out_are_those_of_transformers(kind):
    sizes = dict(hidden_size=256, intermediate_size=40, num_hidden_layers=2, num_attention_heads=32, vocab_size=61)
    ours, theirs = huggingface.model_config({"model_type": kind, **sizes}), transformers.AutoConfig.for_model(kind, **sizes)
    assert ours.num_kv_heads == theirs.num_key_value_heads and ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.head_size == (getattr(theirs, "head_dim", None) or 256 // 32)
    window = getattr(theirs, "sliding_window", None)
    assert ours.max_context_tokens == min(theirs.max_position_embeddings, window or 1 << 30)
    assert not ours.tie_embeddings and not theirs.tie_word_embeddings


def test_a_window_counts_where_a_layer_has_it():
    sizes = dict(pretrained.SIZES, vocab_size=61, max_position_embeddings=64, use_sliding_window=True, sliding_window=32)
    for context, more in (
        (64, {}),
        (32, dict(max_window_layers=1)),
        (64, dict(max_window_layers=1, use_sliding_window=False)),
        (32, LAYERS),
    ):
        ours = huggingface.model_config({"model_type": "qwen2", **sizes, **more})
        theirs = transformers.Qwen2Config(**{**sizes, **more})
        assert ours.max_context_tokens == context
        assert ("sliding_attention" in theirs.layer_types and theirs.sliding_window is not None) == (context == 32)


# The file is believed over the config.


def test_a_head_of_its_own_is_used_whatever_the_config_says(base, tmp_path):
    arrays = load_file(base / "model.safetensors")
    said = importing.load_decoder(changed(base, tmp_path / "said", tie_word_embeddings=True))
    silent = importing.load_decoder(changed(base, tmp_path / "silent", tie_word_embeddings=None))
    for model in (said, silent):
        np.testing.assert_array_equal(model.lm_head.weight[...][:320], arrays["lm_head.weight"])
    arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"]
    same = pretrained.directory(tmp_path / "same", arrays=arrays, tie_word_embeddings=True)
    assert importing.load_decoder(same).lm_head is None
    arrays.pop("lm_head.weight")
    with pytest.raises(UserError, match=r"tie_word_embeddings is missing, for llama false by default, but the file has no lm_head.weight"):
        importing.load_decoder(pretrained.directory(tmp_path / "none", arrays=arrays))
    with pytest.raises(ValueError, match=r"lm_head.weight among them"):
        importing.load_decoder(pretrained.directory(tmp_path / "untied", arrays=arrays, tie_word_embeddings=False))


TYPES = {  # fields of a wrong type, and how the line ends that refuses them
    "text for a flag": (dict(tie_word_embeddings="false"), "tie_word_embeddings is 'false'; expected true or false"),
    "a number for a flag": (dict(tie_word_embeddings=1), "tie_word_embeddings is 1; expected true or false"),
    "text for a bias": (dict(attention_bias="false"), "attention_bias is 'false'; expected true or false"),
    "a list for an object": (dict(rope_parameters=[]), "rope_parameters is []; expected an object"),
    "a list for a name": (dict(model_type=[]), "model_type is []; known are llama, mistral, qwen2, qwen3"),
    "a dtype that nothing here computes in": (dict(dtype="float8"), "dtype is 'float8'; allowed: float32, bfloat16, float16"),
    "what only transformers reads": (dict(use_cache="yes"), "Field 'use_cache' expected bool, got str (value: 'yes')"),
    "weights elsewhere": (
        dict(transformers_weights="x.safetensors"),
        "transformers_weights is 'x.safetensors'; known is model.safetensors",
    ),
}


@pytest.mark.parametrize(("fields", "message"), TYPES.values(), ids=TYPES)
def test_a_field_of_a_wrong_type_is_named_with_file_and_value(base, tmp_path, fields, message):
    path = changed(base, tmp_path / "model", **fields)
    with pytest.raises(UserError) as error:
        SpanLM.load(path)
    assert str(error.value) == f"{path / 'config.json'}: {message}"


def test_json_without_end_is_named(base, tmp_path):
    path = changed(base, tmp_path / "model")
    (path / "config.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"config\.json: not JSON"):
        SpanLM.load(path)


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_named(base, tmp_path, number):
    path = changed(base, tmp_path / "model")
    arrays = load_file(base / "model.safetensors")
    arrays["model.norm.weight"] = arrays["model.norm.weight"].copy()
    arrays["model.norm.weight"][3] = number
    save_file(arrays, path / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.norm\.weight has numbers that are not finite"):
        SpanLM.load(path)


def test_two_models_in_one_directory_are_refused(base, tmp_path):
    both = changed(base, tmp_path / "both")
    arrays = load_file(base / "model.safetensors")
    save_file({name: array + 1 for name, array in arrays.items()}, both / "model-00001-of-00001.safetensors")
    index = both / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(arrays, "model-00001-of-00001.safetensors")}))
    with pytest.raises(ValueError, match=r"has model.safetensors and an index of other files"):
        importing.load_decoder(both)
    (both / "model.safetensors").unlink()
    np.testing.assert_array_equal(importing.load_decoder(both).norm.scale[...], arrays["model.norm.weight"] + 1)
    index.write_text(json.dumps({"weight_map": {"x": 5}}))
    with pytest.raises(ValueError, match="no map from tensors to files"):
        importing.load_decoder(both)


def test_quantised_weights_of_others_are_refused(base, tmp_path):
    with pytest.raises(ValueError, match=r"quantised .gptq."):
        importing.load_decoder(changed(base, tmp_path / "q", quantization_config={"quant_method": "gptq"}))


STORED = {  # how weights are stored, what the config says, what is computed, and whether that is said
    "float32": (np.float32, "float32", "float32", False),
    "float32, the config silent": (np.float32, None, "float32", False),
    "float32, to be computed in less": (np.float32, "bfloat16", "bfloat16", True),
    "float16": (np.float16, "float16", "bfloat16", True),
    "float16, the config silent": (np.float16, None, "bfloat16", True),
}


@pytest.mark.parametrize(("stored", "config", "computed", "said"), STORED.values(), ids=STORED)
def test_the_dtype_of_computing_is_said_where_it_rounds(tmp_path, caplog, stored, config, computed, said):
    path = pretrained.directory(tmp_path / "model", arrays=pretrained.tensors(320, dtype=stored), dtype=config)
    with caplog.at_level(logging.WARNING):
        assert importing.load_decoder(path).config.compute_dtype == computed
    name = np.dtype(stored).name
    assert [f"stored in {name}, computed in {computed}" in record.message for record in caplog.records] == [True] * said


def test_dtype_is_an_option_for_every_model(tmp_path, lm):
    path = pretrained.directory(tmp_path / "model", arrays=pretrained.tensors(320, dtype=np.float16), dtype="float16")
    half, wide, short = (SpanLM.load(path, dtype=dtype) for dtype in ("f16", "f32", "bf16"))
    stored = load_file(path / "model.safetensors")["lm_head.weight"]
    for exact in (half, wide):  # no bit of the file is rounded
        np.testing.assert_array_equal(np.asarray(exact.model.lm_head.weight[...], np.float16)[:260], stored[:260])
    ids = wide.task.encode_prompt(TEXT)
    off = {name: np.abs(other.logits(ids) - wide.logits(ids)).max() for name, other in (("f16", half), ("bf16", short))}
    assert 0 < off["f16"] < 0.05 and 3 * off["f16"] < off["bf16"]  # three more bits; logits of about 5
    assert half.generate(TEXT, max_new_tokens=4, attention="dense").text is not None
    ours = SpanLM.load("checkpoints/arithmetic-tiny", dtype="f32")
    assert ours.model.config.compute_dtype == "float32" == ours.model.embed_tokens.embedding[...].dtype
    with pytest.raises(ValueError, match="dtype is 'float32'; allowed: bf16, f32, f16"):
        SpanLM.load(path, dtype="float32")


# Ends of a text.


def test_decoding_ends_at_any_of_the_ends(base, lm, tmp_path):
    """What it writes without them says where each end must cut."""
    free = lm.generate(TEXT, max_new_tokens=24).response_ids
    assert len(free) == 24 and lm.task.stop_ids == ()
    first = free[7]
    cut = [*free[: list(free).index(first) + 1]]
    for name, config, generation in (("config", [0, int(first)], None), ("generation", 0, [int(first), 0]), ("both", int(first), 0)):
        path = changed(base, tmp_path / name, eos_token_id=config)
        if generation is not None:
            (path / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
        stopping = SpanLM.load(path)
        assert stopping.task.stop_ids == (first,)
        out, *_ = outs = stopping.generate([TEXT, "a dog"], max_new_tokens=24)
        np.testing.assert_array_equal(out.response_ids, cut)
        assert out.finished and first not in outs[1].response_ids[:-1]
        alone = stopping.pad([stopping.task.encode_prompt(TEXT)])
        config = DecodeConfig("dense", max_new_tokens=24, stop_ids=stopping.end_ids[1:])
        assert stopping.engine.generate(*alone, config).num_steps == len(cut)  # nothing is computed beyond
        assert "".join(stopping.stream(TEXT, max_new_tokens=24, chunk_tokens=5)) == stopping.task.decode(cut)
    huggingface.export(tmp_path / "exported", stopping.model, stopping.task)
    assert SpanLM.load(tmp_path / "exported").task.stop_ids == (first,)
    assert transformers.GenerationConfig.from_model_config(transformers.AutoConfig.from_pretrained(tmp_path / "exported")).eos_token_id == [
        0,
        first,
    ]


EXPORTS = {  # ways to what is exported
    "the task": lambda model, task: (model, task),
    "its tokenizer": lambda model, task: (model, task.tokenizer),
    "the model alone": lambda model, task: (model,),
    "for decoding": lambda model, task: (SpanLM(model, task).model, task.tokenizer),
    "merged": lambda model, task: (lora.merged(lora.adapt(model, RANK_2)), task.tokenizer),
}


@pytest.mark.parametrize("way", EXPORTS.values(), ids=EXPORTS)
def test_an_export_has_all_ends_of_a_text(base, tmp_path, way):
    model, task = importing.load(changed(base, tmp_path / "ends", eos_token_id=[0, 1]))
    huggingface.export(tmp_path / "x", *way(model, task))
    assert json.loads((tmp_path / "x" / "config.json").read_text())["eos_token_id"] == [0, 1]


def test_an_export_keeps_nothing_of_what_the_tokenizer_was_used_with(base, tmp_path):
    model, task = importing.load(base)
    task.tokenizer([TEXT, "a"], padding="max_length", truncation=True, max_length=4)
    huggingface.export(tmp_path / "x", model, task.tokenizer)
    stored = json.loads((tmp_path / "x" / "tokenizer.json").read_text())
    assert (stored["truncation"], stored["padding"]) == (None, None)


@pytest.mark.parametrize("ids", ["</s>", [0, "1"], [-1], True])
def test_ends_that_are_no_ids_are_refused(base, tmp_path, ids):
    with pytest.raises(ValueError, match="eos_token_id is"):
        importing.open_source(changed(base, tmp_path / "model", eos_token_id=ids))


# Export.


STATES = {  # of a model that is no plain one, and what is said of it
    "int8": (lambda: random_model().for_decoding(weights="int8"), "weights are int8: take the model that they were made from"),
    "adapted": (lambda: lora.adapt(random_model(), RANK_2), r"has adapters: merge the adapters first .lora.merged."),
    "one map adapted": (lambda: lora.adapt(random_model(), LoraConfig(rank=2, targets=("down_proj",))), "merge the adapters first"),
}
CONSUMERS = {
    "export": lambda model, path: huggingface.export(path, model),
    "save_model": lambda model, path: models.save_model(path, model, {}, ""),
    "SpanLM": lambda model, path: SpanLM(model, None),
    "for_decoding": lambda model, path: model.for_decoding(),
    "astype": lambda model, path: model.astype("float32"),
    "adapt": lambda model, path: lora.adapt(model, RANK_2),
}


@pytest.mark.parametrize(("make", "message"), STATES.values(), ids=STATES)
def test_a_model_that_is_no_plain_one_is_refused_by_what_would_take_it_for_one(tmp_path, make, message):
    model = make()
    for consume in CONSUMERS.values():
        with pytest.raises(UserError, match=message):
            consume(model, tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_an_int8_model_is_neither_trained_nor_saved_as_an_adapter(tmp_path):
    model = random_model().for_decoding(weights="int8")
    with pytest.raises(UserError, match="weights are int8"):
        training.initial_state(model, TrainConfig(steps=1))
    with pytest.raises(UserError, match="has no adapters"):
        lora.save_adapter(tmp_path / "x", model, RANK_2, "base", {}, "")


def test_an_int8_model_stays_what_it_is_in_another_object():
    first = SpanLM.load("checkpoints/arithmetic-tiny", weights="int8")
    again = SpanLM(first.model, first.task, weights="int8")
    assert again.generate("(3+4)", max_new_tokens=8).text == "<seg:1>3+4=7<eos>"
    for a, b in zip(*(jax.tree.leaves(nnx.state(each.model, nnx.Param)) for each in (first, again)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda lm: (5, lm.model), "directory is 5; expected a path"),
        (lambda lm: ("x", lm), "expected a Decoder to export, found SpanLM: of a SpanLM give its model"),
        (lambda lm: ("x", lm.model, "tokenizer.json"), "expected a tokenizer of transformers or the model's task, found str"),
        (lambda lm: ("x", lm.model, pretrained.tokenizer()), "the tokenizer has no <solve>, or with another id than the model"),
        (
            lambda lm: ("x", (own := SpanLM.load("checkpoints/arithmetic-tiny")).model, own.task),
            "the task arithmetic: its vocabulary is the built-in one, without a tokenizer",
        ),
    ],
)
def test_what_cannot_be_exported_is_refused(lm, arguments, message):
    with pytest.raises(ValueError, match=message):
        huggingface.export(*arguments(lm))


@pytest.mark.parametrize("head", [True, False], ids=["untied", "tied"])
def test_an_export_is_loaded_as_what_it_was(tmp_path, head):
    """No bit changes and no token is added a second time, however often it goes around."""
    arrays = pretrained.tensors(320, head=head)
    once = SpanLM.load(pretrained.directory(tmp_path / "0", arrays=arrays, tie_word_embeddings=not head))
    huggingface.export(tmp_path / "1", once.model, once.task.tokenizer)
    again = SpanLM.load(tmp_path / "1")
    huggingface.export(tmp_path / "2", again.model, again.task)
    twice = SpanLM.load(tmp_path / "2")
    assert once.model.vocab == again.model.vocab == twice.model.vocab and twice.model.vocab_size == once.model.vocab_size
    assert twice.model.config == once.model.config
    for a, b in zip(*(jax.tree.leaves(nnx.state(each.model, nnx.Param)) for each in (once, twice)), strict=True):
        np.testing.assert_array_equal(a, b)
    few, _ = importing.load(tmp_path / "2", num_labels=8)
    assert few.vocab.num_labels == 8 and few.vocab.ref_base == once.model.vocab.ref_base
    with pytest.raises(ValueError, match="has span tokens of 256 labels: num_labels is 300"):
        importing.load(tmp_path / "2", num_labels=300)


def test_new_tokens_begin_alike_wherever_their_rows_lie(tmp_path):
    """Zero rows beyond the tokenizer, as padding to a round size leaves them: structural tokens take some, and none is zero."""
    arrays = pretrained.tensors(1000)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        arrays[name][260:] = 0
    model, _ = importing.load(pretrained.directory(tmp_path / "model", rows=1000, arrays=arrays))
    assert model.vocab_size == 1000 and model.vocab.min_vocab_size < 1000
    new = slice(260, model.vocab.min_vocab_size)
    for name, rows in (("model.embed_tokens.weight", model.embed_tokens.embedding[...]), ("lm_head.weight", model.lm_head.weight[...])):
        old = arrays[name][:260]
        np.testing.assert_array_equal(rows[:260], old)
        np.testing.assert_array_equal(rows[new.stop :], 0)
        assert len(np.unique(rows[new], axis=0)) == new.stop - 260
        np.testing.assert_allclose(rows[new], np.broadcast_to(old.mean(axis=0), rows[new].shape), atol=0.06 * old.std())


def test_new_tokens_begin_with_the_mean_of_the_ids_in_use(tmp_path):
    """A tokenizer that leaves ids free, whose rows are zero in the file."""
    words = {word: i if i < 200 else i + 100 for i, word in enumerate(pretrained.WORDS)}
    arrays, used = pretrained.tensors(400), [*words.values()]
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        arrays[name][200:300] = 0
    path = pretrained.directory(tmp_path / "model", rows=400, words=pretrained.tokenizer(vocab=words), arrays=arrays)
    model, _ = importing.load(path, num_labels=64)
    for name, rows in (("model.embed_tokens.weight", model.embed_tokens.embedding[...]), ("lm_head.weight", model.lm_head.weight[...])):
        new, old = np.asarray(rows)[360 : model.vocab.min_vocab_size], arrays[name][used]
        np.testing.assert_allclose(new.mean(axis=0), old.mean(axis=0), atol=0.01 * old.std())
        np.testing.assert_allclose(new.std(axis=0), 0.01 * old.std(axis=0), rtol=0.4)


def test_files_are_utf8_whatever_the_locale(tmp_path):
    path = pretrained.directory(tmp_path / "model", words=pretrained.tokenizer(chat_template="é{{ messages[0].content }}"))
    config = json.loads((path / "config.json").read_text(encoding="utf-8")) | {"made_by": "é"}
    (path / "config.json").write_text(json.dumps(config, ensure_ascii=False), encoding="utf-8")
    before = locale.setlocale(locale.LC_CTYPE)
    locale.setlocale(locale.LC_CTYPE, "C")  # what files are read and written in, where nothing else is said
    try:
        assert locale.getencoding() == "ANSI_X3.4-1968"
        model, task = importing.load(path)
        models.save_model(tmp_path / "saved", model, {}, "é")
    finally:
        locale.setlocale(locale.LC_CTYPE, before)
    assert task.decode(task.encode_chat("the")) == "éthe"
    assert (tmp_path / "saved" / "README.md").read_text(encoding="utf-8") == "é"


MALFORMED = {  # prompts that no tokenizer takes, and what is read in their place
    "half of a pair": ("a \ud83d b", "a \ufffd b"),
    "the other half": ("\ude80", "\ufffd"),
    "halves of one character": ("a \ud83d\ude80", "a \U0001f680"),
    "halves whose second could be a byte": ("\ud83d\udc80", "\U0001f480"),
    "an argument in an ASCII locale": ("café \U0001f680".encode().decode("ascii", "surrogateescape"), "café \U0001f680"),
    "a byte that is no UTF-8": (b"a \xff b".decode("utf-8", "surrogateescape"), "a \ufffd b"),
}


@pytest.mark.parametrize(("prompt", "read"), MALFORMED.values(), ids=MALFORMED)
def test_a_prompt_with_surrogates_is_read_as_text(lm, prompt, read):
    ids = lm.task.tokenizer(read)["input_ids"]
    assert lm.task.encode_prompt(prompt).tolist() == ids
    texts, encoded = lm.encode([prompt, read], chat=False)
    assert texts == [read, read] and [each.tolist() for each in encoded] == [ids, ids]


def test_a_prompt_with_surrogates_is_decoded_every_way(lm, tmp_path):
    prompt, read = MALFORMED["half of a pair"]
    right = lm.generate(read, max_new_tokens=3)
    several = lm.generate([prompt, prompt], max_new_tokens=3)
    stream = lm.stream(prompt, max_new_tokens=3)
    assert "".join(stream) == right.text
    for out in (lm.generate(prompt, max_new_tokens=3), *several, stream.output):
        assert (out.prompt, out.text) == (read, right.text)
        json.dumps(out.to_json(), ensure_ascii=False).encode("utf-8")
    words = pretrained.tokenizer(chat_template="{{ messages[0].content }}")
    assert TextTask(words).encode_chat(prompt).tolist() == words(read)["input_ids"]


def test_a_model_names_itself_in_a_line(lm):
    assert repr(lm) == "SpanLM(text: 63,584 parameters, computed in float32, attention dense, context 64 tokens)"


WRONG = {
    "no path": (dict(directory=5), "5 is no model; expected a path or an id"),
    "nothing": (dict(directory=None), "None is no model"),
    "a base that is none": (dict(directory="checkpoints/smollm2-news", base=7), "7 is no model"),
    "unknown weights": (dict(directory="checkpoints/arithmetic-tiny", weights="int4"), "weights is 'int4'; allowed: bf16, int8"),
    "weights of a wrong type": (dict(directory="checkpoints/arithmetic-tiny", weights=8), "weights is 8"),
    "dtype of a wrong type": (dict(directory="checkpoints/arithmetic-tiny", dtype=np.float32), "dtype is .*; allowed: bf16, f32, f16"),
    "a mesh of a wrong type": (dict(directory="checkpoints/arithmetic-tiny", mesh=2), "mesh is 2"),
    "tasks of a wrong type": (dict(directory="checkpoints/arithmetic-tiny", tasks="arithmetic"), "tasks is 'arithmetic'"),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=WRONG)
def test_wrong_arguments_of_load_are_said_in_one_line(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        SpanLM.load(**arguments)
    assert "\n" not in str(error.value) and type(error.value).__name__ == "UserError"
