"""Tiny pretrained models as others write them: Hugging Face directories by `transformers`' own classes, GGUF files by the package gguf."""

import json
from pathlib import Path

import gguf
import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SIZES = dict(hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
WORDS = ["<|end|>", *ALPHABET, "th", "the", "Ġthe"]  # `<|end|>` ends a text
MERGES = [("t", "h"), ("th", "e"), ("Ġ", "the")]


def tokenizer(words=WORDS, *, vocab=None, **special) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer. `vocab`: other ids than those in order."""
    core = Tokenizer(models.BPE(vocab=vocab or {word: i for i, word in enumerate(words)}, merges=MERGES))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, **{"eos_token": "<|end|>", **special})


def tensors(rows: int, *, head: bool = True, seed: int = 0, dtype=np.float32) -> dict[str, np.ndarray]:
    """The tensors of a Llama of these sizes, under its names; norms are not ones, so that each matters."""
    rng = np.random.default_rng(seed)
    shapes = {"model.embed_tokens.weight": (rows, 32), "model.norm.weight": (32,)} | ({"lm_head.weight": (rows, 32)} if head else {})
    for layer in ("model.layers.0.", "model.layers.1."):
        shapes |= {f"{layer}self_attn.{name}_proj.weight": (16 if name in "kv" else 32, 32) for name in "qkvo"}
        shapes |= {f"{layer}mlp.{name}_proj.weight": (32, 40) if name == "down" else (40, 32) for name in ("gate", "up", "down")}
        shapes |= {f"{layer}{name}_layernorm.weight": (32,) for name in ("input", "post_attention")}
    return {name: rng.normal(0, 0.3, shape).astype(dtype) for name, shape in shapes.items()}


def directory(path: Path, *, rows: int = 320, words=None, arrays=None, **fields) -> Path:
    """Write a Hugging Face directory; `fields` of its config in place of the usual, None for none."""
    path.mkdir()
    arrays = tensors(rows) if arrays is None else arrays
    save_file(arrays, path / "model.safetensors", {"format": "pt"})
    config = dict(model_type="llama", architectures=["LlamaForCausalLM"], vocab_size=rows, max_position_embeddings=64, rms_norm_eps=1e-5)
    config |= {**SIZES, "rope_theta": 10000.0, "dtype": "float32", "eos_token_id": 0, **fields}
    (path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    (words or tokenizer()).save_pretrained(path)
    return path


_GGUF_NAMES = {
    **{"model.embed_tokens": "token_embd", "lm_head": "output", "model.norm": "output_norm", "input_layernorm": "attn_norm"},
    **{"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output"},
    **{"post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"},
    "model.layers": "blk",
}


def gguf_file(path: Path, arrays: dict[str, np.ndarray], *, words=WORDS, types=None, without=(), **more) -> Path:
    """Write a GGUF file of the same model; `more` are metadata under their keys with `__` for dots, `without` keys to leave out."""
    metadata = {
        **{"llama.embedding_length": 32, "llama.feed_forward_length": 40, "llama.block_count": 2, "llama.context_length": 64},
        **{"llama.attention.head_count": 4, "llama.attention.head_count_kv": 2, "llama.attention.layer_norm_rms_epsilon": 1e-5},
        **{
            "llama.rope.freq_base": 10000.0,
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "gpt-2",
            "tokenizer.ggml.eos_token_id": 0,
        },
        **{key.replace("__", "."): value for key, value in more.items()},
    }
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_token_list(words)
    writer.add_token_merges([" ".join(pair) for pair in MERGES])
    writer.add_token_types(types or [3 if word == "<|end|>" else 1 for word in words])
    for key, value in metadata.items():
        if key not in without:
            add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
            add.get(type(value), writer.add_array)(key, value)
    for name, array in arrays.items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):  # GGUF has the two of a rotary pair next to each other
            heads = 4 if "q_proj" in name else 2
            array = array.reshape(heads, 2, -1, array.shape[-1]).swapaxes(1, 2).reshape(array.shape)
        for theirs, ours in _GGUF_NAMES.items():
            name = name.replace(theirs, ours)
        writer.add_tensor(name, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
