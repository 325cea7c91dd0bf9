"""Finished models: what is written is what is read, in Llama's names, and what does not fit is refused in one line."""

import json
import shutil

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from selfspan_jax.config import LoraConfig
from selfspan_jax.errors import UserError
from selfspan_jax.weights import lora, models
from tests.selfspan_jax.models import random_model, reference_logits

TASK = {"task": "test", "version": 1}


def leaves(model):
    return jax.tree.leaves(nnx.state(model, nnx.Param))


@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_a_float32_model_comes_back_bit_for_bit(tmp_path, tie_embeddings):
    model = random_model(tie_embeddings=tie_embeddings)
    models.save_model(tmp_path / "model", model, TASK, "# card\n")
    loaded, task = models.load_model(tmp_path / "model")
    assert (loaded.config, loaded.vocab, loaded.vocab_size, task) == (model.config, model.vocab, model.vocab_size, TASK)
    for expected, found in zip(leaves(model), leaves(loaded), strict=True):
        np.testing.assert_array_equal(expected, found)
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["README.md", "config.json", "model.safetensors", "vocab.json"]


def test_a_bfloat16_model_is_stored_in_half_the_bytes_and_computes_the_same(tmp_path):
    model = random_model(compute_dtype="bfloat16")
    models.save_model(tmp_path / "model", model, TASK, "")
    loaded, _ = models.load_model(tmp_path / "model")
    assert (tmp_path / "model" / "model.safetensors").stat().st_size < 2 * model.num_parameters + 4096
    ids, masks = np.arange(4, 12, dtype=np.int32)[None], np.tri(8, dtype=bool)[None]
    np.testing.assert_array_equal(reference_logits(model, ids, masks), reference_logits(loaded, ids, masks))


def test_names_and_layout_are_llamas(tmp_path):
    model = random_model(tie_embeddings=False)
    models.save_model(tmp_path / "model", model, TASK, "")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    assert tensors["model.embed_tokens.weight"].shape == (20, 32)
    assert tensors["lm_head.weight"].shape == (20, 32)
    assert tensors["model.layers.0.self_attn.k_proj.weight"].shape == (16, 32)  # [out, in]
    assert tensors["model.layers.1.mlp.down_proj.weight"].shape == (32, 48)
    assert len(tensors) == 3 + 2 * 9
    gate_up = np.asarray(model.layers[1].mlp.gate_up_proj.weight[...])
    np.testing.assert_array_equal(tensors["model.layers.1.mlp.gate_proj.weight"], gate_up[:48])
    np.testing.assert_array_equal(tensors["model.layers.1.mlp.up_proj.weight"], gate_up[48:])
    # Of the fused map: kv head 0's two queries, its key, its value, then those of kv head 1, 8 outputs each.
    fused = np.asarray(model.layers[0].self_attn.qkv_proj.weight[...]).reshape(2, 4, 8, 32)
    attention = {name: tensors[f"model.layers.0.self_attn.{name}_proj.weight"] for name in "qkv"}
    for head in range(4):
        np.testing.assert_array_equal(attention["q"][8 * head : 8 * head + 8], fused[head // 2, head % 2])
    for head in range(2):
        np.testing.assert_array_equal(attention["k"][8 * head : 8 * head + 8], fused[head, 2])
        np.testing.assert_array_equal(attention["v"][8 * head : 8 * head + 8], fused[head, 3])


def test_an_existing_directory_is_not_overwritten(tmp_path):
    (tmp_path / "model").mkdir()
    with pytest.raises(FileExistsError, match="model exists"):
        models.save_model(tmp_path / "model", random_model(), TASK, "")
    assert not list((tmp_path / "model").iterdir())


def test_a_failed_write_leaves_nothing(tmp_path):
    with pytest.raises(TypeError):
        models.save_model(tmp_path / "model", random_model(), {"task": object()}, "")
    assert not list(tmp_path.iterdir())


def test_models_that_cannot_be_read_again_are_not_written(tmp_path):
    for model in (random_model().for_decoding(weights="int8"), lora.adapt(random_model(), LoraConfig(rank=2))):
        with pytest.raises(UserError, match=r"the model's weights are int8: take|the model has adapters: merge"):
            models.save_model(tmp_path / "model", model, TASK, "")
        assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoint") / "model"
    models.save_model(directory, random_model(), TASK, "")
    return directory


def edit_config(**changes):
    def edit(directory):
        file = directory / "config.json"
        config = json.loads(file.read_text())
        for path, value in changes.items():
            *owners, key = path.split("__")
            owner = config
            for name in owners:
                owner = owner[name]
            owner[key] = value
        file.write_text(json.dumps(config))

    return edit


def edit_tensors(change):
    def edit(directory):
        tensors = load_file(directory / "model.safetensors")
        change(tensors)
        save_file(tensors, directory / "model.safetensors")

    return edit


DAMAGES = {
    "no config": (lambda d: (d / "config.json").unlink(), "config.json is missing"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "model.safetensors is missing"),
    "config is no JSON": (lambda d: (d / "config.json").write_text("{"), "config.json: not JSON"),
    "config is a list": (lambda d: (d / "config.json").write_text("[]"), "expected an object, found list"),
    "another format": (edit_config(format="llama"), "expected format 'selfspan model' version 1"),
    "a later version": (edit_config(version=2), "expected format 'selfspan model' version 1"),
    "unknown key": (edit_config(model__dropout=0.1), "ModelConfig: unknown dropout; known are"),
    "missing key": (edit_config(model={"hidden_size": 8}), "ModelConfig: attention_memory, compute_dtype, .* missing"),
    "impossible shape": (edit_config(model__num_kv_heads=3), "num_kv_heads is 3; allowed: divisors"),
    "text for a number": (edit_config(model__num_layers="2"), "config.json"),
    "text for the vocabulary": (edit_config(vocab_size="20"), "vocab_size is '20', not a whole number"),
    "small vocabulary": (edit_config(vocab_size=12), "vocab_size is 12, but the structural tokens need ids up to 19"),
    "wider than the weights": (edit_config(model__intermediate_size=64), r"mlp\.\w+_proj.weight is \[.*48.*\], but the config asks for"),
    "deeper than the weights": (edit_config(model__num_layers=3), "9 tensors missing, model.layers.2"),
    "shallower than the weights": (edit_config(model__num_layers=1), "9 tensors that the config does not know, model.layers.1"),
    "a tensor lost": (edit_tensors(lambda t: t.pop("model.norm.weight")), "1 tensors missing, model.norm.weight"),
    "weights are text": (lambda d: (d / "model.safetensors").write_text("weights"), "not a safetensors file"),
    "weights cut short": (
        lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:-100]),
        "not a safetensors file",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_a_checkpoint_that_does_not_fit_itself_is_refused(saved, tmp_path, damage, message):
    directory = tmp_path / "model"
    shutil.copytree(saved, directory)
    damage(directory)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        models.load_model(directory)
    assert "\n" not in str(error.value)


def test_a_card_of_an_adapter_says_what_it_is_of_and_names_no_directory_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py", "finetune-lora", f"--run-dir={tmp_path}/run"])
    identity = {
        "training": {"steps": 2, "batch_size": 1, "sequence_tokens": 64},
        "base": {"name": "base.gguf", "sha256": "0"},
        "lora": {"rank": 2, "targets": ["down_proj"]},
        "data": str(tmp_path / "corpus"),
        "corpus": {"tokenizer": str(tmp_path / "tokenizer"), "num_labels": 4},
    }
    found = models.card("mine", random_model(), identity, {}, trained_on="papers", scored_on="", limits="")
    assert str(tmp_path) not in found
    stored = json.loads(found.partition("```json\n")[2].partition("```")[0])
    assert stored == identity | {"data": ".../corpus", "corpus": {"tokenizer": ".../tokenizer", "num_labels": 4}}
    assert ", or `adapter.json` of an adapter, has the architecture, `vocab.json.gz` the task" in found


def test_a_directory_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such checkpoint directory"):
        models.load_model(tmp_path / "nothing")
