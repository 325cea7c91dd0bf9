"""GGUF files: opened as a source of a pretrained model. Tensors are dequantized when they are read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
from jaxtyping import Array

from selfspan_jax.errors import UserError
from selfspan_jax.weights.huggingface import Source
from selfspan_jax.weights.models import Tensors

if TYPE_CHECKING:
    from gguf import GGUFReader
    from transformers import PreTrainedTokenizerBase

_FIELDS = {  # of a Hugging Face config, and the metadata that they are read from
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
}
_NAMES = {  # of parts of the model
    "token_embd": "model.embed_tokens",
    "output": "lm_head",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Whether digits are split before byte-pair encoding, by the GGUF's name for the pre-tokenizer.
_SPLITS_DIGITS = {"smollm": True, "gpt-2": False, "default": False}
_CONTROL = 3  # type of tokens that are not text


def open_source(path: Path) -> Source:
    """Open a GGUF file.

    Raises:
      FileNotFoundError: no such file.
      UserError: a malformed file, or an architecture that the decoder does not have.
    """
    from gguf import GGUFReader  # only needed for these files

    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        reader = GGUFReader(path)
    except (ValueError, IndexError, KeyError) as error:
        raise UserError(f"{path}: not a GGUF file ({error})") from error
    fields = _hugging_face_fields(path, reader)
    return Source.of(fields, _tensors(path, reader, fields), lambda: _tokenizer(path, reader))


def _value(reader: GGUFReader, key: str, default: Any = None) -> Any:
    field = reader.get_field(key)
    return default if field is None else field.contents()


def _hugging_face_fields(path: Path, reader: GGUFReader) -> dict[str, Any]:
    """Convert the metadata to the fields of a Hugging Face config."""
    if (kind := _value(reader, "general.architecture")) != "llama":
        raise UserError(f"{path}: architecture is {kind!r}; known is llama")
    if (scaling := _value(reader, "llama.rope.scaling.type", "none")) != "none":
        raise UserError(f"{path}: rope scaling is of type {scaling!r}; known from GGUF is none")
    shapes = {tensor.name: tensor.shape for tensor in reader.tensors}
    if "rope_freqs.weight" in shapes:
        raise UserError(f"{path}: has scaled rotary frequencies, which are known from Hugging Face directories only")
    fields = {theirs: _value(reader, f"llama.{name}") for theirs, name in _FIELDS.items()}
    fields["head_dim"] = fields["head_dim"] or _value(reader, "llama.rope.dimension_count")
    return fields | {"model_type": "llama", "vocab_size": int(shapes["token_embd.weight"][1]) if "token_embd.weight" in shapes else 0}


def _llama_name(name: str) -> str:
    """Convert a name such as `blk.0.attn_q.weight`."""
    renamed = re.sub(r"\w+(?=\.\w+$)", lambda part: _NAMES.get(part[0], part[0]), name)
    return re.sub(r"^blk\.", "model.layers.", renamed)


def _tensors(path: Path, reader: GGUFReader, fields: dict[str, Any]) -> Tensors:
    from gguf.quants import dequantize

    tensors = {_llama_name(tensor.name): tensor for tensor in reader.tensors}
    kv_heads = fields["num_key_value_heads"] or fields["num_attention_heads"]

    def read(name: str) -> Array:
        array = dequantize(tensors[name].data, tensors[name].tensor_type)
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            # GGUF stores the two of a rotary pair next to each other; here they are H / 2 apart.
            heads = kv_heads if "k_proj" in name else fields["num_attention_heads"]
            array = array.reshape(heads, -1, 2, array.shape[-1]).swapaxes(1, 2).reshape(array.shape)
        return jnp.asarray(array)

    return Tensors(path, {name: tuple(int(n) for n in reversed(tensor.shape)) for name, tensor in tensors.items()}, read)


def _tokenizer(path: Path, reader: GGUFReader) -> PreTrainedTokenizerBase:
    """Build the tokenizer from the file's tokens and merges."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    def value(key: str, default: Any = None) -> Any:
        return _value(reader, f"tokenizer.ggml.{key}", default)

    if (kind := value("model")) != "gpt2":
        raise UserError(f"{path}: the tokenizer is of type {kind!r}; known is gpt2 (byte-pair encoding)")
    if (cut := value("pre", "default")) not in _SPLITS_DIGITS:
        raise UserError(f"{path}: the tokenizer cuts text as {cut!r}; known are {', '.join(_SPLITS_DIGITS)}")
    tokens, merges = value("tokens"), [tuple(merge.split(" ", 1)) for merge in value("merges")]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    digits = [pre_tokenizers.Digits(individual_digits=True)] if _SPLITS_DIGITS[cut] else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t, type in zip(tokens, value("token_type", [])) if type == _CONTROL])

    def token(name: str) -> str | None:
        return None if (index := value(f"{name}_token_id")) is None else tokens[index]

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=token("bos"), eos_token=token("eos"), pad_token=token("padding"), unk_token=token("unknown")
    )
