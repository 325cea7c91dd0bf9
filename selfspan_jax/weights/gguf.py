"""GGUF files: opened as a source of a pretrained model. Tensors are dequantized when they are read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from selfspan_jax.errors import UserError
from selfspan_jax.weights.huggingface import Source
from selfspan_jax.weights.models import Tensors

if TYPE_CHECKING:
    from gguf import GGUFReader
    from transformers import PreTrainedTokenizerBase

_REQUIRED = {  # fields of a Hugging Face config, and the metadata that they are read from
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}
_OPTIONAL = {"num_key_value_heads": "attention.head_count_kv", "head_dim": "attention.key_length", "rope_theta": "rope.freq_base"}
# Settings of scaled rotary positions, with the values that scale nothing; two more only describe how a scaled model came about.
_UNSCALED = {"type": ("none", ""), "factor": (0.0, 1.0), "attn_factor": (0.0, 1.0), "scale_linear": (0.0, 1.0)}
_DESCRIBING = ("original_context_length", "finetuned")
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
_CONTROL, _USER_DEFINED = 3, 4  # types of tokens that are not text, and of those that are never cut
_ENDS = ("eos", "eot", "eom")  # ends of a text, of a turn and of a message: llama.cpp stops at each


def open_source(path: Path) -> Source:
    """Open a GGUF file.

    Raises:
      FileNotFoundError: no such file.
      UserError: a malformed file, or an architecture that the decoder does not have.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        reader = _reader(path)
    except (ValueError, LookupError, TypeError, OverflowError) as error:
        raise UserError(f"{path}: not a GGUF file, or a damaged one ({' '.join(str(error).split())})") from error
    fields = _hugging_face_fields(path, reader)
    ends = (_value(reader, f"tokenizer.ggml.{name}_token_id") for name in _ENDS)
    return Source.of(fields, _tensors(path, reader, fields), lambda: _tokenizer(path, reader), [end for end in ends if end is not None])


def _reader(path: Path) -> GGUFReader:
    from gguf import GGUFReader  # only needed for these files

    class Reader(GGUFReader):
        """One whose bytes are a plain array: it makes a view for each token and merge, of a memory map in three times the time."""

        @property
        def data(self) -> Any:
            return self._data

        @data.setter
        def data(self, mapped: Any) -> None:
            self._data, self.filename = np.asarray(mapped), mapped.filename

    return Reader(path)


def is_gguf(path: Path) -> bool:
    """Return whether this is a GGUF file, by its name or its first bytes."""
    if path.suffix.lower() == ".gguf" or not path.is_file():
        return path.suffix.lower() == ".gguf"
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def _value(reader: GGUFReader, key: str, default: Any = None) -> Any:
    """Read a value of the metadata. Raises UserError for one that cannot be decoded."""
    field = reader.get_field(key)
    try:
        value = default if field is None else field.contents()
    except (ValueError, LookupError, TypeError, OverflowError) as error:
        raise UserError(f"{reader.filename}: {key} cannot be read ({error})") from error  # type: ignore[attr-defined]
    # The shortest number that the file's float32 stands for: 1e-05, not 9.999999747378752e-06.
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _hugging_face_fields(path: Path, reader: GGUFReader) -> dict[str, Any]:
    """Convert the metadata to the fields of a Hugging Face config."""
    if (kind := _value(reader, "general.architecture")) != "llama":
        raise UserError(f"{path}: architecture is {kind!r}; known is llama")
    for key in reader.fields:
        name = key.removeprefix("llama.rope.").removeprefix("scaling.")
        if "rope.scal" in key and name not in _DESCRIBING and (value := _value(reader, key)) not in _UNSCALED.get(name, ()):
            raise UserError(f"{path}: rope scaling: {key} is {value!r}; known from GGUF are unscaled rotary positions")
    shapes = {tensor.name: tensor.shape for tensor in reader.tensors}
    if "rope_freqs.weight" in shapes:
        raise UserError(f"{path}: has scaled rotary frequencies, which are known from Hugging Face directories only")
    fields = {theirs: _value(reader, f"llama.{name}") for theirs, name in (_REQUIRED | _OPTIONAL).items()}
    for theirs, name in (_REQUIRED | _OPTIONAL).items():
        if (value := fields[theirs]) is None and theirs in _REQUIRED:
            raise UserError(f"{path}: llama.{name} is missing")
        if value is not None and type(value) not in (int, float):
            raise UserError(f"{path}: llama.{name} is {type(value).__name__}; expected a number")
    turned, fields["head_dim"] = _value(reader, "llama.rope.dimension_count"), fields["head_dim"]
    if fields["head_dim"] is None:
        fields["head_dim"] = turned
    for name, other in {"rope.dimension_count": turned, "attention.value_length": _value(reader, "llama.attention.value_length")}.items():
        if other not in (None, fields["head_dim"]):
            raise UserError(f"{path}: llama.{name} is {other}; known is the head size, {fields['head_dim']}")
    if "token_embd.weight" not in shapes:
        raise UserError(f"{path}: token_embd.weight is missing")
    tied = "output.weight" not in shapes
    return fields | {"model_type": "llama", "vocab_size": int(shapes["token_embd.weight"][1]), "tie_word_embeddings": tied}


def _llama_name(name: str) -> str:
    """Convert a name such as `blk.0.attn_q.weight`."""
    renamed = re.sub(r"\w+(?=\.\w+$)", lambda part: _NAMES.get(part[0], part[0]), name)
    return re.sub(r"^blk\.", "model.layers.", renamed)


def _tensors(path: Path, reader: GGUFReader, fields: dict[str, Any]) -> Tensors:
    from gguf.quants import dequantize

    tensors = {_llama_name(tensor.name): tensor for tensor in reader.tensors}
    kv_heads = fields["num_key_value_heads"] or fields["num_attention_heads"]

    def read(name: str) -> Array:
        try:
            array = dequantize(tensors[name].data, tensors[name].tensor_type)
        except NotImplementedError as error:
            raise UserError(f"{path}: {name} is stored as {tensors[name].tensor_type.name}, which the package gguf cannot read") from error
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            # GGUF stores the two of a rotary pair next to each other; here they are H / 2 apart.
            heads = kv_heads if "k_proj" in name else fields["num_attention_heads"]
            array = array.reshape(heads, -1, 2, array.shape[-1]).swapaxes(1, 2).reshape(array.shape)
        return jnp.asarray(array)

    shapes = {name: tuple(int(n) for n in reversed(tensor.shape)) for name, tensor in tensors.items()}
    return Tensors(path, shapes, read, {name: tensor.tensor_type.name for name, tensor in tensors.items()})


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
    spelling, merges = value("tokens"), value("merges")
    for name, found in {"tokens": spelling, "merges": merges}.items():
        if not isinstance(found, list):
            raise UserError(f"{path}: tokenizer.ggml.{name} is missing")
    tokens = _spelled(spelling)
    vocab = {token: i for i, token in enumerate(tokens)}
    try:
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[tuple(merge.split(" ", 1)) for merge in merges]))
    except Exception as error:  # that is what the library raises
        raise UserError(f"{path}: its tokens and merges do not fit ({' '.join(str(error).split())})") from error
    digits = [pre_tokenizers.Digits(individual_digits=True)] if _SPLITS_DIGITS[cut] else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    # As transformers: a token that is not written in the alphabet of bytes was marked by mistake.
    kinds = [(token, kind) for token, raw, kind in zip(tokens, spelling, value("token_type", [])) if token == raw]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token, kind in kinds if kind == _CONTROL])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token, kind in kinds if kind == _USER_DEFINED])

    def token(name: str) -> str | None:
        if (index := value(f"{name}_token_id")) is None:
            return None
        if not 0 <= index < len(tokens):
            raise UserError(f"{path}: tokenizer.ggml.{name}_token_id is {index}, but there are {len(tokens):,} tokens")
        return tokens[index]

    ends = {name: bool(value(name, False)) for name in ("add_bos_token", "add_eos_token")}
    names = {"bos_token": token("bos"), "eos_token": token("eos"), "pad_token": token("padding"), "unk_token": token("unknown")}
    chat = _value(reader, "tokenizer.chat_template")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=chat, **names, **ends)


def _spelled(tokens: list[str]) -> list[str]:
    """Write tokens in the alphabet of byte-level tokenizers, in which most files have them already."""
    from tokenizers import pre_tokenizers

    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = set(level.alphabet())
    return [token if alphabet.issuperset(token) else "".join(part for part, _ in level.pre_tokenize_str(token)) for token in tokens]
