"""Adapters: what they change and what they leave alone, merging, their files, and fine-tuning by the command line."""

import dataclasses
import hashlib
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import decode
import train
from benchmarks import sweep
from data import arithmetic, dataset
from data.__main__ import main as data_main
from data.vocab import CHARACTERS, TokenizerVocab, Vocab
from selfspan_jax import SpanLM, files, training
from selfspan_jax.config import LoraConfig, ModelConfig
from selfspan_jax.errors import UserError
from selfspan_jax.model import Decoder
from selfspan_jax.spans import SpanVocab
from selfspan_jax.training import DeviceBatch
from selfspan_jax.training.metrics import step_flops
from selfspan_jax.weights import huggingface, importing, lora
from selfspan_jax.weights.tokenizers import TextTask, add_span_tokens
from tests.selfspan_jax.models import TINY, forward, random_model
from tests.selfspan_jax.training.test_loop import CONFIG, arrays_made, batch_of

pytestmark = pytest.mark.filterwarnings("ignore")  # `transformers` warns about itself
LORA = LoraConfig(rank=3, alpha=6.0)


def logits(model, ids):
    mask = jnp.broadcast_to(jnp.tri(ids.shape[1], dtype=bool), (*ids.shape, ids.shape[1]))
    return np.asarray(forward(model, jnp.asarray(ids), mask))


def trained(model, seed=7):
    """An adapted model whose trainable parameters are no longer what they were."""
    generator = np.random.default_rng(seed)
    move = lambda x: x + jnp.asarray(0.1 * generator.standard_normal(x.shape), x.dtype)  # noqa: E731
    nnx.update(model, jax.tree.map(move, nnx.state(model, nnx.Param)))
    return model


IDS = np.random.default_rng(0).integers(0, 17, (2, 12)).astype(np.int32)
UNTIED = dict(tie_embeddings=False, qkv_bias=True, output_bias=True, qk_norm=True)
ARCHITECTURES = {"tied": {}, "untied, with biases and norms of heads": UNTIED}


@pytest.mark.parametrize("changes", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_an_untrained_adapter_changes_nothing_and_a_merged_one_is_the_adapted_model(changes):
    plain = random_model(**changes)
    before = logits(plain, IDS)
    model = lora.adapt(random_model(**changes), LORA)
    np.testing.assert_allclose(logits(model, IDS), before, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(logits(lora.merged(model), IDS), before, rtol=1e-5, atol=1e-5)
    after = logits(trained(model), IDS)
    assert np.abs(after - before).max() > 0.1
    np.testing.assert_allclose(logits(lora.merged(model), IDS), after, rtol=2e-4, atol=2e-4)


def test_a_merged_matrix_is_written_out_by_the_formula():
    base = random_model()
    model = trained(lora.adapt(random_model(), LORA))
    for layer, old, new in zip(model.layers, base.layers, lora.merged(model).layers, strict=True):
        for part, name in (("self_attn", "qkv_proj"), ("self_attn", "o_proj"), ("mlp", "gate_up_proj"), ("mlp", "down_proj")):
            own, before, after = (getattr(getattr(at, part), name) for at in (layer, old, new))
            a, b = np.asarray(own.lora_a[...], np.float64), np.asarray(own.lora_b[...], np.float64)
            expected = np.asarray(before.weight[...], np.float64) + 6.0 / 3 * b @ a
            np.testing.assert_allclose(after.weight[...], expected, rtol=1e-5, atol=1e-6)


def test_only_the_targets_are_adapted_and_merging_twice_is_refused():
    model = lora.adapt(random_model(), LoraConfig(rank=2, targets=("o_proj",)))
    names = {lora._name(path) for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    assert names == {"embed_tokens.new_rows", *(f"layers.{i}.self_attn.o_proj.lora_{m}" for i in (0, 1) for m in "ab")}
    with pytest.raises(ValueError, match="has adapters: merge the adapters first"):
        lora.adapt(model, LORA)
    with pytest.raises(ValueError, match="merged already"):
        lora.merged(lora.merged(model))


OTHERS = {"alpha": (dict(alpha=7.0), "alpha is 7.0, but the model was adapted with 6.0"), "rank": (dict(rank=2), "rank is 2, but"),
          "targets": (dict(targets=("o_proj",)), "targets is .'o_proj',., but")}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), OTHERS.values(), ids=OTHERS)
def test_an_adapter_is_saved_with_the_config_that_made_it(tmp_path, change, message):
    adapted = lora.adapt(random_model(), LORA)
    for model, match in ((adapted, message), (random_model(), "has no adapters"), (lora.merged(adapted), "has no adapters")):
        with pytest.raises(UserError, match=match):
            lora.save_adapter(tmp_path / "x", model, dataclasses.replace(LORA, **change), "base", {}, "")
    assert not list(tmp_path.iterdir())


def test_training_goes_on_from_an_adapter_of_the_same_base(tmp_path):
    model, directory = trained(lora.adapt(random_model(), LORA)), tmp_path / "first"
    lora.save_adapter(directory, model, LORA, "base", {}, "")
    other = lora.adapt(random_model(), LORA, seed=1)
    digest = hashlib.sha256((directory / "adapter.safetensors").read_bytes()).hexdigest()
    assert lora.begin_with(other, directory) == {"name": "first", "sha256": digest}
    for own, expected in zip(*(jax.tree.leaves(nnx.state(each, nnx.Param)) for each in (other, model)), strict=True):
        np.testing.assert_array_equal(own, expected)
    refused = {
        "like those to train: give --rank 3$": LoraConfig(2, 6.0),
        "give --alpha 6 --targets qkv_proj o_proj gate": LoraConfig(3, 7, ("o_proj",)),
    }
    refused = {message: lora.adapt(random_model(), config) for message, config in refused.items()} | {"has no adapters": random_model()}
    refused["not of the model that is trained"] = lora.adapt(random_model(hidden_size=64), LORA)
    for message, model in refused.items():
        with pytest.raises(UserError, match=message):
            lora.begin_with(model, directory)


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_gradients_are_of_adapters_and_new_rows_alone(tie):
    """Nothing of the shape of a frozen matrix is computed in a step, the rows of old tokens included; the step changes what is trained."""
    vocab = SpanVocab.consecutive(20, 4)
    model = Decoder(ModelConfig(**TINY, tie_embeddings=tie), vocab=vocab, vocab_size=vocab.min_vocab_size, rngs=nnx.Rngs(0))
    model = lora.adapt(model, LORA)
    batch = batch_of(0, tokens=29)
    ids = np.clip(batch.token_ids + 10, 0, vocab.min_vocab_size - 1)
    ids[batch.token_ids == 3] = vocab.solve_id
    batch = DeviceBatch.of(batch._replace(token_ids=ids))
    fixed, state = training.initial_state(model, CONFIG)
    frozen = {leaf.shape for leaf in jax.tree.leaves(fixed.frozen) if leaf.ndim == 2}
    assert (20, 32) in frozen and len(frozen) == 5
    program = jax.make_jaxpr(training.train_step, static_argnums=(3,))(fixed, state, batch, CONFIG)
    made = {primitive for shape, primitive in arrays_made(program.jaxpr) if shape in frozen | {s[::-1] for s in frozen}}
    assert made <= {"pjit", "jit", "convert_element_type", "transpose"}
    moments = jax.tree.leaves(optax.tree_utils.tree_get(state.opt_state, "mu"))
    assert sum(leaf.size for leaf in moments) == training.num_trained(model) < sum(leaf.size for leaf in jax.tree.leaves(fixed.frozen))
    before = jax.tree.map(np.array, state.params)
    for _ in range(3):
        state, _ = training.train_step(fixed, state, batch, CONFIG)
    changed = [bool((a != b).any()) for a, b in zip(*(jax.tree.leaves(tree) for tree in (before, state.params)), strict=True)]
    assert all(changed)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(rank=0), "rank is 0; allowed: whole numbers above 0"),
        (dict(alpha=0.0), "alpha is 0.0"),
        (dict(targets=()), "targets is"),
        (dict(targets=("k_proj",)), "allowed: one or more of qkv_proj, o_proj"),
        (dict(targets=("o_proj", "o_proj")), "allowed: each once"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        LoraConfig(**changes)


def test_a_rank_beyond_a_map_is_refused():
    with pytest.raises(ValueError, match="rank is 33; allowed: up to 32"):
        lora.adapt(random_model(), LoraConfig(rank=33))


# The vocabulary of a tokenizer.


def tokenizer(characters=CHARACTERS):
    """One that would join digits, with an end of text of its own."""
    words = ["<|end|>", *characters, " ", "51", "75"]
    core = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[("5", "1"), ("7", "5")]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Split(" ", "isolated"), decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>")


def directory(path, *, seed=0, rows=24, words=None, **changes):
    """A random model with a tokenizer, as somebody would keep it."""
    sizes = {**TINY, "hidden_size": 64, "max_context_tokens": 512, **changes}
    own = SpanVocab.consecutive(rows - 8, 2)
    huggingface.export(path, Decoder(ModelConfig(**sizes), vocab=own, vocab_size=rows, rngs=nnx.Rngs(seed)))
    (words or tokenizer()).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return directory(tmp_path_factory.mktemp("base") / "base")


def tokenizer_vocab(num_labels=8):
    own = tokenizer()
    ids = add_span_tokens(own, num_labels)
    span_ids = {name: getattr(ids, name) for name in ids.__dataclass_fields__}
    return TokenizerVocab.of(TextTask(own).tokenizer_json, span_ids, ids.min_vocab_size)


def test_expressions_in_a_tokenizers_own_words_are_the_corpus_in_other_ids():
    """The built-in vocabulary is the oracle: the same tokens, one for one, and the same verdicts."""
    vocab, builtin = tokenizer_vocab(), Vocab(8)
    corpus = arithmetic.Corpus(min_ops=2, max_ops=3, num_labels=8)
    task = arithmetic.ArithmeticTask.from_json(json.loads(json.dumps(arithmetic.ArithmeticTask.of(corpus, vocab).to_json())))
    assert task == arithmetic.ArithmeticTask.of(corpus, vocab) and vocab.text_ids("51+75").size == 3  # the tokenizer's own cut joins digits
    streams = corpus.stream(vocab=vocab, seed=3), corpus.stream(seed=3)
    for _, own, other in zip(range(20), *streams):
        assert [vocab.tokens[i] for i in own.token_ids] == [builtin.tokens[i] for i in other.token_ids]
        assert task.decode(own.token_ids) == corpus.vocab.decode(other.token_ids)
        gold = task.encode(own.prompt).response_ids
        assert task.verify(own.prompt, gold).steps_right and task.verify(own.prompt, gold).spans_right
        assert task.answer(gold) == str(own.expression.value)
        wrong = gold.copy()
        wrong[-2] = vocab.ids["+"]
        assert not task.verify(own.prompt, wrong).steps_right


def test_a_vocabulary_that_cannot_write_expressions_or_is_damaged_is_refused():
    good = tokenizer_vocab().to_json()
    for change, message in {
        "structural_ids": ([1, 2, 3], "structural_ids are"),
        "num_tokens": (20, "beyond the 20 tokens"),
        "tokenizer_json": ("{", "not a tokenizer"),
    }.items():
        with pytest.raises(ValueError, match=message[1]):
            TokenizerVocab.from_json({**good, change: message[0]})
    with pytest.raises(ValueError, match="unknown key 'more'"):
        TokenizerVocab.from_json({**good, "more": 1})


# The command lines.


TOY_OPTIONS = {
    **{"--steps": 4, "--warmup-steps": 1, "--batch-size": 2, "--sequence-tokens": 128, "--max-ops": 3, "--num-labels": 8},
    **{"--checkpoint-every-steps": 2, "--log-every-steps": 1, "--eval-examples": 0, "--workers": 0},
}
TOY = [str(word) for option in TOY_OPTIONS.items() for word in option]


def fine_tune(call, run_dir, base, *more, kind="finetune-lora"):
    return call(train.main, kind, "--run-dir", run_dir, "--init", base, "--corpus", "arithmetic", *TOY, *more)


@pytest.fixture
def bench(call, monkeypatch, tmp_path):
    """Runs `decode.py bench` on a model with two sequences, and returns its JSON, the tokens and the shape; nothing is timed."""
    replayed = []
    monkeypatch.setattr(sweep, "compile_cases", lambda *_: {})
    monkeypatch.setattr(sweep, "sweep", lambda shape, cases, tokens_of, **_: replayed.append((tokens_of(*cases), shape)) or ())

    def run(model, *options):
        file = tmp_path / "bench.json"
        words = ["--batch-size", 2, "--steps", 8, "--attention", "span", "--json", file, *options]
        assert call(decode.main, "bench", model, *words)[0] == 0
        return files.read_json(file), *replayed.pop()

    return run


def test_fine_tuning_writes_an_adapter_and_a_model_that_decode_alike(call, base, bench, tmp_path):
    status, out, err = fine_tune(call, tmp_path / "run", base, "--rank", 4)
    assert status == 0, err
    assert out.splitlines()[-1] == f"finished: {tmp_path / 'run' / 'model'}"
    adapter, model = tmp_path / "run" / "adapter", tmp_path / "run" / "model"
    with pytest.raises(ValueError, match="is an adapter of base: it needs that model too"):
        SpanLM.load(adapter)
    from_adapter, whole = SpanLM.load(adapter, base=base), SpanLM.load(model)
    assert isinstance(whole.task, arithmetic.ArithmeticTask) and whole.task == from_adapter.task and whole.model.config.mask == "span"
    for a, b in zip(*(jax.tree.leaves(nnx.state(lm.model, nnx.Param)) for lm in (whole, from_adapter)), strict=True):
        np.testing.assert_array_equal(a, b)
    small, large = ((d / f).stat().st_size for d, f in ((adapter, "adapter.safetensors"), (model, "model.safetensors")))
    assert small < large
    report, ids, _ = bench(model, "--context", 96)
    assert report["workload"] == "arithmetic" and ids.shape == (2, 100)  # in its own words
    # into a Hugging Face directory and out of it again: nothing is lost but what the tokens mean
    huggingface.export(tmp_path / "exported", whole.model, whole.task)
    text = SpanLM.load(tmp_path / "exported")
    assert (
        text.model.vocab == whole.model.vocab and text.task.decode(whole.task.encode_prompt("(1+2)")) == "<bos><seg:1>(1+2)<ref:1><solve>"
    )
    ids = whole.task.encode_prompt("(1+2)*3")
    again = importing.load_decoder(tmp_path / "exported", whole.model.vocab)
    np.testing.assert_allclose(SpanLM(again, whole.task).logits(ids), whole.logits(ids, attention="dense"), atol=1e-5)
    # a second stage begins with the finished model, its span tokens and what was learned about them
    status, _, err = fine_tune(call, tmp_path / "second", model, "--rank", 4, "--dtype", "f32")
    assert status == 0, err
    status, _, err = fine_tune(call, tmp_path / "second", model, "--rank", 4, "--dtype", "bf16")
    assert status == 2 and "--dtype is 'f32' there, 'bf16' here" in err
    second, first = SpanLM.load(tmp_path / "second" / "model"), whole
    assert second.task == first.task and second.model.vocab == first.model.vocab and second.model.vocab_size == first.model.vocab_size
    np.testing.assert_array_equal(second.model.norm.scale[...], first.model.norm.scale[...])
    assert SpanLM.load(tmp_path / "second" / "adapter", base=model).model.config == second.model.config
    # so does the export, with the tokens of its own
    status, _, err = fine_tune(call, tmp_path / "third", tmp_path / "exported", "--rank", 4)
    assert status == 0 and SpanLM.load(tmp_path / "third" / "model").model.vocab == first.model.vocab, err
    status, _, err = fine_tune(call, tmp_path / "no", adapter)
    assert status == 2 and "is an adapter: expected a whole model" in err


def test_a_directory_is_tuned_on_and_the_model_of_that_tuned_again(call, base, tmp_path, monkeypatch):
    """In the words of the model's own tokenizer; the second stage keeps the span tokens and labels of the first.

    Examples without room are counted, in run.json too; not where no step is left.
    """
    corpus = ["arithmetic", "--num-examples", 20, "--max-ops", 3, "--num-labels", 8, "--label-jumps", 0, "--out", tmp_path / "corpus"]
    assert call(data_main, *corpus)[0] == 0
    options = ["--data", tmp_path / "corpus", *TOY, "--steps", 2]
    assert call(train.main, "finetune-full", "--init", base, *options, "--run-dir", tmp_path / "first")[0] == 0
    lengths = dataset.StoredCorpus.lengths
    monkeypatch.setattr(dataset.StoredCorpus, "lengths", lambda *of: lengths(*of) * (np.arange(20) > 2))
    again = ["--init", tmp_path / "first" / "model", "--run-dir", tmp_path / "second", "--eval-examples", 1]
    status, out, err = call(train.main, "finetune-full", *options, *again)
    assert status == 0 and "without room for them: 3 of 20 examples" in out, err
    assert [files.read_json(tmp_path / name / "run.json").get("left_out_examples") for name in ("first", "second")] == [None, 3]
    monkeypatch.delattr(dataset.StoredCorpus, "lengths")
    status, out, _ = call(train.main, "finetune-full", *options, *again)
    assert status == 0 and out == f"this run is finished, more --steps go on with it: {tmp_path / 'second' / 'model'}\n"
    first, second = (files.read_json(tmp_path / name / "model" / "vocab.json.gz") for name in ("first", "second"))
    assert first == second and first["vocab"]["structural_ids"] == list(tokenizer_vocab().structural_ids)
    readme = (tmp_path / "second" / "model" / "README.md").read_text()
    assert "fine-tuned from `first/model` by `train.py` of selfspan on 17 of the 20 examples of corpus" in readme


def test_an_imported_model_is_timed_on_segments_with_its_own_ids(base, bench):
    report, ids, shape = bench(base, "--context", 256, "--attended-fraction", 0.3)
    assert report["workload"] == "segments" and ids.shape == (2, 260) and 0 <= ids.min() and ids.max() < report["vocab_size"]
    labels = ids - shape.vocab.seg_base
    assert np.all((ids == shape.vocab.solve_id).sum(axis=1) == 1) and np.all(((0 < labels) & (labels < shape.vocab.num_labels)).any(axis=1))


def test_a_directory_is_read_without_the_package_for_gguf_files(base, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert importing.load_decoder(base, mask="span", header_view="span").config.mask == "span"
    (tmp_path / "model.gguf").touch()
    with pytest.raises(ImportError):
        importing.load_decoder(tmp_path / "model.gguf")


@pytest.mark.parametrize("kind", ["finetune-lora", "finetune-full"])
def test_a_stopped_fine_tuning_ends_as_one_that_was_not(call, base, tmp_path, kind):
    assert fine_tune(call, tmp_path / "whole", base, kind=kind)[0] == 0
    status, out, _ = fine_tune(call, tmp_path / "parts", base, "--stop-after-seconds", 0, kind=kind)
    assert status == 0 and "stopped after step 1 of 4" in out
    assert fine_tune(call, tmp_path / "parts", base, kind=kind)[0] == 0
    files = [tmp_path / name / "model" / "model.safetensors" for name in ("whole", "parts")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert (tmp_path / "whole" / "adapter").exists() == (kind == "finetune-lora")
    untouched = load_file(base / "model.safetensors")["model.norm.weight"]
    assert bool((load_file(files[0])["model.norm.weight"] == untouched).all()) == (kind == "finetune-lora")


def test_what_the_user_of_fine_tuning_got_wrong_is_said_in_one_line(call, base, tmp_path):
    bare = directory(tmp_path / "bare")
    (bare / "tokenizer.json").unlink()
    larger = directory(tmp_path / "larger", rows=16)
    wordless = directory(tmp_path / "wordless", words=tokenizer(CHARACTERS.replace("*", "")))
    other = directory(tmp_path / "other", seed=1)
    assert fine_tune(call, tmp_path / "stopped", base, "--stop-after-seconds", 0)[0] == 0
    run = tmp_path / "run"
    cases = {
        "no init": (["finetune-lora", "--run-dir", run, *TOY], "--init"),
        "init is nowhere": (["finetune-lora", "--run-dir", run, "--init", tmp_path / "none", *TOY], "no config.json"),
        "no GGUF": (["finetune-lora", "--run-dir", run, "--init", tmp_path / "x.gguf", *TOY], "x.gguf: no such file"),
        "no tokenizer": (["finetune-lora", "--run-dir", run, "--init", bare, *TOY], "tokenizer.json is missing"),
        "another model's tokenizer": (["finetune-full", "--run-dir", run, "--init", larger, *TOY], "the tokenizer has 20 tokens"),
        "no words": (["finetune-lora", "--run-dir", run, "--init", wordless, *TOY], "no token of its own for '*'"),
        "rank of 0": (["finetune-lora", "--run-dir", run, "--init", base, *TOY, "--rank", 0], "rank is 0"),
        "rank too large": (["finetune-lora", "--run-dir", run, "--init", base, *TOY, "--rank", 999], "rank is 999; allowed: up to 64"),
        "an adapter for all parameters": (["finetune-full", "--run-dir", run, "--init", base, "--adapter", base, *TOY], "finetune-lora"),
        "no such target": (["finetune-lora", "--run-dir", run, "--init", base, *TOY, "--targets", "k_proj"], "k_proj"),
        "no such corpus": (["finetune-lora", "--run-dir", run, "--init", base, "--corpus", "poems", *TOY], "poems"),
        "rows too long": (["finetune-lora", "--run-dir", run, "--init", base, *TOY, "--sequence-tokens", 1024], "context of"),
        "another base": (
            ["finetune-lora", "--run-dir", tmp_path / "stopped", "--init", other, *TOY],
            "--init is 'base' there, 'other' here",
        ),
    }
    for name, (arguments, message) in cases.items():
        status, _, err = call(train.main, *arguments)
        assert status == 2 and err.startswith("error: ") and err.count("\n") == 1 and message in err, (name, status, err)
    assert not run.exists()


def test_an_adapter_that_does_not_fit_is_refused_in_one_line(call, base, tmp_path):
    other = directory(tmp_path / "other", seed=1)
    wide = directory(tmp_path / "wide", intermediate_size=64)
    model, text = importing.load(base, num_labels=8)
    vocab = TokenizerVocab.of(text.tokenizer_json, vars(model.vocab), model.vocab_size)
    task = arithmetic.ArithmeticTask.of(arithmetic.Corpus(num_labels=8, max_ops=3), vocab).to_json()
    model = trained(lora.adapt(model, LORA))
    adapter = tmp_path / "adapter"
    lora.save_adapter(adapter, model, LORA, "base", task, "# card\n")
    with pytest.raises(FileExistsError, match="exists: choose another"):
        lora.save_adapter(adapter, model, LORA, "base", task, "# card\n")
    exported = tmp_path / "exported"  # of the plain model: its span tokens are rows like others
    huggingface.export(exported, *importing.load(base, num_labels=32))
    cases = ((other, "other weights than those of base"), (wide, "another architecture"), (None, "needs that model too"))
    for wrong, message in (*cases, (exported, r"tokens with those of the adapter, base \d+; an export has the span tokens")):
        with pytest.raises(ValueError, match=message):
            SpanLM.load(adapter, base=wrong)
    tensors, fields = load_file(adapter / "adapter.safetensors"), json.loads((adapter / "adapter.json").read_text())
    first = sorted(tensors)[0]
    damages = {
        "missing": ({**{n: t for n, t in tensors.items() if n != first}}, fields, f"1 tensors missing, {first} among them"),
        "shape": ({**tensors, first: tensors[first][:-1]}, fields, "but the config asks for"),
        "more": ({**tensors, "x": tensors[first]}, fields, "1 tensors that the config does not know, x among them"),
        "version": (tensors, {**fields, "version": 9}, "expected format"),
        "settings": (tensors, {**fields, "lora": {"rank": 3}}, "missing"),
        "base": (tensors, {**fields, "base": {}}, "adapter.json"),
    }
    for own_tensors, own_fields, message in damages.values():
        save_file(own_tensors, adapter / "adapter.safetensors")
        (adapter / "adapter.json").write_text(json.dumps(own_fields))
        with pytest.raises(ValueError, match=message) as error:
            SpanLM.load(adapter, base=base)
        assert "\n" not in str(error.value)
    packed = (adapter / "vocab.json.gz").read_bytes()
    (adapter / "vocab.json.gz").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(UserError, match=r"vocab.json.gz: not JSON \(Compressed file ended before"):
        SpanLM.load(adapter, base=base)
    (adapter / "vocab.json.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"vocab.json is missing"):
        SpanLM.load(adapter, base=base)


def dot_operations(jaxpr):
    """2 x the multiplications of all matrix products of a program."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            total += 2 * equation.outvars[0].aval.size * np.prod([equation.invars[0].aval.shape[axis] for axis in contracted])
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            if hasattr(inner := getattr(inner, "jaxpr", inner), "eqns"):
                total += dot_operations(inner)
    return int(total)


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_the_operations_of_a_step_are_those_of_its_program(tie):
    """But for attention's own, which both sides count the same way, and the gradient of the first norm's input."""
    counted, done = [], []
    for adapted in (False, True):
        model = random_model(tie_embeddings=tie)
        total = model.num_parameters
        model = lora.adapt(model, LORA) if adapted else model
        adapters = sum(leaf.size for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)) if "lora" in str(path[-1]))
        assert model.num_parameters == total + adapters
        fixed, state = training.initial_state(model, CONFIG)
        batch = DeviceBatch.of(batch_of(0))
        program = jax.make_jaxpr(training.train_step, static_argnums=(3,))(fixed, state, batch, CONFIG)
        done.append(dot_operations(program.jaxpr))
        counted.append(step_flops(model, 4 * 31, 0.0))  # the last token of a row has no logits
    assert counted[0] - counted[1] == pytest.approx(done[0] - done[1], rel=0.05) and done[1] < done[0]


def test_an_adapter_is_decoded_with_its_base(call, base, tmp_path):
    model, text = importing.load(base, num_labels=8)
    task = arithmetic.ArithmeticTask.of(
        arithmetic.Corpus(num_labels=8, max_ops=3), TokenizerVocab.of(text.tokenizer_json, vars(model.vocab), model.vocab_size)
    )
    lora.save_adapter(tmp_path / "adapter", trained(lora.adapt(model, LORA)), LORA, "base", task.to_json(), "")
    status, out, err = call(decode.main, "generate", tmp_path / "adapter", "1+2*3", "--base", base, "--max-new-tokens", 8)
    assert (status, err) == (0, "") and "attended" in out
    for arguments, message in ((["--base", tmp_path / "x.gguf"], "no such file"), ([], "it needs that model too (--base)")):
        status, _, err = call(decode.main, "generate", tmp_path / "adapter", "1+2", *arguments)
        assert status == 2 and err.count("\n") == 1 and message in err
    for path, message in ((base, f"{base} is no adapter, so it takes no base"), (tmp_path / "x", "x: no such checkpoint directory")):
        status, _, err = call(decode.main, "generate", path, "1+2", "--base", base)
        assert status == 2 and message in err
