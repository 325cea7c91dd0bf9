"""Finished models: what is written is what is read, in Llama's names, and what does not fit is refused in one line."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.flax
from flax import nnx
from safetensors.numpy import load_file, save_file

from selfspan_jax.attention.sequences import attend_under
from selfspan_jax.weights import checkpoints as checkpoint
from tests.selfspan_jax.models import random_model

TASK = {"task": "test", "version": 1}


def leaves(model):
    return jax.tree.leaves(nnx.state(model, nnx.Param))


@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_a_float32_model_comes_back_bit_for_bit(tmp_path, tie_embeddings):
    model = random_model(tie_embeddings=tie_embeddings)
    checkpoint.save_model(tmp_path / "model", model, TASK, "# card\n")
    loaded, task = checkpoint.load_model(tmp_path / "model")
    assert (loaded.config, loaded.vocab, loaded.vocab_size, task) == (model.config, model.vocab, model.vocab_size, TASK)
    for expected, found in zip(leaves(model), leaves(loaded), strict=True):
        np.testing.assert_array_equal(expected, found)
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["README.md", "config.json", "model.safetensors", "vocab.json"]


def test_a_bfloat16_model_is_stored_in_half_the_bytes_and_computes_the_same(tmp_path):
    model = random_model(compute_dtype="bfloat16")
    checkpoint.save_model(tmp_path / "model", model, TASK, "")
    loaded, _ = checkpoint.load_model(tmp_path / "model")
    assert (tmp_path / "model" / "model.safetensors").stat().st_size < 2 * model.num_parameters + 4096
    ids = np.arange(4, 12, dtype=np.int32)[None]
    attend = attend_under(np.tri(8, dtype=bool)[None])
    for expected, found in zip(model(ids, ids, attend)[0], loaded(ids, ids, attend)[0], strict=True):
        np.testing.assert_array_equal(np.asarray(expected, np.float32), np.asarray(found, np.float32))


def test_names_and_layout_are_llamas(tmp_path):
    model = random_model(tie_embeddings=False)
    checkpoint.save_model(tmp_path / "model", model, TASK, "")
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
        checkpoint.save_model(tmp_path / "model", random_model(), TASK, "")
    assert not list((tmp_path / "model").iterdir())


def test_a_failed_write_leaves_nothing(tmp_path):
    with pytest.raises(TypeError):
        checkpoint.save_model(tmp_path / "model", random_model(), {"task": object()}, "")
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoint") / "model"
    checkpoint.save_model(directory, random_model(), TASK, "")
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
    "missing key": (edit_config(model={"hidden_size": 8}), "ModelConfig: compute_dtype, .* missing"),
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
        checkpoint.load_model(directory)
    assert "\n" not in str(error.value)


def test_a_directory_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such checkpoint directory"):
        checkpoint.load_model(tmp_path / "nothing")


# --- exports


def training_state(numbers):
    """What a state looks like: parameters, Adam's moments by their names, counts and something else."""
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(2, numbers)).astype(np.float32)
    first = (rng.normal(size=(2, numbers)) * 10.0 ** rng.uniform(-12, 2, (2, numbers))).astype(np.float32)
    return {
        "params": {"w": jnp.asarray(weights)},
        "opt_state": ({"mu": {"w": jnp.asarray(first)}, "nu": {"w": jnp.asarray(first**2)}, "count": jnp.int32(7)}, jnp.float32(0.1)),
        "step": jnp.int32(7),
    }


def assert_same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("numbers", [1, 128, 300])
def test_an_export_is_read_as_the_state_that_its_writer_goes_on_from(tmp_path, numbers):
    state = training_state(numbers)
    rounded = checkpoint.save_export(tmp_path / "export", state, 7, 99)
    loaded, next_example = checkpoint.load_export(tmp_path / "export", jax.tree.map(jnp.zeros_like, state))
    assert next_example == 99
    assert_same(loaded, rounded)
    assert_same(rounded["params"]["w"], state["params"]["w"].astype(jnp.bfloat16).astype(jnp.float32))
    assert_same((rounded["step"], rounded["opt_state"][1]), (state["step"], state["opt_state"][1]))
    flat = {name: np.asarray(state["opt_state"][0][name]["w"], np.float64).reshape(-1) for name in ("mu", "nu")}
    found = {name: np.asarray(rounded["opt_state"][0][name]["w"], np.float64).reshape(-1) for name in ("mu", "nu")}
    for begin in range(0, 2 * numbers, 256):
        block = slice(begin, begin + 256)
        largest = {name: np.abs(values[block]).max() for name, values in flat.items()}
        assert np.abs(found["mu"][block] - flat["mu"][block]).max() <= largest["mu"] / 254 * 1.001
        inside = flat["nu"][block] >= largest["nu"] * 2.0**-31.7
        ratio = found["nu"][block] / flat["nu"][block]
        assert np.abs(np.log2(ratio[inside])).max() <= 1 / 16 + 1e-4
        assert (ratio[~inside] >= 1).all()  # rounded up: too small a step, never too large a one


def test_zeros_and_the_second_export_of_a_state(tmp_path):
    """A first state has moments of 0; what was rounded once does not move again."""
    state = jax.tree.map(jnp.zeros_like, training_state(300))
    assert_same(checkpoint.save_export(tmp_path / "zeros", state, 0, 0), state)
    once = checkpoint.save_export(tmp_path / "export", training_state(300), 7, 99)
    assert_same(checkpoint.save_export(tmp_path / "export", once, 7, 99), once)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export", "zeros"]
    checkpoint.save_export(tmp_path / "export", once, 7, (99, 0, 12))
    assert checkpoint.load_export(tmp_path / "export", once)[1] == [99, 0, 12]


def test_parts_are_small_and_all_needed(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "_PART_BYTES", checkpoint._HEADER_BYTES + 1300)
    state = training_state(300)
    (tmp_path / "log").write_text("words")
    rounded = checkpoint.save_export(tmp_path / "export", state, 7, 99, [tmp_path / "log"])
    files = sorted(path.name for path in (tmp_path / "export").iterdir())
    assert files == ["log", *(f"part-{i:02d}.safetensors" for i in range(2)), "state.json"]
    assert_same(checkpoint.load_export(tmp_path / "export", state)[0], rounded)
    (tmp_path / "export" / "part-01.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"part-01\.safetensors: missing; the export has 2 parts"):
        checkpoint.load_export(tmp_path / "export", state)


@pytest.mark.parametrize("room", [1200, 602], ids=["a part is just too small", "no more than a row"])
def test_arrays_that_are_larger_than_a_part_are_cut_by_rows(tmp_path, monkeypatch, room):
    """Parameters of 2 x 301 take 1,204 bytes, moments 602 and 12 of scales."""
    monkeypatch.setattr(checkpoint, "_PART_BYTES", checkpoint._HEADER_BYTES + room)
    state = training_state(301)
    rounded = checkpoint.save_export(tmp_path / "export", state, 7, 99)
    assert_same(checkpoint.load_export(tmp_path / "export", state)[0], rounded)
    assert_same(rounded["params"]["w"], state["params"]["w"].astype(jnp.bfloat16).astype(jnp.float32))
    parts = sorted((tmp_path / "export").glob("part-*"))
    held = {part: safetensors.flax.load_file(part) for part in parts}
    assert all(sum(array.nbytes for array in arrays.values()) <= room for arrays in held.values())
    (lost,) = (part for part, arrays in held.items() if "params/w:value#1" in arrays)
    safetensors.flax.save_file({name: array for name, array in held[lost].items() if name != "params/w:value#1"}, lost)
    with pytest.raises(ValueError, match=r"params/w:value is bfloat16\[1, 301\], expected bfloat16\[2, 301\]"):
        checkpoint.load_export(tmp_path / "export", state)


def test_a_row_that_is_larger_than_a_part_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "_PART_BYTES", checkpoint._HEADER_BYTES + 600)
    with pytest.raises(ValueError, match=r"^params/w:value: a row takes 602 bytes; a part of an export has 600$"):
        checkpoint.save_export(tmp_path / "export", training_state(301), 7, 99)
    assert not (tmp_path / "export").exists()


def test_exports_that_do_not_fit(tmp_path):
    state = training_state(8)
    with pytest.raises(FileNotFoundError, match=r"not an export of a training state"):
        checkpoint.load_export(tmp_path, state)
    checkpoint.save_export(tmp_path / "export", state, 7, 99)
    with pytest.raises(ValueError, match=r"opt_state/0/mu/w:codes is int8\[2, 8\], expected int8\[2, 9\]"):
        checkpoint.load_export(tmp_path / "export", training_state(9))
    with pytest.raises(ValueError, match=r"params/b:value is missing"):
        checkpoint.load_export(tmp_path / "export", {**state, "params": {**state["params"], "b": jnp.zeros(3)}})
    with pytest.raises(ValueError, match=r"step:value is not of this run"):
        checkpoint.load_export(tmp_path / "export", {name: value for name, value in state.items() if name != "step"})
    fields = json.loads((tmp_path / "export" / "state.json").read_text())
    for change in ({"version": 2}, {"parts": -1}, {"next_example": "1"}, {"next_example": []}, {"next_example": [1, -1]}, {"more": 1}):
        (tmp_path / "export" / "state.json").write_text(json.dumps({**fields, **change}))
        with pytest.raises(ValueError, match=r"state\.json: "):
            checkpoint.load_export(tmp_path / "export", state)
    (tmp_path / "export" / "state.json").write_text(json.dumps(fields))
    (tmp_path / "export" / "part-00.safetensors").write_bytes(b"not tensors")
    with pytest.raises(ValueError, match=r"not a safetensors file"):
        checkpoint.load_export(tmp_path / "export", state)
